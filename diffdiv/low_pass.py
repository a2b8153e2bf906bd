"""Adaptive low-pass of the image while sampling (ALG, arXiv 2506.08456), without training.

Early, where the video is noise, the network is shown a blurred image, so that it cannot settle on
its details before anything moves; late it sees the image as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from diffdiv.core.leakage import gaussian_blur
from diffdiv.models.video import VideoCodec


@dataclass(frozen=True)
class _Host:
    """Where a pipeline's network finds its image: ``net``, axis of channels, tau of its time."""

    net: str
    axis: int
    tau: Callable[[Tensor], Tensor]


_LN_MIN, _LN_MAX = (torch.tensor(sigma).log().item() for sigma in (0.002, 700.0))
HOSTS: Mapping[str, _Host] = {
    "StableVideoDiffusionPipeline": _Host(
        "unet",
        2,
        lambda t: (4 * t - _LN_MIN) / (_LN_MAX - _LN_MIN),  # t is ln(sigma) / 4
    ),
    "WanImageToVideoPipeline": _Host("transformer", 1, lambda t: t / 1000),
    "CogVideoXImageToVideoPipeline": _Host("transformer", 2, lambda t: t / 1000),
}


@contextmanager
def low_pass_image(pipe: DiffusionPipeline, width: float = 4.0, a: float = 2.0) -> Iterator[None]:
    """Blur the image that a pipeline's network sees, by width tau^a, inside the ``with`` block.

    Differs from the paper in the filter (a Gaussian whose width falls smoothly with time).

    Args:
        pipe: Stable Video Diffusion, Wan 2.1 or CogVideoX, image to video.
        width: standard deviation of the blur at pure noise, in latent pixels.
        a: power of the time tau in 0..1 (ln sigma for Stable Video Diffusion).

    Raises:
        ValueError: for another pipeline, or a negative width.
    """
    host = next((HOSTS[c.__name__] for c in type(pipe).__mro__ if c.__name__ in HOSTS), None)
    if host is None:
        raise ValueError(f"{type(pipe).__name__}: the image of {', '.join(HOSTS)} can be blurred")
    if width < 0 or a <= 0:
        raise ValueError(f"width {width:g} must not be negative, and a {a:g} must be positive")
    channels = VideoCodec(pipe.components["vae"]).channels

    def blurred(x_in: Tensor, t: Tensor) -> Tensor:
        level = width * host.tau(t.double().flatten()[:1]).clamp(0, 1) ** a
        kept = x_in.shape[host.axis] - channels
        video, image = x_in.split([kept, channels], host.axis)
        return torch.cat([video, gaussian_blur(image, level.expand(len(image)))], host.axis)

    def hook(
        _net: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        if given:  # Stable Video Diffusion names neither
            return (blurred(given[0], given[1]), *given[1:]), named
        return given, {**named, "hidden_states": blurred(named["hidden_states"], named["timestep"])}

    handle = cast(nn.Module, pipe.components[host.net]).register_forward_pre_hook(
        hook, with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()
