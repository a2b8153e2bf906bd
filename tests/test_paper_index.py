"""docs/paper_index.md is true: every function can be imported, every config exists.

The table has the columns method | equation | function | config; a function is written
`diffdiv.module:name` or `diffdiv.module.name` or as a file path with a colon, in backquotes.
"""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "docs" / "paper_index.md"


def rows() -> list[list[str]]:
    """The cells of the table's body."""
    if not INDEX.is_file():
        return []
    lines = [line.strip() for line in INDEX.read_text(encoding="utf-8").splitlines()]
    table = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in table if not set("".join(row)) <= set("-: ")][
        1:
    ]


def exists(reference: str) -> bool:
    """Whether `package.module:name`, `package.module.name` or `path.py:name` is there."""
    place, colon, name = reference.partition(":")
    if "/" in place or place.endswith(".py"):
        text = (ROOT / place).read_text(encoding="utf-8") if (ROOT / place).is_file() else ""
        return bool(
            re.search(rf"^(def|class) {re.escape(name)}\b|^{re.escape(name)}\b.*=", text, re.M)
        )
    if not colon:
        place, _, name = place.rpartition(".")
    try:
        found: object = importlib.import_module(place)
    except ModuleNotFoundError:
        return False
    for part in name.split("."):
        if part not in dir(found):
            return False
        found = vars(found).get(part)
    return True


@pytest.mark.skipif(not INDEX.is_file(), reason="docs/paper_index.md is not in this checkout")
def test_every_row_is_true() -> None:
    assert rows(), "the table is empty"
    for row in rows():
        assert len(row) == 4, row
        method, equation, function, config = row
        assert method and equation
        references = re.findall(r"`([^`]+)`", function)
        assert references, f"{method}: no function"
        for reference in references:
            assert exists(reference), f"{method}: {reference} cannot be imported"
        for path in re.findall(r"`([^`]+)`", config):
            assert (ROOT / path).exists(), f"{method}: {path} does not exist"


def test_the_test_sees_a_false_reference() -> None:
    assert exists("diffdiv.core.divergence:get_divergence")
    assert exists("diffdiv.core.divergence.get_divergence")
    assert exists("diffdiv/core/divergence.py:get_divergence")
    assert not exists("diffdiv.core.divergence:get_divergenze")
    assert not exists("diffdiv.cor.divergence:get_divergence")
    assert not exists("diffdiv/core/divergence.py:get_divergenze")
