"""One self-contained HTML page on one or several runs: nothing to install, nothing to fetch."""

import base64
import io
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import jinja2
from PIL import Image
from pydantic import BaseModel, TypeAdapter

from diffdiv.curves import COLOURS, DASHES, panels
from diffdiv.runtime.yaml_io import ConfigError, Plain, read_yaml, redact, to_yaml
from diffdiv.sequence_figures import Point, SequenceFigures, front_panels, logo_panel

_LOWER = "frechet|fid|kid|distance|loss|error|divergence|seconds|memory"
_HIGHER = "accuracy|precision|recall|coverage|density|score|clip|diversity"
_HIGHER += "|^(digit|colour|background|stroke|all)$"  # accuracies of the embedded judge
_SHOWN, _LONGEST = 6, 2000  # sequences shown of a file, letters of each
Object = dict[str, object]
_OBJECT = TypeAdapter(Object)


class Row(BaseModel):
    """One sampler's figures; a reference, such as held-out images, has no network evaluations."""

    name: str = ""
    network_evaluations: int | None = None
    metrics: dict[str, float] = {}


class Figures(BaseModel):
    """Content of evaluation.json."""

    rows: list[Row] = []
    card: Object = {}


class Finding(BaseModel):
    """One diagnostic of a reward's side effects."""

    name: str
    before: float
    after: float
    help: str


class Alignment(BaseModel):
    """Content of alignment.json."""

    findings: list[Finding] = []
    times: list[dict[str, float]] = []
    card: Object = {}


