"""The page of `diffdiv evaluate --leakage`: verdict, curves, clips, card; one file, offline."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffdiv.curves import COLOURS, DASHES, INK, figure_svg
from diffdiv.demo_i2v_report import data_url
from diffdiv.leakage_verdict import with_error
from diffdiv.metrics.card import Row
from diffdiv.models.video import as_images

_FRAMES, _SIDE, _GAP = 8, 72, 4  # frames of a filmstrip, their height and distance in pixels
_PANELS = {
    "error": ("One-step error", "mean squared, latents"),
    "error_over_copier": ("Error over the copier's", "1 = repeating the image"),
    "motion": ("Motion of the prediction", "1 = that of the real clips"),
}


def write_leakage_page(
    path: Path, rows: Sequence[Row], shown: Mapping[str, Tensor], *, card: Mapping[str, object]
) -> None:
    """Write the page.

    Args:
        path: HTML file.
        rows: of evaluation.json.
        shown: clips [B, F, 3, height, width] in [-1, 1] by what they are.
        card: of evaluation.json, with its "verdict".
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffdiv"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    curves = {
        name: [row["metrics"] for row in rows if row["name"] == name] for name in ("seen", "unseen")
    }
    curves = {name: points for name, points in curves.items() if points}
    text = environment.get_template("leakage.html.j2").render(
        verdict=card["verdict"],
        with_error=with_error,
        card={k: _words(v) for k, v in card.items() if k != "verdict" and v not in (None, "none")},
        panels=[(title, unit, _panel(curves, key)) for key, (title, unit) in _PANELS.items()],
        curves=curves,
        generated=[row for row in rows if row["name"].startswith(("made", "teacher", "real"))],
        student=[row["metrics"] for row in rows if row["name"] == "student over teacher"],
        strips=[(name, [filmstrip(clip) for clip in clips]) for name, clips in shown.items()],
    )
    path.write_text(text, encoding="utf-8")


def _words(value: object) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return value


def _panel(curves: Mapping[str, Sequence[Mapping[str, float]]], key: str) -> Markup:
    """One quantity over M with two standard errors, a line a set."""
    figure = Figure(figsize=(3.8, 2.5), layout="constrained")
    axes = figure.subplots()
    words = []
    for i, (name, points) in enumerate(curves.items()):
        xs, ys = [p["start"] for p in points], [p[key] for p in points]
        bars = [2 * p[f"{key}_se"] for p in points]
        axes.errorbar(
            xs, ys, bars, fmt=DASHES[i][0], color=COLOURS[i], marker=".", capsize=2, label=name
        )
        words.append(f"{name} from {ys[0]:.3g} to {ys[-1]:.3g}")
    axes.set_xlabel("M (1 = pure noise)", color=INK, fontsize=8)
    axes.set_ylim(0, None)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(alpha=0.25, color=INK)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure_svg(figure, f"{_PANELS[key][0]}: {'; '.join(words)}")


def filmstrip(clip: Tensor) -> str:
    """Data address of a PNG: frames of a clip [F, 3, height, width] in [-1, 1], left to right."""
    chosen = torch.linspace(0, len(clip) - 1, min(_FRAMES, len(clip))).round().long()
    height, width = clip.shape[-2:]
    side = max(round(_SIDE * width / height), 1)
    sheet = Image.new("RGB", (len(chosen) * (side + _GAP) - _GAP, _SIDE), (225, 225, 225))
    for k, frame in enumerate(as_images(clip[chosen])):
        sheet.paste(frame.resize((side, _SIDE), Image.Resampling.BOX), (k * (side + _GAP), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return data_url(buffer.getvalue())
