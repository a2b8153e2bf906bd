"""ImageReward (arXiv 2304.05977): BLIP's text encoder looks at the image, a small head scores.

    f = BERT(prompt, cross-attention to ViT(image)), first token      r = (head(f) - m) / s

The networks are transformers' own BLIP modules, filled with the published weights. Sizes are read
from the weights; heads are 64 wide, as in BLIP's base and large models and in BERT.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from diffdiv.rewards.images import ImageReward
from diffdiv.rewards.pixels import CLIP_MEAN, CLIP_STD, fitted, normalised
from diffdiv.rewards.published import blip_vision_names, load_exactly

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # m, s, as published
TEXT_LENGTH = 35  # tokens, padded
_HEAD_WIDTH = 64
_FILE = "image_reward.safetensors"


class ImageRewardNet(nn.Module):
    """The networks of ImageReward, in the sizes of some weights.

    Args:
        weights: in the published naming: ``blip.visual_encoder.``, ``blip.text_encoder.``,
            ``mlp.layers.N.``; the two projections that BLIP's pretraining needed are not used.
        source: file they come from, for errors.

    Raises:
        ValueError: if they are not complete, or of shapes that do not belong together.
    """

    def __init__(self, weights: Mapping[str, Tensor], source: Path) -> None:
        super().__init__()
        vision = blip_vision_names(_part(weights, "blip.visual_encoder."))
        text, head = _part(weights, "blip.text_encoder."), _part(weights, "mlp.layers.")
        try:
            self.vision = BlipVisionModel(_vision_config(vision))
            self.text = BlipTextModel(_text_config(text, vision), add_pooling_layer=False)
        except KeyError as error:
            raise ValueError(f"{source}: no weights of ImageReward, {error} is missing") from error
        self.head = nn.ModuleDict(
            {
                name.partition(".")[0]: nn.Linear(value.shape[1], value.shape[0])
                for name, value in sorted(head.items(), key=lambda item: int(item[0].split(".")[0]))
                if name.endswith("weight")
            }
        )
        for net, part in ((self.vision, vision), (self.text, text), (self.head, head)):
            load_exactly(net, part, source)
        patch = vision["embeddings.patch_embedding.weight"].shape[-1]
        self.size = patch * _grid(vision)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards [B] of normalised pixels [B, 3, S, S] and tokens [B, 35]."""
        seen = self.vision(pixels).last_hidden_state
        states = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones_like(seen[..., 0], dtype=torch.long),
        ).last_hidden_state
        x: Tensor = states[:, 0]
        for layer in self.head.values():  # published without activations between them
            x = layer(x)
        return (x[:, 0] - MEAN) / STD


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}


def _depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({n.removeprefix(prefix).partition(".")[0] for n in weights if n.startswith(prefix)})


def _grid(vision: Mapping[str, Tensor]) -> int:
    """Patches a side; one more position is the first token's."""
    return round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5)


def _vision_config(weights: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_depth(weights, "encoder.layers."),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=patch * _grid(weights),
        patch_size=patch,
        layer_norm_eps=1e-6,  # timm's; transformers' default is another
    )


def _text_config(weights: Mapping[str, Tensor], vision: Mapping[str, Tensor]) -> BlipTextConfig:
    words, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=vision["post_layernorm.weight"].shape[0],
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_depth(weights, "encoder.layer."),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,  # it has cross-attention; its self-attention is still both ways
        bos_token_id=None,
        sep_token_id=None,
    )


def image_reward(folder: Path, device: torch.device) -> ImageReward:
    """ImageReward 1.0, shifted and scaled as published.

    Args:
        folder: holds ``image_reward.safetensors`` (the published ``ImageReward.pt`` is a pickle of
            the same names; convert it once) and the tokenizer of bert-base-uncased.
        device: to run on.

    Raises:
        FileNotFoundError, ValueError: if weights or tokenizer are missing, or do not fit.
    """
    file = folder / _FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: ImageReward's weights are wanted there, as safetensors")
    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise FileNotFoundError(f"{folder}: the tokenizer of bert-base-uncased is wanted there")
    net = ImageRewardNet(load_file(file), file).to(device, torch.float32)
    net.eval().requires_grad_(False)
    tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True,
            return_tensors="pt",
        ).to(images.device)  # fmt: skip
        pixels = normalised(fitted(images, net.size), CLIP_MEAN, CLIP_STD)
        found: Tensor = net(pixels, tokens.input_ids, tokens.attention_mask)
        return found

    return ImageReward("image_reward", score)
