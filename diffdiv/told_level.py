"""Sampling from a TimeNoise model of Stable Video Diffusion: the clean image, told a noisy level.

The network was told how noisy its image was, and has learned how far to trust it at each time. Told
0 at a noisy time, as the pipeline's call tells it throughout, it is asked what it hardly saw in
training. Told the median level of its training instead, it trusts the clean image as little as it
trusted noised ones while the motion is decided, and as much when details are. The rule is ours: the
code released with the paper (arXiv 2406.15735v3) tells one level throughout.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    StableVideoDiffusionPipeline,
)
from torch import Tensor, nn

from diffdiv.core.leakage import TimeNoise, condition_noise
from diffdiv.models.video import VideoCodec
from diffdiv.models.video_calls import svd_schedule

_SETTINGS = ("kind", "strength", "a", "mu_max", "s", "time", "clean_probability", "space")


def noise_of_export(folder: Path) -> TimeNoise:
    """The TimeNoise that an export of train/timenoise.py was trained with.

    Raises:
        ValueError: if it was trained otherwise, or is no such export.
    """
    file = folder / "export.json"
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    law = {name: float(found[name]) for name in ("p_mean", "p_std") if name in found}
    if found.get("kind") != "time_noise" or len(law) < 2:
        raise ValueError(f"{folder}: no export of a Stable Video Diffusion trained with TimeNoise")
    settings = {name: found[name] for name in _SETTINGS}
    noise = condition_noise(schedule=svd_schedule(**law), **settings)
    assert isinstance(noise, TimeNoise)
    return noise


@contextmanager
def told_level(pipe: StableVideoDiffusionPipeline, noise: TimeNoise) -> Iterator[None]:
    """Tell the network the median level of its training at each time, inside the ``with`` block.

    Where the image is dropped for guidance the level stays 0, as in training.

    Args:
        pipe: the export, called as usual.
        noise: of its training, see :func:`noise_of_export`.
    """
    channels = VideoCodec(pipe.vae).channels

    def hook(
        _net: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        x_in, time = given
        sigma = (4 * time.double().flatten()[:1]).exp()  # the network is told ln(sigma) / 4
        level = noise.quantile(0.5, sigma)
        is_shown = x_in[:, :, channels:].flatten(1).abs().sum(1) > 0
        told = named["added_time_ids"].clone()
        told[:, 2] = torch.where(is_shown, level.to(told), 0.0)
        return given, {**named, "added_time_ids": told}

    handle = cast(nn.Module, pipe.unet).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
