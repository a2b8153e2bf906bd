"""Figures of generated clips: beside real ones, and of a few-step student beside its teacher.

    made, taught   clips of a model and of its teacher [B * S, F, 3, height, width] in [-1, 1], S
                   seeds of an image together; row i of both is from the same image and noise
    real           the clips whose first frames they were made from [B, F, 3, height, width]

A student that has lost motion has a motion ratio below 1; one that lets the image decide has lost
variety between seeds at an unchanged one, which no motion score sees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from diffdiv.core.tensor import flat_mean
from diffdiv.leakage_verdict import FEW, ratio, with_error
from diffdiv.metrics.motion import (
    Features,
    clip_frechet,
    compare_clips,
    flow_speeds,
    r3d_features,
    raft_flow,
)

_STILL = 0.1  # of the mean motion of the real clips: what moves less counts as still
_THUMBNAIL = (4, 8, 8)  # frames, rows and columns of grey that diversity is measured on


def frame_difference(clips: Tensor) -> Tensor:
    """Root mean square difference between neighbouring frames [B]; light changes count too."""
    return flat_mean(clips.double().diff(dim=1).square()).sqrt()


def thumbnails(clips: Tensor) -> Tensor:
    """Grey miniatures of 4 frames of 8x8 of clips [B, F, 3, height, width]: [B, 256]."""
    return functional.adaptive_avg_pool3d(clips.float().mean(2), _THUMBNAIL).flatten(1)


@dataclass(frozen=True)
class Eyes:
    """What clips are measured by.

    Attributes:
        speed: clips -> motion [B].
        features: clips -> [B, D], of diversity and distance.
        motion, diversity: names of these figures, which say by what.
        has_distance: whether a Frechet distance of the features means anything.
    """

    speed: Callable[[Tensor], Tensor]
    features: Features
    motion: str
    diversity: str
    has_distance: bool

    @staticmethod
    def of(flow: Path | None, features: Path | None, device: torch.device) -> "Eyes":
        """RAFT and R3D-18 where there are weights, else frame differences and thumbnails."""
        optical = None if flow is None else raft_flow(flow, device=device)
        see = thumbnails if features is None else r3d_features(features, device=device)

        def speed(clips: Tensor) -> Tensor:
            return frame_difference(clips) if optical is None else flow_speeds(clips, optical).score

        motion = "frame_difference" if flow is None else "flow_pixels_per_frame"
        diversity = "diversity_thumbnails" if features is None else "diversity_r3d"
        return Eyes(speed, see, motion, diversity, features is not None)


def judge_clips(
    made: Tensor, real: Tensor, seeds_each: int, eyes: Eyes
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of generated and of real clips, see the module; 2 seeds an image at least."""
    found = compare_clips(
        made,
        real.repeat_interleave(seeds_each, 0),
        images=real[:, 0].repeat_interleave(seeds_each, 0),
        groups=torch.arange(len(real)).repeat_interleave(seeds_each),
        speed=eyes.speed,
        features=eyes.features,
        still_below=_STILL * float(eyes.speed(real).mean()),
    )
    own, truth, between = (dict(found[key]) for key in ("clips", "reference", "between"))
    figures = {
        eyes.motion: own["motion"],
        "static_fraction": own["static_fraction"],
        eyes.diversity: own["seed_diversity"],
        "first_frame_error": own["first_frame_error"],
        "motion_change": between["motion_change"],
    }
    if truth["motion"] > 0:
        figures["motion_ratio"] = between["motion_ratio"]
    if eyes.has_distance:
        figures["frechet_distance_r3d"] = between["frechet_distance"]
    return figures, {eyes.motion: truth["motion"], "static_fraction": truth["static_fraction"]}


def judge_student(
    made: Tensor, taught: Tensor, seeds_each: int, eyes: Eyes
) -> tuple[dict[str, float], str]:
    """A student over its teacher, with standard errors over images, and a sentence.

    Args:
        made, taught: see the module.
        seeds_each: clips an image, 2 at least.
        eyes: what they are measured by.

    Returns:
        "motion_ratio" and "diversity_ratio" (each with ``_se``), "motion_change" (mean absolute,
        clip by clip), with features "frechet_distance_r3d"; and what follows from them.
    """
    count = len(made) // seeds_each
    own, other = (eyes.speed(clips).double().cpu() for clips in (made, taught))
    spread, reference = (_variances(eyes.features(clips), count) for clips in (made, taught))
    if float(other.sum()) == 0 or float(reference.sum()) == 0:
        return {}, "Nothing can be said about the student: its teacher's clips do not vary."
    motion = ratio(own.unflatten(0, (count, -1)).mean(1), other.unflatten(0, (count, -1)).mean(1))
    squared, squared_se = ratio(spread, reference)
    root = squared**0.5
    diversity = root, squared_se / (2 * root) if root > 0 else 0.0
    figures = {
        "motion_ratio": motion[0], "motion_ratio_se": motion[1],
        "diversity_ratio": diversity[0], "diversity_ratio_se": diversity[1],
        "motion_change": float((own - other).abs().mean()),
    }  # fmt: skip
    if eyes.has_distance:
        figures["frechet_distance_r3d"] = clip_frechet(made, taught, eyes.features)
    return figures, student_verdict(motion, diversity, count)


def _variances(features: Tensor, count: int) -> Tensor:
    """Variance over the seeds of each of ``count`` images, summed over features [count]."""
    return features.double().cpu().unflatten(0, (count, -1)).var(1).sum(1)


def student_verdict(
    motion: tuple[float, float], diversity: tuple[float, float], images: int
) -> str:
    """What two ratios to the teacher, each with its standard error over images, say together."""
    said = f"it has {with_error(*motion)} of its teacher's motion"
    said += f" and {with_error(*diversity)} of the variety between seeds of one image"
    if images < FEW:
        return f"Too few images for a verdict on the student ({FEW} at least): {said}."
    named = {"motion": motion, "variety": diversity}
    lost = [name for name, (value, error) in named.items() if value + 3 * error < 1]
    if lost:
        return f"The student has lost {' and '.join(lost)}: {said}."
    if motion[0] - 3 * motion[1] > 1:
        return f"The student moves more than its teacher, which need not be better: {said}."
    return f"No sign that the student has lost motion or variety: {said}."
