"""diffusers folders behind the denoiser contract: networks and VAEs, read and written.

Only local folders are read, only safetensors, never code.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch

# concrete modules: mypy sees the placeholders of the lazy top level
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffdiv.core.tensor import at_once
from diffdiv.models.denoiser import Denoiser
from diffdiv.models.families import FAMILIES, latent_shape, schedule_for
from diffdiv.models.families import call_sd_unet as call_sd_unet
from diffdiv.models.families import call_unet2d as call_unet2d
from diffdiv.models.text import PromptEncoder as PromptEncoder

_VAES: Mapping[str, type[AutoencoderKL] | type[AutoencoderDC]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderDC": AutoencoderDC,
}


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise ValueError(
            f"{path.parent.parent}: no {path.parent.name}/{path.name} in this folder; wanted is a "
            "diffusers folder with unet/ or transformer/, and scheduler/ (made by save_pretrained)"
        )
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def load_denoiser(path: Path, *, dtype: torch.dtype = torch.float32) -> Denoiser:
    """Denoiser of a local diffusers folder with ``unet/`` or ``transformer/``, and ``scheduler/``.

    Args:
        path: a pipeline folder of a family in models/families.py, or a UNet2DModel folder (EDM-,
            DDPM- or flow-type scheduler). EDM's sigma_data is read from the scheduler.
        dtype: of the weights.

    Raises:
        ValueError: naming the folder and what is wrong with it.
    """
    folder = "transformer" if (path / "transformer").is_dir() else "unet"
    config = _read_json(path / folder / "config.json")
    scheduler = _read_json(path / "scheduler/scheduler_config.json")
    kind = str(config.get("_class_name"))
    if kind not in FAMILIES:
        raise ValueError(f"{path / folder}: {kind} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    try:
        call = family.bind(config)
    except ValueError as error:
        raise ValueError(f"{path / folder}: {error}") from None
    try:
        name = str(scheduler.get("_class_name", "DDPMScheduler"))
        schedule, prediction = schedule_for(name, scheduler, stored_shape(path))
    except ValueError as error:
        raise ValueError(f"{path / 'scheduler'}: {error}") from None
    try:
        net = family.model.from_pretrained(
            path / folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path / folder}: weights cannot be read ({error})") from None
    sigma_data = float(str(scheduler.get("sigma_data", 0.5))) if schedule.family == "edm" else None
    return Denoiser(net.eval(), call, schedule, prediction, sigma_data)


def stored_shape(path: Path) -> tuple[int, int, int]:
    """Shape (channels, height, width) of the samples of the network in a diffusers folder.

    FLUX's network names no size; the image size that its VAE names stands for it.
    """
    folder = "transformer" if (path / "transformer").is_dir() else "unet"
    config, vae = _read_json(path / folder / "config.json"), path / "vae/config.json"
    channels, height, width = latent_shape(config)
    if "sample_size" in config or not vae.is_file():
        return channels, height, width
    named = _read_json(vae)
    levels = len(cast("list[int]", named["block_out_channels"]))
    size = int(str(named["sample_size"])) // 2 ** (levels - 1)
    return channels, size, size


def num_labels(net: nn.Module) -> int:
    """Size of a backbone's class embedding; 0 without one."""
    return cast(UNet2DModel, net).config.get("num_class_embeds") or 0


def build_unet2d(
    shape: tuple[int, int, int],
    *,
    channels: Sequence[int],
    layers: int,
    attention: Sequence[int],
    num_labels: int,
) -> UNet2DModel:
    """A fresh pixel-space network.

    Args:
        shape: of a sample, (C, H, W).
        channels: of each level; the resolution halves between levels.
        layers: residual blocks a level.
        attention: levels with self-attention.
        num_labels: classes; 0 = unconditional.

    Raises:
        ValueError: if the size does not halve that often.
    """
    halvings = 2 ** (len(channels) - 1)
    if shape[1] % halvings or shape[2] % halvings:
        raise ValueError(
            f"samples of {shape[1]}x{shape[2]} pixels do not halve {len(channels) - 1} times"
        )
    attends = [level in attention for level in range(len(channels))]
    return UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        norm_num_groups=8,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        num_class_embeds=num_labels or None,
    )


