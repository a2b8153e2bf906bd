"""Reward fine-tuning of masked diffusion on a problem whose every path can be enumerated."""

import weakref
from collections.abc import Callable
from functools import partial
from itertools import permutations
from math import log

import pytest
import torch
from enumerable_masked import (
    CLEAN,
    LENGTH,
    MASK,
    STATES,
    TOKENS,
    Instance,
    TableNet,
    conditionals,
    index_of,
    marginals,
    objective,
    path_kl,
    subs,
    value,
)
from table_policies import all_paths, denoiser, gradient, noise, start
from torch import Tensor
from torch.nn.functional import one_hot

from diffdiv.core import masking
from diffdiv.core.divergence import DIVERGENCES, get_divergence
from diffdiv.models.token_networks import DilatedTokenNet
from diffdiv.models.tokens import TokenDenoiser, token_denoiser
from diffdiv.objectives import drakes, rollout
from diffdiv.objectives import policy_gradient as pg

K = 16
CHAIN = masking.log_linear().chain(K)
RHOS = [CHAIN.rho(k) for k in range(K)]
ALL = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)


@pytest.fixture(scope="module")
def instance() -> Instance:
    return Instance()


@pytest.fixture(scope="module")
def reference(instance) -> TokenDenoiser:
    return denoiser(instance.reference_net())


def policy(instance: Instance, scale: float = 0.7, seed: int = 1) -> TokenDenoiser:
    return denoiser(TableNet(instance.perturbed(scale, seed)))


# -- rollouts ----------------------------------------------------------------------------------


def test_both_estimates_of_the_path_kl(instance, reference):
    """Log ratios and sums of exact step KLs, 10,000 paths, within four standard errors."""
    of = policy(instance)
    paths = rollout.roll_out(of, CHAIN, noise(10_000), start(10_000))
    exact = path_kl(subs(of.net.logits.detach()), subs(reference.net.logits), RHOS)
    assert exact > 0.5
    with torch.no_grad():
        estimates = [
            rollout.path_log_ratio(paths, reference),
            rollout.path_kl(of, reference, paths),
        ]
    spread = [float(e.std()) for e in estimates]
    for estimate in estimates:
        error = float(estimate.std()) / 10_000**0.5
        assert float(estimate.mean()) == pytest.approx(exact, abs=4 * error)
    assert spread[1] < spread[0] / 2  # why the sum of exact steps is the default


def test_kl_is_exactly_zero_at_the_reference(instance, reference):
    same = denoiser(TableNet(instance.reference))
    paths = rollout.roll_out(same, CHAIN, noise(64), start(64))
    assert torch.equal(rollout.path_kl(same, reference, paths), torch.zeros(64).double())
    assert torch.equal(rollout.path_log_ratio(paths, reference), torch.zeros(64).double())
    for hard in ("end", "step"):
        path = drakes.SoftPath(CHAIN, 6, hard=hard)
        _, metrics = drakes.drakes_loss(
            same, reference, instance.reward_of, start(64), noise(64), path=path, alpha=1.0
        )
        assert float(metrics["policy/kl"]) == 0


