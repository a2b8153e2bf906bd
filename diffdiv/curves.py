"""Training curves as inline SVG: one small panel for each quantity, all runs in it."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

COLOURS = ("#2f8fd8", "#d55e00", "#009e73", "#cc79a7", "#a6761d", "#56b4e9")
# Runs differ in more than colour: (matplotlib's style, SVG's dash array).
DASHES = (("-", "none"), ("--", "7 3"), (":", "2 3"), ("-.", "8 3 2 3"))
GROUPS = {
    "Losses": "loss",
    "Gradient norms": "grad",
    "Density ratio and weights": "ratio|log_r|weight|(^|[/_])[rh]([/_]|$)",
    "Learning rates, speed and memory": "^lr|per_second|memory",
    "Other quantities": "",
}
INK = "#123456"  # stands for the page's own text colour, light or dark
_MAX_POINTS = 300

Points = list[tuple[float, float]]  # (step, value), in order


class Panel(NamedTuple):
    """One drawn quantity: its name, what the drawing shows in words, the drawing."""

    name: str
    words: str
    svg: Markup


def panels(
    runs: Sequence[Sequence[Mapping[str, object]]], step_key: str, skipped: Sequence[str]
) -> dict[str, list[Panel]]:
    """Panels for every numeric key of the runs' metric lines, by group.

    Args:
        runs: for each run its lines, oldest first.
        step_key: key of the horizontal axis.
        skipped: keys not to draw.
    """
    names = {key for lines in runs for line in lines for key in line} - {step_key, *skipped}
    groups: dict[str, list[Panel]] = {group: [] for group in GROUPS}
    for name in sorted(names):
        series = [_points(lines, step_key, name) for lines in runs]
        if any(series):
            group = next(g for g, pattern in GROUPS.items() if re.search(pattern, name))
            groups[group].append(_panel(name, series))
    return {group: found for group, found in groups.items() if found}


def _points(lines: Sequence[Mapping[str, object]], step_key: str, name: str) -> Points:
    pairs = [(line.get(step_key), line.get(name)) for line in lines]
    return [
        (x, y)
        for x, y in pairs
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y)
    ]


def _panel(name: str, series: Sequence[Points]) -> Panel:
    values = [y for points in series for _, y in points]
    is_log = min(values) > 0 and max(values) > 50 * min(values)
    every = math.ceil(max(map(len, series)) / _MAX_POINTS)
    figure = Figure(figsize=(3.6, 2.0), layout="constrained")
    axes = figure.subplots()
    for i, points in enumerate(series):
        bins = [points[j : j + every] for j in range(0, len(points), every)]
        xs = [chunk[-1][0] for chunk in bins]
        ys = [sum(y for _, y in chunk) / len(chunk) for chunk in bins]
        style = "." if len(bins) == 1 else DASHES[i % len(DASHES)][0]
        axes.plot(xs, ys, style, color=COLOURS[i % len(COLOURS)], linewidth=1.4)
    axes.set_yscale("log" if is_log else "linear")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.grid(alpha=0.25, color=INK)
    words = "; ".join(f"from {p[0][1]:.4g} to {p[-1][1]:.4g}" for p in series if p)
    words += ", log axis" if is_log else ""
    words += f", means of {every} lines" if every > 1 else ""
    return Panel(name, words, figure_svg(figure, f"{name}: {words}"))


def figure_svg(figure: Figure, description: str) -> Markup:
    """The figure as an SVG element without ids that clash, fixed colours or outside addresses."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue().partition("<svg")[2]
    used = set(re.findall(r'#([\w-]+)[)"]', text))
    text = re.sub(r' id="([\w-]+)"', lambda m: m.group(0) if m.group(1) in used else "", text)
    label = Markup('<svg role="img" aria-label="{}"').format(description)
    return label + Markup(text.replace(INK, "currentColor"))
