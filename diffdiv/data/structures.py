"""Backbones from PDB and mmCIF files, read by gemmi (``pip install 'diffdiv[bio]'``).

What happens to what is not a complete standard residue of one model:

- waters, ligands, nucleic acids and caps (ACE, NH2): left out;
- selenomethionine (MSE): read as methionine; any other modified, D- or unknown residue: X, which
  can be designed and is never a target of training;
- alternate locations: the conformer with the highest occupancy of N, CA, C, O (the first of equal
  ones); two residues at one place likewise;
- a residue that lacks one of N, CA, C, O, or has a coordinate that is not finite: "missing", it
  keeps its letter, cannot be designed and is not part of the graph;
- insertion codes: residues of their own, in the order of the file ("52A" in ``design``);
- several models (NMR): the one asked for, by default the first;
- no protein, fewer than 2 complete residues, more than ``max_residues``, a file that cannot be
  read: an error; in a folder such a file is set aside with its name and the reason, and more than
  5 % set aside is an error.
"""

import importlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffdiv.data.backbones import LETTERS, UNKNOWN, Backbone

if TYPE_CHECKING:
    import gemmi

MAX_BROKEN = 0.05
MAX_RESIDUES = 10_000
SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")
ATOMS = ("N", "CA", "C", "O")


@dataclass(frozen=True)
class BackboneFolder:
    """The structures of a folder.

    Attributes:
        backbones: by file name.
        quarantine: files set aside, as (name, reason).
    """

    backbones: tuple[Backbone, ...]
    quarantine: tuple[tuple[str, str], ...]


def read_backbone(
    path: Path, *, design: str | None = None, model: int = 1, max_residues: int = MAX_RESIDUES
) -> Backbone:
    """The backbone of a file; see the module for what is left out, simplified or refused.

    Args:
        path: .pdb, .ent, .cif or .mmcif, each also with .gz.
        design: positions to be designed, see data/backbones.py; None: all that have a backbone.
        model: number of the model, from 1.
        max_residues: more are refused.

    Raises:
        ValueError: see the module.
        ImportError: without gemmi.
    """
    found = _open(path)
    if not 1 <= model <= len(found):
        raise ValueError(f"{path}: no model {model}; there are {len(found)}")
    residues = [
        (chain.name, residue)
        for chain in found[model - 1]
        for _, group in itertools.groupby(chain, key=lambda r: str(r.seqid))
        for residue in _at_one_place(list(group))
    ]
    if not residues:
        raise ValueError(f"{path}: there is no protein in this file")
    if len(residues) > max_residues:
        raise ValueError(f"{path}: {len(residues)} residues, more than {max_residues}")
    backbone = _assemble(_stem(path), residues, _notes(residues, len(found), model))
    if int((~backbone.missing).sum()) < 2:
        raise ValueError(f"{path}: fewer than 2 residues have all of {', '.join(ATOMS)}")
    return backbone if design is None else backbone.with_design(design)


def read_backbones(
    folder: Path, *, design: str | None = None, max_residues: int = MAX_RESIDUES
) -> BackboneFolder:
    """The backbones of all structure files of a folder, in the order of their names.

    Raises:
        ValueError: if there is none, or more than 5 % of them cannot be used.
        ImportError: without gemmi.
    """
    files = sorted(p for p in folder.iterdir() if _kind(p) in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder}: no structures there ({', '.join(SUFFIXES)}, also .gz)")
    found, quarantine, names = list[Backbone](), list[tuple[str, str]](), set[str]()
    for file in files:
        try:
            if _stem(file) in names:
                raise ValueError(f"another file is called {_stem(file)}")
            names.add(_stem(file))
            found.append(read_backbone(file, design=design, max_residues=max_residues))
        except ValueError as error:
            quarantine.append((file.name, str(error).removeprefix(f"{file}: ")))
    if len(quarantine) > MAX_BROKEN * len(files):
        name, reason = quarantine[0]
        raise ValueError(
            f"{folder}: {len(quarantine)} of {len(files)} structures cannot be used (more than "
            f"{MAX_BROKEN:.0%}); the first is {name}: {reason}"
        )
    return BackboneFolder(tuple(found), tuple(quarantine))


def _kind(path: Path) -> str:
    return next((s for s in reversed(path.suffixes) if s.lower() != ".gz"), "").lower()


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name[: -len(_kind(path))]


