"""Statistics of clean video latents, and the Gaussian closest to q(x_t) at a start time t = M.

    x0 [B, F, C, H, W]   clean video latents, as the network sees them: (z - shift) * scale
    x_M = alpha x0 + sigma eps
    KL(q(x_M) || N(m, s^2)) is least for m = alpha E[x0], s^2 = sigma^2 + alpha^2 Var(x0), the
    variance averaged over whatever shares one number (everything, a channel, nothing): moment
    matching, "Analytic-Init" of arXiv 2406.15735v3.

The mean is what counts: at usual starts the variance moves KL by 1e-6 nats a dimension. A mean per
pixel, estimated from few videos, is a ghost of them and worse than none: hence the granularities.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffdiv.core.schedule import Schedule
from diffdiv.core.tensor import sum_over_ranks

Granularity = Literal["channel", "pixel", "shrunk"]
Variance = Literal["scalar", "channel", "pixel"]
MIN_VIDEOS_FOR_PIXELS = 100
_EVERYWHERE = (0, 2, 3)  # frames, rows, columns


@dataclass(frozen=True)
class LatentSpace:
    """What latents are latents of.

    Attributes:
        vae: class name of the autoencoder.
        channels, frames, height, width: of one video's latents.
        scale, shift: one number, or one a channel: latents = (z - shift) * scale.
    """

    vae: str
    channels: int
    frames: int
    height: int
    width: int
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (F, C, H, W) of one video's latents."""
        return self.frames, self.channels, self.height, self.width

    def describe(self) -> str:
        """For people: "AutoencoderKLTemporalDecoder, 14 frames of 4x72x128"."""
        return f"{self.vae}, {self.frames} frames of {self.channels}x{self.height}x{self.width}"


@dataclass(frozen=True)
class LatentStats:
    """Mean and variance of clean latents, to be saved beside a model.

    Attributes:
        mean: E[x0], [1, C, 1, 1] or [F, C, H, W], float64.
        var: E[(x0 - mean)^2] of the shape of ``mean``, or [1, C, 1, 1]; float64.
        var_about_first: E[(x0 - first frame)^2], [1, C, 1, 1], for starts from the image.
        count: videos measured.
        granularity: "channel" fits every size; "pixel" and "shrunk" fit theirs alone.
        space: of which latents.
    """

    mean: Tensor
    var: Tensor
    var_about_first: Tensor
    count: int
    granularity: Granularity
    space: LatentSpace

    def require(self, space: LatentSpace) -> None:
        """Raise ValueError unless these statistics fit latents of ``space``."""
        names = ["vae", "channels", "scale", "shift"]
        if self.granularity != "channel":
            names += ["frames", "height", "width"]
        own, other = asdict(self.space), asdict(space)
        for name in names:
            if own[name] != other[name]:
                remedy = "for this model" if name in names[:4] else "at this size, or by channel"
                raise ValueError(
                    f"latent statistics by {self.granularity} of {self.space.describe()} do not "
                    f"fit {space.describe()} ({name} {own[name]}, not {other[name]}); measure them "
                    f"again {remedy}"
                )

    def save(self, path: Path) -> None:
        """Write one safetensors file; all that is not a tensor is JSON in its header."""
        tensors = {"mean": self.mean, "var": self.var, "var_about_first": self.var_about_first}
        facts = {
            "count": self.count,
            "granularity": self.granularity,
            "space": asdict(self.space),
        }
        header = {"latent_stats": json.dumps(facts)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=header)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of :meth:`save`; ValueError if it is none."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["latent_stats"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            space = facts["space"]
            space |= {key: tuple(space[key]) for key in ("scale", "shift")}
            return cls(
                tensors["mean"],
                tensors["var"],
                tensors["var_about_first"],
                facts["count"],
                facts["granularity"],
                LatentSpace(**space),
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: no latent statistics there ({type(error).__name__}: {error}); "
                "`diffdiv stats MODEL VIDEOS` makes them"
            ) from None


