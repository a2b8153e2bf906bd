"""Keeping an image-to-video model from copying its image: how the condition is degraded.

    y      the condition: latents (or pixels) of the image, [B, ...]
    t      time of the video sample, [B], in the unit of its schedule
    tau    the same as a number in [0, 1]: 1 = pure noise (see time_map)
    level  how much of y was taken away, [B]; 0 = y itself

TimeNoise (arXiv 2406.15735v3): y + beta eps, beta = beta_m sigmoid(mu(tau) + s z), z ~ N(0, 1),
mu(tau) = mu_max (2 tau^a - 1): the noisier the video, the noisier the image. Its rivals have the
same interface: constant noise, and the low-pass of ALG (arXiv 2506.08456).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from diffdiv.core.latent_stats import LatentMoments as LatentMoments
from diffdiv.core.latent_stats import LatentSpace as LatentSpace
from diffdiv.core.latent_stats import LatentStats as LatentStats
from diffdiv.core.latent_stats import StartLaw as StartLaw
from diffdiv.core.latent_stats import analytic_init as analytic_init
from diffdiv.core.noise import normal, uniform
from diffdiv.core.schedule import Schedule
from diffdiv.core.tensor import expand_like

TimeMap = Callable[[Tensor], Tensor]
Space = Literal["latent", "pixel"]
_RANKS = 2**14


def time_map(schedule: Schedule, kind: Literal["rank", "log_snr", "time"] = "rank") -> TimeMap:
    """t [B] in the schedule's unit -> tau [B] in [0, 1], float64, clamped.

    "rank": the share of training times below t, so that tau is uniform in training whatever the
    law of times. "log_snr": linear in ln(sigma/alpha), what an EDM network is told of the time.
    "time": t / t_max; for EDM that is nearly always 0.

    Raises:
        ValueError: for "log_snr" where the schedule ends without signal.
    """
    if kind == "time":
        return lambda t: (t.double() / schedule.t_max).clamp(0, 1)
    grid = schedule.sample_t((torch.arange(_RANKS, dtype=torch.float64) + 0.5) / _RANKS)
    if kind == "rank":

        def rank(t: Tensor) -> Tensor:
            table, t = grid.to(t.device), t.double().contiguous()  # searchsorted warns else
            below = torch.searchsorted(table, t) + torch.searchsorted(table, t, right=True)
            return below.double() / (2 * _RANKS)  # ties share the middle

        return rank

    def log_snr(t: Tensor) -> Tensor:
        return (schedule.sigma(t) / schedule.alpha(t)).log()

    ends = torch.tensor([float(schedule.quantile(grid.new_zeros(1))), schedule.t_max]).double()
    low, high = log_snr(ends).tolist()
    if not (torch.isfinite(log_snr(ends)).all() and low < high):
        raise ValueError("time map 'log_snr': this schedule ends without signal; take 'rank'")
    return lambda t: ((log_snr(t.double()) - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class ConditionDraw:
    """Randomness of a degraded condition: z [B] normal, u [B] uniform, eps [B, ...] normal."""

    z: Tensor
    u: Tensor
    eps: Tensor

    @staticmethod
    def draw(
        shape: Sequence[int],
        indices: Sequence[int],
        *,
        seed: int,
        purpose: str = "condition",
        device: torch.device | None = None,
    ) -> "ConditionDraw":
        """By global sample index, for conditions of ``shape``; one value of eps a pixel."""
        level, clean, eps = (f"{purpose}_{part}" for part in ("level", "clean", "eps"))
        z = normal((1,), seed=seed, purpose=level, indices=indices, dtype=torch.float64)[:, 0]
        u = uniform(seed=seed, purpose=clean, indices=indices)
        noise = normal(shape, seed=seed, purpose=eps, indices=indices)
        return ConditionDraw(z.to(device), u.to(device), noise.to(device))


class ConditionNoise(Protocol):
    """How a condition is degraded at time t."""

    @property
    def space(self) -> Space:
        """What y is: the image's latents, or its pixels before they are encoded."""
        ...

    def __call__(self, y: Tensor, t: Tensor, noise: ConditionDraw) -> tuple[Tensor, Tensor]:
        """Degraded y of its shape and dtype, and the level [B], float32."""
        ...


def _check(clean_probability: float, **positive: float) -> None:
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, not {value:g}")
    if not 0 <= clean_probability <= 1:
        raise ValueError(f"clean_probability must lie in [0, 1], not {clean_probability:g}")


def _unless_clean(level: Tensor, noise: ConditionDraw, clean_probability: float) -> Tensor:
    return torch.where(noise.u < clean_probability, 0.0, level.double()).float()