def _open(path: Path) -> "gemmi.Structure":
    try:
        gemmi = importlib.import_module("gemmi")
    except ImportError:
        raise ImportError("gemmi is not installed: pip install 'diffdiv[bio]'") from None
    if _kind(path) not in SUFFIXES:
        raise ValueError(f"{path}: structures come as {', '.join(SUFFIXES)}, also .gz")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        found = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a structure ({error})") from None
    found.setup_entities()
    return found


def _at_one_place(group: "Sequence[gemmi.Residue]") -> "list[gemmi.Residue]":
    """The amino-acid residue at a place, if any; of several, the one that is there most."""
    kept = [residue for residue in group if _is_part_of_a_protein(residue)]
    return kept and [max(kept, key=lambda residue: max(_occupancies(residue).values()))]


def _is_part_of_a_protein(residue: "gemmi.Residue") -> bool:
    gemmi = importlib.import_module("gemmi")
    if residue.entity_type != gemmi.EntityType.Polymer:
        return False
    known = gemmi.find_tabulated_residue(residue.name)
    names = {atom.name for atom in residue}
    return bool(known.is_amino_acid()) or {"N", "CA", "C"} <= names


def _occupancies(residue: "gemmi.Residue") -> dict[str, float]:
    """Backbone occupancy of each alternate location, in the order of the file."""
    total: dict[str, float] = {}
    for atom in residue:
        if atom.name in ATOMS:
            total[atom.altloc] = total.get(atom.altloc, 0.0) + atom.occ
    named = {altloc: occ for altloc, occ in total.items() if altloc != "\0"}
    return named or total or {"\0": 0.0}


def _coordinates(residue: "gemmi.Residue") -> list[list[float]] | None:
    """N, CA, C, O of the likeliest conformer; None unless all four are there and finite."""
    found, occupancies = dict[str, list[float]](), _occupancies(residue)
    best = max(occupancies, key=lambda altloc: occupancies[altloc])
    for atom in residue:
        if atom.name in ATOMS and atom.altloc in ("\0", best):
            found.setdefault(atom.name, [atom.pos.x, atom.pos.y, atom.pos.z])
    rows = [found.get(name, [math.nan]) for name in ATOMS]
    return rows if all(math.isfinite(value) for row in rows for value in row) else None


def _token(name: str) -> int:
    """Token of a residue's name."""
    known = importlib.import_module("gemmi").find_tabulated_residue(name)
    letter = "M" if name == "MSE" else known.one_letter_code if known.is_standard() else "X"
    return LETTERS.index(letter) if letter in LETTERS else UNKNOWN


def _notes(residues: "Sequence[tuple[str, gemmi.Residue]]", models: int, model: int) -> list[str]:
    notes = [f"model {model} of {models}"] if models > 1 else []
    unknown = Counter(residue.name for _, residue in residues if _token(residue.name) == UNKNOWN)
    notes += [f"{count} x {name} read as X" for name, count in sorted(unknown.items())]
    if count := sum(len(_occupancies(residue)) > 1 for _, residue in residues):
        notes.append(f"{count} residues with alternate locations")
    return notes


def _assemble(
    name: str, residues: "Sequence[tuple[str, gemmi.Residue]]", notes: list[str]
) -> Backbone:
    chain_names = tuple(dict.fromkeys(chain for chain, _ in residues))
    found = [_coordinates(residue) for _, residue in residues]
    missing = torch.tensor([rows is None for rows in found])
    if count := int(missing.sum()):
        notes.append(f"{count} residues lack backbone atoms")
    places = [0]
    numbers = [(chain, residue.seqid.num or 0) for chain, residue in residues]
    for (before, last), (chain, number) in itertools.pairwise(numbers):
        # an insertion code repeats the number
        places.append(places[-1] + max(1, number - last) if chain == before else 0)
    return Backbone(
        name,
        torch.tensor([rows or [[0.0] * 3] * 4 for rows in found]),
        torch.tensor([chain_names.index(chain) for chain, _ in residues]),
        torch.tensor(places),
        torch.tensor([_token(residue.name) for _, residue in residues]),
        ~missing,
        missing,
        chain_names,
        tuple(str(residue.seqid) for _, residue in residues),
        tuple(notes),
    )