class RunPage:
    """What the page shows of one run folder; files that are absent or damaged count as empty."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a run folder")
        self.folder, self.name = folder, folder.resolve().name
        self.config: dict[str, Plain] = {}
        with suppress(ConfigError):
            self.config = read_yaml(folder / "config.yaml")
        self.figures = Figures()
        with suppress(OSError, ValueError):
            self.figures = Figures.model_validate_json((folder / "evaluation.json").read_bytes())
        self.alignment = Alignment()
        with suppress(OSError, ValueError):
            content = (folder / "alignment.json").read_bytes()
            self.alignment = Alignment.model_validate_json(content)
        said = self.figures.card.get("summary")  # where one sentence needs more than two rows
        self.summary = said if isinstance(said, str) else _summary(self.figures.rows)
        self.lines = _objects(folder / "metrics.jsonl")
        self.last = self.lines[-1] if self.lines else {}
        self.events = _objects(folder / "events.jsonl")[-40:]
        self.pictures = _pictures(folder / "samples")
        self.texts = _sequences(folder / "samples")
        self.drawn = SequenceFigures()
        with suppress(OSError, ValueError):
            content = (folder / "sequences.json").read_bytes()
            self.drawn = SequenceFigures.model_validate_json(content)
        self.captions = _object(folder / "samples/captions.json")
        self.export = _object(folder / "export/export.json")
        states = sorted((folder / "state").glob("step-*/manifest.json"))
        self.manifest = _object(states[-1]) if states else {}
        files = {
            "config.yaml (the configuration)": self.config,
            "metrics.jsonl (the curves)": self.lines,
            "evaluation.json (the figures; written by diffdiv evaluate)": self.figures.rows,
            "samples/ (the pictures, or sequences)": self.pictures or self.texts,
            "export/ (the student to use; written by diffdiv export)": (folder / "export").is_dir(),
        }
        self.missing = [name for name, found in files.items() if not found]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of one run, or the comparison of several.

    Args:
        runs: run folders; files they lack are named in the report, not refused.
        out: HTML file to write.

    Raises:
        FileNotFoundError: a run folder does not exist.
    """
    pages = [RunPage(run) for run in runs]
    rows = [row for page in pages for row in page.figures.rows]
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    step_key = next((key for key in pages[0].last if key.endswith("_step")), "student_step")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffdiv"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"words": _words, "yaml": to_yaml, "data_url": _data_url}
    html = environment.get_template("report.html.j2").render(
        pages=pages,
        columns=[(n, _direction(n), _best(n, rows)) for n in names if not _is_error(n, names)],
        fronts=front_panels(_points(pages), [line for page in pages for line in page.drawn.lines]),
        logo=logo_panel,
        step_key=step_key,
        groups=panels([page.lines for page in pages], step_key, ("images_seen", "seconds")),
        colours=COLOURS,
        dashes=DASHES,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return out


def _points(pages: Sequence[RunPage]) -> list[Point]:
    """All models; of several runs each with the name of its run."""
    return [
        Point(f"{page.name}: {row.name}" if len(pages) > 1 else row.name, row.metrics)
        for page in pages
        for row in page.figures.rows
    ]


def _objects(path: Path) -> list[Object]:
    """The JSON objects in a file, one a line; a torn line (of a killed run) is left out."""
    found = []
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            found.append(_OBJECT.validate_json(text))
    return found


def _object(path: Path) -> Object:
    with suppress(OSError, ValueError):
        return _OBJECT.validate_json(path.read_bytes())
    return {}


def _words(value: object) -> str:
    """``value`` in words, without secrets and without the name of the user's home folder."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    home = str(Path.home())
    return redact(text.replace(home, "~") if len(home) > 1 else text)


def _is_error(name: str, names: Collection[str]) -> bool:
    """Whether a metric is the standard error of another one, and shown beside it."""
    return name.removesuffix("_error") in names and name.endswith("_error")


def _direction(key: str) -> str:
    """Which way a metric is better: "lower", "higher", or "" when its name does not tell."""
    if re.search(_LOWER, key.lower()):
        return "lower"
    return "higher" if re.search(_HIGHER, key.lower()) else ""


def _best(key: str, rows: Sequence[Row]) -> float | None:
    """The best figure in a column of two or more models; None when its name does not tell."""
    models = [row for row in rows if row.network_evaluations is not None]
    figures = [row.metrics[key] for row in models if key in row.metrics]
    if len(figures) < 2 or not _direction(key):
        return None
    return min(figures) if _direction(key) == "lower" else max(figures)


def _summary(rows: Sequence[Row]) -> str:
    """The result in one sentence: a policy and its reference, or a student and its teacher."""
    by_name = {row.name: row.metrics for row in rows}
    if {"reference", "policy"} <= by_name.keys():
        return _tuned(by_name["reference"], by_name["policy"])
    teachers = [row for row in rows if row.name.startswith("teacher")]
    students = [row for row in rows if row.name.startswith("student")]
    if not teachers or not students:
        return ""
    said, key = [], next(iter(students[-1].metrics), "")
    for row in (students[-1], teachers[0]):
        if key not in row.metrics:
            return ""
        plural = "" if row.network_evaluations == 1 else "s"
        said.append(
            f"{row.metrics[key]:.4g} in {row.network_evaluations} network evaluation{plural}"
        )
    better = f" ({_direction(key)} is better)" if _direction(key) else ""
    return f"{key.replace('_', ' ')}: student {said[0]}, teacher {said[1]}{better}."


def _tuned(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """What fine-tuning for a reward has changed, and its price."""
    moved = [
        f"{words} {before[key]:.3g} to {after[key]:.3g}"
        for key, words in {"reward": "reward", "twin": "its twin, never trained on,"}.items()
        if key in before and key in after
    ]
    price = f", at a path KL of {after['path_kl']:.3g} nats" if "path_kl" in after else ""
    return f"From reference to policy: {'; '.join(moved)}{price}." if moved else ""


def _sequences(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """The first sequences of the reference and of the policy, each with what its header says."""
    found = {}
    for name in ("reference", "policy"):
        with suppress(OSError, ValueError), (folder / f"{name}.fa").open(encoding="ascii") as file:
            lines = [line.strip()[:_LONGEST] for line in islice(file, 2 * _SHOWN)]
            found[name] = [
                (head[1:], letters)
                for head, letters in zip(lines[::2], lines[1::2], strict=False)
                if head.startswith(">") and letters.isalpha()
            ]
    return {name: pairs for name, pairs in found.items() if pairs}


def _pictures(folder: Path) -> dict[str, Image.Image]:
    """By title: the teacher's grid, the first and the last of the student."""
    steps = sorted(folder.glob("step-*.png"))
    files = {"Teacher": folder / "teacher.png"}
    files |= {f"Student, step {int(p.stem[5:]):,}": p for p in steps[:1] + steps[-1:]}
    found = {}
    for title, path in files.items():
        with suppress(OSError, Image.DecompressionBombError), Image.open(path) as image:
            found[title] = image.convert("RGB")
            found[title].thumbnail((1200, 1200))
    return found


def _data_url(image: Image.Image) -> str:
    """The picture encoded again, so that nothing hidden in its file comes along."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