@dataclass(frozen=True)
class TimeNoise:
    """White noise on the condition, the stronger the noisier the video.

    Differs from the released code in that the noise is white (there: one offset for a whole image),
    tau covers [0, 1] (there: 0 throughout for SVD), and the model keeps seeing clean images.

    Attributes:
        time_map: t -> tau, see :func:`time_map`.
        beta_m: bound of the level, in units of y.
        a: tau^a: large = noise only near pure noise.
        mu_max: contrast between both ends of time; 1 changes the level 2.7 times, 4 50 times.
        s: spread of the level's logit.
        clean_probability: of samples whose condition stays clean, as at inference.
        space: of y.
    """

    time_map: TimeMap
    beta_m: float
    a: float = 5.0
    mu_max: float = 4.0
    s: float = 1.0
    clean_probability: float = 0.1
    space: Space = "latent"

    def __post_init__(self) -> None:
        _check(self.clean_probability, beta_m=self.beta_m, a=self.a, s=self.s)

    def quantile(self, p: float, t: Tensor) -> Tensor:
        """Quantile of the levels of noised samples at times t, [B], float64; p = 0.5: the median.

        beta_m sigmoid(mu(tau) + s Phi^-1(p)).
        """
        return self._level(t, torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))

    def _level(self, t: Tensor, z: Tensor) -> Tensor:
        mu = self.mu_max * (2 * self.time_map(t) ** self.a - 1)
        return self.beta_m * torch.sigmoid(mu + self.s * z.to(mu.device))

    def __call__(self, y: Tensor, t: Tensor, noise: ConditionDraw) -> tuple[Tensor, Tensor]:
        """See :class:`ConditionNoise`."""
        level = _unless_clean(self._level(t, noise.z), noise, self.clean_probability)
        return y + expand_like(level, y) * noise.eps.to(y.dtype), level


@dataclass(frozen=True)
class ConstantNoise:
    """White noise of one level on the condition at all times; the control for TimeNoise.

    Attributes:
        beta: standard deviation, in units of y.
        clean_probability, space: as for :class:`TimeNoise`.
    """

    beta: float
    clean_probability: float = 0.1
    space: Space = "latent"

    def __post_init__(self) -> None:
        _check(self.clean_probability, beta=self.beta)

    def __call__(self, y: Tensor, t: Tensor, noise: ConditionDraw) -> tuple[Tensor, Tensor]:
        """See :class:`ConditionNoise`."""
        level = _unless_clean(torch.full_like(noise.u, self.beta), noise, self.clean_probability)
        return y + expand_like(level, y) * noise.eps.to(y.dtype), level


@dataclass(frozen=True)
class LowPass:
    """A blurred condition, the more the noisier the video; ALG's idea, also without training.

    Attributes:
        time_map: t -> tau.
        width: standard deviation of the Gaussian at tau = 1, in pixels of y; width tau^a at tau.
        a: power of tau.
        axes: how many of the last axes are blurred.
        clean_probability, space: as for :class:`TimeNoise`.
    """

    time_map: TimeMap
    width: float
    a: float = 1.0
    axes: int = 2
    clean_probability: float = 0.1
    space: Space = "latent"

    def __post_init__(self) -> None:
        _check(self.clean_probability, width=self.width, a=self.a, axes=self.axes)

    def __call__(self, y: Tensor, t: Tensor, noise: ConditionDraw) -> tuple[Tensor, Tensor]:
        """See :class:`ConditionNoise`; the level is the width of the blur."""
        width = self.width * self.time_map(t) ** self.a
        level = _unless_clean(width, noise, self.clean_probability).to(y.device)
        return gaussian_blur(y, level, axes=self.axes), level


def gaussian_blur(y: Tensor, width: Tensor, *, axes: int = 2) -> Tensor:
    """Blur along the last axes, edges mirrored: every frequency f times exp(-2 (pi width f)^2).

    Args:
        y: [B, ...].
        width: standard deviation in pixels, [B]; 0 leaves a sample exactly as it is.
        axes: how many axes.
    """
    blurred = y.float()
    for axis in range(-axes, 0):
        size = y.shape[axis]
        mirrored = torch.cat([blurred, blurred.flip(axis)], axis).movedim(axis, -1)
        f = torch.fft.rfftfreq(2 * size, device=y.device)
        gain = torch.exp(-2 * (torch.pi * width.float()[:, None] * f) ** 2)
        gain = gain.reshape(len(y), *([1] * (y.ndim - 2)), -1)
        smooth = torch.fft.irfft(torch.fft.rfft(mirrored) * gain, n=2 * size)
        blurred = smooth.movedim(-1, axis).narrow(axis, 0, size)
    return torch.where(expand_like(width, y) > 0, blurred.to(y.dtype), y)


def condition_noise(
    *,
    kind: Literal["time_noise", "constant", "low_pass", "none"],
    schedule: Schedule,
    strength: float,
    a: float,
    mu_max: float,
    s: float,
    time: Literal["rank", "log_snr", "time"],
    clean_probability: float,
    space: Space,
) -> ConditionNoise:
    """The degradation that a configuration names; "none" leaves every condition clean.

    Args:
        kind: which; strength is its beta_m, beta or width.
        schedule: of the video samples.
        time: kind of its time map.
        a, mu_max, s, clean_probability, space: as above, where the kind has them.

    Raises:
        ValueError: for a value out of range, or a time map the schedule does not have.
    """
    tau = time_map(schedule, time)
    match kind:
        case "time_noise":
            return TimeNoise(tau, strength, a, mu_max, s, clean_probability, space)
        case "low_pass":
            return LowPass(tau, strength, a, 2, clean_probability, space)
        case "constant":
            return ConstantNoise(strength, clean_probability, space)
    return ConstantNoise(strength, clean_probability=1.0)
