"""One step of train/timenoise.py for Stable Video Diffusion on random weights: what it costs.

As rehearsal.py does for f-distill: shapes suffice, so ``diffdiv plan`` runs it on fake tensors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffdiv.core.schedule import Noising
from diffdiv.counters import Counters
from diffdiv.models.adapters import AdapterView, SharedBase, enable_checkpointing
from diffdiv.models.architectures import Config
from diffdiv.models.denoiser import Condition, Denoiser
from diffdiv.models.image_to_video import SVD_LORA_TARGETS
from diffdiv.models.video import VideoCodec
from diffdiv.models.video_calls import call_svd, svd_schedule
from diffdiv.objectives.denoising import denoising_loss
from diffdiv.rehearsal import DTYPES, Precision, materialise, trained_network, update


@dataclass(frozen=True)
class VideoArchitecture:
    """Configurations of the three networks of Stable Video Diffusion.

    Attributes:
        unet: of UNetSpatioTemporalConditionModel.
        vae: of AutoencoderKLTemporalDecoder.
        vision: of the CLIP image encoder.
    """

    unet: Config
    vae: Config
    vision: Config


#: Stable Video Diffusion as released (arXiv 2311.15127): config.json of its folders
SVD = VideoArchitecture(
    unet={"num_attention_heads": [5, 10, 20, 20], "num_frames": 14, "sample_size": 96},
    vae={
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    vision={
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 16, "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu",
    },
)  # fmt: skip


def read_video_architecture(folder: Path) -> VideoArchitecture:
    """The architecture of a local pipeline folder; only ``config.json`` files are read.

    Raises:
        ValueError: if a configuration is missing, or the network is not that of Stable Video
            Diffusion.
    """
    names = ("unet", "vae", "image_encoder")
    files = [folder / name / "config.json" for name in names]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: not there, so this is not Stable Video Diffusion")
    unet, vae, vision = (json.loads(file.read_text("utf-8")) for file in files)
    if unet.get("_class_name") != "UNetSpatioTemporalConditionModel":
        raise ValueError(f"{folder / 'unet'}: {unet.get('_class_name')} cannot be planned yet")
    return VideoArchitecture(unet, vae, vision)


@dataclass(frozen=True)
class VideoSpec:
    """One GPU's share of a fine-tuning of Stable Video Diffusion.

    Attributes:
        architecture: shapes of the networks.
        frames, height, width: of a clip, pixels.
        batch: clips of a micro-batch.
        rank: of the LoRA; None = the whole network is trained, float32.
        checkpointing: activations inside U-Net blocks are computed again in the backward.
        base_dtype: of frozen weights and of the image encoder.
        precision: of autocast; fp32 = off.
        optimizer_bits: of each AdamW moment.
        shards: processes that share a whole network among them (fsdp2).
        num_ema: averages of the trained weights, float32.
        live: clips are encoded as they come, by a float32 autoencoder and an image encoder on the
            GPU; False = they are cached.
    """

    architecture: VideoArchitecture
    frames: int
    height: int
    width: int
    batch: int
    rank: int | None = 64
    checkpointing: bool = True
    base_dtype: Precision = "bf16"
    precision: Precision = "bf16"
    optimizer_bits: Literal[8, 32] = 32
    shards: int = 1
    num_ema: int = 1
    live: bool = True


def build_video_networks(spec: VideoSpec) -> dict[str, nn.Module]:
    """U-Net ("base"), what is trained ("model"), and the encoders if wanted; on the meta device."""
    shape = spec.architecture
    dtype = torch.float32 if spec.rank is None else DTYPES[spec.base_dtype]
    with torch.device("meta"):
        base: nn.Module = UNetSpatioTemporalConditionModel.from_config(dict(shape.unet))
    base = nn.Module.to(base, dtype).eval()
    nets = {"base": base, "model": base}
    if spec.rank is not None:
        shared = SharedBase(base)
        with torch.device("meta"):
            nets["model"] = shared.add(
                "model", rank=spec.rank, alpha=spec.rank, targets=SVD_LORA_TARGETS, seed=0
            )
        if spec.checkpointing:
            enable_checkpointing(shared)
    elif spec.checkpointing:
        enable_checkpointing(base)
    if spec.live:
        with torch.device("meta"):
            vae: nn.Module = AutoencoderKLTemporalDecoder.from_config(dict(shape.vae))
            vision = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(dict(shape.vision)))
        nets["VAE"] = vae.eval().requires_grad_(False)
        nets["vision"] = nn.Module.to(vision, DTYPES[spec.base_dtype]).eval().requires_grad_(False)
    return nets


class VideoRehearsal:
    """The networks of a run with optimiser and average, and one step.

    Args:
        spec: what is rehearsed.
        nets: of :func:`build_video_networks`; they get storage on ``device`` here.
        device: a real one, or the CPU under a FakeTensorMode.
        counters: told what is allocated for what; they count only while entered.

    Raises:
        ValueError: if the clip does not fit the autoencoder.
    """

    def __init__(
        self,
        spec: VideoSpec,
        nets: Mapping[str, nn.Module],
        device: torch.device,
        counters: Counters,
    ) -> None:
        self.spec, self.device, self.counters, self.nets = spec, device, counters, nets
        kinds = {"VAE": "encoders", "vision": "encoders", "model": "trained weights"}
        for name, net in nets.items():
            if not isinstance(net, AdapterView) and (name != "base" or net is not nets["model"]):
                with counters.kind(kinds.get(name, "frozen weights")):
                    materialise(net, device)
        self.network = trained_network("model", nets["model"], counters, spec.num_ema)
        levels = len(cast("list[int]", spec.architecture.vae["block_out_channels"]))
        side = 2 ** (levels - 1)
        if spec.height % side or spec.width % side:
            raise ValueError(f"{spec.height}x{spec.width} pixels are no multiples of {side}")
        self.shape = (spec.frames, 4, spec.height // side, spec.width // side)

    def step(self) -> None:
        """Encode clips, if they come live, and train on them."""
        batch, device, phase = self.spec.batch, self.device, self.counters.phase
        width = int(str(self.spec.architecture.vision["projection_dim"]))
        x0, y = torch.randn(batch, *self.shape, device=device), None
        tokens = torch.zeros(batch, 1, width, device=device)
        if self.spec.live:
            with phase("encoding"), torch.no_grad():
                x0, y, tokens = self._encode()
        y = x0[:, :1] if y is None else y
        schedule = svd_schedule()
        u = torch.rand(batch, dtype=torch.float64)
        at = Noising(schedule.sample_t(u).to(device), u, torch.randn(x0.shape, device=device))
        with phase("training"):
            denoiser = Denoiser(
                self.nets["model"], partial(call_svd, y=y), schedule, "x0", sigma_data=1.0
            )
            cond = Condition(text=tokens, time_ids=torch.zeros(batch, 3, device=device))
            name = self.spec.precision
            with torch.autocast(device.type, DTYPES[name], enabled=name != "fp32"):
                loss = denoising_loss(denoiser, x0, cond, at)
            update(self.network, loss, batch)

    def _encode(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, image and tokens of clips, as video_clips.encode makes them."""
        spec, codec = self.spec, VideoCodec(self.nets["VAE"])
        clips = torch.zeros(spec.batch, spec.frames, 3, spec.height, spec.width, device=self.device)
        mean, std = codec.posterior(clips)
        image = codec.posterior(clips[:, :1])[0]
        pixels = torch.zeros(spec.batch, 3, 224, 224, device=self.device)
        vision = self.nets["vision"]
        found = vision(pixels.to(next(vision.parameters()).dtype)).image_embeds
        return codec.draw(mean, std, torch.randn_like(mean)), image, found[:, None].float()
