"""Best of N and sequential Monte Carlo against the exact tilted law of the enumerable problem."""

from math import log

import pytest
import torch
from enumerable_masked import CLEAN, LENGTH, TOKENS, Instance, marginals, subs
from table_policies import denoiser, noise, start
from torch.nn.functional import one_hot

from diffdiv.core import masking
from diffdiv.objectives import particles
from diffdiv.objectives.sequence_guidance import guided_log_probs

CHAIN = masking.log_linear().chain(4)


@pytest.fixture(scope="module")
def instance() -> Instance:
    return Instance()


def reference_law(instance: Instance) -> torch.Tensor:
    """Of the 256 sequences, after the chain."""
    return marginals(subs(instance.reference), [CHAIN.rho(k) for k in range(4)])[-1][CLEAN]


def run(instance, alpha, seed, size, guided=False, threshold=0.5) -> particles.Particles:
    reference = denoiser(instance.reference_net())
    proposal = guided_log_probs(reference, instance.reward_of, 2.0) if guided else None
    u = torch.rand(4, generator=torch.Generator().manual_seed(seed))
    return particles.sequential_monte_carlo(
        reference, instance.reward_of, alpha, CHAIN, noise(size, seed), u.__getitem__, start(size),
        proposal=proposal, threshold=threshold,
    )  # fmt: skip


@pytest.mark.parametrize(("guided", "threshold"), [(False, 0.0), (False, 0.5), (True, 0.5)])
def test_particles_are_of_the_tilted_law(instance, guided, threshold):
    """Mean reward and estimate of Z of 16 runs of 1,000 particles, five standard errors."""
    law, alpha = reference_law(instance), 1.0
    tilted = torch.softmax(law.log() + instance.reward / alpha, 0)
    exact = float(tilted @ instance.reward)
    log_z = float(torch.logsumexp(law.log() + instance.reward / alpha, 0))
    means, normalisers = [], []
    for seed in range(16):
        found = run(instance, alpha, seed, 1000, guided, threshold)
        assert float(found.log_weights.exp().sum()) == pytest.approx(1)
        reward = instance.reward_of(one_hot(found.tokens, TOKENS).double())
        means.append(float(found.log_weights.exp() @ reward))
        normalisers.append(float((found.log_normaliser - log_z).exp()))
    for values, expected in ((means, exact), (normalisers, 1.0)):
        runs = torch.tensor(values, dtype=torch.float64)
        assert float(runs.mean()) == pytest.approx(expected, abs=5 * float(runs.std()) / 4)
    assert exact > float(law @ instance.reward) + 0.5  # the aim is far from where it starts


def drawn(instance: Instance, alpha: float, size: int, runs: int) -> tuple[torch.Tensor, list[int]]:
    """Bounds on the KL [runs], and one sequence of each run, drawn by weight, as its number."""
    generator, bounds, picked = torch.Generator().manual_seed(0), [], []
    places = TOKENS ** torch.arange(LENGTH - 1, -1, -1)
    for seed in range(runs):
        found = run(instance, alpha, seed, size)
        weights = found.log_weights.exp()
        reward = instance.reward_of(one_hot(found.tokens, TOKENS).double())
        bounds.append(weights @ reward / alpha - found.log_normaliser)
        one = int(torch.multinomial(weights, 1, generator=generator))
        picked.append(int((found.tokens[one] * places).sum()))
    return torch.stack(bounds), picked


def test_the_bound_on_the_kl_of_particles(instance):
    """500 runs of 3 particles: the law of one of them, as a histogram of 256 sequences, has a KL
    from the reference below the bound. 60 runs of 300: that of the tilted law, within 0.05 and
    five standard errors."""
    alpha, law = 0.7, reference_law(instance)
    bounds, picked = drawn(instance, alpha, 3, 500)
    share = torch.bincount(torch.tensor(picked), minlength=256).double() / 500
    kl = float((share * (share / law).log()).nan_to_num().sum())
    bias = 255 / (2 * 500)  # of the plug-in estimate, upwards, at most
    assert kl - bias < float(bounds.mean()) + 4 * float(bounds.std()) / 500**0.5
    tilted = torch.softmax(law.log() + instance.reward / alpha, 0)
    exact = float(tilted @ (tilted / law).log())
    bounds, _ = drawn(instance, alpha, 300, 60)
    assert float(bounds.mean()) == pytest.approx(
        exact, abs=0.05 + 5 * float(bounds.std()) / 60**0.5
    )


def test_resampling_keeps_each_particle_as_often_as_its_weight_says():
    weights = torch.tensor([0.05, 0.3, 0.15, 0.4, 0.1], dtype=torch.float64)
    totals = torch.zeros(5)
    for u in (torch.arange(1000) + 0.5) / 1000:
        counts = torch.bincount(particles.systematic_resampling(weights.log(), u), minlength=5)
        assert bool(((counts - 5 * weights).abs() < 1).all())
        totals += counts
    torch.testing.assert_close(totals / 1000, (5 * weights).float(), atol=2e-3, rtol=0)


def test_best_of_each_group():
    reward = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0, -2.0])
    assert particles.best_of_n(reward, 3).tolist() == [1, 3]
    assert particles.best_of_n(reward, 1).tolist() == list(range(6))
    with pytest.raises(ValueError, match="groups of 4"):
        particles.best_of_n(reward, 4)


def test_kl_of_the_best_of_n(instance):
    """Law of the best of N among sequences of different rewards: F^N - (F - p)^N, summed."""
    law, order = reference_law(instance), instance.reward.argsort()
    below = law[order].cumsum(0)
    for group in (1, 4, 16):
        best = below**group - (below - law[order]) ** group
        exact = float((best * (best / law[order]).log()).sum())
        bound = particles.best_of_n_kl(group)
        # a sequence drawn twice is a tie: with 256 of them the KL stays a little below
        assert 0.9 * bound - 1e-12 <= exact <= bound + 1e-12
    assert particles.best_of_n_kl(2) == pytest.approx(log(2) - 0.5)
