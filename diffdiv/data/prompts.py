"""Prompts from text files, drawn by global sample index."""

import csv
import importlib
import json
import unicodedata
from collections.abc import Sequence
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
        self._seed = seed
        try:
            lines = _read(path, column)
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

    def row(self, index: int) -> int:
        """Row of a global sample index; each epoch of ``len(self)`` uses every one once."""
        return permuted(index, len(self), seed=self._seed, purpose="prompts")

    def prompt(self, index: int) -> str:
        """The prompt of a global sample index."""
        return self.prompts[self.row(index)]


def _read(path: Path, column: str) -> list[str]:
    match path.suffix.lower():
        case ".txt":
            return path.read_text("utf-8-sig").splitlines()
        case ".jsonl":
            lines = path.read_text("utf-8-sig").split("\n")
            filled = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
            return [_from_json(f"{path}: line {n}", line, column) for n, line in filled]
        case ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file)
                _check_column(path, column, rows.fieldnames or ())
                return [row[column] or "" for row in rows]
        case ".parquet":
            return _read_parquet(path, column)
    raise ValueError(f"{path}: a prompt file is one of .txt, .jsonl, .csv, .parquet")


def _from_json(place: str, line: str, column: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error.msg})") from None
    prompt = value.get(column) if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f"{place} is no string and has no string {column!r}")
    return prompt


def _read_parquet(path: Path, column: str) -> list[str]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ImportError("pyarrow is not installed: pip install 'diffdiv[data]'") from None
    _check_column(path, column, parquet.read_schema(path).names)
    return [str(v) for v in parquet.read_table(path, columns=[column])[column].to_pylist() if v]


def _check_column(path: Path, column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        raise ValueError(f"{path}: no column {column!r}; there is {', '.join(columns) or 'none'}")
