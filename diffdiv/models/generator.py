"""One-step generator: a denoiser evaluated once, at a fixed time, on pure noise.

Input conventions at t_init (alpha, sigma = the schedule's coefficients there):

    unit    x_t = z              DMD2-like; variance-preserving teachers
    ve      x_t = sigma z        EDM-like ("sigma_init" students)

They are different students: at t_init = 399 of Stable Diffusion the two inputs differ by a factor
two, so the export records which one was trained.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffdiv.models.denoiser import Condition, Denoiser

InputConvention = Literal["unit", "ve"]


@dataclass(frozen=True)
class Generator:
    """x0 = denoiser(input(z), t_init, cond).

    Attributes:
        denoiser: the student as a denoiser.
        t_init: its only time (schedule units: index, sigma or 0..1).
        convention: scale of the input.
    """

    denoiser: Denoiser
    t_init: float
    convention: InputConvention

    def __post_init__(self) -> None:
        t_max = self.denoiser.schedule.t_max
        if not 0 < self.t_init <= t_max:
            raise ValueError(f"t_init must lie in (0, {t_max:g}], not {self.t_init:g}")

    def __call__(self, z: Tensor, cond: Condition) -> Tensor:
        """Samples of the student.

        Args:
            z: standard normal noise [B, C, H, W].
            cond: condition of batch B.

        Returns:
            x0, shape of z, float32.
        """
        t = torch.full((len(z),), self.t_init, dtype=torch.float64, device=z.device)
        if self.convention == "ve":
            z = z * self.denoiser.schedule.sigma(t[:1]).to(z.dtype)
        return self.denoiser(z, t, cond)

    def with_net(self, net: nn.Module) -> "Generator":
        """The same generator around another network (averaged weights, a wrapper)."""
        return replace(self, denoiser=self.denoiser.with_net(net))
