"""What one-step predictions of seen and unseen clips say: curves over the noise, and a verdict.

    start    M, the noise level as a fraction, as in docs/i2v.md: of ln sigma for Stable Video
             Diffusion, sigma for flows, index / 1000 for CogVideoX
    error    of one-step predictions, and in units of the copier's (leakage_clips.py)
    motion   energy of x0_hat over that of x0 (metrics/leakage.py)

A model that reads the motion off the image knows it for the clips it was trained on and guesses it
for others (arXiv 2406.15735, whose diagnostic it is). So the verdict is one gap, chosen before any
figure is seen: error over the copier's at M >= 0.8, unseen minus seen. Dividing by the copier's
error keeps a set that merely moves more from looking like a leak.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffdiv.core.schedule import Schedule
from diffdiv.leakage_clips import OneStep
from diffdiv.metrics.card import Row

FRACTIONS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.94, 1.0)
NOISY = 0.8  # from here on the verdict looks
FEW = 10  # clips a set; below, standard errors are themselves too rough for a verdict
_WORSE = 1.05  # times the copier's error on seen clips: a network that predicts worse says nothing
_RELEVANT = 0.02  # a gap below this part of the seen error is none, whatever its standard error


def times_at(schedule: Schedule, fractions: Sequence[float]) -> list[float]:
    """Times of a schedule at fractions M in (0, 1], see the module."""
    if schedule.family == "edm":
        low = float(schedule.sample_t(torch.zeros(1)))
        return [low * (schedule.t_max / low) ** part for part in fractions]
    times = [part * schedule.t_max for part in fractions]
    return [float(round(t)) for t in times] if schedule.family == "vp" else times


def ratio(top: Tensor, bottom: Tensor) -> tuple[float, float]:
    """Ratio of the means of two quantities of N >= 2 clips, and its standard error (delta method).

    Raises:
        ValueError: if no clip moves, so that the ratio is to nothing.
    """
    if float(bottom.sum()) == 0:
        raise ValueError("no clip moves, so there is no motion to compare with")
    value = float(top.sum() / bottom.sum())
    spread = (top - value * bottom).std() / bottom.mean()
    return value, float(spread) / len(top) ** 0.5


def with_error(value: float, error: float) -> str:
    """A figure and its standard error in plain digits: "0.314 ± 0.021"."""
    return f"{value:.3g} ± {float(f'{error:.2g}'):g}"


def curve_rows(name: str, found: OneStep, times: Sequence[float]) -> list[Row]:
    """Figures of one set of clips, a row a noise level; ``_se`` are standard errors."""
    rows = []
    for k, (start, t) in enumerate(zip(FRACTIONS, times, strict=True)):
        error, over = found.error[:, k], ratio(found.error[:, k], found.copier)
        motion = ratio(found.motion[:, k], found.energy)
        metrics = {
            "start": start, "t": t,
            "error": float(error.mean()), "error_se": float(error.std()) / len(error) ** 0.5,
            "error_over_copier": over[0], "error_over_copier_se": over[1],
            "motion": motion[0], "motion_se": motion[1],
        }  # fmt: skip
        rows.append(Row(name=name, network_evaluations=1, metrics=metrics))
    return rows


def verdict(seen: OneStep, unseen: OneStep | None) -> tuple[dict[str, float], str]:
    """The gap at noisy times with its standard error, and a sentence that says how sure it is."""
    noisy = torch.tensor([start >= NOISY for start in FRACTIONS])
    own, own_se = ratio(seen.error[:, noisy].mean(1), seen.copier)
    figures = {"seen": own, "seen_se": own_se}
    said = f"where noise is strong (M >= {NOISY:g}) its error is {with_error(own, own_se)}"
    if unseen is None:
        return figures, (
            "Nothing can be said about a leak without unseen videos to compare with: "
            f"{said} of a copier's on the seen ones."
        )
    other, other_se = ratio(unseen.error[:, noisy].mean(1), unseen.copier)
    gap, gap_se = other - own, (own_se**2 + other_se**2) ** 0.5
    figures |= {"unseen": other, "unseen_se": other_se, "gap": gap, "gap_se": gap_se}
    said += f" of a copier's on seen clips and {with_error(other, other_se)} on unseen ones"
    said += f", a gap of {with_error(gap, gap_se)}"
    if min(len(seen.error), len(unseen.error)) < FEW:
        return figures, f"Too few clips for a verdict ({FEW} of each at least): {said}."
    if own > _WORSE:
        return figures, (
            f"No verdict: {said}; a network worse than a still picture even on seen clips is "
            "not trained, or for another size or frame rate, or the clips hardly move."
        )
    if abs(gap) < max(_RELEVANT * own, 2 * gap_se):
        bound = max(gap, 0) + 2 * gap_se
        return figures, f"No sign of a leak: {said}; one below {bound:.2g} would go unnoticed."
    if gap < 0:
        return figures, f"The sets cannot be compared, the unseen one is easier: {said}."
    start = "It leaks" if gap > 3 * gap_se else "It may leak, but this is not sure"
    return figures, f"{start}: {said} ({gap / gap_se:.1f} standard errors)."
