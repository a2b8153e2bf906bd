"""README.md of an export: how to call it first, then what it is, measured how, under what licence.

Everything that comes from outside (prompts, names, figures) is escaped for HTML by jinja and put
on one line, so that it cannot open a tag, a table row, a code fence or a front matter.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from diffdiv.metrics.card import Evaluation, versions


class Card(TypedDict, total=False):
    """What a model card says besides what the export itself shows."""

    facts: dict[str, object]
    evaluation: Evaluation
    prompt: str


def write_model_card(folder: Path, teacher: Path, facts: Mapping[str, object], card: Card) -> None:
    """Write ``folder``/README.md.

    Args:
        folder: the export.
        teacher: the base model's folder; its name and the licence in its README.md are used.
        facts: what the student is, a table; those of the card follow.
        card: measured figures and an example prompt, if known.
    """
    evaluation = card.get("evaluation", Evaluation(rows=[], card={}))
    rows = _table(evaluation)
    licence = _licence(teacher)
    text = (folder / "tokenizer").is_dir()
    data = ModelCardData(
        library_name="diffusers",
        license=licence,
        pipeline_tag="text-to-image" if text else "unconditional-image-generation",
        tags=["diffdiv", "one-step", "distillation"],
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = environment.get_template("model_card.md.j2").render(
        front_matter=Markup(data.to_yaml()),
        text=text,
        classes=facts.get("classes"),
        title=f"{_line(teacher.name)} in one step",
        base=_line(teacher.name),
        prompt=_line(card.get("prompt", "a photo of a lighthouse")),
        facts=_lines({**facts, **card.get("facts", {}), **versions()}),
        header=rows[0] if rows else [],
        rows=rows[1:],
        metric_card=_lines(evaluation["card"]),
        licence=_line(licence or ""),
    )
    (folder / "README.md").write_text(content, encoding="utf-8")


def _table(evaluation: Evaluation) -> list[list[str]]:
    """The evaluation as a table, header first; empty without rows."""
    names = list(dict.fromkeys(name for row in evaluation["rows"] for name in row["metrics"]))
    table = [["sampler", "network evaluations", *map(_line, names)]]
    for row in evaluation["rows"]:
        figures = [
            f"{row['metrics'][name]:.4g}" if name in row["metrics"] else "" for name in names
        ]
        table.append([_line(row["name"]), str(row["network_evaluations"]), *figures])
    return table if names else []


def _licence(teacher: Path) -> str | None:
    """The licence named in the base folder's README.md, if there is one."""
    if not (teacher / "README.md").is_file():
        return None
    text = (teacher / "README.md").read_text(encoding="utf-8", errors="replace")
    licence = ModelCard(text, ignore_metadata_errors=True).data.get("license")
    return None if licence is None else str(licence)


def _line(value: object) -> str:
    """One line without what Markdown would take for a table cell, code or a link."""
    return re.sub(r"[|`\[\]<>]+", " ", " ".join(str(value).split()))


def _lines(values: Mapping[str, object]) -> dict[str, str]:
    return {_line(name): _line(value) for name, value in values.items() if value is not None}
