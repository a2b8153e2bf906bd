"""Masked diffusion against enumeration of every state of a small problem."""

from functools import partial

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
    chi_square_bound,
    index_of,
    marginals,
    objective,
    path_kl,
    subs,
    transition,
)

from diffdiv.core import masking

SCHEDULES = [masking.log_linear(), masking.cosine(), masking.polynomial(2.0)]
ALL = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)


@pytest.fixture(scope="module")
def instance() -> Instance:
    return Instance()


def rhos_of(chain: masking.Chain) -> list[float]:
    return [chain.rho(k) for k in range(chain.num_steps)]


def log_probs_of(net: TableNet) -> masking.LogProbs:
    return lambda x: masking.subs_log_probs(net(x), x, TOKENS)


def start(batch: int) -> torch.Tensor:
    return torch.full((batch, LENGTH), MASK)


def noise(batch: int, seed: int = 0, device: str = "cpu") -> masking.Noise:
    return masking.counter_gumbel(
        (LENGTH, TOKENS + 1), seed=seed, purpose="test", indices=range(batch), device=device
    )


# -- schedules ---------------------------------------------------------------------------------


@ALL
def test_mask_rate_grows_from_zero_and_the_rate_is_its_log_derivative(schedule):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    rate = schedule.mask_rate(t)
    (slope,) = torch.autograd.grad(rate.sum(), t)
    assert bool((slope > 0).all())
    torch.testing.assert_close(schedule.reveal_rate(t), slope / rate)
    ends = schedule.mask_rate(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert float(ends[0]) == 0 and 0.998 < float(ends[1]) <= 1


@ALL
def test_a_chain_shows_everything_in_the_end(schedule):
    chain = schedule.chain(7)
    assert chain.rho(6) == 1.0
    still_masked = 1.0
    for k in range(7):
        still_masked *= 1 - chain.rho(k)
        assert still_masked == pytest.approx(chain.mask_rates[k + 1] / chain.mask_rates[0])


def test_log_linear_is_mdlms():
    """sigma(t) = -log(1 - (1 - eps) t), m = 1 - exp(-sigma)."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma = -torch.log1p(-(1 - 1e-3) * t)
    torch.testing.assert_close(masking.log_linear().mask_rate(t), 1 - torch.exp(-sigma))


@pytest.mark.parametrize(("steps", "t_end"), [(0, 0.0), (4, 1.0), (4, -0.1)])
def test_impossible_grids_are_refused(steps, t_end):
    with pytest.raises(ValueError, match="num_steps, t_end"):
        masking.log_linear().chain(steps, t_end=t_end)
    with pytest.raises(ValueError, match="power"):
        masking.polynomial(0.0)


def test_masking_law():
    schedule = masking.log_linear()
    tokens = torch.zeros(1000, 50, dtype=torch.long)
    t = torch.full((1000,), 0.3)
    u = torch.rand(1000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = float((schedule.mask(tokens, t, u, MASK) == MASK).double().mean())
    # 50,000 positions: five standard errors (false alarm below 1e-6)
    assert share == pytest.approx(0.999 * 0.3, abs=5 * (0.3 * 0.7 / 50_000) ** 0.5)


# -- parametrisation ---------------------------------------------------------------------------


def test_subs_never_predicts_a_mask_and_keeps_what_is_shown():
    logits = torch.randn(len(STATES), LENGTH, TOKENS + 3)
    log_p = masking.subs_log_probs(logits, STATES, TOKENS)
    assert log_p.shape == (len(STATES), LENGTH, TOKENS)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(STATES), LENGTH))
    expected = torch.softmax(logits[..., :TOKENS], -1)
    torch.testing.assert_close(log_p.exp()[MASKED], expected[MASKED])
    shown = torch.nn.functional.one_hot(STATES[~MASKED], TOKENS).float()
    assert torch.equal(log_p.exp()[~MASKED], shown)


def test_tokens_and_their_one_hot_rows_are_the_same_state():
    logits = torch.randn(len(STATES), LENGTH, TOKENS)
    soft = torch.nn.functional.one_hot(STATES, TOKENS + 1).float()
    assert torch.equal(
        masking.subs_log_probs(logits, STATES, TOKENS), masking.subs_log_probs(logits, soft, TOKENS)
    )
    assert torch.equal(masking.mask_mass(soft, TOKENS), masking.mask_mass(STATES, TOKENS))
    half = masking.subs_log_probs(logits.half(), STATES, TOKENS)
    assert half.dtype == torch.float32


# -- samplers ----------------------------------------------------------------------------------


def chi_square(tokens: torch.Tensor, law: torch.Tensor) -> float:
    """Pearson's statistic over the sequences, rare ones pooled."""
    counts = torch.bincount(index_of(tokens), minlength=len(STATES))[CLEAN].double()
    expected = law * len(tokens)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert float(expected.min()) > 0
    return float(((counts - expected) ** 2 / expected).sum()) - chi_square_bound(len(counts))


@ALL
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_ancestral_marginals(instance, schedule, steps):
    """40,000 samples against the exact marginals, false alarm 1e-6."""
    chain = schedule.chain(steps)
    net = instance.reference_net()
    tokens = masking.sample_ancestral(log_probs_of(net), chain, fast_noise(40_000), start(40_000))
    law = marginals(subs(instance.reference), rhos_of(chain))[-1]
    assert float(law[CLEAN].sum()) == pytest.approx(1, abs=1e-12)
    assert chi_square(tokens, law[CLEAN]) < 0


def test_first_hitting_has_no_parallel_error(instance):
    """40,000 samples against the reference law itself, false alarm 1e-6."""
    u = torch.rand(40_000, LENGTH, generator=torch.Generator().manual_seed(1))
    tokens = masking.sample_first_hitting(
        log_probs_of(instance.reference_net()), u.argsort(-1), fast_noise(40_000), start(40_000)
    )
    assert chi_square(tokens, instance.log_law.exp()) < 0
    few = marginals(subs(instance.reference), [0.5, 1.0])[-1][CLEAN]
    assert chi_square(tokens, few) > 0  # the test tells two steps from one at a time


def fast_noise(batch: int) -> masking.Noise:
    """Gumbel noise of a whole batch from one generator per step."""

    def noise(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + step)
        shape = (batch, LENGTH, TOKENS + 1)
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        return masking.gumbel_from_normal(z)

    return noise


def test_shown_positions_are_kept_by_all_samplers(instance):
    tokens = torch.tensor([[2, MASK, MASK, 1]]).expand(64, -1)
    log_probs = log_probs_of(instance.reference_net())
    order = torch.arange(LENGTH).expand(64, -1)
    for out in (
        masking.sample_ancestral(log_probs, masking.cosine().chain(3), noise(64), tokens),
        masking.sample_ancestral(
            log_probs, masking.log_linear().chain(3, t_end=1e-5), noise(64), tokens
        ),
        masking.sample_first_hitting(log_probs, order, noise(64), tokens),
    ):
        assert bool((out[:, 0] == 2).all() and (out[:, 3] == 1).all() and (out < MASK).all())


def test_noise_does_not_depend_on_the_batch():
    whole = noise(8)
    part = masking.counter_gumbel(
        (LENGTH, TOKENS + 1), seed=0, purpose="test", indices=[5, 2], device="cpu"
    )
    assert torch.equal(whole(3)[[5, 2]], part(3))
    assert not torch.equal(whole(3), whole(4))


def test_gumbel_law():
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = masking.gumbel_from_normal(z)
    # five standard errors (false alarm below 1e-6); mean: Euler's constant, variance pi^2/6
    assert float(g.mean()) == pytest.approx(0.5772156649, abs=5 * 1.2825 / 100_000**0.5)
    assert float(g.var()) == pytest.approx(torch.pi**2 / 6, abs=5 * 3.45 / 100_000**0.5)
    assert bool(
        torch.isfinite(masking.gumbel_from_normal(torch.tensor([-9.0, 9.0]).double())).all()
    )


# -- soft steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_soft_step_from_tokens_points_at_the_hard_step(tau, rho):
    log_p = masking.subs_log_probs(torch.randn(len(STATES), LENGTH, TOKENS), STATES, TOKENS)
    gumbel = noise(len(STATES))(0)
    x = torch.nn.functional.one_hot(STATES, TOKENS + 1).float()
    soft = masking.soft_step(x, log_p, rho, gumbel, tau)
    torch.testing.assert_close(soft.sum(-1), torch.ones(len(STATES), LENGTH))
    hard = masking.ancestral_step(STATES, log_p, rho, gumbel)
    assert torch.equal(soft.argmax(-1), hard)
    assert torch.equal(masking.straight_through(soft).argmax(-1), hard)
    assert torch.equal(soft[~MASKED], x[~MASKED])


def test_soft_step_at_low_temperature_is_the_hard_step():
    logits = torch.randn(len(STATES), LENGTH, TOKENS, generator=torch.Generator().manual_seed(0))
    log_p = masking.subs_log_probs(logits, STATES, TOKENS)
    x = torch.nn.functional.one_hot(STATES, TOKENS + 1).float()
    soft = masking.soft_step(x, log_p, 0.4, noise(len(STATES))(0), 1e-6)
    torch.testing.assert_close(soft, masking.straight_through(soft), atol=1e-3, rtol=0)


def test_straight_through_is_exact_forward_and_identity_backward():
    soft = torch.rand(5, LENGTH, TOKENS + 1, requires_grad=True)
    hard = masking.straight_through(soft)
    assert torch.equal(hard.sum(-1), torch.ones(5, LENGTH))
    weight = torch.randn_like(soft)
    (grad,) = torch.autograd.grad((weight * hard).sum(), soft)
    assert torch.equal(grad, weight)


@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_gradient_of_a_soft_step_by_differences(rho):
    """Mixtures and one-hot rows alike, in the state and in the logits."""
    generator = torch.Generator().manual_seed(0)
    rand = partial(torch.rand, generator=generator, dtype=torch.float64)
    logits = rand(2, LENGTH, TOKENS).requires_grad_()
    x = torch.softmax(3 * rand(2, LENGTH, TOKENS + 1), -1)
    x[0, 0] = torch.nn.functional.one_hot(torch.tensor(MASK), TOKENS + 1)
    x.requires_grad_()
    gumbel = masking.gumbel_from_normal(rand(2, LENGTH, TOKENS + 1))

    def step(logits, x):
        return masking.soft_step(x, masking.subs_log_probs(logits, x, TOKENS), rho, gumbel, tau=0.7)

    assert torch.autograd.gradcheck(step, (logits, x))


# -- Kullback-Leibler --------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.1, 0.5, 1.0])
def test_step_kl_is_that_of_the_transition_rows(instance, rho):
    log_p, log_q = subs(instance.perturbed(1.0, 1)), subs(instance.reference)
    p, q = transition(log_p, rho), transition(log_q, rho)
    expected = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(1)
    ours = masking.step_kl(
        STATES,
        masking.subs_log_probs(log_p, STATES, TOKENS),
        masking.subs_log_probs(log_q, STATES, TOKENS),
        rho,
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@ALL
@pytest.mark.parametrize("steps", [4, 9])
def test_path_kl_is_the_expected_sum_of_step_kls(instance, schedule, steps):
    rhos = rhos_of(schedule.chain(steps))
    log_p, log_q = subs(instance.perturbed(0.7, 2)), subs(instance.reference)
    at_p = masking.subs_log_probs(log_p, STATES, TOKENS)
    at_q = masking.subs_log_probs(log_q, STATES, TOKENS)
    total = sum(
        float(law @ masking.step_kl(STATES, at_p, at_q, rho))
        for law, rho in zip(marginals(log_p, rhos), rhos, strict=False)
    )
    exact = path_kl(log_p, log_q, rhos)
    assert total == pytest.approx(exact, abs=1e-12)
    fast = objective(log_p, log_q, instance.reward, 1.0, rhos)[1]  # the tests' quick enumeration
    assert float(fast) == pytest.approx(exact, abs=1e-12)


def test_kl_is_exactly_zero_at_the_reference(instance):
    log_p = masking.subs_log_probs(instance.perturbed(1.0, 3), STATES, TOKENS)
    assert torch.equal(
        masking.step_kl(STATES, log_p, log_p, 0.3), torch.zeros(len(STATES)).double()
    )


def test_step_log_prob_gives_log_ratios_of_transitions(instance):
    """log P/Q of every transition with positive probability, for two models."""
    log_p, log_q = subs(instance.perturbed(1.0, 1)), subs(instance.reference)
    p, q = transition(log_p, 0.4), transition(log_q, 0.4)
    before, after = (p > 0).nonzero(as_tuple=True)
    ratio = sum(
        sign
        * masking.step_log_prob(
            STATES[before],
            STATES[after],
            masking.subs_log_probs(table[before], STATES[before], TOKENS),
        )
        for sign, table in ((1, log_p), (-1, log_q))
    )
    torch.testing.assert_close(ratio, (p / q)[before, after].log(), rtol=0, atol=1e-12)
