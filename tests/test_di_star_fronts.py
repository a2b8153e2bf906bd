"""What benchmarks/di_star_fronts.py measured and docs/di_star.md reports."""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROWS = json.loads((DOCS / "di_star_fronts.json").read_text("utf-8"))
TEXT = (DOCS / "di_star.md").read_text("utf-8")
METHODS = {
    "integral KL": "ikl", "Diff-Instruct*, squared": "squared",
    "Diff-Instruct*, pseudo-Huber": "pseudo_huber", "DIDR": "didr",
}  # fmt: skip


def test_every_scale_has_the_same_seeds_once():
    seeds = defaultdict(list)
    for row in ROWS:
        seeds[row["method"], row["scale"]].append(row["seed"])
    trained = {key: sorted(found) for key, found in seeds.items() if key[1] is not None}
    assert all(found == [0, 1, 2] for found in trained.values())
    assert all(sum(key[0] == name for key in trained) >= 5 for name in METHODS.values())
    assert seeds["start", None] == seeds["reference", None] == [None]


def test_the_table_is_of_these_rows():
    lines = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| 3 \| (.+) \|$", TEXT, re.MULTILINE)
    assert len(lines) == len({(row["method"], row["scale"]) for row in ROWS} - {None}) - 2
    head = next(line for line in TEXT.splitlines() if line.startswith("| method | scale"))
    names = [cell.strip() for cell in head.split("|")[4:-1]]
    for title, scale, cells in lines:
        rows = [
            row["metrics"]
            for row in ROWS
            if (row["method"], row["scale"]) == (METHODS[title], float(scale))
        ]
        for name, cell in zip(names, cells.split(" | "), strict=True):
            assert abs(float(cell.split(" ")[0]) - mean(row[name] for row in rows)) < 0.0051
