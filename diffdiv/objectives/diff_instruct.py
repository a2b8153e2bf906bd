"""What holds a one-step generator near a reference diffusion while a reward moves it.

    x_t = alpha x0 + sigma eps            x0 = g(z), the generator's
    fake, reference                       denoisers: fake is fitted to the generator's samples
    y = k (fake_x0 - reference_x0)        score difference in a space: k = alpha / sigma^2 (score),
                                          alpha / sigma (eps), 1 (x0)

IKL (Diff-Instruct, arXiv 2305.18455, and Diff-Instruct++, 2410.18881):
    gradient at x0: w(t) (fake_x0 - reference_x0).
Score divergence (SIM, 2410.16794; Diff-Instruct*, 2410.20898), D = E w(t) d(y), law of x_t frozen:
    gradient of  - w(t) d'(y)^T k (fake_x0 - x0),  with x_t LIVE in both networks and in d'(y).
Detaching x_t anywhere in the latter gives another, wrong vector (tests show how wrong). So both
frozen networks are differentiated with respect to their inputs, which KL methods do not need.

Signs and constants are those of minimisation. All losses are means over batch and dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffdiv.core.schedule import Noising, Schedule
from diffdiv.core.score_distance import ScoreDistance
from diffdiv.core.tensor import expand_like, flat_mean, loss_with_gradient
from diffdiv.models.denoiser import Condition

Space = Literal["score", "eps", "x0"]
AnyDenoiser = Callable[[Tensor, Tensor, Condition], Tensor]
Reward = Callable[[Tensor], Tensor]  # x0 [B, ...] -> rewards [B]
Metrics = dict[str, Tensor]


def space_factor(space: Space, alpha: Tensor, sigma: Tensor) -> Tensor:
    """k [B]: what a difference of x0 predictions is multiplied by to be one of scores, eps or x0.

    Raises:
        ValueError: if there is no such space.
    """
    match space:
        case "score":
            return alpha / sigma.square()
        case "eps":
            return alpha / sigma
        case "x0":
            return torch.ones_like(alpha)
    raise ValueError(f"space {space!r} is not one of score, eps, x0")


def _weight(x0: Tensor, reference_x0: Tensor, normalise: bool) -> Tensor:
    """1 / mean|x0 - reference_x0| of each sample [B] (as SiD and DMD weigh), or ones."""
    if not normalise:
        return x0.new_ones(len(x0))
    return 1 / flat_mean((x0 - reference_x0).abs()).detach().clamp_min(1e-5)


def ikl_loss(
    x0: Tensor,
    cond: Condition,
    at: Noising,
    *,
    reference: AnyDenoiser,
    fake: AnyDenoiser,
    schedule: Schedule,
    normalise: bool = True,
) -> tuple[Tensor, Metrics]:
    """Integral KL: loss with gradient w (fake_x0 - reference_x0) at x0, over all its elements.

    Args:
        x0: generator samples with graph [B, ...].
        cond: their conditions.
        at: times and noise for them.
        reference: frozen, guided or not.
        fake: fitted to the generator's samples; frozen here.
        schedule: of both.
        normalise: w = 1 / mean|x0 - reference_x0| of each sample; else 1.

    Returns:
        Loss (its value is <gradient, x0>, without meaning) and metrics.
    """
    with torch.no_grad():
        x_t = schedule.add_noise(x0, at.eps, at.t)
        reference_x0 = reference(x_t, at.t, cond)
        gap = fake(x_t, at.t, cond) - reference_x0
        grad = expand_like(_weight(x0, reference_x0, normalise), gap) * gap / gap.numel()
    metrics = {"regulariser/score_gap": gap.abs().mean(), "regulariser/gradient_norm": grad.norm()}
    return loss_with_gradient(x0, grad.to(x0.dtype)), metrics


def score_divergence_loss(
    x0: Tensor,
    cond: Condition,
    at: Noising,
    *,
    reference: AnyDenoiser,
    fake: AnyDenoiser,
    schedule: Schedule,
    distance: ScoreDistance,
    space: Space = "x0",
    normalise: bool = True,
) -> tuple[Tensor, Metrics]:
    """Score divergence by a loss of equal gradient (see the module).

    Args:
        x0, cond, at, schedule, normalise: as in :func:`ikl_loss`.
        reference, fake: frozen, but differentiated with respect to x_t.
        distance: d.
        space: in which d is taken; the constant of a pseudo-Huber distance lives there.

    Returns:
        Loss (its gradient is meant, its value is not the divergence) and metrics, among them the
        divergence itself and |y|.
    """
    x_t = schedule.add_noise(x0, at.eps, at.t)
    fake_x0, reference_x0 = fake(x_t, at.t, cond), reference(x_t, at.t, cond)
    k = space_factor(space, schedule.alpha(at.t), schedule.sigma(at.t))
    k = expand_like(k, fake_x0)
    y = k * (fake_x0 - reference_x0)
    pulled = -(distance.gradient(y) * k * (fake_x0 - x0)).flatten(1).sum(1)
    weight = _weight(x0, reference_x0, normalise) / x0[0].numel()
    metrics = {
        "regulariser/divergence": distance.value(y.detach()).mean() / x0[0].numel(),
        "regulariser/score_norm": y.detach().flatten(1).norm(dim=1).mean(),
        "regulariser/score_gap": (fake_x0 - reference_x0).detach().abs().mean(),
    }
    return (weight * pulled).mean(), metrics


def sid_loss(
    x0: Tensor,
    cond: Condition,
    at: Noising,
    *,
    reference: AnyDenoiser,
    fake: AnyDenoiser,
    schedule: Schedule,
    alpha: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """SiD (arXiv 2404.04057): (reference - fake)^T [(reference - x0) - alpha (reference - fake)].

    alpha = 1 is the squared score divergence in the space of x0; alpha = 1/2 is half the gradient
    of the Fisher divergence with the law of x_t moving along.

    Args:
        x0, cond, at, reference, fake, schedule: as in :func:`score_divergence_loss`.
        alpha: SiD's.
    """
    x_t = schedule.add_noise(x0, at.eps, at.t)
    fake_x0, reference_x0 = fake(x_t, at.t, cond), reference(x_t, at.t, cond)
    gap = reference_x0 - fake_x0
    inner = flat_mean(gap * ((reference_x0 - x0) - alpha * gap))
    loss = (_weight(x0, reference_x0, normalise=True) * inner).mean()
    return loss, {"regulariser/score_gap": gap.detach().abs().mean()}


def guidance_reward_loss(
    x0: Tensor,
    cond: Condition,
    at: Noising,
    *,
    reference: AnyDenoiser,
    uncond: Condition,
    schedule: Schedule,
    normalise: bool = True,
) -> Tensor:
    """Classifier-free guidance as an implicit reward, outside the regulariser ("CFG out").

    Ascends log p_reference(x_t | cond) - log p_reference(x_t): gradient
    -w (reference_x0(cond) - reference_x0(uncond)) at x0. Under IKL, adding it with scale s equals a
    reference guided with scale 1 + s; under a score divergence it does not.

    Args:
        x0, cond, at, schedule, normalise: as in :func:`ikl_loss`.
        reference: frozen, not guided.
        uncond: condition of batch 1.
    """
    with torch.no_grad():
        x_t = schedule.add_noise(x0, at.eps, at.t)
        with_cond = reference(x_t, at.t, cond)
        gap = reference(x_t, at.t, uncond.expand(len(x_t))) - with_cond
        grad = expand_like(_weight(x0, with_cond, normalise), gap) * gap / gap.numel()
    return loss_with_gradient(x0, grad.to(x0.dtype))


def diffused_reward_score(
    x_t: Tensor,
    t: Tensor,
    cond: Condition,
    *,
    reference: AnyDenoiser,
    reward: Reward,
    beta: float,
    schedule: Schedule,
    noises: Sequence[Sequence[Tensor]] = ((),),
    times: Sequence[Tensor] = (),
) -> Tensor:
    """grad_{x_t} log E[exp(r(x0) / beta) | x_t], the score of the reward-tilted law (DIDR).

    The expectation runs over the reference's own x0 given x_t, drawn by a short differentiable
    denoising: from t through ``times`` to data, with fresh noise at each of them (exact as steps
    and draws grow). Without times it is the one-step proxy grad r(reference_x0) / beta, which
    leaves out the spread of x0 (arXiv 2605.24001 names a short denoising; this estimator is
    derived here).

    Args:
        x_t: noised samples [B, ...]; detached here.
        t: their times [B].
        cond: their conditions.
        reference: frozen, differentiated with respect to its input.
        reward: differentiable, of x0.
        beta: temperature, reward units per nat.
        schedule: of the reference.
        noises: standard normal noise, [draws][len(times)] tensors of the shape of x_t.
        times: falling times [B] below t.

    Returns:
        The score at x_t, detached, shape of x_t.
    """
    with torch.enable_grad():
        leaf = x_t.detach().requires_grad_()
        values = []
        for draw in noises:
            x, now = leaf, t
            for noise, following in zip(draw, times, strict=True):
                x = _stochastic_step(x, now, following, reference(x, now, cond), noise, schedule)
                now = following
            values.append(reward(reference(x, now, cond)) / beta)
        total = torch.logsumexp(torch.stack(values), 0).sum()
        (score,) = torch.autograd.grad(total, leaf)
    return score


def _stochastic_step(
    x: Tensor, t: Tensor, to: Tensor, x0: Tensor, noise: Tensor, schedule: Schedule
) -> Tensor:
    """x at time ``to`` from q(x_to | x_t, x0): DDPM's posterior (arXiv 2006.11239)."""
    alpha, sigma = expand_like(schedule.alpha(t), x), expand_like(schedule.sigma(t), x)
    alpha_to, sigma_to = expand_like(schedule.alpha(to), x), expand_like(schedule.sigma(to), x)
    ratio = alpha / alpha_to
    variance = sigma.square() - ratio.square() * sigma_to.square()  # of x given x_to
    of_x = ratio * sigma_to.square() / sigma.square()
    of_x0 = alpha_to * variance / sigma.square()
    spread = (variance.clamp_min(0) * sigma_to.square() / sigma.square()).sqrt()
    return of_x * x + of_x0 * x0 + spread * noise


def tilted_reference(
    reference: AnyDenoiser,
    schedule: Schedule,
    score: Callable[[Tensor, Tensor, Condition], Tensor],
) -> AnyDenoiser:
    """The denoiser of the diffused reward-tilted law: reference_x0 + (sigma^2 / alpha) s_r.

    With :func:`ikl_loss` and this as its reference the generator's optimum is the tilted law
    itself (DIDR), p_reference exp(r / beta) / Z.

    Args:
        reference: frozen.
        schedule: of the reference.
        score: s_r at (x_t, t, cond), see :func:`diffused_reward_score`.
    """

    def denoise(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        scale = schedule.sigma(t).square() / schedule.alpha(t)
        return reference(x_t, t, cond) + expand_like(scale, x_t) * score(x_t, t, cond)

    return denoise
