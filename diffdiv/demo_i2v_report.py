"""The page of `diffdiv demo i2v`: table, clips that move, leakage curves; one file, offline.

Clips of the strip are bars of 16 cells. Still, a clip is drawn with time downwards: what stands is
vertical, what moves leans. The moving version is a GIF, shown only to readers who do not ask their
system for less motion.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffdiv.metrics.moving_digits import Trial

if TYPE_CHECKING:
    from diffdiv.demo_i2v import Sampled

_CELL, _GAP = 5, 5  # pixels
_IMAGES, _SEEDS = 6, 5  # shown of each model
_SHOWN = 4  # real clips, ideal, leaking and cured model
_FRAME_MS = 350
_PALETTE = {"bayes": "#6b7280", "naive: leaks": "#d55e00", "TimeNoise: the cure": "#0072b2"}


def write_page(
    path: Path,
    trial: Trial,
    rows: "Sequence[Sampled]",
    leakage: Sequence[Mapping[str, float | str]],
    *,
    columns: Mapping[str, str],
    card: Mapping[str, object],
) -> None:
    """Write the page.

    Args:
        path: HTML file.
        trial: of the samples.
        rows: what was sampled.
        leakage: rows of ``leakage_table``.
        columns: figures to show and what they mean.
        card: how they were measured.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffdiv"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    strips = [
        (row.name, [filmstrip(row.clips[chosen]) for chosen in shown_rows(trial.judge.groups)])
        for row in rows[:_SHOWN]
    ]
    text = environment.get_template("i2v.html.j2").render(
        rows=rows,
        columns=columns,
        card=_flat(card),
        strips=strips,
        num_images=_IMAGES,
        num_seeds=_SEEDS,
        curves=[
            (title, data_url(_png(curve(leakage, key, where))), alt)
            for title, key, where, alt in (
                ("Error on seen images", "error", "seen", "leaking model far below the ideal"),
                ("Error on unseen images", "error", "unseen", "leaking model far above the ideal"),
                ("Motion on unseen images", "motion", "unseen", "leaking model moves too early"),
            )
        ],
        noise900=[
            {str(row["set"]): row for row in leakage if row["model"] == name and row["t"] == 900}
            | {"name": name}
            for name in dict.fromkeys(str(row["model"]) for row in leakage)
        ],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _flat(card: Mapping[str, object]) -> dict[str, object]:
    """The card without what does not apply, and with its lists in words."""
    return {
        key: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        for key, value in card.items()
        if value not in (None, "none")
    }


def shown_rows(groups: Tensor) -> list[Tensor]:
    """Rows of the first samples of each of the first images."""
    return [(groups == group).nonzero()[:_SEEDS, 0] for group in range(_IMAGES)]


def filmstrip(clips: Tensor) -> tuple[str, str]:
    """Data addresses of a still PNG (time downwards) and a moving GIF of strips [N, F, cells]."""
    grey = ((clips.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    frames = grey.shape[1]
    still = _tile([clip.repeat(_CELL, 0).repeat(_CELL, 1) for clip in grey])
    height = frames * _CELL
    moving = [
        _tile([clip[f : f + 1].repeat(height, 0).repeat(_CELL, 1) for clip in grey])
        for f in range(frames)
    ]
    buffer = io.BytesIO()
    first, *others = (Image.fromarray(frame) for frame in moving)
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=_FRAME_MS, loop=0)
    return data_url(_encoded(still)), data_url(buffer.getvalue(), "gif")


def _tile(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Panels side by side on a light ground."""
    height, width = panels[0].shape
    sheet = np.full((height, len(panels) * (width + _GAP) - _GAP), 225, np.uint8)
    for k, panel in enumerate(panels):
        sheet[:, k * (width + _GAP) :][:, :width] = panel
    return sheet


def curve(leakage: Sequence[Mapping[str, float | str]], key: str, where: str) -> Figure:
    """One quantity of the leakage table over t, a line a model."""
    figure = Figure(figsize=(4.2, 3.0), layout="constrained")
    axes = figure.subplots()
    for name, colour in _PALETTE.items():
        points = [row for row in leakage if row["model"] == name and row["set"] == where]
        xs, ys = ([float(row[k]) for row in points] for k in ("t", key))
        label = "ideal denoiser" if name == "bayes" else name
        axes.plot(xs, ys, "--" if name == "bayes" else "-", color=colour, marker=".", label=label)
    axes.set(xlabel="t (999 = pure noise)", ylim=(0, None))
    axes.set_ylabel("mean squared error" if key == "error" else "relative to the real clip")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _encoded(grey: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "png") -> str:
    """An image as an inline address."""
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()
