"""Shapes of Stable Diffusion networks as data: what a plan or a benchmark builds without weights.

The three named ones are the ``config.json`` of the released weights, defaults left out. Networks
are built on the meta device: they take no memory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Config = Mapping[str, object]


@dataclass(frozen=True)
class Architecture:
    """Configurations of one text-to-image model.

    Attributes:
        unet: of UNet2DConditionModel.
        vae: of AutoencoderKL.
        text: of each CLIP text encoder; its key ``architectures`` names the class.
    """

    unet: Config
    vae: Config
    text: tuple[Config, ...]

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels behind one latent position."""
        return 2 ** (len(cast("list[int]", self.vae["block_out_channels"])) - 1)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text embedding (SDXL): what six time ids leave of the projection."""
        total = int(str(self.unet["projection_class_embeddings_input_dim"]))
        return total - 6 * int(str(self.unet["addition_time_embed_dim"]))


_SD_UNET: Config = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD21_UNET: Config = {
    **_SD_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL_UNET: Config = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD_VAE: Config = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def _clip(name: str, width: int, layers: int, heads: int, projection: int) -> Config:
    return {
        "architectures": [name],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": projection,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    }


_CLIP_L = _clip("CLIPTextModel", 768, 12, 12, 768)
_CLIP_H = _clip("CLIPTextModel", 1024, 23, 16, 512)
_CLIP_G = _clip("CLIPTextModelWithProjection", 1280, 32, 20, 1280)

#: "sd15", "sd21" (the base model, 512 pixels) and "sdxl" (1024 pixels)
ARCHITECTURES: Mapping[str, Architecture] = {
    "sd15": Architecture(_SD_UNET, _SD_VAE, (_CLIP_L,)),
    "sd21": Architecture(_SD21_UNET, _SD_VAE, (_CLIP_H,)),
    "sdxl": Architecture(_SDXL_UNET, {**_SD_VAE, "sample_size": 1024}, (_CLIP_L, _CLIP_G)),
}


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a local diffusers folder; only ``config.json`` files are read.

    Raises:
        ValueError: if a configuration is missing or the backbone is no UNet2DConditionModel.
    """
    unet, vae = _read_config(folder / "unet"), _read_config(folder / "vae")
    if unet.get("_class_name") != "UNet2DConditionModel":
        raise ValueError(f"{folder / 'unet'}: {unet.get('_class_name')} cannot be planned yet")
    return Architecture(unet, vae, tuple(map(_read_config, sorted(folder.glob("text_encoder*")))))


def _read_config(folder: Path) -> Config:
    path = folder / "config.json"
    try:
        config: dict[str, object] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    return config


def build_unet(architecture: Architecture, dtype: torch.dtype) -> nn.Module:
    """The U-Net on the meta device, in evaluation mode."""
    with torch.device("meta"):
        net: nn.Module = UNet2DConditionModel.from_config(dict(architecture.unet))
    # not net.to: diffusers' own warns that some classes keep modules in float32 (this one has none)
    return nn.Module.to(net, dtype).eval()


def build_vae(architecture: Architecture) -> nn.Module:
    """The VAE on the meta device, frozen, float32."""
    with torch.device("meta"):
        vae: nn.Module = AutoencoderKL.from_config(dict(architecture.vae))
    return vae.eval().requires_grad_(False)


def build_text_encoders(architecture: Architecture, dtype: torch.dtype) -> nn.ModuleList:
    """The text encoders on the meta device, frozen."""
    encoders = nn.ModuleList()
    with torch.device("meta"):
        for config in architecture.text:
            clip = CLIPTextConfig.from_dict(dict(config))
            has_projection = config.get("architectures") == ["CLIPTextModelWithProjection"]
            kind = CLIPTextModelWithProjection if has_projection else CLIPTextModel
            encoders.append(kind(clip))
    return encoders.to(dtype).eval().requires_grad_(False)