def test_rollouts_remember_what_was_shown(instance, reference):
    of = policy(instance)
    first = start(32).index_fill(1, torch.tensor([2]), 1)
    paths = rollout.roll_out(of, CHAIN, noise(32), first)
    assert paths.states.shape == (K + 1, 32, LENGTH) and bool((paths.tokens[:, 2] == 1).all())
    assert paths.one_hot(TOKENS).shape == (32, LENGTH, TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(rollout.step_log_probs(of, paths), paths.log_p)
        some = rollout.step_log_probs(of, paths, [3, 11])
    torch.testing.assert_close(some, paths.log_p[[3, 11]])
    with pytest.raises(ValueError, match="mask rate"):
        rollout.roll_out(of, masking.log_linear().chain(4, t_end=1e-3), noise(2), start(2))


def test_subsets_of_steps_are_unbiased(instance, reference):
    """The mean over all single steps is the whole sum, for the KL and for the policy gradient."""
    of = policy(instance)
    paths = rollout.roll_out(of, CHAIN, noise(8), start(8))
    whole = rollout.path_kl(of, reference, paths)
    singles = [rollout.path_kl(of, reference, paths, [k]) for k in range(K)]
    torch.testing.assert_close(torch.stack(singles).mean(0), whole)
    advantage = torch.arange(8.0, dtype=torch.float64)
    parts = [pg.policy_gradient_loss(of, paths, advantage, [k]) for k in range(K)]
    torch.testing.assert_close(
        torch.stack(parts).mean(), pg.policy_gradient_loss(of, paths, advantage)
    )


# -- the attainable optimum --------------------------------------------------------------------


def ascend(instance: Instance, rhos: list[float] | None, steps: int = 250) -> tuple[float, float]:
    """(largest, last) exact objective of gradient ascent from the reference."""
    logits = torch.nn.Parameter(instance.reference.clone())
    optimizer = torch.optim.Adam([logits], lr=0.1)
    log_ref = masking.subs_log_probs(instance.reference, STATES, TOKENS)
    largest, last = -torch.inf, 0.0
    for step in range(steps):
        log_p = masking.subs_log_probs(logits, STATES, TOKENS)
        total, _ = objective(log_p, log_ref, instance.reward, instance.alpha, rhos)
        last = float(total.detach())
        largest = max(largest, last)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad()
        (-total).backward()
        optimizer.step()
    return largest, last


@pytest.mark.parametrize("seed", [0, 1])
def test_exact_ascent_reaches_the_value_and_never_exceeds_it(seed):
    """Continuous time: alpha log Z is attained within the SUBS family, the reference being
    consistent; a grid of 16 steps stays below its own alpha log Z."""
    instance = Instance(seed=seed)
    best = value(instance.log_law, instance.reward, instance.alpha)
    largest, last = ascend(instance, None)
    assert last >= 0.98 * best and largest <= best + 1e-9
    law = marginals(subs(instance.reference), RHOS)[-1][CLEAN]
    best = value(law.log(), instance.reward, instance.alpha)
    assert ascend(instance, RHOS, 60)[0] <= best + 1e-9


# -- f-divergences as regularisers -------------------------------------------------------------


CLOSED_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda s: s,
    "forward_kl": lambda s: 1 - torch.exp(-s),
    "jensen_shannon": lambda s: log(2) - torch.nn.functional.softplus(-s),
    "softened_reverse_kl": lambda s: torch.nn.functional.softplus(s) - log(2),
    "squared_hellinger": lambda s: (1 - torch.exp(-s / 2)) / 2,
    "jeffreys": lambda s: s + 1 - torch.exp(-s),
    "neyman_chi2": lambda s: 2 * (torch.exp(s) - 1),
    "pearson_chi2": lambda s: 1 - torch.exp(-2 * s),
}


@ALL
def test_penalty_in_closed_form(divergence):
    at = torch.linspace(-20, 20, 81, dtype=torch.float64)
    torch.testing.assert_close(
        pg.penalty(at, divergence), CLOSED_FORMS[divergence.name](at), rtol=1e-9, atol=1e-12
    )


