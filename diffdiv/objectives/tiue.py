"""Objectives of the shared-encoder student (TiUE, arXiv 2505.21960; written from the equations).

VSD     gradient (1 - alpha_bar_t) (eps_teacher - eps_fake) at x0, both under the same guidance
KL      of the elements of every predicted noise, taken as one normal law, to N(0, 1)
"""

import torch
from torch import Tensor

from diffdiv.core.schedule import Noising, Schedule
from diffdiv.core.tensor import expand_like, loss_with_gradient
from diffdiv.models.denoiser import Condition, Denoiser, GuidedDenoiser
from diffdiv.objectives.f_distill import Metrics

AnyDenoiser = Denoiser | GuidedDenoiser


def vsd_loss(
    x0: Tensor,
    cond: Condition,
    at: Noising,
    *,
    teacher: AnyDenoiser,
    fake: AnyDenoiser,
    schedule: Schedule,
) -> tuple[Tensor, Metrics]:
    """Variational score distillation with the weight 1 - alpha_bar (arXiv 2305.16213, 2312.05239).

    (1 - alpha_bar) (eps_teacher - eps_fake) = alpha sigma (fake_x0 - teacher_x0), divided by the
    number of elements of the batch.

    Args:
        x0: student samples with graph [B, C, H, W].
        cond: their conditions.
        at: times and noise for them.
        teacher: frozen.
        fake: fitted to the student's samples; guided as the teacher is.
        schedule: the teacher's.

    Returns:
        Loss (its value is <gradient, x0>, without meaning) and metrics.
    """
    with torch.no_grad():
        x_t = schedule.add_noise(x0.detach(), at.eps, at.t)
        gap = fake(x_t, at.t, cond) - teacher(x_t, at.t, cond)
        weight = schedule.alpha(at.t) * schedule.sigma(at.t)
        grad = expand_like(weight, gap) * gap / gap.numel()
    metrics = {"student/vsd_gradient_norm": grad.norm(), "student/score_gap": gap.abs().mean()}
    return loss_with_gradient(x0, grad.to(x0.dtype)), metrics


def moment_kl(eps: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each predicted noise: sum over K, mean over the batch.

    Mean and unbiased variance are over all elements of one prediction. The mean over the batch
    keeps the weight independent of how many samples a process holds; the released code sums, so
    its weight is this one's divided by its batch (0.1 there at 8 samples is 0.8 here).

    Args:
        eps: predicted noise [K, B, C, H, W].

    Returns:
        Nats, float32 scalar.
    """
    variance, mean = torch.var_mean(eps.float().flatten(2), dim=2)
    return (variance + mean.square() - 1 - variance.log()).sum(0).mean() / 2
