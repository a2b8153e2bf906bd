"""Protein backbones as tensors, batched by padding; files of structures: data/structures.py.

L            residues of all chains, one after the other
coordinates  N, CA, C, O of each residue [L, 4, 3], angstrom
tokens       [L] int64: 0..19 for the letters below, 20 (X) for an unknown residue; 21 is the mask
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: ProteinMPNN's alphabet; X is shown where the residue is not known, never predicted
LETTERS = "ACDEFGHIKLMNPQRSTVWYX"
NUM_TOKENS = len(LETTERS)
UNKNOWN, MASK_ID = NUM_TOKENS - 1, NUM_TOKENS
#: ends one chain and begins the next in texts
CHAIN_BREAK = "/"


@dataclass(frozen=True, eq=False)
class Backbone:
    """One structure; see the module for shapes.

    Attributes:
        name: of the structure.
        coordinates: zeros where missing.
        chains: number of each residue's chain [L] int64, from 0.
        residues: place in the chain [L] int64; gaps in the file's numbering are gaps here.
        tokens: what is there now [L].
        design: positions to be designed [L] bool; never a missing one.
        missing: an atom of the four is not in the file [L] bool: such a residue keeps its token and
            is not part of the graph.
        chain_names: by number.
        labels: the file's residue numbers with insertion codes ("52A") [L].
        notes: what was simplified on reading.
    """

    name: str
    coordinates: Tensor
    chains: Tensor
    residues: Tensor
    tokens: Tensor
    design: Tensor
    missing: Tensor
    chain_names: tuple[str, ...]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """L."""
        return len(self.tokens)

    def with_design(self, design: str | None) -> "Backbone":
        """The same backbone with other positions to be designed, see :func:`parse_design`."""
        return replace(self, design=parse_design(design, self))

    def text(self, tokens: Tensor) -> str:
        """Letters of a design [>= L], chains separated by a slash; the mask is a dash."""
        letters, parts = LETTERS + "-", [""] * len(self.chain_names)
        pairs = zip(tokens[: len(self)].tolist(), self.chains.tolist(), strict=True)
        for token, chain in pairs:
            parts[chain] += letters[token]
        return CHAIN_BREAK.join(parts)

    def encode(self, text: str) -> Tensor:
        """Tokens [L] of letters in the order of the residues; slashes are passed over.

        Raises:
            ValueError: if there are not L letters, or one is no amino acid or X.
        """
        letters = text.upper().replace(CHAIN_BREAK, "")
        unknown = sorted(set(letters) - set(LETTERS))
        if unknown or len(letters) != len(self):
            raise ValueError(
                f"{self.name}: {len(letters)} letters for {len(self)} residues, unknown: {unknown}"
            )
        return torch.tensor([LETTERS.index(letter) for letter in letters])


def parse_design(design: str | None, backbone: Backbone) -> Tensor:
    """Positions named by a text [L] bool.

    Args:
        design: items "A" (a chain, but for its missing residues), "A:25", "A:10-25", separated by
            commas; numbers are the file's, as a viewer shows them, with insertion codes
            ("H:52A-56"). None: every position.
        backbone: whose chains and labels are meant.

    Raises:
        ValueError: if an item names no chain or residue of the structure, a residue that lacks
            backbone atoms, or nothing is left to design.
    """
    if design is None:
        chosen = ~backbone.missing
    else:
        chosen = torch.zeros(len(backbone), dtype=torch.bool)
        for item in design.split(","):
            chosen[_rows(item.strip(), backbone)] = True
        chosen &= ~backbone.missing
    if not chosen.any():
        raise ValueError(f"design: {backbone.name} has no residue to design by {design!r}")
    return chosen


def _rows(item: str, backbone: Backbone) -> list[int]:
    """Rows of one item of a design."""
    name, colon, span = item.partition(":")
    if name not in backbone.chain_names:
        there = ", ".join(backbone.chain_names)
        raise ValueError(
            f"design: {item!r}: {backbone.name} has no chain {name!r} (it has {there})"
        )
    number = backbone.chain_names.index(name)
    rows = (backbone.chains == number).nonzero()[:, 0].tolist()
    labels = [backbone.labels[row] for row in rows]
    if not colon:
        return rows
    # a dash may be a sign: every cut at which both sides are labels, or the whole is one
    cuts = [(span, span), *((span[:i], span[i + 1 :]) for i, c in enumerate(span) if c == "-")]
    for first, last in cuts:
        if first in labels and last in labels:
            start, stop = labels.index(first), labels.index(last)
            chosen = rows[start : stop + 1]
            if bad := [backbone.labels[row] for row in chosen if backbone.missing[row]]:
                raise ValueError(
                    f"design: {item!r}: residues without a complete backbone in {backbone.name} "
                    f"cannot be designed: {', '.join(bad[:20])}"
                )
            if chosen:
                return chosen
    raise ValueError(
        f"design: {item!r}: chain {name} of {backbone.name} has no such residues; its numbers go "
        f"from {labels[0]} to {labels[-1]}"
    )


@dataclass(frozen=True, eq=False)
class BackboneBatch:
    """Backbones padded to one length; padding shows X, is not designed and not part of the graph.

    Attributes:
        coordinates: [B, L, 4, 3].
        chains, residues, tokens: [B, L] int64.
        design, valid: [B, L] bool; valid: neither missing nor padding.
    """

    coordinates: Tensor
    chains: Tensor
    residues: Tensor
    tokens: Tensor
    design: Tensor
    valid: Tensor

    @classmethod
    def of(cls, backbones: Sequence[Backbone]) -> "BackboneBatch":
        """Pad to the longest."""
        longest = max(map(len, backbones))

        def padded(rows: list[Tensor], fill: float) -> Tensor:
            out = rows[0].new_full((len(rows), longest, *rows[0].shape[1:]), fill)
            for place, row in zip(out, rows, strict=True):
                place[: len(row)] = row
            return out

        return cls(
            padded([b.coordinates for b in backbones], 0),
            padded([b.chains for b in backbones], -1),
            padded([b.residues for b in backbones], 0),
            padded([b.tokens for b in backbones], UNKNOWN),
            padded([b.design for b in backbones], 0),
            padded([~b.missing for b in backbones], 0),
        )

    @property
    def start(self) -> Tensor:
        """Where generation starts [B, L]: the mask where designed, else what is there."""
        return torch.where(self.design, MASK_ID, self.tokens)

    @property
    def known(self) -> Tensor:
        """Positions to learn from [B, L] bool: designed, and the residue is not X."""
        return self.design & (self.tokens != UNKNOWN)

    def rows(self, rows: Sequence[int]) -> "BackboneBatch":
        """These backbones, one may come several times."""
        index = torch.tensor(list(rows), device=self.tokens.device)
        return BackboneBatch(*(value[index] for value in vars(self).values()))

    def to(self, device: torch.device | str) -> "BackboneBatch":
        """The same on a device."""
        return BackboneBatch(*(value.to(device) for value in vars(self).values()))

    def moved(self, displacement: Tensor) -> "BackboneBatch":
        """With noise [B, L, 4, 3], angstrom, added to the coordinates."""
        return replace(self, coordinates=self.coordinates + displacement)
