"""diffusers backbones behind the denoiser contract: how each family is called and loaded.

Only local folders are read, only safetensors, never code.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

# concrete modules: mypy sees the placeholders of the lazy top level
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffdiv.core.schedule import schedule_from_config
from diffdiv.models.denoiser import Condition, Denoiser


def call_unet2d(net: nn.Module, x_in: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """UNet2DModel, class-conditional when the condition holds a label."""
    output: Tensor = net(x_in, time.to(x_in.dtype), class_labels=cond.label, return_dict=False)[0]
    return output


def call_sd_unet(net: nn.Module, x_in: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """UNet2DConditionModel with text embeddings (Stable Diffusion 1.x, 2.x)."""
    output: Tensor = net(x_in, time, encoder_hidden_states=cond.text, return_dict=False)[0]
    return output


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise ValueError(
            f"{path.parent.parent}: no {path.parent.name}/{path.name} in this folder; wanted is a "
            "diffusers folder with unet/ and scheduler/ (made by save_pretrained)"
        )
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is wanted")
    return content


def load_denoiser(path: Path, *, dtype: torch.dtype = torch.float32) -> Denoiser:
    """Denoiser of a local diffusers folder with ``unet/`` and ``scheduler/``.

    Args:
        path: a Stable Diffusion pipeline folder or a UNet2DModel folder (EDM-, DDPM- or flow-type
            scheduler). EDM's sigma_data is read from the scheduler.
        dtype: of the weights.

    Raises:
        ValueError: naming the folder and what is wrong with it.
    """
    unet_config = _read_json(path / "unet" / "config.json")
    scheduler_config = _read_json(path / "scheduler" / "scheduler_config.json")
    name = str(scheduler_config.get("_class_name", "DDPMScheduler"))
    try:
        schedule, prediction = schedule_from_config(name, scheduler_config)
    except ValueError as error:
        raise ValueError(f"{path / 'scheduler'}: {error}") from None
    classes = {
        "UNet2DModel": (UNet2DModel, call_unet2d),
        "UNet2DConditionModel": (UNet2DConditionModel, call_sd_unet),
    }
    kind = str(unet_config.get("_class_name"))
    if kind not in classes:
        raise ValueError(f"{path / 'unet'}: {kind} is not one of {', '.join(classes)}")
    model_class, call = classes[kind]
    if unet_config.get("addition_embed_type"):
        raise ValueError(
            f"{path / 'unet'}: networks with added conditions (SDXL) are not wired yet"
        )
    try:
        net = model_class.from_pretrained(
            path / "unet", use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path / 'unet'}: weights cannot be read ({error})") from None
    sigma_data = scheduler_config.get("sigma_data") if schedule.family == "edm" else None
    return Denoiser(
        net=net.eval(),
        call=call,
        schedule=schedule,
        prediction=prediction,
        sigma_data=None if sigma_data is None else float(str(sigma_data)),
    )


def sample_shape(net: nn.Module) -> tuple[int, int, int]:
    """Shape (channels, height, width) of the samples a loaded backbone was built for."""
    config = cast("dict[str, int | list[int]]", net.config)
    channels, size = config["in_channels"], config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    assert isinstance(channels, int)
    return channels, height, width


def num_labels(net: nn.Module) -> int:
    """Size of a backbone's class embedding; 0 without one."""
    return cast("dict[str, int | None]", net.config)["num_class_embeds"] or 0


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
    scheduler = EDMEulerScheduler(sigma_data=sigma_data, sigma_max=sigma_max)
    scheduler.save_config(folder / "scheduler")


class PromptEncoder:
    """Text encoder of a Stable Diffusion folder; each distinct prompt is encoded once."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer", local_files_only=True)
        self.text_encoder = CLIPTextModel.from_pretrained(
            path / "text_encoder",
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
        )
        self.text_encoder.eval().requires_grad_(False)
        self._cache: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings of the prompts, [B, L, D] float32 on the CPU."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._cache]
        if new:
            tokens = self.tokenizer(
                new, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                # not in chunks of the batch: padding to a fixed length makes rows independent
                embeddings = self.text_encoder(tokens)[0]
            self._cache.update(zip(new, embeddings, strict=True))
        return Condition(text=torch.stack([self._cache[p] for p in prompts]))


class LatentCodec:
    """VAE of a Stable Diffusion folder: images in [-1, 1] <-> scaled latents."""

    def __init__(self, path: Path, device: torch.device) -> None:
        vae = AutoencoderKL.from_pretrained(
            path / "vae", torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.scale: float = vae.config.scaling_factor
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Shape of the latent of a square image of ``size`` pixels."""
        return self.vae.config.latent_channels, size // self.factor, size // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor, eps: Tensor) -> Tensor:
        """Latents of images [B, 3, H, W], drawn from the posterior, times the scaling factor.

        A teacher was trained on posterior samples, so means would betray themselves as "real".

        Args:
            images: in [-1, 1].
            eps: standard normal noise [B, C, h, w] of the draw.
        """
        posterior = self.vae.encode(images.to(self.vae.device)).latent_dist
        latents: Tensor = posterior.mean + posterior.std * eps.to(self.vae.device)
        return latents * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, *, chunk: int = 64) -> Tensor:
        """Images in [-1, 1], [B, 3, H, W] float32 on the CPU."""
        parts = latents.float().to(self.vae.device).split(chunk)
        images = [self.vae.decode(p / self.scale, return_dict=False)[0] for p in parts]
        return torch.cat(images).clamp(-1, 1).cpu()
