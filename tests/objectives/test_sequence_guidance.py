"""Guidance against exact conditionals and the mean-field optimum of the enumerable problem."""

from itertools import permutations

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
    conditionals,
    index_of,
    path_kl,
    subs,
)
from table_policies import denoiser, gumbel, noise, start
from torch import Tensor

from diffdiv.core import masking
from diffdiv.objectives import rollout
from diffdiv.objectives import sequence_guidance as guidance

ONE_LEFT = MASKED.sum(1) == 1


@pytest.fixture(scope="module")
def instance() -> Instance:
    return Instance()


def tilted_at_one_left(instance: Instance, alpha: float) -> Tensor:
    """p exp(r / alpha), normalised, at the masked place of the states with one left."""
    states = STATES[ONE_LEFT]
    place = (states == MASK).nonzero()[:, 1]
    filled = torch.where(
        (states == MASK)[:, None], torch.arange(TOKENS)[None, :, None], states[:, None]
    )
    base = TOKENS ** torch.arange(LENGTH - 1, -1, -1)
    reward = instance.reward[(filled * base).sum(-1)]
    log_p = instance.reference[ONE_LEFT][torch.arange(len(states)), place]
    return torch.log_softmax(log_p + reward / alpha, -1)


def at_one_left(phi: Tensor) -> Tensor:
    place = (STATES[ONE_LEFT] == MASK).nonzero()[:, 1]
    return phi[ONE_LEFT][torch.arange(int(ONE_LEFT.sum())), place]


# -- guidance by gradients of the reward -------------------------------------------------------


def test_guidance_is_exact_for_an_additive_reward(instance):
    """r = sum of w[i, k] over the tokens: the tilted conditional is p exp(w / alpha), normalised,
    for one masked position; revealed ones are kept."""
    weights = torch.randn(LENGTH, TOKENS, generator=torch.Generator().manual_seed(0)).double()
    reference = denoiser(instance.reference_net())
    guided = guidance.guided_log_probs(reference, lambda x: (x * weights).sum((1, 2)), 0.7)(STATES)
    expected = torch.log_softmax(instance.reference + weights / 0.7, -1)
    torch.testing.assert_close(guided[MASKED], expected[MASKED])
    assert torch.equal(guided.argmax(-1)[~MASKED], STATES[~MASKED])
    assert not guided.requires_grad


def test_guidance_feeds_probabilities(instance):
    seen = []

    def reward(x):
        seen.append(x.detach())
        return x.sum((1, 2))

    guidance.guided_log_probs(denoiser(instance.reference_net()), reward, 1.0)(STATES)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(len(STATES), LENGTH).double())
    assert float(seen[0].min()) >= 0


# -- without a classifier ----------------------------------------------------------------------