@ALL
def test_penalty_is_f_minus_its_tangent(divergence):
    """f(R) - R f'(R) by autograd, less its value at R = 1."""

    def tangent(log_r: Tensor) -> Tensor:
        log_r = log_r.clone().requires_grad_()
        f = divergence.f(log_r)
        (slope,) = torch.autograd.grad(f.sum(), log_r)
        return (f - slope).detach()

    at = torch.linspace(-4, 4, 33, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(pg.penalty(at, divergence), tangent(-at) - tangent(zero))


@ALL
@pytest.mark.parametrize("to", ["reference", "target"])
def test_gradient_of_every_regulariser_by_enumeration_of_paths(instance, reference, divergence, to):
    """d/dtheta of E[r] - alpha D_f over all 4,096 paths, by autograd and by the pseudo-reward."""
    of, alpha = policy(instance, 0.3), 0.7
    paths, times = all_paths(0.4)
    log_p = rollout.step_log_probs(of, paths).sum(0) + times.log()
    with torch.no_grad():
        log_ref = rollout.step_log_probs(reference, paths).sum(0) + times.log()
    reward = instance.reward_of(one_hot(paths.tokens, TOKENS).double())
    assert float(log_p.detach().exp().sum()) == pytest.approx(1, abs=1e-12)
    if to == "reference":
        exact = log_p.exp() @ (reward - alpha * divergence.f(log_ref - log_p))
        log_z = 0.0
    else:
        tilted = log_ref + reward / alpha
        log_z = torch.logsumexp(tilted, 0)
        exact = -alpha * (log_p.exp() @ divergence.f(tilted - log_z - log_p))
    regulariser = pg.Regulariser(divergence, alpha, to=to)
    advantage = regulariser.advantage(reward, (log_p - log_ref).detach(), log_z)
    weights = log_p.detach().exp() * len(log_p)
    loss = pg.policy_gradient_loss(of, paths, weights * advantage)
    torch.testing.assert_close(gradient(-loss, of), gradient(exact, of), rtol=1e-8, atol=1e-12)


def test_regularisers_that_cannot_be_are_refused():
    js, kl = get_divergence("jensen_shannon"), get_divergence("reverse_kl")
    with pytest.raises(ValueError, match="only reverse_kl to the reference"):
        pg.Regulariser(js, 1.0, level="step")
    with pytest.raises(ValueError, match="level 'path'"):
        pg.Regulariser(kl, 1.0, level="step", to="target")
    with pytest.raises(ValueError, match="alpha"):
        pg.Regulariser(kl, 0.0)
    assert pg.Regulariser(kl, 1.0, level="step").level == "step"


def test_clip_bounds_the_log_ratio():
    bounded = pg.Regulariser(get_divergence("forward_kl"), 1.0, clip=(-3.0, 50.0))
    ratio = torch.tensor([-40.0, -3.0, 40.0], dtype=torch.float64)
    out = bounded.advantage(torch.zeros(3), ratio)
    assert out[0] == out[1] and float(out[2]) == pytest.approx(-1)


def test_normaliser_and_weights(instance, reference):
    """log Z from 10,000 paths of another policy, five standard errors; weights of an exact law."""
    of, alpha = policy(instance, 0.3), 1.0
    paths = rollout.roll_out(of, CHAIN, noise(10_000), start(10_000))
    ratio = rollout.path_log_ratio(paths, reference)
    reward = instance.reward_of(one_hot(paths.tokens, TOKENS).double())
    law = marginals(subs(instance.reference), RHOS)[-1][CLEAN]
    exact = float(torch.logsumexp(law.log() + instance.reward / alpha, 0))
    terms = (reward / alpha - ratio).exp()
    error = float(terms.std() / terms.mean()) / 10_000**0.5
    assert float(pg.log_normaliser(reward, ratio, alpha)) == pytest.approx(exact, abs=5 * error)
    weights = pg.path_weights(reward, ratio, alpha)
    assert float(weights.sum()) == pytest.approx(1)
    tilted = float(
        (law * (instance.reward / alpha).exp() @ instance.reward) / torch.tensor(exact).exp()
    )
    size = float(pg.effective_sample_size(weights))
    spread = float((weights @ (reward - tilted) ** 2) ** 0.5)
    assert 1 < size < 10_000
    assert float(weights @ reward) == pytest.approx(tilted, abs=5 * spread / size**0.5)


def test_leave_one_out_baseline():
    values = torch.tensor([1.0, 4.0, 7.0])
    expected = torch.tensor([1 - 5.5, 0.0, 7 - 2.5])
    torch.testing.assert_close(pg.leave_one_out(values), expected)
    with pytest.raises(ValueError, match="two samples"):
        pg.leave_one_out(values[:1])


# -- weighted denoising cross-entropy ----------------------------------------------------------


def test_masked_cross_entropy_by_enumeration_of_masks(instance):
    """Integral over m of each mask's probability / m is a Beta function of the number masked."""
    of = policy(instance)
    tokens = STATES[CLEAN][[3, 77, 200]]
    patterns = torch.cartesian_prod(*[torch.tensor([False, True])] * LENGTH)
    exact = torch.zeros((), dtype=torch.float64)
    for pattern in patterns[1:]:
        n = int(pattern.sum())
        beta = torch.lgamma(torch.tensor([n, LENGTH - n + 1, LENGTH + 1.0]).double())
        x = torch.where(pattern, MASK, tokens)
        log_p = subs(of.net.logits)[index_of(x)].gather(-1, tokens[..., None])[..., 0]
        exact = (
            exact
            - (beta[0] + beta[1] - beta[2]).exp()
            * (log_p * pattern).sum(1)
            @ torch.tensor([0.5, 0.3, 0.2]).double()
        )
    # midpoint rule over m and over the mask pattern's probabilities: u enumerates the patterns
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    total = 0.0
    for pattern in patterns:
        n = int(pattern.sum())
        u = torch.where(pattern, -1.0, 2.0).double().expand(3, -1)
        # the loss divides by m: call it at m = 1 and weigh by the integral of P(pattern) / m
        loss = pg.masked_cross_entropy(
            of, tokens, torch.tensor([0.5, 0.3, 0.2]).double(), torch.ones(3).double(), u
        )
        integral = float((grid ** (n - 1) * (1 - grid) ** (LENGTH - n)).mean()) if n else 0.0
        total += integral * float(loss.detach())
    assert total == pytest.approx(float(exact.detach()), rel=1e-5)


def test_masked_cross_entropy_by_sampling(instance):
    """30,000 draws of m and masks against the chain rule in uniformly random order, five errors."""
    of, size = policy(instance), 30_000
    tokens = STATES[CLEAN][77].expand(size, -1)
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(size, generator=generator, dtype=torch.float64)
    u = torch.rand(size, LENGTH, generator=generator, dtype=torch.float64)
    table = subs(of.net.logits.detach())
    orders = torch.tensor(list(permutations(range(LENGTH))))
    exact = 0.0
    for order in orders:
        x = torch.full((LENGTH,), MASK)
        for place in order.tolist():
            exact -= float(table[index_of(x), place, tokens[0, place]]) / len(orders)
            x[place] = tokens[0, place]
    with torch.no_grad():
        parts = torch.stack(
            [
                pg.masked_cross_entropy(
                    of, tokens[c], torch.full((300,), 1 / 300).double(), rates[c], u[c]
                )
                for c in torch.arange(size).split(300)
            ]
        )
    assert float(parts.mean()) == pytest.approx(exact, abs=5 * float(parts.std()) / 100**0.5)


def test_the_tilted_law_is_stationary(instance):
    """At the tilted law's own conditionals the loss weighted by that law has no gradient."""
    tilted = instance.log_law + instance.reward / instance.alpha
    tilted = tilted - torch.logsumexp(tilted, 0)
    table = conditionals(tilted)
    of = denoiser(TableNet(torch.where(table > -torch.inf, table, -30.0)))
    tokens, weights = STATES[CLEAN], tilted.exp()
    total = torch.zeros(())
    for pattern in torch.cartesian_prod(*[torch.tensor([False, True])] * LENGTH):
        u = torch.where(pattern, -1.0, 2.0).double().expand(256, -1)
        total = total + pg.masked_cross_entropy(of, tokens, weights, torch.ones(256).double(), u)
    assert float(gradient(total, of).abs().max()) < 1e-12


# -- DRAKES ------------------------------------------------------------------------------------


def loss_of(
    instance: Instance, of: TokenDenoiser, anchor: TokenDenoiser | None, batch: int = 32, **settings
) -> tuple[Tensor, drakes.Metrics]:
    path = drakes.SoftPath(
        settings.pop("chain", CHAIN),
        settings.pop("num_soft", 6),
        tau=settings.pop("tau", 1.0),
        hard=settings.pop("hard", "end"),
        checkpointing=settings.pop("checkpointing", False),
    )
    draws = noise(batch, settings.pop("seed", 0))
    reward = settings.pop("reward", instance.reward_of)
    return drakes.drakes_loss(
        of, anchor, reward, start(batch), draws, path=path, alpha=0.5, **settings
    )


def twice_called(
    instance: Instance,
    of: TokenDenoiser,
    anchor: TokenDenoiser,
    num_soft: int,
    chain: masking.Chain,
) -> Tensor:
    """The released code's way: graphs everywhere, every state visited again for the KL."""
    draws, x, states = noise(32), one_hot(start(32), TOKENS + 1).double(), []
    for k in range(chain.num_steps):
        m_t, m_s = chain.mask_rates[k : k + 2]
        states.append(x)
        p = of.log_probs(x).exp()
        q = torch.cat([p * (m_t - m_s), torch.full_like(p[..., :1], m_s)], -1)
        scores = (q + 1e-300).log() + draws(k)
        kept = 1 - x[..., -1:]
        if k < chain.num_steps - num_soft:
            x = (kept * x + (1 - kept) * one_hot(scores.argmax(-1), TOKENS + 1)).detach()
        else:
            x = kept * x + (1 - kept) * torch.softmax(scores, -1)
    soft = x[..., :-1]
    hard = one_hot(soft.argmax(-1), TOKENS).double()
    score = instance.reward_of(soft + (hard - soft).detach())
    total = torch.zeros(32).double()
    for k, state in enumerate(states):
        log_p, log_ref = of.log_probs(state), anchor.log_probs(state)
        kl = log_ref.exp() - log_p.exp() + log_p.exp() * (log_p - log_ref)
        weight = (1 - state[..., -1:]) * state[..., :-1] / chain.mask_rates[k]
        total = total + (weight * kl).sum((1, 2))
    return (0.5 * total - score).mean()


def test_legacy_has_the_gradient_of_the_released_arithmetic(instance, reference):
    chain = masking.log_linear().chain(K, t_end=1e-5)
    of = policy(instance)
    ours, _ = loss_of(instance, of, reference, kl="legacy", chain=chain)
    theirs = twice_called(instance, of, reference, 6, chain)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert float((gradient(ours, of) - gradient(theirs, of)).abs().max()) < 1e-12


def test_legacy_is_blind_on_tokens(instance, reference):
    """At every state of tokens the released term is 0, whatever the policy; the KL is not."""
    x = one_hot(STATES, TOKENS + 1).double()
    with torch.no_grad():
        log_p, log_ref = policy(instance, 3.0).log_probs(x), reference.log_probs(x)
    terms = [
        term(x, log_p, log_ref, CHAIN, 3) for term in (drakes.legacy_step_kl, drakes.exact_step_kl)
    ]
    assert bool((terms[0] == 0).all())
    assert float(terms[1].max()) > 0.3


@pytest.mark.parametrize("hard", ["end", "step"])
@pytest.mark.parametrize("kl", ["path", "legacy"])
def test_checkpointing_changes_nothing(instance, hard, kl):
    torch.manual_seed(0)
    nets = [DilatedTokenNet(TOKENS, width=8, kernel=3, dilations=(1, 2)) for _ in range(2)]
    of, anchor = (token_denoiser(torch.nn.Module.to(net, torch.float64)) for net in nets)
    anchor.net.requires_grad_(False)
    run = partial(loss_of, instance, of, anchor, hard=hard, kl=kl)
    steps = {"kl_steps": [1, 7]} if kl == "path" else {}
    plain, saved = (run(checkpointing=c, **steps)[0] for c in (False, True))
    assert torch.equal(plain, saved)
    assert torch.equal(gradient(plain, of), gradient(saved, of))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_is_called_once_a_step_and_keeps_nothing(instance, checkpointing):
    nets = [DilatedTokenNet(TOKENS, width=8, kernel=3, dilations=(1, 2)) for _ in range(2)]
    of, anchor = (token_denoiser(torch.nn.Module.to(net, torch.float64)) for net in nets)
    anchor.net.requires_grad_(False)
    seen: list[weakref.ref[Tensor]] = []
    anchor.net.mix.register_forward_hook(lambda _net, _x, out: seen.append(weakref.ref(out)))
    loss, _ = loss_of(instance, of, anchor, checkpointing=checkpointing, kl="legacy")
    assert len(seen) == 6 and all(activation() is None for activation in seen)  # loss is alive
    loss.backward()
    assert len(seen) == 6


def test_trajectories_hard_at_every_step_are_the_samplers(instance, reference):
    """The reward sees the very sequences that roll_out gives with the same noise."""
    seen = []

    def reward(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return instance.reward_of(x)

    of = policy(instance)
    for num_soft in (1, 6, K):
        loss_of(instance, of, reference, hard="step", num_soft=num_soft, reward=reward)
    tokens = rollout.roll_out(of, CHAIN, noise(32), start(32)).tokens
    for x in seen:
        assert torch.equal(x, one_hot(tokens, TOKENS).double())


def test_kl_on_hard_trajectories_is_exact(instance, reference):
    """hard "step": the metric is the path KL of these trajectories; all prefix steps alike."""
    of = policy(instance)
    paths = rollout.roll_out(of, CHAIN, noise(32), start(32))
    expected = rollout.path_kl(of, reference, paths).mean()
    for num_soft in (1, 6, K):
        _, metrics = loss_of(instance, of, reference, hard="step", num_soft=num_soft)
        torch.testing.assert_close(metrics["policy/kl"], expected.detach())
    parts = [
        loss_of(instance, of, reference, hard="step", kl_steps=[k])[1]["policy/kl"]
        for k in range(K - 6)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), expected.detach())


def test_gradient_of_a_soft_path_by_differences(instance, reference):
    """All steps soft: the loss is a smooth function of the logits but for the last rounding."""
    of = policy(instance)
    chain = masking.log_linear().chain(3)
    settings = {"chain": chain, "num_soft": 3, "batch": 4}
    # a reward without slope leaves the KL, which is differentiable throughout
    flat = partial(loss_of, instance, of, reference, reward=lambda x: 0 * x.sum((1, 2)), **settings)
    grad = gradient(flat()[0], of)
    direction = torch.randn(len(grad), generator=torch.Generator().manual_seed(0)).double()
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            of.net.logits.add_(step * direction.view_as(of.net.logits))
            values.append(float(flat()[0]))
            of.net.logits.sub_(step * direction.view_as(of.net.logits))
    assert float(grad @ direction) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_frozen_networks_get_no_gradients_and_must_be_frozen(instance, reference):
    of = policy(instance)
    loss_of(instance, of, reference)[0].backward()
    assert reference.net.logits.grad is None and of.net.logits.grad is not None
    with pytest.raises(ValueError, match="reference"):
        loss_of(instance, of, policy(instance))
    _, metrics = loss_of(instance, of, None)
    assert float(metrics["policy/kl"]) == 0


@pytest.mark.parametrize("steps", [[], [10], [-1]])
def test_steps_that_cannot_be_are_refused(instance, reference, steps):
    with pytest.raises(ValueError, match="kl_steps"):
        loss_of(instance, policy(instance), reference, kl_steps=steps)


@pytest.mark.parametrize("settings", [{"num_soft": 0}, {"num_soft": K + 1}, {"tau": 0.0}])
def test_paths_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        drakes.SoftPath(CHAIN, **({"num_soft": 1} | settings))


# -- training by sampling ----------------------------------------------------------------------


def trained(
    instance: Instance,
    loss: Callable[[TokenDenoiser, masking.Noise], Tensor],
    *,
    steps: int,
    lr: float,
    batch: int = 128,
) -> tuple[float, float]:
    """Exact (objective, path KL) of a policy trained from the reference by sampled gradients."""
    of = denoiser(TableNet(instance.reference))
    optimizer = torch.optim.Adam(of.net.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 1.5 * (1 - step / steps))
        optimizer.zero_grad()
        loss(of, noise(batch, step + 1)).backward()
        optimizer.step()
    log_ref = subs(instance.reference)
    log_p = subs(of.net.logits.detach())
    total, kl = objective(log_p, log_ref, instance.reward, instance.alpha, RHOS)
    return float(total), float(kl)


def share_of_gain(instance: Instance, total: float) -> float:
    """0 at the reference, 1 at the best policy on this grid (by exact ascent)."""
    log_ref = subs(instance.reference)
    floor = float(objective(log_ref, log_ref, instance.reward, instance.alpha, RHOS)[0])
    return (total - floor) / (ascend(instance, RHOS)[0] - floor)


@pytest.mark.slow
def test_policy_gradient_reaches_the_attainable_gain(instance, reference):
    """98 % when written (150 updates of 128 paths); 99 % after 300 of 256."""
    regulariser = pg.Regulariser(get_divergence("reverse_kl"), instance.alpha)

    def loss(of: TokenDenoiser, draws: masking.Noise) -> Tensor:
        paths = rollout.roll_out(of, CHAIN, draws, start(128))
        reward = instance.reward_of(one_hot(paths.tokens, TOKENS).double())
        advantage = regulariser.advantage(reward, rollout.path_log_ratio(paths, reference))
        return pg.policy_gradient_loss(of, paths, pg.leave_one_out(advantage))

    total, _ = trained(instance, loss, steps=150, lr=0.1)
    assert share_of_gain(instance, total) >= 0.95


def drakes_training(
    instance: Instance, anchor: TokenDenoiser, batch: int, *, num_soft: int = K, **settings
) -> Callable[[TokenDenoiser, masking.Noise], Tensor]:
    """The loss of :func:`trained` by DRAKES, Gumbel temperature 0.7."""
    path = drakes.SoftPath(CHAIN, num_soft, tau=0.7)
    return lambda of, draws: drakes.drakes_loss(
        of, anchor, instance.reward_of, start(batch), draws, path=path, **settings
    )[0]


@pytest.mark.slow
def test_drakes_as_far_as_its_bias_lets_it(instance, reference):
    """89 % of the attainable gain when written. A likely reason for the rest, not isolated: between
    tokens the network is asked at mixtures, where its answer is no average of its answers at
    tokens. Other settings tried (300 updates of 256): temperatures 0.3, 0.5, 1: 78, 88, 86 %; hard
    states after every step at 0.3, 0.5: 77, 81 %."""
    loss = drakes_training(instance, reference, 128, alpha=instance.alpha)
    total, _ = trained(instance, loss, steps=250, lr=0.05)
    assert share_of_gain(instance, total) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("num_soft", [6, K])
def test_legacy_does_not_control_the_kl(instance, reference, num_soft):
    """With a weight that should hold the policy at the reference the path KL does, and the released
    term, though counted K times over, lets it go. When written: 0.015 and 0.13 nats against 0.75
    and 1.33 (6 and 16 soft steps)."""
    kls = {}
    for kl in ("path", "legacy"):
        loss = drakes_training(instance, reference, 64, num_soft=num_soft, alpha=5.0, kl=kl)
        kls[kl] = trained(instance, loss, steps=100, lr=0.05, batch=64)[1]
    assert kls["path"] < 0.25 and kls["legacy"] > 0.5


# -- the controller ----------------------------------------------------------------------------


def test_controller_settles_at_its_target():
    """A policy whose KL is 3 / alpha: the fixed point of alpha is 3 / target."""
    controller = pg.KlController(0.1, target=2.0)
    for _ in range(400):
        controller.observe(3 / controller.alpha)
    assert controller.alpha == pytest.approx(1.5, rel=1e-6)
    again = pg.KlController(0.1, target=2.0)
    again.load_state_dict(controller.state_dict())
    assert again.alpha == controller.alpha
    with pytest.raises(ValueError, match="target"):
        pg.KlController(0.1, target=0.0)
