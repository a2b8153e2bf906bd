"""Table, picture and JSON of benchmarks/drakes_fronts.py."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from diffdiv.rewards.dna_world import Front, read_front

MEANS = ("reward", "twin", "kl", "world_kl", "hamming", "distinct", "sampling_ms", "updates")
ERRORS = ("reward", "twin", "kl", "world_kl")
#: group -> methods; one marker for each group, one colour for each method
GROUPS = {
    "DRAKES": ("DRAKES, path KL", "DRAKES, legacy KL", "DRAKES, no KL"),
    "trained": (
        "policy gradient", "policy gradient, surrogate", "weighted denoising",
        "posterior alignment", "soft policy", "one-step likelihood",
    ),
    "not trained": (
        "classifier guidance", "classifier-free", "logit correction",
        "logit correction, no gradient", "sequential Monte Carlo", "twisted", "best of N",
    ),
}  # fmt: skip


class Point(TypedDict):
    """A method at one alpha: means over seeds; errors from the spread over them and within."""

    method: str
    alpha: float | None
    seeds: list[int]
    means: dict[str, float]
    errors: dict[str, float]


def points(rows: Iterable[dict]) -> list[Point]:
    """Rows of all seeds, joined."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["method"], row["alpha"]].append(row)
    return [_point(method, alpha, found) for (method, alpha), found in cells.items()]


def _point(method: str, alpha: float | None, rows: Sequence[dict]) -> Point:
    means, errors, n = {}, {}, len(rows)
    for key in MEANS:
        values = [row[key] for row in rows if row.get(key) is not None]
        if not values:
            continue
        means[key] = sum(values) / len(values)
        if key in ERRORS:
            within = sum(row[f"{key}_error"] ** 2 for row in rows) ** 0.5 / n
            spread = sum((v - means[key]) ** 2 for v in values) / max(n * (n - 1), 1)
            errors[key] = max(within, spread**0.5)
    seeds = sorted(row["seed"] for row in rows)
    return Point(method=method, alpha=alpha, seeds=seeds, means=means, errors=errors)


def reference_front(rows: Sequence[dict]) -> list[dict[str, float]]:
    """alpha, alpha log Z of the reference (mean over seeds) and its error; where >= 100 count."""
    tables = [row["front"] for row in rows if row["method"] == "reference"]
    found = []
    for alpha in tables[0]:
        values, errors, sizes = zip(*(table[alpha] for table in tables), strict=True)
        if sum(sizes) >= 100:
            error = sum(e**2 for e in errors) ** 0.5 / len(errors)
            row = {"alpha": float(alpha), "value": sum(values) / len(values), "error": error}
            found.append(row)
    return found


def bound(front: Sequence[dict[str, float]], kl: float) -> float:
    """What nothing that starts from the reference can pass at this path KL."""
    return min(row["value"] + row["alpha"] * kl for row in front)


def at_two_nats(found: Sequence[Point]) -> dict[str, float]:
    """Reward of each method at a path KL of 2 nats, linear in sqrt(KL) between its points below 6
    nats and the reference; methods whose points do not reach 2 nats are left out."""
    base = next(p["means"]["reward"] for p in found if p["method"] == "reference")
    rewards = {}
    for method in dict.fromkeys(p["method"] for p in found):
        line = [(0.0, base)]
        line += [(p["means"]["kl"] ** 0.5, p["means"]["reward"]) for p in found
                 if p["method"] == method and p["means"]["kl"] < 6]  # fmt: skip
        line.sort()
        for (x0, y0), (x1, y1) in pairwise(line):
            if x0 <= 2**0.5 <= x1 and x1 > x0:
                rewards[method] = y0 + (y1 - y0) * (2**0.5 - x0) / (x1 - x0)
    return rewards


