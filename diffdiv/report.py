"""One self-contained HTML page on one or several runs: nothing to install, nothing to fetch."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image

from diffdiv.curves import COLOURS, DASHES, panels
from diffdiv.runtime.yaml_io import ConfigError, Plain, read_yaml, redact, to_yaml

_LOWER = "frechet|fid|kid|distance|loss|error|divergence|seconds|memory"
_HIGHER = "accuracy|precision|recall|coverage|density|score|clip|diversity"
_HIGHER += "|^(digit|colour|background|stroke|all)$"  # accuracies of the embedded judge
Lines = list[dict[str, Plain]]


@dataclass(frozen=True)
class Picture:
    """A grid of samples, ready to be shown."""

    title: str
    source: str  # data: address
    width: int
    height: int


@dataclass(frozen=True)
class RunPage:
    """Everything the page says about one run; what the folder lacks is named in ``missing``."""

    name: str
    folder: str
    recipe: str
    facts: dict[str, str]
    summary: str
    lines: Lines
    step_key: str
    rows: Lines
    card: dict[str, Plain]
    pictures: list[Picture]
    prompts: list[str]
    events: Lines
    config: str
    usage: str
    missing: list[str]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of one run, or the comparison of several.

    Args:
        runs: run folders; files they lack are named in the report, not refused.
        out: HTML file to write.

    Raises:
        FileNotFoundError: a run folder does not exist.
    """
    pages = [_read_run(run) for run in runs]
    rows = [{**row, "run": page.name} for page in pages for row in page.rows]
    keys = dict.fromkeys(key for row in rows for key in _mapping(row.get("metrics")))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("report.html.j2").render(
        pages=pages,
        columns=[(key, _direction(key)) for key in keys],
        table=[_cells(row, rows, list(keys)) for row in rows],
        groups=panels([p.lines for p in pages], pages[0].step_key, ("images_seen", "seconds")),
        legend=[(p.name, COLOURS[i % 6], DASHES[i % 4][1]) for i, p in enumerate(pages)],
        words=_words,
        public=lambda text: _public(str(text)),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return out


def _read_run(run: Path) -> RunPage:
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a run folder")
    try:
        config = read_yaml(run / "config.yaml")
    except ConfigError:
        config = {}
    lines, evaluation = _lines(run / "metrics.jsonl"), _object(run / "evaluation.json")
    last = lines[-1] if lines else {}
    rows = [row for item in _list(evaluation.get("rows")) if (row := _mapping(item))]
    pictures = _pictures(run / "samples")
    states = sorted((run / "state").glob("step-*/manifest.json"))
    missing = {
        "config.yaml (the configuration)": config,
        "metrics.jsonl (the curves)": lines,
        "evaluation.json (the figures; written by diffdiv evaluate)": rows,
        "samples/ (the pictures)": pictures,
        "export/ (the student to use; written by diffdiv export)": (run / "export").is_dir(),
    }
    return RunPage(
        name=run.resolve().name,
        folder=_public(str(run)),
        recipe=str(config.get("recipe", "unknown")),
        facts=_facts(last, _object(states[-1]) if states else {}),
        summary=_summary(rows),
        lines=lines,
        step_key=next((key for key in last if key.endswith("_step")), "student_step"),
        rows=rows,
        card=_mapping(evaluation.get("card")),
        pictures=pictures,
        prompts=[str(p) for p in _list(_object(run / "samples/captions.json").get("prompts"))],
        events=_lines(run / "events.jsonl")[-40:],
        config=_public(to_yaml(config)) if config else "",
        usage=_usage(run),
        missing=[name for name, found in missing.items() if not found],
    )


def _lines(path: Path) -> Lines:
    """The JSON objects in a file, one a line; a torn line (of a killed run) is left out."""
    texts = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    return [found for text in texts if (found := _parse(text))]


def _object(path: Path) -> dict[str, Plain]:
    return _parse(path.read_text("utf-8", errors="replace")) if path.is_file() else {}


def _parse(text: str) -> dict[str, Plain]:
    try:
        return _mapping(json.loads(text))
    except ValueError:
        return {}


def _mapping(value: Plain) -> dict[str, Plain]:
    return value if isinstance(value, dict) else {}


def _list(value: Plain) -> list[Plain]:
    return value if isinstance(value, list) else []


def _public(text: str) -> str:
    """``text`` without secrets and without the name of the user's home folder."""
    home = str(Path.home())
    return redact(text.replace(home, "~") if len(home) > 1 else text)


def _facts(last: Mapping[str, Plain], manifest: Mapping[str, Plain]) -> dict[str, str]:
    counts = {k: f"{v:,}" for k, v in last.items() if k.endswith("_step") or k == "images_seen"}
    seconds = last.get("seconds")
    time = {"training_minutes": f"{seconds / 60:.1f}"} if isinstance(seconds, int | float) else {}
    hidden = ("files", "sha256", "schema", "step")
    machine = {key: _words(value) for key, value in manifest.items() if key not in hidden}
    return counts | time | machine


def _words(value: Plain) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else _public(str(value))


def _direction(key: str) -> str:
    """Which way a metric is better: "lower", "higher", or "" when its name does not tell."""
    if re.search(_LOWER, key.lower()):
        return "lower"
    return "higher" if re.search(_HIGHER, key.lower()) else ""


def _cells(row: Mapping[str, Plain], rows: Lines, keys: Sequence[str]) -> dict[str, Plain]:
    """A row of the table: texts, and whether each figure is the best of its column."""
    cells: list[Plain] = []
    models = [other for other in rows if "network_evaluations" in other]  # the rest: references
    for key in keys:
        column = [_mapping(other.get("metrics")).get(key) for other in models]
        numbers = [v for v in column if isinstance(v, int | float)]
        value, direction = _mapping(row.get("metrics")).get(key), _direction(key)
        best = {"lower": min, "higher": max}[direction](numbers) if direction and numbers else None
        is_best = len(numbers) > 1 and row in models and value == best is not None
        cells.append(["n/a" if value is None else _words(value), is_best])
    calls = row.get("network_evaluations", "")
    return {"run": row["run"], "name": row.get("name", ""), "calls": _words(calls), "cells": cells}


def _summary(rows: Lines) -> str:
    """The result in one sentence: the last student against the first teacher."""
    named = [(str(row.get("name")).split()[0].strip(","), row) for row in rows if row.get("name")]
    teacher = next((row for owner, row in named if owner == "teacher"), {})
    student = next((row for owner, row in reversed(named) if owner == "student"), {})
    key = next(iter(_mapping(student.get("metrics"))), "")
    said = []
    for row in (student, teacher):
        value, calls = _mapping(row.get("metrics")).get(key), row.get("network_evaluations")
        if value is None:
            return ""
        plural = "" if calls == 1 else "s"
        said.append(f"{_words(value)} in {_words(calls)} network evaluation{plural}")
    better = f" ({_direction(key)} is better)" if _direction(key) else ""
    return f"{key.replace('_', ' ')}: student {said[0]}, teacher {said[1]}{better}."


def _pictures(folder: Path) -> list[Picture]:
    steps = sorted(folder.glob("step-*.png"))
    wanted = [("Teacher", folder / "teacher.png")]
    wanted += [
        (f"Student, step {int(p.stem[5:]):,}", p) for p in dict.fromkeys(steps[:1] + steps[-1:])
    ]
    found = [_picture(title, path) for title, path in wanted if path.is_file()]
    return [picture for picture in found if picture is not None]


def _picture(title: str, path: Path) -> Picture | None:
    """The image, re-encoded (so nothing hidden in the file comes along), or None if damaged."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    small.thumbnail((1200, 1200))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(title, source, *small.size)


def _usage(run: Path) -> str:
    """Python that uses the export; how to make it, when it is not there yet."""
    call = _mapping(_object(run / "export/export.json").get("call"))
    plain = {"num_inference_steps": 1, "guidance_scale": 0}
    words = [f"{key}={value!r}" for key, value in (call or plain).items()]
    index = _object(run / "export/model_index.json")
    own_code = isinstance(index.get("_class_name"), list)  # a pipeline file lies beside the weights
    trust = ", trust_remote_code=True" if own_code else ""
    prompt = [] if own_code else ["'a prompt'"]
    folder = _public(str(run / "export"))
    first = "" if index else f"# first, in a shell: diffdiv export {_public(str(run))} {folder}\n"
    return (
        f"{first}from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({folder!r}{trust})\n"
        f"pipe({', '.join(prompt + words)}).images[0].save('sample.png')"
    )
