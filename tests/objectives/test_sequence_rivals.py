"""Rivals that train, each against what it should rest at in the enumerable problem."""

import pytest
import torch
from enumerable_masked import (
    CLEAN,
    LENGTH,
    MASK,
    MASKED,
    START,
    STATES,
    TOKENS,
    Instance,
    TableNet,
    index_of,
)
from table_policies import denoiser, gradient, gumbel, start
from torch import Tensor
from torch.nn.functional import one_hot

from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives import sequence_rivals as rivals

PLACES = TOKENS ** torch.arange(LENGTH - 1, -1, -1)


@pytest.fixture(scope="module")
def instance() -> Instance:
    return Instance()


def every_completion() -> tuple[Tensor, Tensor]:
    """States with one position masked, and each with each token there: [1024, L] twice."""
    before = STATES[MASKED.sum(1) == 1].repeat_interleave(TOKENS, 0)
    token = torch.arange(TOKENS).repeat(len(before) // TOKENS)[:, None]
    return before, torch.where(before == MASK, token, before)


def tilted_by(instance: Instance, base: Tensor, alpha: float) -> Tensor:
    """Logits: the base's plus r / alpha of the completed sequence, where one position is masked."""
    before, after = every_completion()
    rows, place = index_of(before), (before == MASK).nonzero()[:, 1]
    tilt = torch.zeros_like(base)
    token = after.gather(1, place[:, None])[:, 0]
    tilt[rows, place, token] = instance.reward[(after * PLACES).sum(1)] / alpha
    return base + tilt


# -- soft-optimal steps ------------------------------------------------------------------------


def test_distillation_is_stationary_at_the_soft_optimal_step(instance):
    """One position left, old uniform (so that all tokens alike make the exact mean): the policy
    p exp(r / alpha), normalised, has no gradient; another one has."""
    alpha, (before, after) = 2.0, every_completion()
    uniform = torch.zeros(len(STATES), LENGTH, TOKENS).double()
    old = denoiser(TableNet(uniform))
    old.net.requires_grad_(False)
    for power, still in ((1.0, True), (2.0, False)):
        policy = denoiser(TableNet(tilted_by(instance, uniform, alpha / power)))
        loss = rivals.soft_policy_distillation_loss(
            policy, old, instance.reward_of, before, after, alpha=alpha
        )
        largest = float(gradient(loss, policy).abs().max())
        assert largest < 1e-8 if still else largest > 1e-3  # the values are float32


# -- one-step likelihood -----------------------------------------------------------------------


def independent(logits: Tensor) -> TokenDenoiser:
    """A policy whose positions are independent: the same logits [L, V] at every state."""
    return denoiser(TableNet(logits.double().expand(len(STATES), -1, -1)))


def product_law(logits: Tensor) -> Tensor:
    """Probabilities of the 256 sequences under independent positions, differentiable."""
    log_p = torch.log_softmax(logits.double(), -1)
    return log_p[torch.arange(LENGTH), STATES[CLEAN]].sum(1).exp()


def one_step_gradient(
    instance: Instance, policy: TokenDenoiser, reference: TokenDenoiser, law: Tensor, beta: float
) -> Tensor:
    """Exact gradient of the loss under that law of samples, on policy, summed over positions."""
    tokens, begin = STATES[CLEAN], start(256)
    with torch.no_grad():
        old = rivals.one_step_log_probs(policy, tokens, begin)
        ref = rivals.one_step_log_probs(reference, tokens, begin)
    advantage = instance.reward - law @ instance.reward
    total = torch.zeros((), dtype=torch.float64)
    for row in range(256):
        part = slice(row, row + 1)
        loss = rivals.one_step_policy_loss(
            policy, tokens[part], begin[part], advantage[part],
            old_log_p=old[part], ref_log_p=ref[part], beta=beta,
        )  # fmt: skip
        total = total + law[row] * LENGTH * loss
    return gradient(total, policy).view(len(STATES), LENGTH, TOKENS)


def random_logits(seed: int) -> Tensor:
    return torch.randn(LENGTH, TOKENS, generator=torch.Generator().manual_seed(seed)).double()


def test_one_step_is_exact_for_independent_positions(instance):
    """There, and only there: the gradient of E[r] - beta KL(reference || policy), forward KL."""
    logits, ref = random_logits(0).requires_grad_(), random_logits(1)
    law, ref_law, beta = product_law(logits), product_law(ref), 0.3
    exact = law @ instance.reward - beta * (ref_law @ (ref_law / law).log())
    (expected,) = torch.autograd.grad(exact, logits)
    policy, reference = independent(logits.detach()), independent(ref)
    found = one_step_gradient(instance, policy, reference, law.detach(), beta)
    torch.testing.assert_close(-found[START], expected)


def test_one_step_teaches_nothing_beyond_the_first_state(instance):
    """Its bias: whatever goes together is learnt at states that it never looks at."""
    policy = denoiser(TableNet(instance.perturbed(0.7, 1)))
    reference = denoiser(instance.reference_net())
    found = one_step_gradient(instance, policy, reference, instance.log_law.exp(), 0.1)
    assert float(found[START].abs().max()) > 1e-2
    assert float(found[:START].abs().max()) == 0


def test_one_step_rests_where_the_forward_kl_puts_it(instance):
    """Additive reward: each position rests at beta p_ref / (beta + E[r] - r), not at exp(r)."""
    beta, weights, ref = 0.8, random_logits(2), random_logits(1)
    p_ref = torch.softmax(ref, -1)
    rest = torch.empty_like(p_ref)
    for i in range(LENGTH):
        low, high = float(weights[i].max()) - beta, float(weights[i].max())  # E[r] by bisection
        for _ in range(100):
            middle = (low + high) / 2
            share = beta * p_ref[i] / (beta + middle - weights[i]).clamp_min(1e-300)
            low, high = (middle, high) if float(share.sum()) > 1 else (low, middle)
        rest[i] = share
    additive = Instance()
    additive.reward = weights[torch.arange(LENGTH), STATES[CLEAN]].sum(1)
    policy, law = independent(rest.log()), product_law(rest.log())
    found = one_step_gradient(additive, policy, independent(ref), law, beta)
    assert float(found.abs().max()) < 1e-9
    assert float((rest - p_ref).abs().max()) > 0.1


def test_ratios_are_clipped(instance):
    """Where p / p_old is beyond the clip and the advantage asks for more, nothing is asked."""
    policy, tokens = independent(torch.zeros(LENGTH, TOKENS)), STATES[CLEAN][:8]
    now = rivals.one_step_log_probs(policy, tokens, start(8)).detach()
    for old, advantage, moves in ((now - 1, 1.0, False), (now - 1, -1.0, True), (now, 1.0, True)):
        loss = rivals.one_step_policy_loss(
            policy, tokens, start(8), torch.full((8,), advantage),
            old_log_p=old, ref_log_p=now, beta=0.0, clip=0.5,
        )  # fmt: skip
        assert bool(gradient(loss, policy).any()) is moves


def test_positions_that_were_given_do_not_count(instance):
    policy = denoiser(TableNet(instance.perturbed(0.7, 1)))
    tokens, begin = STATES[CLEAN][:4], STATES[CLEAN][:4].clone()
    begin[:, 1] = MASK
    log_p = rivals.one_step_log_probs(policy, tokens, begin)
    assert bool((log_p[:, [0, 2, 3]] == 0).all()) and bool((log_p[:, 1] < 0).all())
    loss = rivals.one_step_policy_loss(
        policy, tokens, begin, torch.ones(4),
        old_log_p=log_p.detach(), ref_log_p=log_p.detach(), beta=0.0,
    )  # fmt: skip
    assert float(loss.detach()) == pytest.approx(-1)


def test_groups_are_centred_by_themselves():
    found = rivals.group_advantages(torch.tensor([1.0, 3.0, 10.0, 20.0]), 2)
    assert found.tolist() == [-1, 1, -5, 5]
    for group in (1, 3):
        with pytest.raises(ValueError, match=f"groups of {group}"):
            rivals.group_advantages(torch.zeros(4), group)


# -- alignment of posteriors -------------------------------------------------------------------


def alignment(
    instance: Instance, policy: TokenDenoiser, state: Tensor, candidates: Tensor, alpha: float
) -> Tensor:
    reference = denoiser(instance.reference_net())
    reward = instance.reward_of(one_hot(candidates.flatten(0, 1), TOKENS).double())
    return rivals.posterior_alignment_loss(
        policy, reference, state, candidates, reward.view(candidates.shape[:2]), alpha=alpha
    )


def test_alignment_is_exact_where_one_position_is_left(instance):
    """At the reference's conditionals times exp(r / alpha) every choice of candidates is content;
    elsewhere not."""
    alpha, state = 0.5, STATES[MASKED.sum(1) == 1]
    reference = denoiser(instance.reference_net())
    for seed, size in ((0, 2), (1, 5)):
        noise = gumbel(size, len(state), LENGTH, TOKENS, seed=seed)
        candidates = rivals.posterior_candidates(reference, state, noise)
        assert candidates.shape == (len(state), size, LENGTH)
        assert bool(((candidates == state[:, None]) | (state[:, None] == MASK)).all())
        for power, still in ((1.0, True), (2.0, False)):
            logits = tilted_by(instance, instance.reference, alpha / power)
            policy = denoiser(TableNet(logits))
            loss = len(state) * alignment(instance, policy, state, candidates, alpha)
            largest = float(gradient(loss, policy).abs().max())
            assert largest < 1e-12 if still else largest > 0.1


def test_alignment_of_whole_states_matches_marginals_of_the_tilted_product(instance):
    """All 256 completions of the empty state, as often as the reference's product has them: at rest
    the policy's positions are those of product times exp(r / alpha), not of the tilted law."""
    alpha, state = 0.8, start(1)
    log_ref = torch.log_softmax(instance.reference[START], -1)
    x = STATES[CLEAN]
    product = log_ref[torch.arange(LENGTH), x].sum(1)
    tilted = torch.softmax(product + instance.reward / alpha, 0)
    marginal = torch.stack([one_hot(x[:, i], TOKENS).double().T @ tilted for i in range(LENGTH)])
    # repetitions stand in for probabilities: the candidates are what an infinite draw would hold
    times = (product.exp() * 4000).round().long()
    candidates = x.repeat_interleave(times, 0)[None]
    logits = instance.reference.clone()
    logits[START] = marginal.log()
    others = instance.reference.clone()
    law = torch.softmax(instance.log_law + instance.reward / alpha, 0)
    others[START] = torch.stack(
        [(one_hot(x[:, i], TOKENS).double().T @ law).log() for i in range(LENGTH)]
    )
    sizes = []
    for table in (logits, others):
        policy = denoiser(TableNet(table))
        loss = alignment(instance, policy, state, candidates, alpha)
        sizes.append(float(gradient(loss, policy).abs().max()))
    assert sizes[0] < 0.01 < 3 * sizes[0] + 0.01 < sizes[1] + 0.01
