"""A random CLIP model with its processor, 16x16 pixels."""

from pathlib import Path

import torch
from builders import TEXT_LENGTH, tiny_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor


def write_clip(folder: Path, *, projection: int = 8) -> Path:
    """Write it into ``folder``, as save_pretrained does, and return the folder."""
    torch.manual_seed(0)
    tower = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": projection,
    }  # fmt: skip
    text = tower | {"vocab_size": 64, "max_position_embeddings": TEXT_LENGTH}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = tower | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(pixels, tiny_tokenizer(folder / "words")).save_pretrained(folder)
    return folder
