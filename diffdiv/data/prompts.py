"""Prompts from text files, drawn by global sample index."""

import csv
import importlib
import importlib.util
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

from diffdiv.core.noise import permuted


class PromptFile:
    """The prompts of a file, in an order that is a function of (seed, epoch)."""

    def __init__(self, path: Path, *, seed: int = 0, column: str = "prompt") -> None:
        """Read and check the whole file.

        Args:
            path: .txt (one prompt a line), .jsonl (a string, or an object with ``column``, a
                line), .csv with a header, or .parquet.
            seed: of the order.
            column: that holds the prompt.

        Raises:
            ValueError: naming the file and the line: another kind of file, no prompts, not UTF-8,
                no such column, control characters.
            ImportError: for .parquet without pyarrow.
        """
        readers: dict[str, Callable[[Path, str], list[str]]] = {
            ".txt": lambda path, _: path.read_text("utf-8-sig").splitlines(),
            ".jsonl": _read_jsonl,
            ".csv": _read_csv,
            ".parquet": _read_parquet,
        }
        path, self._seed = Path(path), seed
        if path.suffix.lower() not in readers:
            raise ValueError(f"{path}: a prompt file is one of {', '.join(readers)}")
        try:
            lines = readers[path.suffix.lower()](path, column)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
        for number, line in enumerate(lines, 1):
            if bad := [c for c in line if unicodedata.category(c) == "Cc" and not c.isspace()]:
                raise ValueError(f"{path}: prompt {number} has the control character {bad[0]!r}")
        self.prompts = [clean for line in lines if (clean := " ".join(line.split()))]
        if not self.prompts:
            raise ValueError(f"{path}: there is no prompt in this file")

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def prompt(self, index: int) -> str:
        """The prompt of a global sample index; each epoch of ``len(self)`` uses every one once."""
        return self.prompts[permuted(index, len(self), seed=self._seed, purpose="prompts")]


def _read_jsonl(path: Path, column: str) -> list[str]:
    prompts = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error.msg})") from None
        prompt = value.get(column) if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise ValueError(f"{path}: line {number} is no string and has no string {column!r}")
        prompts.append(prompt)
    return prompts


def _read_csv(path: Path, column: str) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if column not in (rows.fieldnames or ()):
            raise ValueError(f"{path}: no column {column!r}; there is {rows.fieldnames}")
        return [row[column] or "" for row in rows]


def _read_parquet(path: Path, column: str) -> list[str]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError("pyarrow is not installed: pip install 'diffdiv[data]'")
    parquet = importlib.import_module("pyarrow.parquet")
    if column not in (names := parquet.read_schema(path).names):
        raise ValueError(f"{path}: no column {column!r}; there is {names}")
    return [str(v) for v in parquet.read_table(path, columns=[column])[column].to_pylist() if v]
