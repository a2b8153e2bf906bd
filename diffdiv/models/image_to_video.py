"""Image-to-video networks behind the denoiser contract, with what their pipelines tell them.

    x0       [B, F, C, H, W] video latents       y   the image's latents, as the network gets them
    rows     what is computed of a clip once: mean and std of x0's posterior, image = y, tokens of
             the image, text; all [B, ...]

    host                     y                                      level is told   loss
    Stable Video Diffusion   unscaled, every frame the same         yes, its slot   EDM, data std 1
    Wan 2.1                  the image and grey frames, encoded     no              flow
    CogVideoX                the image, zeros behind it             no              v

Everything is prepared by the stock pipeline's own methods, so that training and sampling agree.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import torch
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import (
    CogVideoXImageToVideoPipeline,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    StableVideoDiffusionPipeline,
)
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from torch import Tensor, nn

from diffdiv.core.schedule import Schedule
from diffdiv.models.denoiser import Condition, Denoiser
from diffdiv.models.video import VideoCodec, as_images
from diffdiv.models.video_calls import call_svd, svd_schedule
from diffdiv.models.video_transformers import ATTENTION, FEED_FORWARD, CogVideoX, Rows, Wan


class ImageToVideo(Protocol):
    """A pipeline to be trained.

    Attributes:
        net: the network.
        codec: the autoencoder.
        schedule: forward process and law of training times.
        lora_targets: ends of names of the layers that adapters change.
        pipe: the stock pipeline, of which ``net`` is a part.
        tells_level: whether the network is told the level of y.
    """

    net: nn.Module
    codec: VideoCodec
    schedule: Schedule
    lora_targets: tuple[str, ...]
    tells_level: bool

    @property
    def pipe(self) -> DiffusionPipeline: ...

    def image(self, frames: Tensor, num_frames: int) -> Tensor:
        """y of first frames [B, 3, height, width] in [-1, 1], for clips of so many frames."""
        ...

    def embed(self, frames: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Rows that y does not enter: tokens of the first frames, text."""
        ...

    def without(self, rows: Rows, y: Tensor, dropped: Tensor) -> tuple[Rows, Tensor]:
        """Rows and y as the unconditional branch sees them, where ``dropped`` [B] is true."""
        ...

    def denoiser(
        self, net: nn.Module, rows: Rows, y: Tensor, level: Tensor
    ) -> tuple[Denoiser, Condition]:
        """The network, given this y of this level [B], and the rest of its condition."""
        ...


#: ends of names of Stable Video Diffusion's layers that adapters change
SVD_LORA_TARGETS: tuple[str, ...] = (*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out")


class StableVideoDiffusion:
    """Stable Video Diffusion: a U-Net told frame rate, motion and level of its image.

    Args:
        pipe: the stock pipeline.
        fps: frames a second of the clips; the network is told fps - 1, as its pipeline does.
        motion_bucket: 0..255, told for every clip.
        schedule: of training.
    """

    tells_level = True

    def __init__(
        self,
        pipe: StableVideoDiffusionPipeline,
        *,
        fps: float,
        motion_bucket: int,
        schedule: Schedule,
    ) -> None:
        self.pipe, self.net, self.schedule = pipe, cast(nn.Module, pipe.unet), schedule
        self.codec, self._told = VideoCodec(pipe.vae), (fps - 1, float(motion_bucket))
        self.lora_targets = SVD_LORA_TARGETS

    @torch.no_grad()
    def image(self, frames: Tensor, num_frames: int) -> Tensor:
        """Unscaled mode [B, 1, C, H, W]; all frames get the same."""
        return self.codec.posterior(frames[:, None])[0]

    @torch.no_grad()
    def embed(self, frames: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """CLIP's embedding of the image, [B, 1, D]."""
        device = next(self.pipe.image_encoder.parameters()).device
        return {"tokens": self.pipe._encode_image(as_images(frames), device, 1, False)}

    def without(self, rows: Rows, y: Tensor, dropped: Tensor) -> tuple[Rows, Tensor]:
        """Image and tokens are zeros."""
        kept = (~dropped).to(y.dtype)
        tokens = rows["tokens"] * kept.to(rows["tokens"].dtype)[:, None, None]
        return {**rows, "tokens": tokens}, y * kept[:, None, None, None, None]

    def denoiser(
        self, net: nn.Module, rows: Rows, y: Tensor, level: Tensor
    ) -> tuple[Denoiser, Condition]:
        """The level goes where the pipeline says ``noise_aug_strength``."""
        rate, motion = (torch.full_like(level, value) for value in self._told)
        cond = Condition(text=rows["tokens"], time_ids=torch.stack([rate, motion, level], 1))
        return Denoiser(net, partial(call_svd, y=y), self.schedule, "x0", 1.0), cond


#: what can be trained here: the pipelines' class names
PIPELINES = (
    "StableVideoDiffusionPipeline", "WanImageToVideoPipeline", "CogVideoXImageToVideoPipeline",
)  # fmt: skip


def host_kind(path: Path) -> str:
    """The class name of a pipeline folder, one of PIPELINES; reads one small file.

    Raises:
        ValueError: if it is no folder of such a pipeline.
    """
    file = path / "model_index.json"
    if not file.is_file():
        raise ValueError(f"{path}: no model_index.json there, so it is not a diffusers pipeline")
    kind = str(json.loads(file.read_text("utf-8"))["_class_name"])
    if kind not in PIPELINES:
        raise ValueError(f"{path}: {kind} is not one of {', '.join(PIPELINES)}")
    return kind


def open_host(
    path: Path,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    fps: float = 7.0,
    motion_bucket: int = 127,
    svd: Schedule | None = None,
) -> ImageToVideo:
    """An image-to-video pipeline folder, to be trained; its autoencoder stays in float32.

    Args:
        path: local diffusers folder.
        device: of everything.
        dtype: of network and encoders.
        fps, motion_bucket, svd: what Stable Video Diffusion is told and its schedule; others have
            no such input.

    Raises:
        ValueError: if it is no pipeline that can be trained here.
    """
    known: dict[str, Callable[[DiffusionPipeline], ImageToVideo]] = {
        "StableVideoDiffusionPipeline": lambda pipe: StableVideoDiffusion(
            cast(StableVideoDiffusionPipeline, pipe), fps=fps, motion_bucket=motion_bucket,
            schedule=svd or svd_schedule(),
        ),
        "WanImageToVideoPipeline": lambda pipe: Wan(cast(WanImageToVideoPipeline, pipe)),
        "CogVideoXImageToVideoPipeline": lambda pipe: CogVideoX(
            cast(CogVideoXImageToVideoPipeline, pipe)
        ),
    }  # fmt: skip
    kind = host_kind(path)
    pipe = DiffusionPipeline.from_pretrained(
        path, dtype={"vae": torch.float32, "default": dtype}, use_safetensors=True,
        local_files_only=True,
    )  # fmt: skip
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part.eval().requires_grad_(False), device)
    return known[kind](pipe)
