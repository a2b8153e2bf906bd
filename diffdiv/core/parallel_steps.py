"""K deterministic DDIM steps whose network outputs are all known beforehand: a linear map.

    a_k      alpha-bar at the time of output k        p_k      alpha-bar where step k lands
    out_k    network output of the student's prediction kind, k = 1..K

DDIM (arXiv 2010.02502, eta 0) maps z_{k-1} to z_k = g_k z_{k-1} + h_k out_k, so with outputs that
do not depend on the z_k in between (TiUE, arXiv 2505.21960)

    z_K = S z_0 + sum_k E_k out_k,    S = prod_k g_k,    E_k = h_k prod_{j > k} g_j.

p_k need not be a_{k+1}: diffusers' "linspace" spacing lands beside the next listed time.
Clipping, thresholding and eta > 0 are not linear, or not deterministic: refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from diffdiv.core.prediction import PredictionKind, check_convertible, coefficients, convert

_KINDS: Mapping[str, PredictionKind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True)
class ParallelSteps:
    """K steps of a variance-preserving schedule.

    Attributes:
        kind: what the outputs predict.
        times: of the outputs, indices into the schedule; the first is where pure noise enters.
        alpha_bar: a_k, float64 [K].
        landing: p_k, float64 [K]; the last is where z_K is, almost or exactly data.
    """

    kind: PredictionKind
    times: tuple[int, ...]
    alpha_bar: Tensor
    landing: Tensor

    def __post_init__(self) -> None:
        alpha, sigma = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        check_convertible(self.kind, alpha, sigma)

    @classmethod
    def listed(
        cls,
        kind: PredictionKind,
        times: Sequence[int],
        alphas_cumprod: Tensor,
        final: float,
    ) -> "ParallelSteps":
        """Steps from each listed time to the next, and from the last one to ``final``.

        Args:
            kind: what the outputs predict.
            times: falling indices into the table.
            alphas_cumprod: the schedule's alpha-bar, [T].
            final: alpha-bar of the result, in (0, 1].

        Raises:
            ValueError: if the times do not fall, or lie outside the table.
        """
        size = len(alphas_cumprod)
        falls = all(high > low for high, low in pairwise(times))
        if not times or not falls or not 0 <= times[-1] <= times[0] < size:
            raise ValueError(f"times {list(times)} are not falling indices within 0..{size - 1}")
        table = alphas_cumprod.double()[list(times)]
        last = table.new_tensor([final])
        return cls(kind, tuple(times), table, torch.cat([table[1:], last]))

    @classmethod
    def of_scheduler(cls, scheduler: DDIMScheduler, num_steps: int) -> "ParallelSteps":
        """The steps that a diffusers DDIM scheduler would take.

        Raises:
            ValueError: if it clips or thresholds, which no linear map does.
        """
        config = scheduler.config
        for name in ("clip_sample", "thresholding"):
            if config[name]:
                raise ValueError(f"{name}: true in this scheduler, but clipped steps do not add up")
        scheduler.set_timesteps(num_steps)
        times = [int(t) for t in scheduler.timesteps]
        table = scheduler.alphas_cumprod.double()
        gap = int(config["num_train_timesteps"]) // num_steps
        final = scheduler.final_alpha_cumprod.double()
        landing = torch.stack([table[t - gap] if t >= gap else final for t in times])
        return cls(_KINDS[config["prediction_type"]], tuple(times), table[times], landing)

    def _gains(self) -> tuple[Tensor, Tensor]:
        """g_k and h_k, float64 [K]: one step applied to z alone and to the output alone."""
        alpha, sigma = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        a, b = coefficients(self.kind, alpha, sigma)
        to_alpha, to_sigma = self.landing.sqrt(), (1 - self.landing).sqrt()
        determinant = alpha * b - sigma * a
        gain = (to_alpha * b - to_sigma * a) / determinant
        return gain, (to_sigma * alpha - to_alpha * sigma) / determinant

    @property
    def noise_gain(self) -> float:
        """S."""
        return float(self._gains()[0].prod())

    @property
    def output_gains(self) -> Tensor:
        """E_k, float64 [K]."""
        gain, injection = self._gains()
        behind = gain.flip(0).cumprod(0).flip(0)  # prod_{j >= k}
        return injection * torch.cat([behind[1:], behind.new_ones(1)])

    def combine(self, z: Tensor, outputs: Tensor) -> Tensor:
        """z_K, [B, ...] in float32 or better.

        Args:
            z: standard normal noise [B, ...].
            outputs: [K, B, ...].
        """
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        gains = self.output_gains.to(outputs.device, outputs.dtype)
        return self.noise_gain * z.to(outputs.dtype) + torch.tensordot(gains, outputs, 1)

    def predicted_noise(self, z: Tensor, outputs: Tensor) -> Tensor:
        """Each output as predicted noise at its own z_{k-1}, [K, B, ...], float32 or better.

        Args:
            z, outputs: as for :meth:`combine`.
        """
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.kind == "eps":
            return outputs
        found, state = [], z.to(outputs.dtype)
        gain, injection = self._gains()
        for k, output in enumerate(outputs):
            alpha, sigma = self.alpha_bar[k].sqrt(), (1 - self.alpha_bar[k]).sqrt()
            found.append(convert(output, self.kind, "eps", state, alpha, sigma))
            state = float(gain[k]) * state + float(injection[k]) * output
        return torch.stack(found)
