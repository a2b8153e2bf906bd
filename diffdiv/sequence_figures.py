"""Figures of fine-tuned sequence models, as inline SVG: fronts of reward against KL, logos.

A run folder may hold ``sequences.json`` (:class:`SequenceFigures`): what to draw beside the figures
of evaluation.json, such as the exact front and the sites of motifs.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from pydantic import BaseModel, Field

from diffdiv.curves import COLOURS, INK, Panel, figure_svg

_MARKERS = "oDsv^P*X"
_LETTERS = {"A": "#2f8f3f", "C": "#2f6fd8", "G": "#e09a00", "T": "#d03a2f"}
_BOLD = FontProperties(family="DejaVu Sans", weight="bold")
_LEAST_BITS = 0.03  # lower letters are not drawn

Probability = Annotated[float, Field(ge=0, le=1)]
Place = Annotated[list[Probability], Field(min_length=4, max_length=4)]  # of A, C, G, T


class Line(BaseModel):
    """A curve behind the points, such as an exact front; quantity -> values, all as long."""

    name: str
    values: dict[str, list[float]]


class Stack(BaseModel):
    """One logo: letter frequencies at aligned places."""

    name: str
    places: list[Place]


class Motif(BaseModel):
    """Logos of one motif, to be compared."""

    name: str
    stacks: list[Stack]


class Text(BaseModel):
    """A sequence to show, in parts: letters, and the motif they are a site of."""

    head: str
    parts: list[tuple[str, str | None]]


class SequenceFigures(BaseModel):
    """Content of sequences.json; ``note`` says how the windows of the logos were chosen."""

    lines: list[Line] = []
    motifs: list[Motif] = []
    texts: dict[str, list[Text]] = {}
    note: str = ""


class Point(NamedTuple):
    """A model's figures by quantity; those named ``X_error`` are the standard errors of X."""

    name: str
    metrics: Mapping[str, float]


def front_panels(points: Sequence[Point], lines: Sequence[Line]) -> list[Panel]:
    """Reward, and its held-out twin if there is one, against path KL.

    Args:
        points: those without both quantities are left out.
        lines: drawn where they have both quantities.
    """
    words = {"reward": "reward", "twin": "twin of the reward (never trained on)"}
    found = []
    for key, title in words.items():
        shown = [p for p in points if {key, "path_kl"} <= p.metrics.keys()]
        if len(shown) > 1:
            found.append(_front(shown, [n for n in lines if {key, "kl"} <= n.values.keys()], key))
            found[-1] = found[-1]._replace(name=f"{title} against KL from the pretrained model")
    return found


def _front(points: Sequence[Point], lines: Sequence[Line], key: str) -> Panel:
    figure = Figure(figsize=(5.2, 4.9), layout="constrained")
    axes = figure.subplots()
    limit = 1.15 * max(1.0, *(p.metrics["path_kl"] for p in points))
    for line, dash in zip(lines, ("-", "--", ":") * len(lines), strict=False):
        inside = [i for i, kl in enumerate(line.values["kl"]) if kl <= limit]
        x, y = ([line.values[name][i] for i in inside] for name in ("kl", key))
        axes.plot(x, y, dash, color=INK, linewidth=1.2, label=line.name)
    for i, point in enumerate(points):
        m = point.metrics
        axes.errorbar(
            [m["path_kl"]], [m[key]], xerr=m.get("path_kl_error", 0.0),
            yerr=m.get(f"{key}_error", 0.0), fmt=_MARKERS[i % len(_MARKERS)], markersize=7,
            color=COLOURS[i % len(COLOURS)], linewidth=1.2, label=point.name,
        )  # fmt: skip
    # a front begins like the square root of the KL
    axes.set_xscale("function", functions=(_signed_root, lambda v: np.sign(v) * v**2))
    ticks = [0.0]
    for tick in (0.1, 0.5, 1, 2, 4, 8, 16, 32, 64):
        if tick <= limit and tick**0.5 - ticks[-1] ** 0.5 > 0.08 * limit**0.5:
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlim(-0.01 * limit, limit)
    axes.set_xlabel("path KL, nats a sequence", color=INK)
    axes.set_ylabel(key, color=INK)
    _plain(axes)
    legend = figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_color(INK)
    told = [f"{p.name} {p.metrics[key]:.3g} at {p.metrics['path_kl']:.3g} nats" for p in points]
    return Panel("", "", figure_svg(figure, f"{key} against path KL: {'; '.join(told)}"))


def _signed_root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.grid(alpha=0.25, color=INK)


def logo_panel(motif: Motif) -> Panel:
    """Logos one above the other; a letter is as high as its share of the place's information."""
    count = len(motif.stacks)
    figure = Figure(figsize=(3.6, 0.25 + 0.85 * count), layout="constrained")
    for axes, stack in zip(np.atleast_1d(figure.subplots(count, 1)), motif.stacks, strict=True):
        _draw_logo(axes, np.array(stack.places))
        axes.set_title(stack.name, loc="left", fontsize=8, color=INK, pad=3)
    names = ", ".join(stack.name for stack in motif.stacks)
    return Panel(motif.name, "", figure_svg(figure, f"logos of {motif.name}: {names}"))


def information(places: np.ndarray) -> np.ndarray:
    """Bits at each place [W] of letter frequencies [W, 4]: 2 - entropy, in [0, 2]."""
    p = np.where(places > 0, places, 1.0)
    result: np.ndarray = 2 + (p * np.log2(p)).sum(1)
    return result


def _draw_logo(axes: Axes, places: np.ndarray) -> None:
    heights = places * information(places)[:, None]
    for place, column in enumerate(heights):
        bottom = 0.0
        for index in np.argsort(column):
            letter, height = "ACGT"[index], float(column[index])
            if height >= _LEAST_BITS:
                _draw_letter(axes, letter, place, bottom, height)
            bottom += height
    axes.set_xlim(0, len(places))
    axes.set_ylim(0, 2)
    axes.set_xticks([])
    axes.set_yticks([0, 2], ["0", "2"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.tick_params(colors=INK, labelsize=7)


@cache
def _outline(letter: str) -> TextPath:
    return TextPath((0, 0), letter, size=1, prop=_BOLD)


def _draw_letter(axes: Axes, letter: str, place: int, bottom: float, height: float) -> None:
    outline = _outline(letter)
    box = outline.get_extents()
    shape = (
        Affine2D()
        .translate(-box.x0, -box.y0)
        .scale(0.92 / box.width, height / box.height)
        .translate(place + 0.04, bottom)
    )
    patch = PathPatch(outline, transform=shape + axes.transData, lw=0, fc=_LETTERS[letter])
    axes.add_patch(patch)
