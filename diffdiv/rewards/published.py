"""Weights under the names they were published with, brought to transformers' names.

open_clip keeps queries, keys and values in one matrix and projections transposed; BLIP's networks
are timm's vision transformer and a BERT with cross-attention.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

_CLIP = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
_CLIP_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_BLIP_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
    "blocks.": "encoder.layers.",
}
_BLIP_BLOCK = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.": "mlp.",
}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """With its beginning exchanged; a name that none of them begins stays as it is."""
    found = next((old for old in names if name.startswith(old)), None)
    return name if found is None else names[found] + name.removeprefix(found)


def _block_renamed(name: str, names: Mapping[str, str]) -> str:
    """What follows ``layers.N.`` renamed."""
    head, number, tail = re.split(r"(?<=layers\.)(\d+)\.", name, maxsplit=1)
    return f"{head}{number}.{_renamed(tail, names)}"


def clip_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a CLIP in open_clip's naming under transformers'; others are left as they are."""
    if "visual.conv1.weight" not in weights:
        return dict(weights)
    found: dict[str, Tensor] = {}
    for old, value in weights.items():
        name = _renamed(old, _CLIP)
        if old in ("text_projection", "visual.proj"):
            found[name] = value.T.contiguous()
        elif ".attn.in_proj_" in old:
            head, kind = name.split("attn.in_proj_")
            parts = zip("qkv", value.chunk(3), strict=True)
            found |= {f"{head}self_attn.{part}_proj.{kind}": v for part, v in parts}
        elif ".layers." in name:
            found[_block_renamed(name, _CLIP_BLOCK)] = value
        elif old != "attn_mask":  # a constant
            found[name] = value
    return found


def blip_vision_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of BLIP's vision transformer, published as timm's, under transformers' names."""
    found = {_renamed(old, _BLIP_VISION): value for old, value in weights.items()}
    return {
        _block_renamed(name, _BLIP_BLOCK) if ".layers." in name else name: value
        for name, value in found.items()
    }


def load_exactly(net: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load weights that must be all of the network's, and no others, in its shapes.

    Raises:
        ValueError: naming the file and what is missing, unknown or of another shape.
    """
    wanted = {name: value.shape for name, value in net.state_dict().items()}
    # constants that older files hold
    given = {name: v for name, v in weights.items() if not name.endswith("position_ids")}
    problems = [f"{name} is missing" for name in wanted.keys() - given.keys()]
    problems += [f"{name} is unknown" for name in given.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(given[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        raise ValueError(
            f"{source}: not the weights of this model, {len(problems)} faults: {shown}"
        )
    net.load_state_dict(given)
