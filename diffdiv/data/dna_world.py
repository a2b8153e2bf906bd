"""A world of 100-bp DNA whose law is known exactly: a grammar of motifs on a background.

    S, L      hidden states, length
    tokens    [B, L], int64, 0..3 for A, C, G, T
    log_prob  natural logarithm; bits per base = -log_prob / (L ln 2)

A hidden chain walks over: background; the positions of seven motifs on either strand; gaps of 3 to
9 bp after which a partner motif must follow; a spacer. Outside motifs a base depends on the two
before it (few CpG, runs of A and T), so that dependence costs no states. The forward algorithm
gives the exact likelihood, and with it entropies, and the optimum of every reward (see
rewards/dna_world.py). Motif words are well-known consensus sequences of liver and general factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from diffdiv.core.noise import normal
from diffdiv.data.motifs import Motif, iupac_motif

CONSENSUS = {
    "AP1": "TGASTCA", "GATA": "WGATAAR", "CTCF": "CCACNAGGGGGCGC", "HNF1": "GTTAATNATTAAC",
    "HNF4": "CAAAGTCCA", "FOXA": "TGTTTAC", "CEBP": "TTGCGCAA",
}  # fmt: skip
#: what may follow a motif after a gap of ``GAPS`` bp, with probability ``LINKED``
LINKS: Mapping[str, tuple[str, ...]] = {
    "HNF1": ("HNF4", "FOXA"), "HNF4": ("HNF1", "CEBP"), "FOXA": ("CEBP", "HNF4"),
    "CEBP": ("FOXA", "HNF1"), "GATA": ("AP1",), "AP1": ("GATA",),
}  # fmt: skip
GAPS = range(3, 10)
LINKED, START, SPACER, PURITY = 0.55, 0.03, 4, 0.94
_BASES = (0.295, 0.205, 0.205, 0.295)  # about the composition of human DNA
_LAST = 1 - 1e-12  # uniform numbers stay below one when a state's number is added


def background_tables() -> tuple[Tensor, Tensor, Tensor]:
    """p(z), p(z | y), p(z | x, y) of background bases ([4], [4, 4], [4, 4, 4]), float64."""
    base = torch.tensor(_BASES, dtype=torch.float64)
    pair = base.repeat(4, 1)
    pair[1, 2] *= 0.25  # CpG
    for letter in (0, 3):
        pair[letter, letter] *= 1.3
    triple = pair.repeat(4, 1, 1)
    for letter in (0, 3):
        triple[letter, letter, letter] *= 1.4
    return base, pair / pair.sum(-1, keepdim=True), triple / triple.sum(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Grammar:
    """A hidden Markov chain whose background emissions see the two bases before.

    Attributes:
        length: L.
        start: probability of each state at the first base [S], float64.
        transition: from row to column [S, S], float64.
        emission: of A, C, G, T by state [S, 4]; unused where ``is_background``.
        is_background: [S].
        names: what each state is, for people.
    """

    length: int
    start: Tensor
    transition: Tensor
    emission: Tensor
    is_background: Tensor
    names: tuple[str, ...]

    def sample(self, indices: Sequence[int], *, seed: int) -> Tensor:
        """Sequences [B, L] of global sample indices; a function of (seed, index)."""
        return self.sample_with_states(indices, seed=seed)[0]

    def sample_with_states(self, indices: Sequence[int], *, seed: int) -> tuple[Tensor, Tensor]:
        """Sequences and the hidden states behind them, each [B, L]."""
        z = normal(
            (self.length, 2), seed=seed, purpose="dna_world", indices=indices, dtype=torch.float64
        )
        u = torch.special.ndtr(z).clamp_max(_LAST)
        tables = background_tables()
        moves = _Choices(self.transition)
        state = _Choices(self.start[None]).draw(torch.zeros(len(u), dtype=torch.int64), u[:, 0, 0])
        tokens = torch.empty(len(u), self.length, dtype=torch.int64)
        states = torch.empty_like(tokens)
        for i in range(self.length):
            if i:
                state = moves.draw(state, u[:, i, 0])
            p = self._emission_rows(tokens, i, tables)
            p = torch.where(self.is_background[state, None], p, self.emission[state])
            tokens[:, i] = (p.cumsum(1)[:, :3] <= u[:, i, 1, None]).sum(1)
            states[:, i] = state
        return tokens, states

    def log_prob(self, tokens: Tensor, *, chunk: int = 1024) -> Tensor:
        """Exact log-likelihood [B], float64, by the scaled forward algorithm.

        Raises:
            ValueError: if the sequences are not of this length, or hold other tokens.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.length or not len(tokens):
            raise ValueError(f"tokens: shape {list(tokens.shape)} is not [B, {self.length}]")
        if tokens.min() < 0 or tokens.max() > 3:
            raise ValueError("tokens: not all of 0..3 (A, C, G, T); a mask has no likelihood")
        return torch.cat([self._log_prob(part) for part in tokens.cpu().split(chunk)])

    def _log_prob(self, tokens: Tensor) -> Tensor:
        tables, by_letter = background_tables(), self.emission.T.contiguous()
        total = torch.zeros(len(tokens), dtype=torch.float64)
        forward = self.start.expand(len(tokens), -1)
        for i in range(self.length):
            if i:
                forward = forward @ self.transition
            letter = tokens[:, i]
            p = self._emission_rows(tokens, i, tables).gather(1, letter[:, None])
            forward = forward * torch.where(self.is_background, p, by_letter[letter])
            scale = forward.sum(1)
            forward, total = forward / scale[:, None], total + scale.log()
        return total

    @staticmethod
    def _emission_rows(tokens: Tensor, i: int, tables: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Background probabilities of the base at place i [B, 4]."""
        if i == 0:
            return tables[0].expand(len(tokens), 4)
        if i == 1:
            return tables[1][tokens[:, 0]]
        return tables[2][tokens[:, i - 2], tokens[:, i - 1]]


class _Choices:
    """Draws from the rows of a stochastic matrix, without looking at every entry of a row."""

    def __init__(self, rows: Tensor) -> None:
        sums = rows.cumsum(1)
        self._size = rows.shape[1]
        self._edges = (sums / sums[:, -1:] + torch.arange(len(rows))[:, None]).flatten()

    def draw(self, row: Tensor, u: Tensor) -> Tensor:
        return torch.searchsorted(self._edges, row + u, right=True) - row * self._size


def make_grammar(
    motifs: Sequence[Motif],
    links: Mapping[str, Sequence[str]],
    *,
    length: int,
    start: float = START,
    linked: float = LINKED,
    gaps: range = GAPS,
    spacer: int = SPACER,
) -> Grammar:
    """The grammar of some motifs.

    Args:
        motifs: what can appear, on either strand, all alike often.
        links: name of a motif -> names of its partners; a partner follows after a gap.
        length: L.
        start: probability that a motif starts after a background base.
        linked: probability that a motif with partners is followed by one.
        gaps: numbers of bases in a gap, all alike often; consecutive, from 1 up.
        spacer: bases, at least 1, after a motif that is not followed by a partner.

    Raises:
        ValueError: if a link names no motif.
    """
    names = [motif.name for motif in motifs]
    if unknown := {name for pair in links.items() for name in (pair[0], *pair[1])} - set(names):
        raise ValueError(f"links: {sorted(unknown)} are not among {names}")
    states = ["background"]
    states += [f"{m.name}{s}{i}" for m in motifs for s in "+-" for i in range(len(m.probabilities))]
    states += [f"gap {name} {left}" for name in links for left in range(gaps[-1], 0, -1)]
    states += [f"spacer {left}" for left in range(spacer, 0, -1)]
    number = {state: i for i, state in enumerate(states)}
    move = torch.zeros(len(states), len(states), dtype=torch.float64)

    def enter(row: int, chosen: Sequence[str], probability: float) -> None:
        for name in chosen:
            for strand in "+-":
                move[row, number[f"{name}{strand}0"]] += probability / (2 * len(chosen))

    move[0, 0] = 1 - start
    enter(0, names, start)
    emission = torch.full((len(states), 4), 0.25, dtype=torch.float64)
    for motif in motifs:
        for strand, p in (("+", motif.probabilities), ("-", motif.reverse_complement())):
            first = number[f"{motif.name}{strand}0"]
            emission[first : first + len(p)] = p
            move[range(first, first + len(p) - 1), range(first + 1, first + len(p))] = 1
            last, share = first + len(p) - 1, linked if motif.name in links else 0.0
            move[last, number[f"spacer {spacer}"]] = 1 - share
            for gap in gaps if share else ():
                move[last, number[f"gap {motif.name} {gap}"]] = share / len(gaps)
    for name, partners in links.items():
        first = number[f"gap {name} {gaps[-1]}"]
        move[range(first, first + gaps[-1] - 1), range(first + 1, first + gaps[-1])] = 1
        enter(number[f"gap {name} 1"], partners, 1.0)
    for left in range(spacer, 0, -1):
        move[number[f"spacer {left}"], number[f"spacer {left - 1}"] if left > 1 else 0] = 1
    background = torch.tensor([s.startswith(("background", "gap", "spacer")) for s in states])
    return Grammar(length, move[0].clone(), move, emission, background, tuple(states))


def world_motifs(purity: float = PURITY) -> list[Motif]:
    """The seven motifs, their allowed letters with this probability in all."""
    return [iupac_motif(name, word, purity=purity) for name, word in CONSENSUS.items()]


def dna_world(length: int = 100) -> Grammar:
    """The embedded world."""
    return make_grammar(world_motifs(), LINKS, length=length)


def bits_per_base(log_prob: Tensor, length: int) -> tuple[float, float]:
    """Mean of -log_prob / (L ln 2) over sequences, and its standard error.

    For samples of the law itself: its entropy.
    """
    bits = -log_prob.double() / (length * log(2))
    return float(bits.mean()), float(bits.std() / len(bits) ** 0.5)
