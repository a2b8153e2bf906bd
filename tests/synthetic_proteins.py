"""A world of proteins whose law given the backbone is known: letters by burial.

A residue is buried if at least NEIGHBOURS others have their CA within RADIUS; buried and exposed
residues draw their letters independently from two laws over eight letters each. So the best bound
is the entropy of the laws, and the recovery of exact samples is the sum of squares.
"""

from pathlib import Path

import gemmi
import torch
from torch import Tensor

from diffdiv.data.backbones import LETTERS, Backbone

RADIUS, NEIGHBOURS = 7.0, 9
_WEIGHTS = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05], dtype=torch.float64)
LAWS = torch.zeros(2, 20, dtype=torch.float64)  # exposed, buried
for _row, _letters in enumerate(("EKDRSTNQ", "LVIFAMWY")):
    for _letter, _weight in zip(_letters, _WEIGHTS.tolist(), strict=True):
        LAWS[_row, LETTERS.index(_letter)] = _weight


def buried(coordinates: Tensor) -> Tensor:
    """[L] bool, of [L, 4, 3]."""
    ca = coordinates[:, 1]
    near = (ca[:, None] - ca).norm(dim=-1) < RADIUS
    return near.sum(1) - 1 >= NEIGHBOURS


def entropy() -> float:
    """Nats per residue; both laws have the same."""
    return float(-(_WEIGHTS * _WEIGHTS.log()).sum())


def exact_recovery() -> float:
    """Expected recovery of sequences drawn from the law."""
    return float(_WEIGHTS.square().sum())


def make(name: str, length: int, seed: int) -> Backbone:
    """A compact random chain with 3.8 angstrom between CAs, and letters of the law."""
    generator = torch.Generator().manual_seed(seed)
    ca = torch.zeros(length, 3)
    for i in range(1, length):
        draw = torch.randn(16, 3, generator=generator)
        tries = ca[i - 1] + 3.8 * draw / draw.norm(dim=-1, keepdim=True)
        clash = ((tries[:, None] - ca[:i]).norm(dim=-1) < 3.7).sum(1)
        cost = 3.0 * clash + 0.08 * tries.norm(dim=-1) ** 1.5
        ca[i] = tries[cost.argmin()]
    after = torch.cat([ca[1:], 2 * ca[-1:] - ca[-2:-1]]) - ca
    before = torch.cat([2 * ca[:1] - ca[1:2], ca[:-1]]) - ca
    side = torch.linalg.cross(after, before)
    side = side / side.norm(dim=-1, keepdim=True).clamp_min(1e-3)
    n, c = ca + 0.38 * before, ca + 0.4 * after
    coordinates = torch.stack([n, ca, c, c + 1.2 * side], 1)
    tokens = torch.multinomial(LAWS[buried(coordinates).long()], 1, generator=generator)[:, 0]
    everywhere = torch.ones(length, dtype=torch.bool)
    return Backbone(
        name,
        coordinates,
        torch.zeros(length, dtype=torch.long),
        torch.arange(length),
        tokens,
        everywhere,
        ~everywhere,
        ("A",),
        tuple(str(i + 1) for i in range(length)),
    )


def write(folder: Path, backbone: Backbone) -> Path:
    """A PDB file of one chain."""
    chain = gemmi.Chain("A")
    for i, token in enumerate(backbone.tokens.tolist()):
        residue = gemmi.Residue()
        residue.name = gemmi.expand_one_letter(LETTERS[token], gemmi.ResidueKind.AA)
        residue.seqid = gemmi.SeqId(i + 1, " ")
        residue.entity_type = gemmi.EntityType.Polymer
        for name, at in zip(("N", "CA", "C", "O"), backbone.coordinates[i].tolist(), strict=True):
            atom = gemmi.Atom()
            atom.name, atom.pos, atom.element = name, gemmi.Position(*at), gemmi.Element(name[0])
            residue.add_atom(atom)
        chain.add_residue(residue)
    structure, model = gemmi.Structure(), gemmi.Model(1)
    model.add_chain(chain)
    structure.add_model(model)
    path = folder / f"{backbone.name}.pdb"
    structure.write_pdb(str(path))
    return path


def write_world(folder: Path, count: int, *, length: int = 24, seed: int = 0) -> Path:
    """``count`` structures of ``length`` residues and a few more; the folder is made."""
    folder.mkdir(parents=True)
    for i in range(count):
        write(folder, make(f"p{i:04}", length + i % 5, seed * 100_000 + i))
    return folder
