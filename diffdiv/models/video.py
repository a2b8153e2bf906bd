"""Autoencoders of video pipelines: clips in [-1, 1] <-> shifted and scaled latents.

    videos   [B, N, 3, height, width] pixels       x0   [B, F, C, H, W] latents, frames first

Networks that want channels first are given a transposed view by their own call.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor, nn

from diffdiv.core.latent_stats import LatentSpace
from diffdiv.core.schedule import Schedule, vp_from_betas

_VAES: Mapping[str, type[ModelMixin]] = {
    "AutoencoderKLTemporalDecoder": AutoencoderKLTemporalDecoder,  # SVD
    "AutoencoderKL": AutoencoderKL,  # I2VGen-XL: frame by frame too
    "AutoencoderKLCogVideoX": AutoencoderKLCogVideoX,
    "AutoencoderKLHunyuanVideo": AutoencoderKLHunyuanVideo,
    "AutoencoderKLHunyuanVideo15": AutoencoderKLHunyuanVideo15,
    "AutoencoderKLLTXVideo": AutoencoderKLLTXVideo,
    "AutoencoderKLWan": AutoencoderKLWan,
}
_BY_FRAME = ("AutoencoderKLTemporalDecoder", "AutoencoderKL")


def codec_kind(path: Path) -> str:
    """Class name of the autoencoder in ``path/vae``; ValueError if there is none we know."""
    file = path / "vae/config.json"
    if not file.is_file():
        raise ValueError(f"{path}: no vae/config.json there, so it is no video pipeline")
    kind = str(json.loads(file.read_text("utf-8")).get("_class_name"))
    if kind not in _VAES:
        raise ValueError(f"{path / 'vae'}: {kind} is not one of {', '.join(_VAES)}")
    return kind


class VideoCodec:
    """A pipeline's autoencoder.

    Attributes:
        vae: frozen.
        stride: pixels a latent, along (time, height, width); the first frame is a latent of its
            own where time is strided.
        scale, shift: latents are (z - shift) * scale, as the network is given them.

    Args:
        vae: one of the classes above.

    Raises:
        ValueError: if it is another one.
    """

    def __init__(self, vae: nn.Module) -> None:
        kind = type(vae).__name__
        if kind not in _VAES:
            raise ValueError(f"autoencoder {kind} is not one of {', '.join(_VAES)}")
        self.vae, self._kind = cast(ModelMixin, vae.eval().requires_grad_(False)), kind
        config = self.vae.config
        self.scale: tuple[float, ...]
        self.shift: tuple[float, ...]
        if kind == "AutoencoderKLWan":
            self.scale = tuple(1 / std for std in config["latents_std"])
            self.shift = tuple(config["latents_mean"])
            self.channels = int(config["z_dim"])
            side = int(config["scale_factor_spatial"])
            self.stride = int(config["scale_factor_temporal"]), side, side
            return
        self.scale = (float(config["scaling_factor"]),)
        self.shift = (float(config.get("shift_factor") or 0),)
        self.channels = int(config["latent_channels"])
        if isinstance(vae, AutoencoderKLLTXVideo):
            self.scale = tuple((config["scaling_factor"] / vae.latents_std).tolist())
            self.shift = tuple(vae.latents_mean.tolist())
            side = int(vae.spatial_compression_ratio)
            self.stride = int(vae.temporal_compression_ratio), side, side
            return
        levels = 2 ** (len(config["block_out_channels"]) - 1)
        time = 1
        if kind == "AutoencoderKLCogVideoX":
            time = int(config["temporal_compression_ratio"])
        elif kind.startswith("AutoencoderKLHunyuanVideo"):
            time, levels = (int(config[f"{k}_compression_ratio"]) for k in ("temporal", "spatial"))
        self.stride = time, levels, levels

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "VideoCodec":
        """The autoencoder in ``path/vae``, in float32; ValueError if there is none we know."""
        vae = _VAES[codec_kind(path)].from_pretrained(
            path / "vae", dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        return cls(nn.Module.to(vae, device))

    def space(self, num_frames: int, height: int, width: int) -> LatentSpace:
        """Latents of clips of so many frames and pixels; ValueError if these do not divide."""
        time, rows, columns = self.stride
        if (num_frames - 1) % time or height % rows or width % columns:
            raise ValueError(
                f"clips of {num_frames} frames of {height}x{width} pixels do not fit {self._kind}: "
                f"wanted are {time} n + 1 frames and multiples of {rows} pixels"
            )
        return LatentSpace(
            self._kind,
            self.channels,
            (num_frames - 1) // time + 1,
            height // rows,
            width // columns,
            self.scale,
            self.shift,
        )

    def pixels(self, frames: int, rows: int, columns: int) -> tuple[int, int, int]:
        """Frames, height and width of the clip whose latents have this size."""
        return (frames - 1) * self.stride[0] + 1, rows * self.stride[1], columns * self.stride[2]

    @torch.no_grad()
    def posterior(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the unscaled latents of clips, each [B, F, C, H, W]."""
        weight = next(self.vae.parameters())
        videos = videos.to(weight.device, weight.dtype)
        if self._kind in _BY_FRAME:
            found = [self.vae.encode(frame).latent_dist for frame in videos.unbind(1)]
            return torch.stack([f.mean for f in found], 1), torch.stack([f.std for f in found], 1)
        dist = self.vae.encode(videos.transpose(1, 2)).latent_dist
        return dist.mean.transpose(1, 2), dist.std.transpose(1, 2)

    def draw(self, mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
        """Latents drawn from a posterior by the noise ``eps``, shifted and scaled."""
        return self.scaled(mean + std * eps.to(mean.device))

    def scaled(self, z: Tensor) -> Tensor:
        """Shifted and scaled latents [B, F, C, H, W]."""
        scale, shift = (z.new_tensor(v).reshape(-1, 1, 1) for v in (self.scale, self.shift))
        return (z - shift) * scale


def vp_from_table(alphas_cumprod: Tensor) -> Schedule:
    """Schedule of a table of alpha^2 [N]; CogVideoX's schedulers change theirs after the betas."""
    abar = alphas_cumprod.double()
    return vp_from_betas(1 - abar / torch.cat([abar.new_ones(1), abar[:-1]]))


def as_images(frames: Tensor) -> list[Image.Image]:
    """Frames [B, 3, height, width] in [-1, 1] as the 8-bit images a pipeline is given."""
    values = ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(value.numpy()) for value in values]
