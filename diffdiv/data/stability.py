"""Tables of measured stability: variants of structures, and a number for each.

CSV with the columns structure (name of the file without its suffix), value, and one of

- sequence: letters in the order of the residues, chains may be separated by a slash;
- mutations: "E5K" or "A:E5K;B:L7V", the file's numbers; empty for the structure's own sequence.

A row that names no structure, does not fit it, or has no finite number is set aside with its number
and the reason; more than 5 % set aside, a missing column, no row: an error.
"""

import csv
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffdiv.core.noise import permuted
from diffdiv.data.backbones import LETTERS, UNKNOWN, Backbone, BackboneBatch

MAX_BROKEN = 0.05
_MUTATION = re.compile(r"(?:(\w+):)?([A-Z])(-?\d+[A-Za-z]?)([A-Z])")


@dataclass(frozen=True, eq=False)
class StabilitySet:
    """Variants of backbones.

    Attributes:
        backbones: all of them, padded to the longest.
        numbers: backbone of each variant [N] int64.
        tokens: [N, L]; X beyond a backbone's length.
        values: [N] float32, higher is more stable.
        quarantine: rows set aside, as (row, reason).
    """

    backbones: BackboneBatch
    numbers: Tensor
    tokens: Tensor
    values: Tensor
    quarantine: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        """N."""
        return len(self.values)

    def select(self, rows: Sequence[int]) -> "StabilitySet":
        """These variants, without a quarantine."""
        kept = list(rows)
        return StabilitySet(
            self.backbones, self.numbers[kept], self.tokens[kept], self.values[kept]
        )

    def rows(self, indices: Sequence[int], *, seed: int) -> list[int]:
        """Rows of global sample indices: each epoch of N visits every row once."""
        return [permuted(i, len(self), seed=seed, purpose="stability") for i in indices]

    def split(self, shares: Mapping[str, float], *, by: str) -> dict[str, "StabilitySet"]:
        """Parts of about these shares, as a function of the letters alone.

        Args:
            shares: by name; they sum to one.
            by: "structure" keeps the variants of one structure together, "sequence" those of one
                sequence only: the figures then flatter more.

        Raises:
            ValueError: if a part would be empty.
        """
        keys = self.backbones.tokens[self.numbers] if by == "structure" else self.tokens
        texts = (row.to(torch.uint8).numpy().tobytes() for row in keys)
        digests = (hashlib.blake2b(text, digest_size=4).digest() for text in texts)
        draws = [int.from_bytes(digest, "little") / 2**32 for digest in digests]
        parts, low = {}, 0.0
        for name, share in shares.items():
            rows = [i for i, draw in enumerate(draws) if low <= draw < low + share]
            if not rows:
                raise ValueError(f"split: no variant in part {name} of {share:.0%}, by {by}")
            parts[name], low = self.select(rows), low + share
        return parts


def read_stability(path: Path, backbones: Sequence[Backbone]) -> StabilitySet:
    """Read a table; see the module.

    Raises:
        ValueError: see the module.
    """
    numbers = {backbone.name: i for i, backbone in enumerate(backbones)}
    batch, longest = BackboneBatch.of(backbones), max(map(len, backbones))
    kept, tokens, values, quarantine = [], [], [], list[tuple[str, str]]()
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = set(reader.fieldnames or ())
        if not {"structure", "value"} <= names or not names & {"sequence", "mutations"}:
            raise ValueError(
                f"{path}: needed are the columns structure, value, and sequence or mutations; "
                f"there is {', '.join(sorted(names))}"
            )
        for number, row in enumerate(reader, 2):
            try:
                place = numbers.get((row["structure"] or "").strip())
                if place is None:
                    raise ValueError(f"there is no structure {row['structure']!r}")
                letters = _variant(row, backbones[place])
                value = float(row["value"])
                if not math.isfinite(value):
                    raise ValueError("the value is not finite")
            except (ValueError, TypeError) as error:
                quarantine.append((f"line {number}", str(error)))
                continue
            kept.append(place)
            tokens.append(
                torch.nn.functional.pad(letters, (0, longest - len(letters)), value=UNKNOWN)
            )
            values.append(value)
    if not kept or len(quarantine) > MAX_BROKEN * (len(kept) + len(quarantine)):
        first = ": ".join(quarantine[0]) if quarantine else "the table has no rows"
        raise ValueError(
            f"{path}: {len(quarantine)} of {len(kept) + len(quarantine)} rows cannot be used "
            f"(more than {MAX_BROKEN:.0%}, or all); {first}"
        )
    return StabilitySet(
        batch, torch.tensor(kept), torch.stack(tokens), torch.tensor(values), tuple(quarantine)
    )


def _variant(row: Mapping[str, str | None], backbone: Backbone) -> Tensor:
    """Tokens [L] of a row."""
    if (text := (row.get("sequence") or "").strip()) or "mutations" not in row:
        return backbone.encode(text)
    tokens = backbone.tokens.clone()
    for item in (row["mutations"] or "").replace(",", ";").split(";"):
        if not item.strip():
            continue
        found = _MUTATION.fullmatch(item.strip())
        if found is None:
            raise ValueError(f"mutation {item!r} is not written like A:E5K")
        chain, before, label, after = found.groups()
        names = backbone.chain_names
        places = [
            i
            for i, (number, there) in enumerate(
                zip(backbone.chains.tolist(), backbone.labels, strict=True)
            )
            if there == label and chain in (None, names[number])
        ]
        if len(places) != 1 or after not in LETTERS:
            raise ValueError(f"mutation {item!r}: {len(places)} residues are so numbered")
        if LETTERS[int(backbone.tokens[places[0]])] != before:
            there = LETTERS[int(backbone.tokens[places[0]])]
            raise ValueError(f"mutation {item!r}: residue {label} is {there}")
        tokens[places[0]] = LETTERS.index(after)
    return tokens
