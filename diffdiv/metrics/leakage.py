"""The leakage meter: does an image-to-video model read the motion off the image?

    x0_hat   one-step prediction of the clip from a noised real clip, E[x0 | x_t, image] if ideal
    error    mean (x0_hat - x0)^2 per value
    motion   sum of squared differences between frames of x0_hat, over that of x0

A model that leaks is better on the clips it was trained on than the ideal denoiser could be (it
knows their motion by heart), worse on others, and on these x0_hat moves too little long before the
noise would excuse it (arXiv 2406.15735, whose diagnostic it is, made exact where the ideal denoiser
is known). Without an ideal one, the gap between seen and unseen clips is what can be said.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from diffdiv.core.noise import normal
from diffdiv.models.denoiser import Condition, Denoiser

#: the images of a batch [B, ...] -> the denoiser of their clips
ImageDenoiser = Callable[[Tensor], Denoiser]


@dataclass(frozen=True)
class LeakagePoint:
    """One-step predictions at one time.

    Attributes:
        t: time, in the unit of the schedule.
        error: mean squared error per value.
        motion: motion energy of x0_hat relative to that of x0.
    """

    t: float
    error: float
    motion: float


@torch.no_grad()
def leakage_curve(
    denoiser_of: ImageDenoiser,
    x0: Tensor,
    image: Tensor,
    times: Sequence[float],
    *,
    seed: int,
    draws: int = 1,
    batch: int = 256,
) -> list[LeakagePoint]:
    """One-step errors over time on real clips; all models see the same noise.

    Args:
        denoiser_of: images -> denoiser.
        x0: clips [N, F, ...], some of which move.
        image: their first frames [N, ...].
        times: in the unit of the schedule.
        seed: of the noise.
        draws: noised copies of each clip.
        batch: clips at once.

    Raises:
        ValueError: if no clip moves.
    """
    energy = float(_motion_energy(x0))
    if energy == 0:
        raise ValueError("x0: no clip moves, so there is no motion to compare with")
    sums = torch.zeros(len(times), 2, dtype=torch.float64)
    for start in range(0, len(x0), batch):
        clips, images = x0[start : start + batch], image[start : start + batch]
        denoiser = denoiser_of(images)
        for draw in range(draws):
            rows = range(draw * len(x0) + start, draw * len(x0) + start + len(clips))
            eps = normal(clips.shape[1:], seed=seed, purpose="leakage", indices=rows).to(clips)
            for k, time in enumerate(times):
                t = torch.full((len(clips),), time, dtype=torch.float64, device=clips.device)
                x_t = denoiser.schedule.add_noise(clips, eps, t)
                x0_hat = denoiser(x_t, t, Condition())
                error = (x0_hat - clips).double().square().sum()
                sums[k] += torch.stack([error, _motion_energy(x0_hat)]).cpu()
    error, motion = (sums / draws).T
    return [
        LeakagePoint(float(t), float(e) / x0.numel(), float(m) / energy)
        for t, e, m in zip(times, error, motion, strict=True)
    ]


def _motion_energy(clips: Tensor) -> Tensor:
    return clips.double().diff(dim=1).square().sum()


def leakage_table(
    models: dict[str, ImageDenoiser],
    sets: dict[str, tuple[Tensor, Tensor]],
    times: Sequence[float],
    *,
    seed: int,
    draws: int = 1,
) -> list[dict[str, float | str]]:
    """Curves of several models on several sets of clips, as rows for a report or a plot.

    Args:
        models: by name; "bayes" is the ideal one, where known.
        sets: by name ("seen", "unseen"): clips [N, F, ...] and their images.
        times, seed, draws: as for :func:`leakage_curve`.

    Returns:
        Rows with "model", "set", "t", "error", "motion"; and "over_bayes", error over that of the
        ideal denoiser on the same clips and noise, where there is one. Below 1 a model knows what
        the noised clip does not tell.
    """
    rows: list[dict[str, float | str]] = []
    for set_name, (x0, image) in sets.items():
        curves = {
            name: leakage_curve(model, x0, image, times, seed=seed, draws=draws)
            for name, model in models.items()
        }
        for name, curve in curves.items():
            for k, point in enumerate(curve):
                row: dict[str, float | str] = {"model": name, "set": set_name, **asdict(point)}
                if "bayes" in curves and curves["bayes"][k].error > 0:
                    row["over_bayes"] = point.error / curves["bayes"][k].error
                rows.append(row)
    return rows
