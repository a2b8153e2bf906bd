"""Discriminator heads on features of a denoiser; a logit is log_r = log(p_teacher / p_student).

Heads are small because the trunk is a pretrained denoiser that already knows x_t, t and the
condition (f-distill and DMD2 do the same). Several tapped blocks: one head each, logits averaged.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffdiv.models.denoiser import Condition, Denoiser


class DiscriminatorHeads(nn.Module):
    """Convolutional heads, one per tapped feature map.

    Args:
        channels: channels of each tapped feature map.
        width: hidden channels of a head.
    """

    def __init__(self, channels: Sequence[int], *, width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_head(inputs, width) for inputs in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B], float32, from one feature map [B, C_i, h_i, w_i] per head."""
        logits = [head(f.float()) for head, f in zip(self.heads, features, strict=True)]
        return torch.cat(logits, 1).mean(1)


def _head(inputs: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, width):
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        layers += [nn.GroupNorm(min(8, width), width), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))


def heads_for(
    trunk: Denoiser, shape: Sequence[int], cond: Condition, blocks: Sequence[str], *, seed: int
) -> DiscriminatorHeads:
    """Heads that fit the named blocks of a denoiser, found by one probing forward.

    Args:
        trunk: denoiser whose features will be read.
        shape: of one sample, (C, H, W).
        cond: any condition of batch 1.
        blocks: dotted names of its blocks.
        seed: of the initial weights.

    Raises:
        ValueError: if a block does not exist.
    """
    device = next(trunk.net.parameters()).device
    t = trunk.schedule.sample_t(torch.full((1,), 0.5)).to(device)
    with torch.no_grad():
        features = trunk.features(torch.zeros(1, *shape, device=device), t, cond.to(device), blocks)
    channels = [f.shape[1] for f in features]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiscriminatorHeads(channels, width=max(32, min(channels) // 4))