def table(found: Sequence[Point], front: Sequence[dict[str, float]], exact: Front) -> str:
    """Markdown, best reward first within a method."""
    lines = [
        "| method | alpha | reward | twin | path KL, nats | reference's front there | "
        "KL from the world | exact front there | Hamming | updates | ms a sequence |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in found:
        mean, error = p["means"], p["errors"]
        cell = {k: f"{mean[k]:.2f} +- {error[k]:.2f}" for k in ERRORS if k in mean}
        cells = [p["method"], "-" if p["alpha"] is None else f"{p['alpha']:g}"]
        cells += [cell["reward"], cell["twin"], cell["kl"], f"{bound(front, mean['kl']):.2f}"]
        world = "world_kl" in mean
        cells += [cell["world_kl"] if world else "-"]
        cells += [f"{exact.bound_at(mean['world_kl']):.2f}" if world else "-"]
        updates = f"{mean['updates']:.0f}" if "updates" in mean else "-"
        cells += [f"{mean['hamming']:.3f}", updates]
        lines.append("| " + " | ".join([*cells, f"{mean['sampling_ms']:.0f}"]) + " |")
    return "\n".join(lines)


def _panel(
    axes: Axes, found: Sequence[Point], front: Sequence[dict[str, float]], exact: Front, key: str
) -> None:
    """One of the two marks against path KL."""
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    number = -1
    for group, marker in zip(GROUPS, "so^", strict=True):
        for method in GROUPS[group]:
            number += 1
            mine = sorted(
                (p for p in found if p["method"] == method), key=lambda p: p["means"]["kl"]
            )
            if not mine:
                continue
            axes.errorbar(
                [p["means"]["kl"] for p in mine], [p["means"][key] for p in mine],
                xerr=[p["errors"]["kl"] for p in mine], yerr=[p["errors"][key] for p in mine],
                marker=marker, color=colours[number], label=method, markersize=4, linewidth=0.9,
            )  # fmt: skip
    base = next(p for p in found if p["method"] == "reference")["means"]
    axes.plot(0, base[key], "k*", markersize=10, label="reference")
    rows = [row for row in exact.rows if row.kl <= 5]
    axes.plot(
        [max(row.kl, 0) for row in rows],
        [row.reward if key == "reward" else row.twin for row in rows],
        "k-", linewidth=1.5, label="exact front of the world",
    )  # fmt: skip
    if key == "reward":
        grid = [0.02 * i**2 for i in range(16)]
        axes.plot(
            grid, [bound(front, kl) for kl in grid], "k--", linewidth=1,
            label="what can be reached from the reference",
        )  # fmt: skip
    axes.set_xlim(-0.1, 5)
    axes.set_xlabel("path KL from the reference, nats")
    axes.set_ylabel("reward" if key == "reward" else "twin reward (nothing trains on it)")
    axes.grid(alpha=0.3)


def draw(rows_path: Path, json_path: Path | None, png_path: Path | None) -> str:
    """Write what is asked for; returns the table."""
    lines = map(json.loads, rows_path.read_text("utf-8").splitlines())
    # two processes at one file may both do a run: the first counts
    every = {(row["method"], row["alpha"], row["seed"]): row for row in reversed([*lines])}
    found = [*reversed(every.values())]
    seeds = Counter((row["method"], row["alpha"]) for row in found)
    # only what every seed has: a run that was stopped half-way shows nothing half-way
    rows = [r for r in found if seeds[r["method"], r["alpha"]] == max(seeds.values())]
    exact, front = read_front(), reference_front(rows)
    order = ["reference", *(m for methods in GROUPS.values() for m in methods)]
    joined = sorted(points(rows), key=lambda p: (order.index(p["method"]), -(p["alpha"] or 0)))
    if json_path:
        text = ",\n  ".join(json.dumps(row) for row in rows)
        facts = {"reference_front": front, "reward_at_two_nats": at_two_nats(joined)}
        head = json.dumps(facts)[1:-1]
        json_path.write_text(f'{{{head},\n "rows": [\n  {text}\n ]}}\n', "utf-8")
    if png_path:
        figure, axes = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
        for panel, key in zip(axes, ("reward", "twin"), strict=True):
            _panel(panel, joined, front, exact, key)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        figure.savefig(png_path, dpi=80)
        plt.close(figure)
    best = sorted(at_two_nats(joined).items(), key=lambda item: -item[1])
    two = "\n".join(f"{name}: {reward:.2f}" for name, reward in best)
    return f"{table(joined, front, exact)}\n\nAt 2 nats ({exact.reward_at(2):.2f}):\n{two}"
