"""DNA sequences as tokens, drawn by global sample index; files: data/sequence_files.py.

tokens    [N, L], int64: 0..3 for A, C, G, T; 4 is the mask, never in data
values    [N, D], float32: measured activities, or 1 and 0 for two classes
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdiv.core.noise import permuted, uniform
from diffdiv.data.motifs import IUPAC, LETTERS

MASK_ID = 4


@dataclass(frozen=True, eq=False)
class SequenceSet:
    """Sequences of one length; see the module for shapes.

    Attributes:
        tokens: [N, L].
        values: [N, D]; D = 0 where nothing was measured.
        names: header or row number.
        chromosomes: None where a record does not say.
        quarantine: records set aside, as (name, reason).
    """

    tokens: Tensor
    values: Tensor
    names: tuple[str, ...]
    chromosomes: tuple[str | None, ...]
    quarantine: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        """N."""
        return len(self.tokens)

    def rows(self, indices: Sequence[int], *, seed: int) -> list[int]:
        """Rows of global sample indices: each epoch of N visits every row once."""
        return [permuted(i, len(self), seed=seed, purpose="sequences") for i in indices]

    def batch(
        self, indices: Sequence[int], *, seed: int, reverse_complement: bool
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] and values [B, D] of global sample indices, on the CPU.

        Args:
            indices: B of them.
            seed: of order and strands.
            reverse_complement: show the other strand half of the time, a function of (seed, index).
        """
        rows = self.rows(indices, seed=seed)
        tokens = self.tokens[rows]
        if reverse_complement:
            flipped = uniform(seed=seed, purpose="sequences.strand", indices=indices) < 0.5
            tokens = torch.where(flipped[:, None], reverse_complement_of(tokens), tokens)
        return tokens, self.values[rows]

    def select(self, rows: Sequence[int]) -> "SequenceSet":
        """These rows, without a quarantine."""
        return SequenceSet(
            self.tokens[list(rows)],
            self.values[list(rows)],
            tuple(self.names[i] for i in rows),
            tuple(self.chromosomes[i] for i in rows),
        )

    def of_chromosomes(self, *groups: Sequence[str]) -> list["SequenceSet"]:
        """One set for each group of chromosomes; no sequence is in two of them.

        A sequence that occurs again, on either strand, in an earlier group is left out of later
        ones: put what is held out first.

        Raises:
            ValueError: if a chromosome is in two groups, a group is empty, or a record does not say
                its chromosome.
        """
        listed = [name for group in groups for name in group]
        if len(set(listed)) < len(listed):
            raise ValueError(f"chromosomes: {sorted(listed)} has one in two groups")
        if None in self.chromosomes:
            name = self.names[self.chromosomes.index(None)]
            raise ValueError(
                f"{name}: no chromosome (a header such as 'chr1:100-200', or a column)"
            )
        keys, seen, sets = self._keys(), set[bytes](), list[SequenceSet]()
        for group in groups:
            rows = [i for i, name in enumerate(self.chromosomes) if name in group]
            rows = [i for i in rows if keys[i] not in seen]
            if not rows:
                there = ", ".join(sorted({str(name) for name in self.chromosomes})[:30])
                raise ValueError(f"chromosomes: no sequence of {list(group)}; there is {there}")
            seen |= {keys[i] for i in rows}
            sets.append(self.select(rows))
        return sets

    def split(self, held_out: Sequence[str]) -> tuple["SequenceSet", "SequenceSet"]:
        """(train, held out): the chromosomes named are held out, as :meth:`of_chromosomes`."""
        rest = sorted({str(name) for name in self.chromosomes} - set(held_out))
        held, train = self.of_chromosomes(held_out, rest)
        return train, held

    def split_by_letters(self, share: float) -> tuple["SequenceSet", "SequenceSet"]:
        """(train, held out) where nothing is known of chromosomes.

        About ``share`` of the sequences are held out, as a function of their letters alone, so that
        copies of one sequence, on either strand, stay together. Relatives that differ in a letter
        may not: the held-out figures flatter more than those of held-out chromosomes.

        Raises:
            ValueError: if one side would be empty.
        """
        digests = [hashlib.blake2b(key, digest_size=4).digest() for key in self._keys()]
        held = [int.from_bytes(digest, "little") < share * 2**32 for digest in digests]
        if all(held) or not any(held):
            raise ValueError(f"held out: {share:.0%} of {len(self)} sequences leave one side empty")
        sides = [[i for i, out in enumerate(held) if out is side] for side in (False, True)]
        return self.select(sides[0]), self.select(sides[1])

    def _keys(self) -> list[bytes]:
        """The same for a sequence and its reverse complement."""
        both = (self.tokens, reverse_complement_of(self.tokens))
        pairs = zip(*(t.to(torch.uint8).numpy() for t in both), strict=True)
        return [min(a.tobytes(), b.tobytes()) for a, b in pairs]


def reverse_complement_of(tokens: Tensor) -> Tensor:
    """The other strand [..., L]; a mask stays a mask."""
    flipped = tokens.flip(-1)
    return torch.where(flipped == MASK_ID, MASK_ID, 3 - flipped)


def encode(texts: Sequence[str]) -> Tensor:
    """Tokens [N, L] of texts of one length; ValueError for letters other than A, C, G, T."""
    if not texts or len({len(text) for text in texts}) > 1:
        raise ValueError("texts: need some, of one length")
    if bad := next((found for text in texts if (found := problem_of(text, len(text)))), None):
        raise ValueError(f"texts: {bad}")
    codes = torch.full((256,), MASK_ID)
    codes[[ord(letter) for letter in LETTERS]] = torch.arange(4)
    raw = torch.frombuffer(bytearray("".join(texts).upper().encode("ascii")), dtype=torch.uint8)
    return codes[raw.long()].view(len(texts), -1)


def decode(tokens: Tensor) -> list[str]:
    """Texts of tokens [N, L]; the mask is N."""
    return ["".join((LETTERS + "N")[i] for i in row) for row in tokens.tolist()]


def merge_classes(positive: SequenceSet, negative: SequenceSet) -> SequenceSet:
    """One set with value 1 for the first and 0 for the second; ValueError if lengths differ."""
    if positive.tokens.shape[1] != negative.tokens.shape[1]:
        lengths = positive.tokens.shape[1], negative.tokens.shape[1]
        raise ValueError(f"classes: lengths {lengths} differ; give one and let longer ones be cut")
    both = (positive, negative)
    return SequenceSet(
        torch.cat([part.tokens for part in both]),
        torch.cat([torch.ones(len(positive), 1), torch.zeros(len(negative), 1)]),
        positive.names + negative.names,
        positive.chromosomes + negative.chromosomes,
        positive.quarantine + negative.quarantine,
    )


def problem_of(letters: str, length: int) -> str | None:
    """Why ``letters`` are not ``length`` letters of A, C, G, T in either case; None if they are."""
    if not letters:
        return "empty"
    if len(letters) != length:
        return f"length {len(letters)}, not {length}"
    found = re.search(rf"[^{LETTERS}]", letters.upper())
    if found is None:
        return None
    kind = "the IUPAC code" if found[0] in IUPAC else "the character"
    return f"{kind} {found[0]!r} at base {found.start() + 1}; only A, C, G, T"
