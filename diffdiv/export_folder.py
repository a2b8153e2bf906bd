"""How an export is put together: in a folder of its own that takes its place at the end."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from diffdiv.model_card import Card, write_model_card


def finish(
    stage: Path, teacher: Path, call: dict[str, object], facts: dict[str, object], card: Card
) -> None:
    """Add export.json and README.md, and drop the local paths that from_pretrained records.

    Args:
        stage: the folder, complete but for these.
        teacher: the base model's folder.
        call: the pipeline's arguments, besides the prompt.
        facts: what the student is.
        card: what the model card can say besides.
    """
    for path in stage.rglob("*.json"):
        content = read_json(path)
        for name in {"_name_or_path", "name_or_path"} & content.keys():
            del content[name]
            write_json(path, content)
    write_json(stage / "export.json", {"call": call, **facts})
    write_model_card(stage, teacher, call, facts, card)


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file."""
    return json.loads(path.read_text("utf-8"))


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def staged(out: Path, force: bool, teacher: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well.

    Args:
        out: the new folder.
        force: replace an earlier export.
        teacher: the base model's folder, which ``out`` may not hold.

    Raises:
        ValueError: if ``out`` may not be overwritten.
    """
    if teacher.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out}: the teacher lies there; choose another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not force or not (out / "export.json").is_file():
            raise ValueError(f"{out}: not empty; only an export is replaced, and only by force")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        stage = Path(folder) / "new"
        stage.mkdir()
        yield stage
        if out.exists():
            out.rename(Path(folder) / "old")
        stage.rename(out)
