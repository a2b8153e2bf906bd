"""A small network that judges the prompted digits: attributes, and features for a distance.

It stands where Inception stands for photographs; its numbers compare runs on this world only and
must not be called FID.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdiv.data.digits import ATTRIBUTES, Attributes
from diffdiv.metrics.frechet import frechet_distance

WEIGHTS_NAME = "judge.safetensors"
_HEADS = {name: len(words) for name, words in ATTRIBUTES.items()}


class Judge(nn.Module):
    """Four convolutions, 64 features, one linear head per attribute; 113,572 parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer, stride in ((3, 16, 2), (16, 32, 2), (32, 48, 1), (48, 64, 2)):
            layers += [nn.Conv2d(inner, outer, 3, stride=stride, padding=1), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 64), nn.SiLU())
        self.heads = nn.Linear(64, sum(_HEADS.values()))

    def features(self, images: Tensor) -> Tensor:
        """Features [B, 64] of images [B, 3, 32, 32] in [-1, 1]."""
        return self.body(images)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits by attribute: digit [B, 10], colour [B, 6], background [B, 2], stroke [B, 2]."""
        logits = self.heads(self.features(images)).split(list(_HEADS.values()), dim=1)
        return dict(zip(_HEADS, logits, strict=True))


def save_judge(judge: Judge, folder: Path) -> None:
    """Write the weights as safetensors into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), folder / WEIGHTS_NAME)


def load_judge(path: Path) -> Judge:
    """The frozen judge from a folder that ``save_judge`` wrote.

    Raises:
        FileNotFoundError: if the folder holds no judge weights.
    """
    weights = path / WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no judge weights here (made by train/embedded_sd.py)")
    judge = Judge()
    judge.load_state_dict(load_file(weights))
    return judge.eval().requires_grad_(False)


def _chunks(images: Tensor, size: int = 250) -> Iterator[Tensor]:
    if images.shape[1:] != (3, 32, 32):
        raise ValueError(f"images: shape {tuple(images.shape)} is not [B, 3, 32, 32]")
    yield from images.float().split(size)


@torch.no_grad()
def judge_features(judge: Judge, images: Tensor) -> Tensor:
    """Features [B, 64] of images [B, 3, 32, 32] in [-1, 1], in bounded memory."""
    return torch.cat([judge.features(chunk) for chunk in _chunks(images)])


@torch.no_grad()
def attribute_accuracy(judge: Judge, images: Tensor, attributes: Attributes) -> dict[str, float]:
    """Fraction of images whose mentioned attributes the judge sees.

    Args:
        judge: a trained judge.
        images: [B, 3, 32, 32] in [-1, 1].
        attributes: what was asked for; entries of -1 are not counted.

    Returns:
        "digit", "colour", "background", "stroke" (NaN where nothing was mentioned) and "all": the
        fraction with every mentioned attribute right.
    """
    logits = [judge(chunk) for chunk in _chunks(images)]
    every = torch.ones(len(images), dtype=torch.bool, device=images.device)
    result = {}
    for name, wanted in attributes.named().items():
        wanted = wanted.to(images.device)
        right = torch.cat([chunk[name] for chunk in logits]).argmax(1) == wanted
        result[name] = right[wanted >= 0].float().mean().item()
        every &= right | (wanted < 0)
    return {**result, "all": every.float().mean().item()}


@torch.no_grad()
def log_obedience(judge: Judge, images: Tensor, mentioned: Attributes) -> Tensor:
    """Log-probability [B] of all that is mentioned, in nats, by the judge's heads.

    Args:
        judge: a trained judge.
        images: [B, 3, 32, 32] in [-1, 1].
        mentioned: what was asked for; entries of -1 count as obeyed.
    """
    logits = [judge(chunk) for chunk in _chunks(images)]
    total = torch.zeros(len(images), device=images.device)
    for name, wanted in mentioned.named().items():
        log_p = torch.cat([chunk[name] for chunk in logits]).log_softmax(1)
        asked = wanted.to(images.device)
        found = log_p.gather(1, asked.clamp_min(0)[:, None])[:, 0]
        total += torch.where(asked >= 0, found, 0.0)
    return total


def judge_frechet(features: Tensor, reference: Tensor) -> float:
    """Frechet distance after dividing both [N, 64] sets by the reference's standard deviation.

    Without the division the value depends on the arbitrary scale of the judge's features.
    """
    scale = reference.double().std(0).clamp_min(1e-6)
    return frechet_distance(features.double() / scale, reference.double() / scale)