def save_edm_teacher(
    net: UNet2DModel,
    weights: Mapping[str, Tensor],
    folder: Path,
    sigma_data: float,
    sigma_max: float,
) -> None:
    """Write ``unet/`` (``net``, given these weights) and ``scheduler/`` (EDMEulerScheduler)."""
    net.load_state_dict(weights)
    net.save_pretrained(folder / "unet")
    EDMEulerScheduler(sigma_data=sigma_data, sigma_max=sigma_max).save_config(folder / "scheduler")


def checkpoint_blocks(decoder: nn.Module) -> None:
    """Let the residual and upsampling blocks of a VAE's decoder make activations again in backward.

    diffusers' own switch works stage by stage: at 1024 pixels the three blocks of SDXL's last one
    hold 14 GiB at once.
    """
    for block in decoder.modules():
        if isinstance(block, ResnetBlock2D | Upsample2D):
            options = {"use_reentrant": False, "preserve_rng_state": False}
            vars(block)["forward"] = partial(checkpoint, block.forward, **options)


class LatentCodec:
    """VAE of a pipeline folder: images in [-1, 1] <-> shifted and scaled latents.

    AutoencoderKL; or SANA's AutoencoderDC, which has no noise: its posterior is a point.

    Args:
        path: the pipeline folder.
        device: of the VAE.

    Raises:
        ValueError: if its VAE is another one.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        kind = str(_read_json(path / "vae/config.json").get("_class_name"))
        if kind not in _VAES:
            raise ValueError(f"{path / 'vae'}: {kind} is not one of {', '.join(_VAES)}")
        vae = _VAES[kind].from_pretrained(
            path / "vae", dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        nn.Module.to(vae, device)
        self.vae, config = vae.eval().requires_grad_(False), vae.config
        checkpoint_blocks(self.vae.decoder)
        self.scale = float(config["scaling_factor"])
        self.shift = float(config.get("shift_factor") or 0)
        levels = config.get("block_out_channels") or config["encoder_block_out_channels"]
        self.factor: int = 2 ** (len(levels) - 1)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Shape of the latent of a square image of ``size`` pixels."""
        return self.vae.config["latent_channels"], size // self.factor, size // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor, eps: Tensor) -> Tensor:
        """Latents of images [B, 3, H, W], drawn from the posterior, shifted and scaled.

        A teacher was trained on posterior samples, so means would betray themselves as "real".

        Args:
            images: in [-1, 1].
            eps: standard normal noise [B, C, h, w] of the draw.
        """
        return self.draw(*self.posterior(images), eps)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the unscaled latents of images [B, 3, H, W]."""
        images = images.to(self.vae.device)
        if isinstance(self.vae, AutoencoderDC):
            mean = self.vae.encode(images, return_dict=False)[0]
            return mean, torch.zeros_like(mean)
        found = self.vae.encode(images).latent_dist
        return found.mean, found.std

    def draw(self, mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
        """Latents drawn from a posterior by the noise ``eps``, shifted and scaled."""
        return (mean + std * eps.to(mean.device) - self.shift) * self.scale

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in float32 on the VAE's device, not clamped.

        Activations of the decoder are made again in the backward, block by block, big images one
        by one.
        """

        def decode(latent: Tensor) -> Tensor:
            return self.vae.decode(latent / self.scale + self.shift, return_dict=False)[0]

        parts = latents.float().to(self.vae.device).split(at_once(latents.shape))
        with torch.autocast(self.vae.device.type, enabled=False):  # SDXL's overflows in half
            return torch.cat([checkpoint(decode, part, use_reentrant=False) for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1], [B, 3, H, W] float32 on the CPU."""
        parts = latents.float().to(self.vae.device).split(at_once(latents.shape))
        images = [self.vae.decode(p / self.scale + self.shift, return_dict=False)[0] for p in parts]
        return torch.cat(images).clamp(-1, 1).cpu()
