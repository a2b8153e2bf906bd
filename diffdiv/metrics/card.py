"""Metric cards: what a number was computed with, so that it can be computed again."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import torch

PACKAGES = ("diffdiv", "torch", "diffusers", "transformers", "torchmetrics", "torch-fidelity")


class Row(TypedDict):
    """One sampler's figures in evaluation.json."""

    name: str
    network_evaluations: int
    metrics: dict[str, float]


class Evaluation(TypedDict):
    """Content of evaluation.json."""

    rows: list[Row]
    card: dict[str, object]


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    return {name: version(name) for name in PACKAGES}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def metric_card(
    *,
    n: int,
    seed: int,
    features: str,
    device: torch.device | str,
    command: str,
    weights: Path | None = None,
    ema_half_life: int | None = None,
    resize: str = "none",
    details: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Everything that decides a metric's value besides the model.

    Args:
        n: number of generated samples.
        seed: of the evaluation; sample i draws its noise from (seed, i).
        features: what the samples were looked at with.
        device: where it ran.
        command: that repeats it.
        weights: file of the feature network; its hash goes into the card.
        ema_half_life: of the student's average, in images; None = the trained weights themselves.
        resize: what is done to images before the features.
        details: whatever else decides the figures.
    """
    return {
        "n": n,
        "seed": seed,
        "seed_rule": "noise of sample i is a function of (seed, i)",
        "features": features,
        "weights_sha256": None if weights is None else file_sha256(weights),
        "resize": resize,
        "ema_half_life": ema_half_life,
        "device": str(device),
        "command": command,
        **(details or {}),
        "versions": versions(),
    }


def write_evaluation(folder: Path, rows: list[Row], card: dict[str, object]) -> Path:
    """Write evaluation.json into a folder; ValueError if a figure is not finite."""
    content: Evaluation = {"rows": rows, "card": card}
    path = folder / "evaluation.json"
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path
