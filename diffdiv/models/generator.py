"""Generators of one or a few steps: a denoiser at fixed times, started on pure noise.

Input conventions at t_init (alpha, sigma = the schedule's coefficients there):

    unit    x_t = z              DMD2-like; variance-preserving teachers
    ve      x_t = sigma z        EDM-like ("sigma_init" students)

They are different students: at t_init = 399 of Stable Diffusion the two inputs differ by a factor
two, so the export records which one was trained.

A student of K steps predicts x0, is noised afresh to the next time, and so on (consistency
sampling). It is trained by backward simulation (DMD2, arXiv 2405.14867, section 4.5): its own first
k steps without gradient make the input of the step that learns, as they will at inference.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffdiv.models.denoiser import Condition, Denoiser

InputConvention = Literal["unit", "ve"]


@dataclass(frozen=True)
class Generator:
    """x0 = denoiser(input(z), t_init, cond); each further step denoises x0 noised to its own time.

    Attributes:
        denoiser: the student as a denoiser.
        t_init: its first time (schedule units: index, sigma or 0..1).
        convention: scale of the first input.
        num_steps: K.
    """

    denoiser: Denoiser
    t_init: float
    convention: InputConvention
    num_steps: int = 1

    def __post_init__(self) -> None:
        schedule = self.denoiser.schedule
        if not 0 < self.t_init <= schedule.t_max:
            raise ValueError(f"t_init must lie in (0, {schedule.t_max:g}], not {self.t_init:g}")
        if self.num_steps > 1 and schedule.family == "edm":
            raise ValueError("a student of several steps needs a vp or flow teacher, not edm")
        if schedule.family == "vp" and (self.t_init + 1) % self.num_steps:
            raise ValueError(
                f"t_init {self.t_init:g}: {self.num_steps} steps must divide t_init + 1 (as in 999)"
            )

    @property
    def times(self) -> tuple[float, ...]:
        """The K times, falling; for vp those of diffusers' LCMScheduler (999, 749, 499, 249)."""
        count = self.num_steps
        if self.denoiser.schedule.family == "vp":
            spacing = (int(self.t_init) + 1) // count
            return (self.t_init, *(k * spacing - 1.0 for k in range(count - 1, 0, -1)))
        return tuple(self.t_init * k / count for k in range(count, 0, -1))

    @property
    def description(self) -> str:
        """In words, for tables."""
        return f"{self.num_steps} step{'s' if self.num_steps > 1 else ''}"

    def noise_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of the noise for samples of ``shape``: a draw for each step, along the channels."""
        return self.num_steps * shape[0], *shape[1:]

    def __call__(self, z: Tensor, cond: Condition, *, last: int | None = None) -> Tensor:
        """Samples of the student.

        Args:
            z: standard normal noise [B, K C, H, W].
            cond: condition of batch B.
            last: stop behind this step, 0..K-1, the earlier ones without gradient (backward
                simulation); None = all steps, with gradient where it is asked for.

        Returns:
            x0 [B, C, H, W], float32.
        """
        schedule, draws = self.denoiser.schedule, z.chunk(self.num_steps, dim=1)
        x0 = draws[0]
        for step, time in enumerate(self.times):
            t = torch.full((len(z),), time, dtype=torch.float64, device=z.device)
            if step > 0:
                x_t = schedule.add_noise(x0, draws[step], t)
            elif self.convention == "ve":
                x_t = x0 * schedule.sigma(t[:1]).to(z.dtype)
            else:
                x_t = x0
            learns = torch.is_grad_enabled() and last in (None, step)
            with torch.set_grad_enabled(learns):
                x0 = self.denoiser(x_t, t, cond)
            if step == last:
                break
        return x0

    def with_net(self, net: nn.Module) -> "Generator":
        """The same generator around another network (averaged weights, a wrapper)."""
        return replace(self, denoiser=self.denoiser.with_net(net))
