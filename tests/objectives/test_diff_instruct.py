"""Score divergences and KL on one Gaussian, where every gradient has a closed form.

x0 = mu + s z,  reference N(m, v), unconditional N(n, u);  V = alpha^2 s^2 + sigma^2
score of the generator -(x - alpha mu) / V; of the reference -B x + C, also when guided
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffdiv.core.schedule import Noising, Schedule, edm, vp_from_betas
from diffdiv.core.score_distance import ScoreDistance, pseudo_huber, squared
from diffdiv.models.denoiser import Condition
from diffdiv.objectives import diff_instruct as di

NONE = Condition()
VP = vp_from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
VE = edm()
CASES = [(VP, t) for t in (20.0, 399.0, 800.0)] + [(VE, sigma) for sigma in (0.1, 2.5, 20.0)]
GENERATORS = [(0.0, 1.0), (1.5, 0.5), (-0.7, 2.0)]
REFERENCE, UNCONDITIONAL, GUIDANCE = (0.3, 0.64), (-0.5, 1.69), 7.5


@dataclass(frozen=True)
class Linear:
    """A denoiser x0 = (x + sigma^2 score) / alpha with score = -B x + C."""

    schedule: Schedule
    line: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __call__(self, x_t: Tensor, t: Tensor, _cond: Condition) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        b, c = self.line(alpha, sigma)
        return (x_t + sigma.square() * (c - b * x_t)) / alpha


def gaussian(schedule: Schedule, mean: float, variance: float) -> Linear:
    def line(alpha, sigma):
        v = alpha.square() * variance + sigma.square()
        return 1 / v, alpha * mean / v

    return Linear(schedule, line)


def reference_of(schedule: Schedule, guided: bool) -> Linear:
    cond, uncond = gaussian(schedule, *REFERENCE), gaussian(schedule, *UNCONDITIONAL)
    if not guided:
        return cond

    def line(alpha, sigma):
        pairs = zip(cond.line(alpha, sigma), uncond.line(alpha, sigma), strict=True)
        return tuple(u + GUIDANCE * (c - u) for c, u in pairs)

    return Linear(schedule, line)


def quadrature(step: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (z, eps) and weights of a two-dimensional normal law.

    The trapezoid rule: for smooth integrands its error falls exponentially with 1 / step.
    """
    nodes = torch.arange(-9, 9 + step / 2, step, dtype=torch.float64)
    density = step * (-nodes.square() / 2).exp() / (2 * torch.pi) ** 0.5
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.reshape(-1, 1), eps.reshape(-1, 1), torch.outer(density, density).reshape(-1)


def gradient(loss, schedule, t, mu, s, noise, **options) -> Tensor:
    """d/d(mu, s) of a loss that is a mean over the batch, under the weights of ``noise``."""
    z, eps, weights = noise
    time = torch.full((len(z),), t, dtype=torch.float64)
    x0 = (mu + s * z).requires_grad_()
    value, _ = loss(x0, NONE, Noising(time, time, eps), schedule=schedule, **options)
    (by_x0,) = torch.autograd.grad(value, x0)
    by_x0 = by_x0[:, 0] * len(z) * weights  # each sample with its own weight in place of 1 / B
    return torch.stack([by_x0.sum(), (by_x0 * z[:, 0]).sum()])


def target(schedule, t, mu, s, guided, d_prime) -> Tensor:
    """E[d'(y) d/dtheta of the generator's score] under the frozen law, by quadrature."""
    time = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    b, c = reference_of(schedule, guided).line(alpha, sigma)
    v = alpha**2 * s**2 + sigma**2
    nodes = torch.arange(-12, 12, 1e-3, dtype=torch.float64)
    w = 1e-3 * (-nodes.square() / 2).exp() / (2 * torch.pi) ** 0.5
    x = alpha * mu + v.sqrt() * nodes
    y = -(x - alpha * mu) / v - (c - b * x)
    by_mu = alpha / v * torch.ones_like(x)
    by_s = (x - alpha * mu) / v**2 * 2 * alpha**2 * s
    slope = d_prime(y[:, None])[:, 0]
    return torch.stack([(w * slope * by_mu).sum(), (w * slope * by_s).sum()])


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("distance", [squared(), pseudo_huber(1.0)], ids=lambda d: d.name)
@pytest.mark.parametrize(("mu", "s"), GENERATORS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].family} {case[1]}")
def test_gradient_is_that_of_the_divergence(case, mu, s, distance: ScoreDistance, guided):
    """The theorem, for l2 and pseudo-Huber, VP and VE, with and without guidance."""
    schedule, t = case
    # pseudo-Huber has poles beside the real axis, the nearer the steeper y is
    noise = quadrature(0.25 if distance.name == "squared" else 0.02)
    found = gradient(
        di.score_divergence_loss, schedule, t, mu, s, noise,
        reference=reference_of(schedule, guided), fake=gaussian(schedule, mu, s * s),
        distance=distance, space="score", normalise=False,
    )  # fmt: skip
    expected = target(schedule, t, mu, s, guided, distance.gradient)
    assert float((found - expected).abs().max()) < 1e-10 * float(expected.abs().max())


