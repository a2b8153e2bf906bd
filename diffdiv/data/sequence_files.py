"""Files of DNA sequences: FASTA and tables.

What happens to a record that is not L letters of A, C, G, T:

- lower case (soft-masked repeats) is read as upper case;
- a longer sequence is cut to its middle where that is asked for, otherwise it is set aside;
- a shorter or empty one, N and other IUPAC codes, U, gaps, any other character, a missing or
  non-finite value: set aside with its name and the reason, never guessed;
- more than 5 % set aside, no record at all, a file that is neither FASTA nor a table with the
  named columns: an error before training starts.
"""

import csv
import gzip
import importlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from diffdiv.data.sequences import SequenceSet, decode, encode, problem_of

MAX_BROKEN = 0.05
_CHROMOSOME = re.compile(r"(?<![A-Za-z0-9])chr\w+")
_FASTA, _TABLES = (".fa", ".fasta", ".fna"), (".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class _Record:
    name: str
    letters: str
    chromosome: str | None = None
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called.

    Attributes:
        sequence: of letters.
        chromosome: a missing column means that chromosomes are not known.
        values: numbers that must be there in every row.
    """

    sequence: str = "sequence"
    chromosome: str = "chromosome"
    values: tuple[str, ...] = ()


def read_sequences(
    path: Path, *, length: int | None = None, crop: bool = False, columns: Columns | None = None
) -> SequenceSet:
    """The sequences of a file, all of one length.

    Args:
        path: .fa, .fasta, .fna, .csv or .tsv with a header, each also with .gz; or .parquet.
        length: L; None = the commonest length in the file.
        crop: cut longer sequences to the middle L.
        columns: of a table.

    Raises:
        ValueError: see the module.
        ImportError: for .parquet without pyarrow.
    """
    kind = next((s for s in reversed(path.suffixes) if s.lower() != ".gz"), "").lower()
    if kind not in _FASTA + _TABLES:
        raise ValueError(f"{path}: sequences come as {', '.join(_FASTA + _TABLES)}")
    try:
        if kind in _FASTA:
            records = list(_read_fasta(path))
        else:
            records = list(_read_table(path, kind, columns or Columns()))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as text ({error})") from None
    return _clean(path, records, length, crop)


def write_fasta(
    path: Path,
    tokens: Tensor,
    *,
    scores: Mapping[str, Tensor] | None = None,
    names: Iterable[str] | None = None,
) -> None:
    """Write sequences [N, L], one line each, with scores [N] in the header: '>name reward=1.5'."""
    titles = [f"sequence-{i}" for i in range(len(tokens))] if names is None else list(names)
    table = {key: values.tolist() for key, values in (scores or {}).items()}
    lengths = {len(titles), *map(len, table.values())}
    if lengths != {len(tokens)}:
        raise ValueError(f"scores, names: {sorted(lengths)} given for {len(tokens)} sequences")
    staged = path.with_name(f".{path.name}")
    with staged.open("w", encoding="ascii") as file:
        for i, text in enumerate(decode(tokens)):
            notes = "".join(f" {key}={values[i]:.6g}" for key, values in table.items())
            file.write(f">{titles[i]}{notes}\n{text}\n")
    staged.replace(path)


def _open(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_fasta(path: Path) -> Iterator[_Record]:
    name, parts = "", list[str]()
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.startswith(">"):
                if name:
                    yield _fasta_record(name, parts)
                name, parts = " ".join(line[1:].split()) or f"record at line {number}", []
            elif line.strip() and not line.startswith(";"):
                if not name:
                    raise ValueError(f"{path}: line {number} is not a FASTA header ('>name')")
                parts.append("".join(line.split()))
    if name:
        yield _fasta_record(name, parts)


def _fasta_record(name: str, parts: Sequence[str]) -> _Record:
    found = _CHROMOSOME.search(name)
    return _Record(name, "".join(parts), found[0] if found else None)


def _read_table(path: Path, kind: str, columns: Columns) -> Iterator[_Record]:
    needed = (columns.sequence, *columns.values)
    for number, row in enumerate(_rows(path, kind), 1):
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f"{path}: no column {missing}; there is {', '.join(map(str, row))}")
        values = tuple(_number(row[name]) for name in columns.values)
        letters, chromosome = row[columns.sequence], row.get(columns.chromosome)
        text = letters.strip() if isinstance(letters, str) else ""
        place = str(chromosome).strip() if chromosome not in (None, "") else None
        yield _Record(f"row {number}", text, place, values)


def _rows(path: Path, kind: str) -> Iterator[Mapping[str, object]]:
    if kind == ".parquet":
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise ImportError("pyarrow is not installed: pip install 'diffdiv[data]'") from None
        yield from parquet.read_table(path).to_pylist()
        return
    with _open(path) as file:
        yield from csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")


def _number(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return math.nan


def _clean(path: Path, records: Sequence[_Record], length: int | None, crop: bool) -> SequenceSet:
    if not records:
        raise ValueError(f"{path}: there is no sequence in this file")
    if length is None:
        length = Counter(len(record.letters) for record in records).most_common(1)[0][0]
    kept, quarantine = list[_Record](), list[tuple[str, str]]()
    for record in records:
        cut = (len(record.letters) - length) // 2
        if crop and cut >= 0:
            record = replace(record, letters=record.letters[cut : cut + length])
        problem = problem_of(record.letters, length)
        if not problem and not all(map(math.isfinite, record.values)):
            problem = "a value is missing or not a finite number"
        if problem:
            quarantine.append((record.name, problem))
        else:
            kept.append(record)
    if len(quarantine) > MAX_BROKEN * len(records):
        name, problem = quarantine[0]
        raise ValueError(
            f"{path}: {len(quarantine)} of {len(records)} sequences cannot be used (more than "
            f"{MAX_BROKEN:.0%}); the first is {name}: {problem}"
        )
    return SequenceSet(
        encode([record.letters for record in kept]),
        torch.tensor([record.values for record in kept]).view(len(kept), -1),
        tuple(record.name for record in kept),
        tuple(record.chromosome for record in kept),
        tuple(quarantine),
    )
