"""The trunk of Enformer (doi 10.1038/s41592-021-01252-x): convolutions, then attention over places.

    x      one-hot or soft sequences [B, L, 4], letters A, C, G, T
    C      channels; places N = L / 2^(convolutional layers), rounded up at each halving
    r      distance of two places, -(N - 1)..N - 1

Names and shapes of the weights are those of the PyTorch port enformer-pytorch, whose files (as
safetensors) can be loaded. Normalisation uses the stored statistics in training too, and leaves
them alone: a sequence's features depend on that sequence only, however a batch is split.
"""

from math import inf, log
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import batch_norm, pad

#: the port's whole model holds each part a second time, under its place in a sequence
_PLACES = {"1": "stem", "2": "conv_tower", "4": "transformer", "6": "final_pointwise"}


def relative_features(
    places: int, count: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Basis functions of all distances, [2 * places - 1, count]; row N - 1 + r is distance r.

    Each of three families has F = count / 6 functions of |r|: 2^(-|r| / h) with log2 h evenly from
    3 to log2 N; 1 where |r| < 2^i - 1, i = 1..F; and Gamma densities of means N / F..N and standard
    deviation N / 2F, plus 1e-8, each over its largest value. Then the same times the sign of r.

    The port divides the Gamma densities by the largest of a row where the original, as here,
    divides by the largest of a column.

    Raises:
        ValueError: if ``count`` is not a positive multiple of 6.
    """
    if count < 6 or count % 6:
        raise ValueError(f"count: {count} is not a positive multiple of 6")
    size = count // 6
    r = torch.arange(1 - places, places, dtype=dtype, device=device)[:, None]
    half_lives = 2 ** torch.linspace(3, log(places, 2), size, dtype=dtype, device=device)
    widths = 2 ** torch.arange(1, size + 1, dtype=dtype, device=device) - 1
    means = torch.linspace(places / size, places, size, dtype=dtype, device=device)
    variance = (places / (2 * size)) ** 2
    shape, rate = means**2 / variance, means / variance
    distance = r.abs()
    exponent = torch.xlogy(shape - 1, distance) - rate * distance
    density = torch.exp(exponent - torch.lgamma(shape) + shape * rate.log()) + 1e-8
    families = [2 ** (-distance / half_lives), (distance < widths).to(dtype)]
    both = torch.cat([*families, density / density.amax(0)], 1)
    return torch.cat([both, r.sign() * both], 1)


def channel_widths(channels: int, num_conv: int, divisor: int) -> list[int]:
    """Channels after each convolutional layer: C / 2, then geometrically from C / 2 to C.

    Raises:
        ValueError: if half the channels are no multiple of ``divisor``, or layers are fewer than 3.
    """
    if num_conv < 3 or channels % (2 * divisor):
        raise ValueError(
            f"channels, num_conv, divisor: {channels}, {num_conv}, {divisor}; need at least 3 "
            "layers, and half the channels a multiple of divisor"
        )
    widths = (channels / 2 * 2 ** (i / (num_conv - 2)) for i in range(num_conv - 1))
    return [channels // 2, *(round(width / divisor) * divisor for width in widths)]


class _Gelu(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _StoredNorm(nn.Module):
    """Batch normalisation [B, C, L] by stored statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class _Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.fn = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(x)
        return x + out


def _conv_block(inputs: int, outputs: int, kernel: int = 1) -> list[nn.Module]:
    conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
    return [_StoredNorm(inputs), _Gelu(), conv]


class AttentionPool(nn.Module):
    """Pairs of neighbours become their mean, weighted by a softmax per channel.

    The logits are a linear map of each place's channels, twice the identity at first. A lone last
    place stays as it is.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_attn_logits = nn.Conv2d(channels, channels, 1, bias=False)
        with torch.no_grad():
            nn.init.dirac_(self.to_attn_logits.weight).mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, L] -> [B, C, ceil(L / 2)]."""
        is_odd = x.shape[2] % 2
        pairs = pad(x, (0, is_odd)).unflatten(2, (-1, 2))
        logits = self.to_attn_logits(pairs)
        if is_odd:
            is_blank = torch.zeros(pairs.shape[2:], dtype=torch.bool, device=x.device)
            is_blank[-1, 1] = True
            logits = logits.masked_fill(is_blank, -inf)
        return (pairs * logits.softmax(3)).sum(3)


class RelativeAttention(nn.Module):
    """Attention whose logits see content and distance.

    Of places i and j, d the key size: (q_i / sqrt(d) + u) . k_j + (q_i / sqrt(d) + v) . R f(j - i)
    with f of :func:`relative_features`.

    Args:
        channels: C; a head's values, and its features of distance, number C / heads.
        heads: attention heads.
        key_size: d.
        dropout: of the weights; of the features of distance a fifth of it.
    """

    def __init__(self, channels: int, heads: int, key_size: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale, self.num_features = heads, key_size**-0.5, channels // heads
        self.to_q = nn.Linear(channels, heads * key_size, bias=False)
        self.to_k = nn.Linear(channels, heads * key_size, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)
        self.to_rel_k = nn.Linear(self.num_features, heads * key_size, bias=False)
        self.rel_content_bias = nn.Parameter(torch.randn(1, heads, 1, key_size))
        self.rel_pos_bias = nn.Parameter(torch.randn(1, heads, 1, key_size))
        self.attn_dropout, self.pos_dropout = nn.Dropout(dropout), nn.Dropout(dropout / 5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        places, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
        features = relative_features(places, self.num_features, dtype=dtype, device=x.device)
        distances = self.to_rel_k(self.pos_dropout(features).to(self.to_rel_k.weight.dtype))
        q, k, v, keys = (
            part.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for part in (self.to_q(x) * self.scale, self.to_k(x), self.to_v(x), distances)
        )
        content = (q + self.rel_content_bias) @ k.mT
        i = torch.arange(places, device=x.device)
        row = (i - i[:, None] + places - 1).expand(content.shape)
        position = ((q + self.rel_pos_bias) @ keys.mT).gather(-1, row)
        weights = self.attn_dropout((content + position).softmax(-1)).to(v.dtype)
        out: Tensor = self.to_out((weights @ v).transpose(1, 2).flatten(2))
        return out


class EnformerTrunk(nn.Module):
    """Enformer without its heads and its crop; the defaults are the published sizes.

    Convolutional layers see shifts by 2^num_conv bases as shifts by one place, edges apart. The
    trunk tells the strands apart. Any L from 1 on.

    Args:
        channels: C; C / heads is a multiple of 6.
        num_conv: convolutional layers, each halving the places.
        num_transformer: attention layers.
        heads: attention heads.
        key_size: of a head's queries and keys.
        divisor: the channels of the convolutional layers are multiples of it.
        dropout: in the attention layers (published: 0.4); of the attention weights and the output
            an eighth of it, of the features of distance a fortieth.

    Raises:
        ValueError: if the channels do not divide.
    """

    def __init__(
        self,
        channels: int = 1536,
        num_conv: int = 7,
        num_transformer: int = 11,
        heads: int = 8,
        key_size: int = 64,
        divisor: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if channels % (6 * heads):
            raise ValueError(f"channels: {channels} is not a multiple of 6 times the {heads} heads")
        widths = channel_widths(channels, num_conv, divisor)
        self.stem = nn.Sequential(
            nn.Conv1d(4, widths[0], 15, padding=7),
            _Residual(*_conv_block(widths[0], widths[0])),
            AttentionPool(widths[0]),
        )
        layers = map(_conv_layer, widths[:-1], widths[1:])
        self.conv_tower = nn.Sequential(*layers)
        sizes = (channels, heads, key_size, dropout)
        blocks = (_attention_layer(*sizes) for _ in range(num_transformer))
        self.transformer = nn.Sequential(*blocks)
        # the empty place is where the port rearranges
        last = nn.Sequential(*_conv_block(channels, 2 * channels))
        self.final_pointwise = nn.Sequential(nn.Identity(), last, nn.Dropout(dropout / 8), _Gelu())

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, N, 2 C]."""
        features = self.conv_tower(self.stem(x.to(next(self.parameters()).dtype).mT))
        out: Tensor = self.final_pointwise(self.transformer(features.mT).mT)
        return out.mT


def _conv_layer(inputs: int, outputs: int) -> nn.Module:
    """[B, inputs, L] -> [B, outputs, ceil(L / 2)]."""
    first = nn.Sequential(*_conv_block(inputs, outputs, 5))
    return nn.Sequential(first, _Residual(*_conv_block(outputs, outputs)), AttentionPool(outputs))


def _attention_layer(channels: int, heads: int, key_size: int, dropout: float) -> nn.Module:
    """Attention and a ReLU layer of twice the channels, both normalised before and added."""
    attention = RelativeAttention(channels, heads, key_size, dropout / 8)
    return nn.Sequential(
        _Residual(nn.LayerNorm(channels), attention, nn.Dropout(dropout)),
        _Residual(
            nn.LayerNorm(channels),
            nn.Linear(channels, 2 * channels),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Linear(2 * channels, channels),
            nn.Dropout(dropout),
        ),
    )


def load_enformer_trunk(trunk: EnformerTrunk, path: Path) -> None:
    """Load published weights; heads, counters and anything else in the file are left out.

    Args:
        trunk: of the sizes of the file.
        path: safetensors, under the names of enformer-pytorch.

    Raises:
        ValueError: if it is no such file, or a weight is missing or of another shape; ``trunk`` is
            untouched then.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: pickles are not read; once, where you trust it: safetensors.torch.save_file("
            "{name: value.clone() for name, value in torch.load(FILE, weights_only=True).items()}, "
            '"enformer.safetensors")'
        )
    try:
        found = {_own_name(name): value for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
    wanted = trunk.state_dict()
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{path}: no weights of an Enformer trunk of these sizes: {missing[0]} and "
            f"{len(missing) - 1} more of {len(wanted)} are missing"
        )
    for name, value in wanted.items():
        have, want = list(found[name].shape), list(value.shape)
        if have != want:
            raise ValueError(f"{path}: {name} is {have}, the trunk's is {want}")
    trunk.load_state_dict({name: found[name] for name in wanted})


def _own_name(name: str) -> str:
    """``_trunk.2.0.1.fn.0.weight`` is ``conv_tower.0.1.fn.0.weight``."""
    head, _, rest = name.partition(".")
    place, _, rest = rest.partition(".")
    return f"{_PLACES[place]}.{rest}" if head == "_trunk" and place in _PLACES else name
