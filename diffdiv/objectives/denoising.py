"""Denoising score matching in the prediction space of the network; regression on ODE pairs."""

from torch import Tensor

from diffdiv.core.schedule import Noising
from diffdiv.models.denoiser import Condition, Denoiser


def denoising_loss(denoiser: Denoiser, x0: Tensor, cond: Condition, at: Noising) -> Tensor:
    """Mean squared error of the raw prediction (eps, v, flow, or EDM's F).

    For an EDM-preconditioned network this is EDM's weighting lambda(sigma) = 1/c_out^2 of the x0
    error (arXiv 2206.00364, table 1); for eps and v networks the usual simple loss.

    Args:
        denoiser: network under training.
        x0: clean samples [B, ...], detached.
        cond: their conditions.
        at: their times and noise.

    Returns:
        Loss, float32 scalar.
    """
    x_t = denoiser.schedule.add_noise(x0, at.eps, at.t)
    target = denoiser.target(x0, at.eps, at.t)
    error = denoiser.raw(x_t, at.t, cond).to(target.dtype) - target
    return error.square().mean()


def regression_loss(x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """Mean squared error of the student against the end of the teacher's ODE from the same noise.

    The warm-up of one-step students (DMD2, arXiv 2405.14867, for SDXL at t_init = 399).

    Args:
        x0: student samples [B, ...].
        teacher_x0: the teacher's, from the same z and condition.

    Returns:
        Loss, float32 scalar.
    """
    return (x0.float() - teacher_x0).square().mean()
