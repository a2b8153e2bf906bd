"""Tiny random models in diffusers folders, built from configurations alone."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffdiv.runtime.checkpoint import newest_valid, read_tensors

TEXT_LENGTH = 32


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of lower-case letters, written into ``folder``."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return CLIPTokenizer(*files, model_max_length=TEXT_LENGTH)


def tiny_text_encoder(vocabulary: int = 64) -> CLIPTextModel:
    """Two layers of width 16."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    """Stable Diffusion's network on 8x8 latents, two levels of width 8 and 16; random."""
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def tiny_vae(shift_factor: float | None = None) -> AutoencoderKL:
    """16x16 images <-> 8x8 latents of 4 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=shift_factor,
    )


def tiny_stable_diffusion(
    folder: Path, scheduler: SchedulerMixin | None = None, **unet_changes: object
) -> Path:
    """Write a random text-to-image pipeline (8x8 latents, 16x16 images) and return its folder."""
    torch.manual_seed(0)
    unet = tiny_unet(**unet_changes)
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(folder / "scratch"),
        unet=unet,
        scheduler=scheduler or stable_diffusion_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "teacher")
    return folder / "teacher"


def stable_diffusion_scheduler(**changes: object) -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**settings, **changes})


def tiny_unet2d(folder: Path, scheduler: SchedulerMixin, num_classes: int | None = None) -> Path:
    """Write a random 8x8 one-channel UNet2DModel with its scheduler and return the folder."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=num_classes,
    )
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest valid state, by "file/key"."""
    state = newest_valid(folder)
    return {
        f"{path.stem}/{key}": value
        for path in sorted(state.glob("*.safetensors"))
        for key, value in read_tensors(state, path.stem).items()
    }


def losses_of(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics without what no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = {"seconds", "images_per_second", "memory"}
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]