def class_law(instance: Instance) -> tuple[Tensor, Tensor]:
    """(log p(y | x), log p(x | y)) of the 256 sequences, for a class that depends on all places."""
    log_class = torch.nn.functional.logsigmoid(instance.reward)
    joint = instance.log_law + log_class
    return log_class, joint - torch.logsumexp(joint, 0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_one_position_follows_the_power_of_the_class(instance, scale):
    """p(x) p(y|x)^w at the last position, whatever w; that of probabilities, not of their logs."""
    log_class, of_class = class_law(instance)
    log_p = masking.subs_log_probs(instance.reference, STATES, TOKENS)
    log_c = masking.subs_log_probs(conditionals(of_class).clamp_min(-30), STATES, TOKENS)
    phi = guidance.classifier_free_guidance(log_c, log_p, scale)
    torch.testing.assert_close(
        phi.logsumexp(-1), torch.zeros(len(STATES), LENGTH).double(), rtol=0, atol=1e-9
    )
    powered = Instance()
    powered.reward = log_class
    expected = tilted_at_one_left(powered, 1 / scale) if scale else at_one_left(log_p)
    torch.testing.assert_close(at_one_left(phi), expected)
    assert torch.equal(phi.argmax(-1)[~MASKED], STATES[~MASKED])


def one_at_a_time(table: Tensor) -> Tensor:
    """Law of the 256 sequences in continuous time: the mean over the 24 orders of chain rules."""
    law, x = torch.zeros(256, dtype=torch.float64), STATES[CLEAN]
    for order in permutations(range(LENGTH)):
        state, log_p = start(256), torch.zeros(256, dtype=torch.float64)
        for place in order:
            log_p = log_p + table[index_of(state), place, x[:, place]]
            state = state.index_copy(1, torch.tensor([place]), x[:, [place]])
        law += log_p.exp() / 24
    return law


def test_law_of_whole_sequences_without_a_classifier(instance):
    """w = 1 samples the class exactly; w = 3 does not sample p p(y|x)^3, as every step looks one
    token ahead only."""
    log_class, of_class = class_law(instance)
    log_p, log_c = (conditionals(law).clamp_min(-30) for law in (instance.log_law, of_class))
    gaps = {}
    for scale in (1.0, 3.0):
        law = one_at_a_time(guidance.classifier_free_guidance(log_c, log_p, scale))
        tilted = torch.softmax(instance.log_law + scale * log_class, 0)
        gaps[scale] = float(0.5 * (law - tilted).abs().sum())
    assert gaps[1.0] < 1e-9 and gaps[3.0] > 0.01


# -- correction of logits ----------------------------------------------------------------------


def samples(size: int, seed: int) -> guidance.SampleNoise:
    return lambda update: gumbel(size, len(STATES), LENGTH, TOKENS, seed=100 * seed + update)


@pytest.mark.parametrize("num_updates", [1, 3])
def test_correction_is_exact_where_one_position_is_left(instance, num_updates):
    """The reward is linear there: any sample has the whole gradient."""
    log_p = masking.subs_log_probs(instance.reference, STATES, TOKENS)
    slope = guidance.gradient_slope(instance.reward_of, samples(1, 0))
    phi = guidance.corrected_log_probs(log_p, slope, alpha=0.5, num_updates=num_updates)
    torch.testing.assert_close(at_one_left(phi), tilted_at_one_left(instance, 0.5))
    assert torch.equal(phi.argmax(-1)[~MASKED], STATES[~MASKED])
    assert float(phi[~MASKED].amax(-1).abs().max()) < 1e-9


def mean_field(instance: Instance, state: Tensor, alpha: float) -> Tensor:
    """Coordinate ascent of E[r] - alpha KL(product || reference) at one state [L, V]."""
    log_p = masking.subs_log_probs(instance.reference[index_of(state)][None], state[None], TOKENS)
    q, table = log_p[0].exp(), instance.reward.view(TOKENS, TOKENS, TOKENS, TOKENS)
    for _ in range(200):
        for i in range(LENGTH):
            others = table.movedim(i, 0)
            for j in [j for j in range(LENGTH) if j != i]:
                others = torch.tensordot(others, q[j], dims=([1], [0]))
            if state[i] == MASK:
                q[i] = torch.softmax(log_p[0, i] + others / alpha, -1)
    return q


@pytest.mark.parametrize("kind", ["gradient", "score"])
def test_correction_rests_at_the_mean_field_optimum(instance, kind):
    """All masked, 2,000 samples an update: within 0.02 of coordinate ascent by enumeration. The
    reward is multilinear, so both slopes are unbiased."""
    state, alpha, size = start(1)[0], 1.0, 2000
    log_p = masking.subs_log_probs(instance.reference[index_of(state)][None], state[None], TOKENS)

    def noises(update: int) -> Tensor:
        return gumbel(size, 1, LENGTH, TOKENS, seed=update)

    slope_of = guidance.gradient_slope if kind == "gradient" else guidance.score_slope
    phi = guidance.corrected_log_probs(
        log_p, slope_of(instance.reward_of, noises), alpha=alpha, num_updates=80, rate=0.1
    )
    expected = mean_field(instance, state, alpha)
    assert float((expected - log_p[0].exp()).abs().max()) > 0.2  # it had some way to go
    assert float((phi[0].exp() - expected).abs().max()) < 0.02


def test_slope_from_rewards_alone_is_that_of_the_gradient(instance):
    """At one state, 40,000 samples: differences between tokens agree within 0.1."""
    phi = masking.subs_log_probs(instance.perturbed(0.5, 3)[-1][None], STATES[-1][None], TOKENS)
    slopes = [
        make(instance.reward_of, lambda update: gumbel(40_000, 1, LENGTH, TOKENS, seed=update))(
            phi, 0
        )
        for make in (guidance.gradient_slope, guidance.score_slope)
    ]
    centred = [s - (phi.exp() * s).sum(-1, keepdim=True) for s in slopes]
    torch.testing.assert_close(centred[0], centred[1], rtol=0, atol=0.1)


@pytest.mark.parametrize("wrong", [{"num_updates": 0}, {"rate": 0.0}, {"rate": 1.5}])
def test_corrections_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="num_updates, rate"):
        guidance.corrected_log_probs(torch.zeros(1, 1, 2), lambda p, u: p, alpha=1.0, **wrong)


# -- rollouts ----------------------------------------------------------------------------------


def test_guided_rollouts_know_their_path_kl(instance):
    """10,000 paths against transition matrices, four standard errors; 0 without guidance."""
    chain = masking.log_linear().chain(8)
    rhos = [chain.rho(k) for k in range(8)]
    reference = denoiser(instance.reference_net())
    other = subs(instance.perturbed(0.7, 1))

    def guide(x: Tensor, log_p: Tensor, step: int) -> Tensor:
        return masking.subs_log_probs(other[index_of(x)], x, TOKENS)

    paths, kl = guidance.guided_roll_out(guide, reference, chain, noise(10_000), start(10_000))
    exact = path_kl(other, subs(instance.reference), rhos)
    assert float(kl.mean()) == pytest.approx(exact, abs=4 * float(kl.std()) / 100)
    policy = denoiser(TableNet(instance.perturbed(0.7, 1)))
    same = rollout.roll_out(policy, chain, noise(10_000), start(10_000))
    assert torch.equal(paths.tokens, same.tokens)
    torch.testing.assert_close(paths.log_p, same.log_p)
    _, none = guidance.guided_roll_out(
        lambda x, log_p, step: log_p, reference, chain, noise(8), start(8)
    )
    assert torch.equal(none, torch.zeros(8).double())
