"""Networks that predict clean tokens from masked ones. Needs torch and diffusers only, so that the
file can travel beside exported weights.

    V     tokens; id V is the mask
    x     int64 tokens [B, L] in 0..V, or a soft state [B, L, V+1] whose rows are probabilities

Neither network is told the time: in masked diffusion the tokens say it all (arXiv 2406.07524).
Features are [B, L, C] throughout: normalisation needs no transposed copy, and the convolutions see
them as channels-last images of height one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, one_hot, relu, scaled_dot_product_attention

#: four of each in this order: the DNA denoiser of DRAKES, after Dirichlet flow matching
DNA_DILATIONS = (1,) * 8 + (4,) * 4 + (16,) * 4 + (64,) * 4


@dataclass
class TokenOutput(BaseOutput):
    """What a token network returns: ``logits`` [B, L, V] of the clean tokens."""

    logits: Tensor


class _DilatedBlock(nn.Module):
    """x + relu(conv(norm(x + shift))); ``shift`` is what a constant time embedding comes to."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width)
        # two-dimensional: the CPU's one-dimensional kernels are up to four times slower
        self.conv = nn.Conv2d(
            width, width, (1, kernel), padding=(0, dilation * (kernel // 2)), dilation=(1, dilation)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + relu(_along(self.conv, self.norm(x + self.shift)))


def _along(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolution along a sequence [B, L, C] -> [B, L, C']."""
    out: Tensor = conv(x.transpose(1, 2).unsqueeze(2))
    return out.squeeze(2).transpose(1, 2)


class DilatedTokenNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' bases disagree
    """Residual dilated convolutions over tokens, for sequences of any length.

    The denoiser of DRAKES' DNA experiments (arXiv 2410.13643), with its constant time input folded
    into a bias of each block and without an output for the mask.

    Args:
        num_tokens: V.
        width: channels C; the paper's network has 128.
        kernel: odd kernel size.
        dilations: of the blocks.
    """

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 4,
        width: int = 128,
        kernel: int = 9,
        dilations: Sequence[int] = DNA_DILATIONS,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel: {kernel} is not odd")
        self.num_tokens = num_tokens
        self.stem = nn.Conv2d(num_tokens + 1, width, (1, kernel), padding=(0, kernel // 2))
        self.blocks = nn.ModuleList(_DilatedBlock(width, kernel, d) for d in dilations)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, num_tokens)

    def forward(self, x: Tensor) -> TokenOutput:
        """Logits of the clean tokens."""
        weight = self.stem.weight
        soft = x if x.is_floating_point() else one_hot(x, self.num_tokens + 1)
        features = relu(_along(self.stem, soft.to(weight.dtype)))
        for block in self.blocks:
            features = block(features)
        return TokenOutput(logits=self.head(relu(self.mix(features))))


class _AttentionBlock(nn.Module):
    """Pre-norm self-attention with rotary positions, then a GELU layer of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(
            _rotate(qkv[0], turn), _rotate(qkv[1], turn), qkv[2]
        )
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864): halves of the channels turn by angles [L, D/2]."""
    first, second = x.chunk(2, -1)
    cos, sin = turn.cos().to(x.dtype), turn.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class TransformerTokenNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as above
    """Bidirectional transformer over tokens.

    Args:
        num_tokens: V.
        width: model width, a multiple of twice the heads.
        depth: blocks.
        heads: attention heads.
    """

    @register_to_config
    def __init__(
        self, num_tokens: int = 4, width: int = 128, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width: {width} is not a multiple of twice the {heads} heads")
        self.pairs: int = width // (2 * heads)
        self.embed = nn.Embedding(num_tokens + 1, width)
        self.blocks = nn.ModuleList(_AttentionBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens)

    def forward(self, x: Tensor) -> TokenOutput:
        """Logits of the clean tokens."""
        table = self.embed.weight
        soft = x.is_floating_point()
        features = x.to(table.dtype) @ table if soft else embedding(x, table)
        places = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        speeds = torch.exp(-log(10_000) * torch.arange(self.pairs, device=x.device) / self.pairs)
        turn = places[:, None] * speeds
        for block in self.blocks:
            features = block(features, turn)
        return TokenOutput(logits=self.head(self.norm(features)))
