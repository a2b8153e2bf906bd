"""f-distill: one-step distillation by the gradient of any f-divergence (arXiv 2502.15681v1).

    r = p_teacher(x_t) / p_student(x_t)     log_r: its logarithm, from the discriminator
    h = r^2 f''(r)                          weight of a sample, detached
    u in [0, 1)                             rank of t in the law of training times

Gradient at a generated sample:  h(r) (fake_x0 - teacher_x0) / mean|x0 - teacher_x0|,
the variational-score-distillation direction with DMD's weight (arXiv 2311.18828) times h.
Reverse KL has h = 1: then this is DMD / Diff-Instruct exactly, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor, nn

from diffdiv.core.divergence import Divergence
from diffdiv.core.schedule import Noising
from diffdiv.core.tensor import expand_like, flat_mean, loss_with_gradient, sum_over_ranks
from diffdiv.models.denoiser import Condition, Denoiser, GuidedDenoiser, concatenate
from diffdiv.objectives.denoising import denoising_loss
from diffdiv.objectives.gan import (
    approximate_r1_penalty,
    discriminator_loss,
    generator_gan_loss,
    r1_penalty,
)

Metrics = dict[str, Tensor]


def vsd_direction(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """DMD-weighted score difference at each sample: (fake_x0 - teacher_x0) / mean|x0 - teacher_x0|.

    Args:
        x0: generated samples [B, ...].
        teacher_x0: teacher's (guided) prediction at x_t.
        fake_x0: fake score's prediction at x_t.

    Returns:
        Direction of ascent of KL(q || p), detached, shape of x0. Dimensionless.
    """
    distance = flat_mean((x0 - teacher_x0).abs()).clamp_min(1e-8)
    return ((fake_x0 - teacher_x0) / expand_like(distance, x0)).detach()


class RatioStatistics:
    """Two-stage normalisation of the weights h(r) by running statistics of *earlier* updates.

    Stage 1: E_{q_t}[r] = 1 at every t, so r is divided by its running mean in a bin of the rank u
    (bins of equal probability whatever the law of t). Stage 2: h is divided by its running mean,
    so the strength of the gradient does not depend on the divergence. The sample being weighted
    never enters its own normaliser: no bias towards 1 in small batches, and gradient accumulation
    does not change the result. Means are bias-corrected exponential averages, reduced over ranks.
    Differs from the released FastGen code, which uses the current batch's means and clips r before
    stage 1. Reverse KL is an exact no-op (h / mean h = 1 / 1).

    Args:
        divergence: supplies h.
        num_bins: bins of u.
        decay: of the exponential averages, per update; 0 = the last update alone.
        clip: bounds on r after stage 1.
    """

    def __init__(
        self,
        divergence: Divergence,
        *,
        num_bins: int = 10,
        decay: float = 0.9,
        clip: tuple[float, float] = (0.1, 20.0),
    ) -> None:
        if not 0 < clip[0] < clip[1]:
            raise ValueError(f"ratio clip must be increasing and positive, not {clip}")
        self.divergence, self.num_bins, self.decay, self.clip = divergence, num_bins, decay, clip
        # rows: decayed sum of batch means, decayed sum of ones; per bin (r), and h, h^2
        self.mean_r = torch.zeros(2, num_bins, dtype=torch.float64)
        self.mean_h = torch.zeros(3, dtype=torch.float64)  # h, h^2, weight
        self.samples = torch.zeros((), dtype=torch.float64)
        self._pending = torch.zeros(2 * num_bins + 3, dtype=torch.float64)

    def _bins(self, u: Tensor) -> Tensor:
        return (u.cpu() * self.num_bins).long().clamp(0, self.num_bins - 1)

    def _normalised_log_r(self, log_r: Tensor, u: Tensor) -> Tensor:
        total, weight = self.mean_r
        mean = torch.where(weight > 0, total / weight.clamp_min(1e-300), 1.0).clamp_min(1e-12)
        centred = log_r.detach().float() - mean.log()[self._bins(u)].to(log_r.device).float()
        return centred.clamp(log(self.clip[0]), log(self.clip[1]))

    def weights(self, log_r: Tensor, u: Tensor) -> Tensor:
        """Weights h(r) / E[h], shape [B], float32, detached.

        Args:
            log_r: discriminator logits at the student's x_t, shape [B], nats.
            u: ranks of t in [0, 1), shape [B].

        Raises:
            ValueError: if ``log_r`` is not one-dimensional.
        """
        if log_r.ndim != 1:
            raise ValueError(f"log_r must have shape [B], not {list(log_r.shape)}")
        h = self.divergence.h(self._normalised_log_r(log_r, u))
        total, _, weight = self.mean_h
        if weight == 0:  # nothing seen yet: an untrained discriminator says r = 1
            return h / self.divergence.h(torch.zeros((), device=h.device))
        return h / (total / weight).to(h.device, h.dtype)

    def observe(self, log_r: Tensor, u: Tensor) -> None:
        """Add logits at student samples to the next :meth:`commit` (any number of times)."""
        h = self.divergence.h(self._normalised_log_r(log_r, u)).double().cpu()
        r = log_r.detach().double().cpu().clamp(-10, 10).exp()
        bins = self._bins(u)
        k = self.num_bins
        self._pending[:k].index_add_(0, bins, r)
        self._pending[k : 2 * k].index_add_(0, bins, torch.ones_like(r))
        count = torch.tensor(float(len(h)))
        self._pending[2 * k :] += torch.stack([h.sum(), h.square().sum(), count])

    def commit(self) -> None:
        """Fold what was observed on all ranks into the running means; call once an update."""
        sums = sum_over_ranks(self._pending)
        self._pending = torch.zeros_like(self._pending)
        k, d = self.num_bins, self.decay
        r, count = sums[:k], sums[k : 2 * k]
        seen = count > 0
        batch_mean = torch.stack([r / count.clamp_min(1), torch.ones_like(r)])
        self.mean_r = torch.where(seen, d * self.mean_r + (1 - d) * batch_mean, self.mean_r)
        if sums[-1] > 0:
            self.mean_h = d * self.mean_h + (1 - d) * (sums[2 * k :] / sums[-1])
            self.samples = sums[-1]

    def warning(self) -> str | None:
        """One sentence when the batch is too small for stage 2 of this divergence, else None.

        Measured by the relative standard error of the mean of h, 0 for reverse KL: Var[h]/E[h]^2
        over the samples the average effectively holds, B (1 + d)/(1 - d).
        """
        total, square, weight = self.mean_h.tolist()
        if total == 0:
            return None
        relative_variance = max(square * weight / total**2 - 1, 0.0)
        held = float(self.samples) * (1 + self.decay) / (1 - self.decay)
        error = (relative_variance / held) ** 0.5
        if error <= 0.25:
            return None
        return (
            f"the mean of h for {self.divergence.name} is known to {error:.0%} only (batch "
            f"{int(self.samples)}, decay {self.decay}): use a larger batch, a decay nearer 1, or a "
            "divergence of lower variance"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Running statistics for a checkpoint (taken between updates: nothing is pending)."""
        return {"mean_r": self.mean_r, "mean_h": self.mean_h, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        self.mean_r, self.mean_h, self.samples = (
            state[name].clone() for name in ("mean_r", "mean_h", "samples")
        )


@dataclass(frozen=True)
class Critic:
    """What judges the student's samples: teacher, fake score, and heads on one of their trunks.

    Attributes:
        teacher: frozen, guided or not.
        fake: denoiser fitted to the student's samples; never guided.
        disc: heads giving log_r, or None when neither ratio nor GAN loss is wanted.
        blocks: tapped block names.
        trunk: whose features the heads read.
    """

    teacher: Denoiser | GuidedDenoiser
    fake: Denoiser
    disc: nn.Module | None
    blocks: Sequence[str]
    trunk: Literal["teacher", "fake"]

    def logits(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """log_r [B] at x_t; the trunk's forward stops behind the last tapped block."""
        assert self.disc is not None
        teacher = self.teacher
        base = teacher.denoiser if isinstance(teacher, GuidedDenoiser) else teacher
        trunk = base if self.trunk == "teacher" else self.fake
        # only a gradient that is asked for at x_t goes through the trunk: its weights learn nothing
        with torch.set_grad_enabled(torch.is_grad_enabled() and x_t.requires_grad):
            features = trunk.features(x_t, t, cond, self.blocks)
        return self.disc(features)

    def judge(
        self, x_t: Tensor, t: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """teacher_x0, fake_x0 and log_r at x_t; one forward of each network in all."""
        if self.disc is None:
            with torch.no_grad():
                return self.teacher(x_t, t, cond), self.fake(x_t, t, cond), None
        if self.trunk == "teacher":
            teacher_x0, features = self.teacher.with_features(x_t, t, cond, self.blocks)
            with torch.no_grad():
                fake_x0 = self.fake(x_t.detach(), t, cond)
        else:
            with torch.no_grad():
                teacher_x0 = self.teacher(x_t.detach(), t, cond)
            fake_x0, features = self.fake.with_features(x_t, t, cond, self.blocks)
        return teacher_x0.detach(), fake_x0.detach(), self.disc(features)


def student_loss(
    x0: Tensor,
    cond: Condition,
    at: Noising,
    *,
    critic: Critic,
    ratio: RatioStatistics | None,
    gan_weight: float | None = None,
    balance_gan: bool = False,
) -> tuple[Tensor, Metrics]:
    """f-distill loss of the student (see the module) plus ``gan_weight`` times the GAN loss.

    Both gradients are taken at x0 first (their norms are what one tunes the GAN weight by), then
    sent through the student in one backward.

    Args:
        x0: student samples with graph, shape [B, C, H, W].
        cond: their conditions.
        at: times (with ranks) and noise for them.
        critic: teacher, fake score and heads.
        ratio: running statistics; the logits are observed, the caller commits. None only without
            discriminator (plain reverse KL).
        gan_weight: lambda of the generator's GAN loss; None = off.
        balance_gan: rescale so that ||GAN gradient|| = gan_weight * ||VSD gradient|| at x0.

    Returns:
        Loss (its value is <gradient, x0>, without meaning) and metrics.
    """
    leaf = x0.detach().requires_grad_(gan_weight is not None)
    x_t = critic.fake.schedule.add_noise(leaf, at.eps, at.t)
    with torch.set_grad_enabled(gan_weight is not None):
        teacher_x0, fake_x0, log_r = critic.judge(x_t, at.t, cond)
    grad = vsd_direction(leaf, teacher_x0, fake_x0)
    metrics: Metrics = {}
    if log_r is not None:
        assert ratio is not None
        weights = ratio.weights(log_r, at.u)
        ratio.observe(log_r, at.u)
        grad = expand_like(weights, grad) * grad
        metrics |= {"ratio/log_r_mean": log_r.detach().mean(), "ratio/weight_max": weights.max()}
    grad = grad / grad.numel()
    metrics["student/vsd_gradient_norm"] = grad.norm()
    metrics["student/score_gap"] = (fake_x0 - teacher_x0).abs().mean()
    if gan_weight is not None:
        assert log_r is not None
        gan_loss = generator_gan_loss(log_r)
        (gan_grad,) = torch.autograd.grad(gan_loss, leaf)
        scale: Tensor | float = gan_weight
        if balance_gan:
            scale = gan_weight * _global_norm(grad) / _global_norm(gan_grad).clamp_min(1e-12)
        metrics["student/gan_loss"] = gan_loss.detach()
        metrics["student/gan_gradient_norm"] = (scale * gan_grad).norm()
        grad = grad + scale * gan_grad
    return loss_with_gradient(x0, grad.to(x0.dtype)), metrics


def _global_norm(x: Tensor) -> Tensor:
    return sum_over_ranks(x.square().sum()).sqrt()


def fake_score_loss(
    fake: Denoiser, x0: Tensor, cond: Condition, at: Noising
) -> tuple[Tensor, Metrics]:
    """Denoising score matching of the fake score on (detached) student samples."""
    loss = denoising_loss(fake, x0.detach(), cond, at)
    return loss, {"fake/loss": loss.detach()}


@dataclass(frozen=True)
class Real:
    """Real (or teacher-made) samples for the discriminator, with their own times and noise."""

    x0: Tensor
    cond: Condition
    at: Noising


def density_ratio_loss(
    x0: Tensor,
    cond: Condition,
    at: Noising,
    real: Real,
    *,
    critic: Critic,
    ratio: RatioStatistics,
    r1_gamma: float = 0.0,
    r1: Literal["exact", "approximate"] = "approximate",
) -> tuple[Tensor, Metrics]:
    """Discriminator loss on noised student samples and noised real samples.

    Fake and real go through the feature trunk in one batch, up to the tapped block only. The
    student's logits also feed the ratio statistics: free samples of r.

    Args:
        x0: student samples, [B, ...]; detached here.
        cond, at: as in :func:`student_loss`.
        real: as many real samples.
        r1_gamma: weight of the R1 penalty; 0 = off.
        r1: exact (second derivative) or by finite differences.
    """
    schedule = critic.fake.schedule
    x_t_fake = schedule.add_noise(x0.detach(), at.eps, at.t)
    x_t_real = schedule.add_noise(real.x0, real.at.eps, real.at.t)
    both = torch.cat([x_t_fake, x_t_real])
    log_r = critic.logits(both, torch.cat([at.t, real.at.t]), concatenate([cond, real.cond]))
    log_r_fake, log_r_real = log_r.split([len(x0), len(real.x0)])
    ratio.observe(log_r_fake, at.u)
    loss = discriminator_loss(log_r_fake, log_r_real)
    metrics: Metrics = {
        "disc/loss": loss.detach(),
        "disc/accuracy": ((log_r_fake < 0).float().mean() + (log_r_real > 0).float().mean()) / 2,
    }
    if r1_gamma > 0:

        def logits(x_t: Tensor) -> Tensor:
            return critic.logits(x_t, real.at.t, real.cond)

        if r1 == "exact":
            penalty = r1_penalty(logits, x_t_real)
        else:
            # the fake samples' noise: independent of x_t_real, however the batch is split
            penalty = approximate_r1_penalty(logits, x_t_real, log_r_real, at.eps)
        metrics["disc/r1"] = penalty.detach()
        loss = loss + r1_gamma * penalty
    return loss, metrics
