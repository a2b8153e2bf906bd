"""Deterministic sampling of any denoiser: the probability-flow ODE, first or second order.

With y = x/alpha and s = sigma/alpha the ODE is dy/ds = eps(x, t) for every schedule, so one Euler
step (= DDIM, arXiv 2010.02502) and one Heun step (EDM, arXiv 2206.00364, algorithm 1) serve all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffdiv.core.prediction import convert
from diffdiv.core.schedule import Schedule
from diffdiv.core.tensor import at_once, expand_like
from diffdiv.models.denoiser import Condition, Denoiser, GuidedDenoiser


def sample_in_parts(
    sampler: Callable[[Tensor, Condition], Tensor], z: Tensor, cond: Condition
) -> Tensor:
    """x0 [B, ...] of many noises and as many conditions, :func:`at_once` in a call."""
    size = at_once(z.shape)
    starts = range(0, len(z), size)
    return torch.cat([sampler(z[i : i + size], cond[i : i + size]) for i in starts])


def time_grid(schedule: Schedule, num_steps: int) -> Tensor:
    """Decreasing times of ``num_steps`` sampling steps, the last one ends in data.

    vp: trailing indices; edm: Karras' grid (rho 7) down to 0.002, at most 1/1000 of the start;
    flow: equal steps of the schedule's own (shifted) quantile.

    Returns:
        Times [num_steps], float64; the step after the last one is t = 0.
    """
    steps = torch.arange(num_steps, dtype=torch.float64)
    match schedule.family:
        case "vp":
            size = schedule.t_max + 1
            return (size - steps * size / num_steps).round() - 1
        case "edm":
            high, low = schedule.t_max, min(0.002, schedule.t_max / 1000)
            ramp = steps / max(num_steps - 1, 1)
            return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return schedule.sample_t(1 - steps / num_steps)


@torch.no_grad()
def sample_ode(
    denoiser: Denoiser | GuidedDenoiser,
    z: Tensor,
    cond: Condition,
    times: Tensor,
    *,
    heun: bool = False,
) -> Tensor:
    """Samples of a denoiser from standard normal noise.

    Args:
        denoiser: teacher, guided or not.
        z: standard normal noise [B, ...]; scaled by sigma at the first time.
        cond: conditions of batch B.
        times: decreasing times, see :func:`time_grid`.
        heun: second order (2 N - 1 evaluations); needs alpha > 0 at the first time.

    Returns:
        x0, shape and device of z.
    """
    schedule = (denoiser.denoiser if isinstance(denoiser, GuidedDenoiser) else denoiser).schedule

    def at(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch_t = t.to(z.device).expand(len(z))
        return batch_t, schedule.alpha(batch_t), schedule.sigma(batch_t)

    t, alpha, sigma = at(times[0])
    x = z * expand_like(sigma, z)
    for following in times[1:]:
        x0 = denoiser(x, t, cond).to(x.dtype)
        eps = convert(x0, "x0", "eps", x, alpha, sigma)
        next_t, next_alpha, next_sigma = at(following)
        step = expand_like(next_alpha, x) * x0 + expand_like(next_sigma, x) * eps
        if heun:
            next_x0 = denoiser(step, next_t, cond).to(x.dtype)
            next_eps = convert(next_x0, "x0", "eps", step, next_alpha, next_sigma)
            ds = next_sigma / next_alpha - sigma / alpha
            y = x / expand_like(alpha, x) + expand_like(ds, x) * (eps + next_eps) / 2
            step = expand_like(next_alpha, x) * y
        x, t, alpha, sigma = step, next_t, next_alpha, next_sigma
    return denoiser(x, t, cond).to(x.dtype)
