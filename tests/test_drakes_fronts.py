"""What benchmarks/drakes_fronts.py measured and docs/drakes_fronts.md reports."""

import json
from collections import defaultdict
from pathlib import Path

from diffdiv.rewards.dna_world import read_front

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = json.loads((DOCS / "drakes_fronts.json").read_text("utf-8"))
ROWS = RESULTS["rows"]
FRONT = RESULTS["reference_front"]


def name(row: dict) -> str:
    return f"{row['method']} {row['alpha']} seed {row['seed']}"


def least(bounds: list[tuple[float, float]], row: dict, kl: str) -> tuple[float, float]:
    """Least of value + alpha KL over (alpha, value), and how far the reward's error and the KL's,
    taken as independent, leave the difference uncertain there."""
    alpha, value = min(bounds, key=lambda b: b[1] + b[0] * row[kl])
    error = (row["reward_error"] ** 2 + (alpha * row[f"{kl}_error"]) ** 2) ** 0.5
    return value + alpha * row[kl], error


def test_every_figure_is_of_three_seeds_and_equal_cpu():
    seeds, sizes = defaultdict(set), defaultdict(int)
    for row in ROWS:
        seeds[row["method"], row["alpha"]].add(row["seed"])
        sizes[row["method"], row["alpha"]] += row["n"]
    assert {len(found) for found in seeds.values()} == {3}
    assert len({row["seconds"] for row in ROWS}) == 1
    pooled = {("best of N", 16.0): 768, ("best of N", 64.0): 192}  # of 3 x 4,096
    assert all(size >= pooled.get(key, 1536) for key, size in sizes.items())


def test_no_method_is_above_the_exact_front():
    """KL from the world along the path, against alpha log Z of 800,000 exact samples; 3 errors."""
    exact = [(r.alpha, r.value) for r in read_front().rows if r.alpha < 1e9]
    checked = [row for row in ROWS if row.get("world_kl") is not None]
    assert len(checked) > 0.7 * len(ROWS)
    for row in checked:
        bound, error = least(exact, row, "world_kl")
        assert row["reward"] <= bound + 3 * error, name(row)


def test_no_method_is_above_the_front_of_the_reference():
    """The same with the path KL from the reference, against log Z of 12,288 of its samples."""
    values = [(r["alpha"], r["value"] + 3 * r["error"]) for r in FRONT]
    for row in ROWS:
        bound, error = least(values, row, "kl")
        assert row["reward"] <= bound + 3 * error, name(row)


def test_drakes_moves_reward_and_twin_together():
    """Held out: it trains on the surrogate. Both rise at every seed and every alpha."""
    base = {row["seed"]: row for row in ROWS if row["method"] == "reference"}
    found = [row for row in ROWS if row["method"] == "DRAKES, path KL"]
    for row in found:
        for key in ("reward", "twin"):
            gain = row[key] - base[row["seed"]][key]
            assert gain > 3 * row[f"{key}_error"], name(row)


def test_the_distance_that_the_docs_state():
    best = max(RESULTS["reward_at_two_nats"].values())
    distance = read_front().reward_at(2.0) - best
    assert f"{distance:.2f}" in (DOCS / "drakes_fronts.md").read_text("utf-8")
