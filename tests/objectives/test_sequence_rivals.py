"""Rivals against the exact tilted law of the enumerable problem."""

import pytest
import torch
from enumerable_masked import (
    CLEAN,
    LENGTH,
    MASK,
    MASKED,
    STATES,
    TOKENS,
    Instance,
    TableNet,
    marginals,
    subs,
)

from diffdiv.core import masking
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives import sequence_rivals as rivals

CHAIN = masking.log_linear().chain(4)


def denoiser(net: TableNet) -> TokenDenoiser:
    return TokenDenoiser(net, lambda net, x: net(x), TOKENS)


@pytest.fixture(scope="module")
def instance() -> Instance:
    return Instance()


def noise(batch: int, seed: int) -> masking.Noise:
    def draw(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * seed + step)
        shape = (batch, LENGTH, TOKENS + 1)
        return masking.gumbel_from_normal(
            torch.randn(shape, generator=generator, dtype=torch.float64)
        )

    return draw


@pytest.mark.parametrize(("guided", "threshold"), [(False, 0.0), (False, 0.5), (True, 0.5)])
def test_particles_are_of_the_tilted_law(instance, guided, threshold):
    """Mean reward of 16 runs of 1,000 particles, within five standard errors over the runs."""
    reference, alpha = denoiser(instance.reference_net()), 1.0
    law = marginals(subs(instance.reference), [CHAIN.rho(k) for k in range(4)])[-1][CLEAN]
    tilted = torch.softmax(law.log() + instance.reward / alpha, 0)
    exact = float(tilted @ instance.reward)
    proposal = rivals.guided_log_probs(reference, instance.reward_of, 2.0) if guided else None
    start = torch.full((1000, LENGTH), MASK)
    means = []
    for seed in range(16):
        u = torch.rand(4, generator=torch.Generator().manual_seed(seed))
        tokens, log_weights = rivals.sequential_monte_carlo(
            reference, instance.reward_of, alpha, CHAIN, noise(1000, seed), u.__getitem__, start,
            proposal=proposal, threshold=threshold,
        )  # fmt: skip
        assert float(log_weights.exp().sum()) == pytest.approx(1)
        reward = instance.reward_of(torch.nn.functional.one_hot(tokens, TOKENS).double())
        means.append(float(log_weights.exp() @ reward))
    runs = torch.tensor(means, dtype=torch.float64)
    assert float(runs.mean()) == pytest.approx(exact, abs=5 * float(runs.std()) / 4)
    assert exact > float(law @ instance.reward) + 0.5  # the aim is far from where it starts


def test_guidance_is_exact_for_an_additive_reward(instance):
    """r = sum of w[i, k] over the tokens: the tilted conditional is p exp(w / alpha), normalised,
    for one masked position; revealed ones are kept."""
    weights = torch.randn(LENGTH, TOKENS, generator=torch.Generator().manual_seed(0)).double()
    reference = denoiser(instance.reference_net())
    guided = rivals.guided_log_probs(reference, lambda x: (x * weights).sum((1, 2)), 0.7)(STATES)
    expected = torch.log_softmax(instance.reference + weights / 0.7, -1)
    torch.testing.assert_close(guided[MASKED], expected[MASKED])
    assert torch.equal(guided.argmax(-1)[~MASKED], STATES[~MASKED])
    assert not guided.requires_grad


def test_guidance_feeds_probabilities(instance):
    seen = []

    def reward(x):
        seen.append(x.detach())
        return x.sum((1, 2))

    rivals.guided_log_probs(denoiser(instance.reference_net()), reward, 1.0)(STATES)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(len(STATES), LENGTH).double())
    assert float(seen[0].min()) >= 0


def test_resampling_keeps_each_particle_as_often_as_its_weight_says():
    weights = torch.tensor([0.05, 0.3, 0.15, 0.4, 0.1], dtype=torch.float64)
    totals = torch.zeros(5)
    for u in (torch.arange(1000) + 0.5) / 1000:
        counts = torch.bincount(rivals.systematic_resampling(weights.log(), u), minlength=5)
        assert bool(((counts - 5 * weights).abs() < 1).all())
        totals += counts
    torch.testing.assert_close(totals / 1000, (5 * weights).float(), atol=2e-3, rtol=0)


def test_best_of_each_group():
    reward = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0, -2.0])
    assert rivals.best_of_n(reward, 3).tolist() == [1, 3]
    assert rivals.best_of_n(reward, 1).tolist() == list(range(6))
    with pytest.raises(ValueError, match="groups of 4"):
        rivals.best_of_n(reward, 4)


def test_distillation_is_stationary_at_the_soft_optimal_step(instance):
    """One position left, old uniform (so that all tokens alike make the exact mean): the policy
    p exp(r / alpha), normalised, has no gradient; another one has."""
    alpha = 2.0
    before = STATES[MASKED.sum(1) == 1].repeat_interleave(TOKENS, 0)
    token = torch.arange(TOKENS).repeat(len(before) // TOKENS)[:, None]
    after = torch.where(before == MASK, token, before)
    old = denoiser(TableNet(torch.zeros(len(STATES), LENGTH, TOKENS).double()))
    old.net.requires_grad_(False)
    tilt = torch.zeros(len(STATES), LENGTH, TOKENS, dtype=torch.float64)
    place = (before == MASK).nonzero()[:, 1]
    from_state = (before * 5 ** torch.arange(3, -1, -1)).sum(1)
    reward = instance.reward_of(torch.nn.functional.one_hot(after, TOKENS).double())
    tilt[from_state, place, token[:, 0]] = reward / alpha
    for logits, still in ((tilt, True), (2 * tilt, False)):
        policy = denoiser(TableNet(logits))
        loss = rivals.soft_policy_distillation_loss(
            policy, old, instance.reward_of, before, after, alpha=alpha
        )
        loss.backward()
        largest = float(policy.net.logits.grad.abs().max())
        assert largest < 1e-8 if still else largest > 1e-3  # the values are float32
