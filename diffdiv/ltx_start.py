"""LTX's initial latents: tokens of x_M behind the clean first frame.

Its call encodes the image only if it is given no latents, so whoever gives them brings the frame.
"""

from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.ltx.pipeline_ltx_image2video import (
    LTXImageToVideoPipeline,
    calculate_shift,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor

from diffdiv.core.latent_stats import LatentSpace
from diffdiv.models.video import VideoCodec

#: of the shift, where the scheduler does not say: the pipeline's
_SHIFT = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


def ltx_times(scheduler: ConfigMixin, steps: int, space: LatentSpace) -> None:
    """Set the times as LTX's call will: their shift grows with the number of latents."""
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    shift = [scheduler.config.get(name, value) for name, value in _SHIFT.items()]
    mu = calculate_shift(space.frames * space.height * space.width, *shift)
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)


def ltx_tokens(
    pipe: DiffusionPipeline, latents: Tensor, image: Image.Image, size: tuple[int, int]
) -> Tensor:
    """Tokens [B, S, C] of x_M [B, C, F, H, W], its first frame replaced by the image's mode.

    Args:
        pipe: LTX image to video.
        latents: x_M.
        image: one for the whole batch.
        size: height and width of the video, pixels.
    """
    ltx, codec = cast(LTXImageToVideoPipeline, pipe), VideoCodec(pipe.components["vae"])
    frame = ltx.video_processor.preprocess(image, height=size[0], width=size[1])[:, None]
    first = codec.scaled(codec.posterior(frame)[0]).transpose(1, 2).to(latents)
    latents = torch.cat([first.expand(len(latents), -1, -1, -1, -1), latents[:, :, 1:]], 2)
    patches = ltx.transformer_spatial_patch_size, ltx.transformer_temporal_patch_size
    tokens: Tensor = ltx._pack_latents(latents, *patches)
    return tokens