class LatentMoments:
    """Running moments of latents in float64 (Welford; Chan et al. for batches), constant memory.

    Args:
        space: of the latents to come.
    """

    def __init__(self, space: LatentSpace) -> None:
        self.space, self.count = space, 0
        self.mean = torch.zeros(space.shape, dtype=torch.float64)
        self._m2 = torch.zeros_like(self.mean)  # sum of squared deviations
        self._about_first = torch.zeros(space.channels, dtype=torch.float64)  # sum over videos

    def add(self, latents: Tensor) -> None:
        """Count videos in.

        Args:
            latents: [B, F, C, H, W], scaled, drawn from the posterior.

        Raises:
            ValueError: if their shape is not the space's.
            FloatingPointError: if a value is not finite.
        """
        if tuple(latents.shape[1:]) != self.space.shape:
            raise ValueError(f"latents {list(latents.shape[1:])} for {self.space.describe()}")
        x = latents.detach().to("cpu", torch.float64)
        if not x.isfinite().all():
            raise FloatingPointError(f"latents of videos {self.count}... are not finite")
        mean = x.mean(0)
        first = (x - x[:, :1]).square().mean((1, 3, 4)).sum(0)
        self._merge(len(x), mean, (x - mean).square().sum(0), first)

    def merge(self, other: "LatentMoments") -> None:
        """Count in what another part of the data gave; ValueError if the spaces differ."""
        if self.space != other.space:
            raise ValueError(f"{self.space.describe()} and {other.space.describe()} do not add up")
        self._merge(other.count, other.mean, other._m2, other._about_first)

    def _merge(self, count: int, mean: Tensor, m2: Tensor, about_first: Tensor) -> None:
        if count == 0:
            return
        total, gap = self.count + count, mean - self.mean
        self._m2 = self._m2 + m2 + gap.square() * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self._about_first, self.count = self._about_first + about_first, total

    def over_ranks(self) -> None:
        """Replace this process's moments by those of all processes together (a collective)."""
        own, mean = self.count, self.mean
        self.count = int(sum_over_ranks(torch.tensor(own)))
        self.mean = sum_over_ranks(own * mean) / max(self.count, 1)
        self._m2 = sum_over_ranks(self._m2 + own * (mean - self.mean).square())
        self._about_first = sum_over_ranks(self._about_first)

    def stats(self, granularity: Granularity = "channel") -> LatentStats:
        """Statistics of what was counted.

        "channel": one mean and variance a channel, over videos, frames and positions. "pixel": one
        of each a value. "shrunk": means a value, drawn towards their channel's by n / (n + k), with
        k = noise / signal of the channel's map of means (empirical Bayes); a variance a channel.

        Raises:
            ValueError: for fewer than 1 video, 2 for "shrunk", or 100 for "pixel".
        """
        least = {"channel": 1, "shrunk": 2, "pixel": MIN_VIDEOS_FOR_PIXELS}
        if granularity not in least:
            raise ValueError(f"granularity {granularity!r}: {', '.join(get_args(Granularity))}")
        if self.count < least[granularity]:
            raise ValueError(
                f"{self.count} videos give no statistics by {granularity!r}, {least[granularity]} "
                "are needed: the means of few videos are their ghost; take 'channel' or 'shrunk'"
            )
        channel = self.mean.mean(_EVERYWHERE, keepdim=True)
        mean, var = channel, self._m2 / self.count + (self.mean - channel).square()
        if granularity != "channel":
            unbiased = self._m2 / (self.count - 1)
            mean, var = self.mean, unbiased
        if granularity == "shrunk":
            gap = self.mean - channel
            noise = _by_channel(unbiased) / self.count
            signal = (_by_channel(gap.square()) - noise).clamp_min(0)
            mean = channel + gap * torch.where(signal > 0, signal / (signal + noise), 0.0)
            var = unbiased + (self.mean - mean).square()
        if granularity != "pixel":
            var = _by_channel(var)
        first = (self._about_first / self.count).reshape(1, -1, 1, 1)
        return LatentStats(mean, var, first, self.count, granularity, self.space)


def _by_channel(x: Tensor) -> Tensor:
    return x.mean(_EVERYWHERE, keepdim=True)


@dataclass(frozen=True)
class StartLaw:
    """A Gaussian to start sampling from: mean and std, broadcasting to [B, F, C, H, W], float64."""

    mean: Tensor
    std: Tensor

    def draw(self, eps: Tensor) -> Tensor:
        """x_M from standard normal noise [B, F, C, H, W], in its dtype (computed in float64)."""
        mean, std = self.mean.to(eps.device), self.std.to(eps.device)
        return (mean + std * eps.double()).to(eps.dtype)


def analytic_init(
    stats: LatentStats,
    schedule: Schedule,
    t: float,
    *,
    variance: Variance = "channel",
    data_scale: float = 1.0,
    condition: Tensor | None = None,
) -> StartLaw:
    """The Gaussian closest in KL to q(x_t), given the statistics of x0.

    Analytic-Init of arXiv 2406.15735v3 for every schedule (VP, EDM, rectified flow); differs from
    it in the granularities, and in ``data_scale``, which the released code leaves out.

    Args:
        stats: of x0.
        schedule: x_t = alpha x0 + sigma eps.
        t: start time M in the schedule's unit (index, sigma, or 0..1).
        variance: what shares one variance; "pixel" needs statistics by pixel.
        data_scale: c_M of models trained on x_t = alpha c_t x0 + sigma eps (dynamic rescaling).
        condition: the image's latents [B, 1 or F, C, H, W] as the mean in place of E[x0]. Closer to
            q(x_t | image), but it tells the model once more that nothing moves.

    Raises:
        ValueError: for a variance these statistics do not have.
    """
    at = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(at)) * data_scale, float(schedule.sigma(at))
    if variance == "pixel" and stats.granularity != "pixel":
        raise ValueError(f"variance 'pixel' needs statistics by pixel, not {stats.granularity!r}")
    mean, var = stats.mean, stats.var
    if condition is not None:
        mean, var = condition.double(), stats.var_about_first
    match variance:
        case "scalar":
            var = var.mean()
        case "channel":
            var = _by_channel(var)
    return StartLaw(alpha * mean, (sigma**2 + alpha**2 * var).sqrt())
