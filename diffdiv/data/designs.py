"""Designed sequences as FASTA, chains separated by a slash (ProteinMPNN's way of writing them)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from diffdiv.data.backbones import Backbone


def design_names(backbones: Sequence[Backbone]) -> list[str]:
    """One name for each row: that of its backbone and a number, '6MRR-0', '6MRR-1', ..."""
    seen: dict[str, int] = {}
    names = []
    for backbone in backbones:
        number = seen.get(backbone.name, 0)
        names.append(f"{backbone.name}-{number}")
        seen[backbone.name] = number + 1
    return names


def write_designs(
    path: Path,
    backbones: Sequence[Backbone],
    tokens: Tensor,
    *,
    scores: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one record for each row: '>6MRR-0 recovery=0.41 reward=1.5', then the letters.

    Args:
        path: of the file.
        backbones: of the rows.
        tokens: [N, L]; what is beyond a backbone's length is padding.
        scores: by name [N].

    Raises:
        ValueError: if there are other numbers of them.
    """
    table = {key: values.tolist() for key, values in (scores or {}).items()}
    lengths = {len(tokens), *map(len, table.values())}
    if lengths != {len(backbones)}:
        raise ValueError(f"tokens, scores: {sorted(lengths)} for {len(backbones)} backbones")
    names = design_names(backbones)
    staged = path.with_name(f".{path.name}")
    with staged.open("w", encoding="utf-8") as file:
        for row, backbone in enumerate(backbones):
            notes = "".join(f" {key}={values[row]:.6g}" for key, values in table.items())
            file.write(f">{names[row]}{notes}\n{backbone.text(tokens[row])}\n")
    staged.replace(path)
