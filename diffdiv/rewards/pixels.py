"""What a reward's vision network is given, with gradient: fitted, resized, normalised pixels.

images    [B, 3, H, W] in [-1, 1]        fitted    [B, 3, S, S] in [0, 1]
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

# of OpenAI's CLIP; BLIP and the open_clip models here use the same
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def straight_clamp(x: Tensor) -> Tensor:
    """x clamped to [0, 1] in value, with the gradient of x: saturated pixels can still move."""
    return x + (x.clamp(0, 1) - x).detach()


def fitted(images: Tensor, size: int, fit: Literal["crop", "pad"] = "crop") -> Tensor:
    """Squares in [0, 1], resized by antialiased bicubic interpolation.

    Args:
        images: in [-1, 1]; what lies beyond counts as the bound.
        size: S.
        fit: "crop": shorter side to S, the middle is kept; "pad": longer side to S, black beside.
    """
    x, (height, width) = straight_clamp((images + 1) / 2), images.shape[-2:]
    if fit == "crop":  # both round as the published preparations do
        shape = size * height // min(height, width), size * width // min(height, width)
    else:
        shape = round(height * size / max(height, width)), round(width * size / max(height, width))
    x = straight_clamp(interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False))
    if fit == "crop":
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        return x[..., top : top + size, left : left + size]
    top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    return pad(x, (left, size - shape[1] - left, top, size - shape[0] - top))


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std by channel."""
    shift, scale = torch.tensor([mean, std], device=x.device).view(2, -1, 1, 1)
    return (x - shift) / scale