@pytest.mark.parametrize(("mu", "s"), GENERATORS)
def test_closed_form_of_the_squared_distance(mu, s):
    """d/dmu = (alpha / V)(B M - C), d/ds = (2 alpha^2 s / V^2)(B V - 1), M = alpha mu."""
    t = torch.tensor([399.0], dtype=torch.float64)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    b, c = reference_of(VP, guided=False).line(alpha, sigma)
    v = alpha**2 * s**2 + sigma**2
    expected = torch.cat([alpha / v * (b * alpha * mu - c), 2 * alpha**2 * s / v**2 * (b * v - 1)])
    found = target(VP, 399.0, mu, s, False, squared().gradient)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", [squared(), pseudo_huber(0.1)], ids=lambda d: d.name)
def test_monte_carlo_agrees(distance):
    mu, s, count = 1.5, 0.5, 400_000
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(count, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    time = torch.full((count,), 399.0, dtype=torch.float64)
    x0 = (mu + s * z).requires_grad_()
    loss, _ = di.score_divergence_loss(
        x0, NONE, Noising(time, time, eps), schedule=VP, reference=reference_of(VP, guided=False),
        fake=gaussian(VP, mu, s * s), distance=distance, space="score", normalise=False,
    )  # fmt: skip
    (by_x0,) = torch.autograd.grad(count * loss, x0)
    samples = torch.cat([by_x0, by_x0 * z], 1)
    expected = target(VP, 399.0, mu, s, False, distance.gradient)
    error = samples.std(0) / count**0.5
    assert ((samples.mean(0) - expected).abs() < 4 * error).all()


def test_what_is_detached_shows():
    """Controls: a detached d'(y), or x_t detached in the networks, is a wrong vector."""
    mu, s, t = 1.5, 0.5, 399.0
    fake, reference = gaussian(VP, mu, s * s), reference_of(VP, guided=False)
    expected = target(VP, t, mu, s, False, squared().gradient)

    def blind(net):
        return lambda x_t, time, cond: net(x_t.detach(), time, cond)

    no_slope = ScoreDistance("detached", squared().value, lambda y: y.detach())
    wrong = {
        "slope": (no_slope, fake, reference),
        "networks": (squared(), blind(fake), blind(reference)),
    }
    for distance, one, other in wrong.values():
        found = gradient(
            di.score_divergence_loss, VP, t, mu, s, quadrature(), reference=other, fake=one,
            distance=distance, space="score", normalise=False,
        )  # fmt: skip
        assert float((found - expected).norm() / expected.norm()) > 0.09


@pytest.mark.parametrize("guided", [False, True])
def test_ikl_is_the_gradient_of_the_kl(guided):
    """Weight sigma^2 / alpha on d KL(N(M, V) || reference) / d(mu, s)."""
    mu, s, t = 1.5, 0.5, 399.0
    time = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = VP.alpha(time), VP.sigma(time)
    b, c = reference_of(VP, guided).line(alpha, sigma)
    v = alpha**2 * s**2 + sigma**2
    of_kl = torch.cat([alpha * (b * alpha * mu - c), alpha**2 * s * (b - 1 / v)])
    found = gradient(
        di.ikl_loss, VP, t, mu, s, quadrature(), reference=reference_of(VP, guided),
        fake=gaussian(VP, mu, s * s), normalise=False,
    )  # fmt: skip
    torch.testing.assert_close(found * alpha**2 / sigma**2, of_kl, rtol=1e-10, atol=1e-12)


def test_guidance_outside_is_guidance_inside_for_kl_only():
    mu, s, t = -0.7, 2.0, 399.0
    z, eps, _ = quadrature(3.0)
    time = torch.full((len(z),), t, dtype=torch.float64)
    at, x0 = Noising(time, time, eps), (mu + s * z).requires_grad_()
    fake, plain = gaussian(VP, mu, s * s), reference_of(VP, guided=False)
    label = Condition(label=torch.zeros(len(z), dtype=torch.int64))

    def reference(x_t, when, cond):
        return (plain if cond.label is not None else gaussian(VP, *UNCONDITIONAL))(x_t, when, cond)

    common = {"schedule": VP, "normalise": False}
    inside, _ = di.ikl_loss(x0, label, at, reference=reference_of(VP, True), fake=fake, **common)
    outside, _ = di.ikl_loss(x0, label, at, reference=plain, fake=fake, **common)
    extra = di.guidance_reward_loss(x0, label, at, reference=reference, uncond=NONE, **common)
    (a,) = torch.autograd.grad(inside, x0, retain_graph=True)
    (b,) = torch.autograd.grad(outside + (GUIDANCE - 1) * extra, x0, retain_graph=True)
    torch.testing.assert_close(a, b)

    score = {"distance": pseudo_huber(0.1), "fake": fake, **common}
    inside, _ = di.score_divergence_loss(x0, label, at, reference=reference_of(VP, True), **score)
    outside, _ = di.score_divergence_loss(x0, label, at, reference=plain, **score)
    (a,) = torch.autograd.grad(inside, x0)
    (b,) = torch.autograd.grad(outside + (GUIDANCE - 1) * extra, x0)
    assert not torch.allclose(a, b, rtol=0.1)


def test_sid_with_alpha_one_is_the_squared_divergence():
    z, eps, _ = quadrature(3.0)
    time = torch.full((len(z),), 399.0, dtype=torch.float64)
    at, x0 = Noising(time, time, eps), (1.5 + 0.5 * z).requires_grad_()
    options = {
        "reference": reference_of(VP, guided=True), "fake": gaussian(VP, 1.5, 0.25), "schedule": VP
    }  # fmt: skip
    (a,) = torch.autograd.grad(di.sid_loss(x0, NONE, at, **options)[0], x0)
    other, _ = di.score_divergence_loss(x0, NONE, at, distance=squared(), **options)
    (b,) = torch.autograd.grad(other, x0)
    torch.testing.assert_close(a, b)


def fixed_point(loss, steps: int = 400) -> tuple[float, float]:
    """(mu, |s|) where the generator comes to rest under a reward and a regulariser."""
    theta = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([theta], lr=0.2)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(theta).backward()
        optimiser.step()
    mu, s = theta.detach().tolist()
    return mu, abs(s)


def test_under_reward_kl_collapses_and_the_score_divergence_does_not():
    """r = -(x - 2)^2 / 2 at scale 0.5; weight sigma^2 in score units, eleven times."""
    z, eps, weights = quadrature(1.0)
    times = torch.linspace(20, 980, 11, dtype=torch.float64).round()
    count = len(z)
    zs, noise = z.repeat(11, 1), eps.repeat(11, 1)
    time = times.repeat_interleave(count)
    at, share = Noising(time, time, noise), weights.repeat(11)
    alpha, sigma = VP.alpha(time), VP.sigma(time)
    reference = gaussian(VP, 0.3, 0.64)

    def total(kind):
        def loss(theta):
            mu, s = theta
            x0 = mu + s * zs
            fake = gaussian(VP, float(theta[0].detach()), float(theta[1].detach()) ** 2)
            x_t = VP.add_noise(x0, noise, time)
            if kind == "ikl":
                with torch.no_grad():
                    # sigma^2 (s_fake - s_reference) alpha = alpha^2 (fake_x0 - reference_x0)
                    gap = fake(x_t, time, NONE) - reference(x_t, time, NONE)
                held = (share * alpha.square() * (gap * x0)[:, 0]).sum() / 11
            else:
                loss_of = per_sample_like(at, reference, fake)
                held = (share * sigma.square() * loss_of(x0)).sum() / 11
            return held + 0.5 * (weights * (mu + s * z - 2)[:, 0].square() / 2).sum()

        return loss

    def per_sample_like(noising, reference, fake):
        def losses(x0):
            x_t = VP.add_noise(x0, noising.eps, noising.t)
            a, b = fake(x_t, noising.t, NONE), reference(x_t, noising.t, NONE)
            k = di.space_factor("score", alpha, sigma)
            return -(k.square() * ((a - b) * (a - x0))[:, 0])

        return losses

    mu, s = fixed_point(total("ikl"))
    assert s < 0.02 and mu == pytest.approx(1.63, abs=0.1)
    mu, s = fixed_point(total("squared"))
    assert s == pytest.approx(0.39, abs=0.05) and mu == pytest.approx(1.39, abs=0.05)


def test_diffused_reward_score_on_a_gaussian():
    """r = -(x - a)^2 / 2: grad log E[exp(r / beta) | x_t] = -(m - a) m' / (beta + v)."""
    schedule, beta, a = VP, 0.7, 2.0
    reference = gaussian(schedule, *REFERENCE)
    x_t = torch.tensor([[-1.0], [0.5], [1.5]], dtype=torch.float64)
    t = torch.full((3,), 600.0, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t[:1]), schedule.sigma(t[:1])
    prior = REFERENCE[1]
    total = alpha**2 * prior + sigma**2
    slope, v = prior * alpha / total, prior * sigma**2 / total
    mean = reference(x_t, t, NONE)
    expected = -(mean - a) * slope / (beta + v)

    def reward(x0):
        return -(x0[:, 0] - a).square() / 2

    options = {"reference": reference, "reward": reward, "beta": beta, "schedule": schedule}
    proxy = di.diffused_reward_score(x_t, t, NONE, **options)
    torch.testing.assert_close(proxy, -(mean - a) * slope / beta)

    steps, draws = 60, 1500
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(600, 0, steps + 1).round().double()[1:]
    big = torch.cat([x_t] * draws)
    # draws as a batch: the same estimator, without a Python loop over draws
    leaf = x_t.clone().requires_grad_()
    x, now = torch.cat([leaf] * draws), t.repeat(draws)
    for to in grid:
        following = torch.full_like(now, float(to))
        noise = torch.randn(big.shape, generator=generator, dtype=torch.float64)
        x = di._stochastic_step(x, now, following, reference(x, now, NONE), noise, schedule)
        now = following
    values = (reward(reference(x, now, NONE)) / beta).view(draws, 3)
    (score,) = torch.autograd.grad(torch.logsumexp(values, 0).sum(), leaf)
    torch.testing.assert_close(score, expected, rtol=0.08, atol=0.03)
    # and the function itself, with few draws, is that very estimator
    few = [[torch.randn(3, 1, generator=generator, dtype=torch.float64)] for _ in range(4)]
    found = di.diffused_reward_score(
        x_t, t, NONE, noises=few, times=[torch.full((3,), 300.0, dtype=torch.float64)], **options
    )
    assert found.shape == x_t.shape and torch.isfinite(found).all()


def test_the_tilted_law_is_the_fixed_point():
    """IKL towards the exactly tilted reference vanishes at p_reference exp(r / beta) / Z."""
    beta, a, (m, v) = 0.7, 2.0, REFERENCE
    tilted_variance = 1 / (1 / v + 1 / beta)
    tilted_mean = tilted_variance * (m / v + a / beta)
    reference = gaussian(VP, m, v)

    def score(x_t, t, _cond):
        alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
        total = alpha**2 * v + sigma**2
        slope, spread = v * alpha / total, v * sigma**2 / total
        return -(reference(x_t, t, NONE) - a) * slope / (beta + spread)

    tilted = di.tilted_reference(reference, VP, score)
    exact = gaussian(VP, tilted_mean, tilted_variance)
    x_t = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    for time in (20.0, 400.0, 900.0):
        t = torch.full((7,), time, dtype=torch.float64)
        torch.testing.assert_close(tilted(x_t, t, NONE), exact(x_t, t, NONE))


def test_distances():
    y = torch.randn(5, 3, 2, dtype=torch.float64)
    for distance in (squared(), pseudo_huber(0.3)):
        leaf = y.clone().requires_grad_()
        (by_hand,) = torch.autograd.grad(distance.value(leaf).sum(), leaf)
        torch.testing.assert_close(distance.gradient(y), by_hand)
        assert float(distance.value(0 * y).abs().max()) == 0
    with pytest.raises(ValueError, match="positive"):
        pseudo_huber(0.0)
    with pytest.raises(ValueError, match="score, eps, x0"):
        di.space_factor("latent", torch.ones(1), torch.ones(1))
