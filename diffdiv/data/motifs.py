"""DNA motifs: read from files, and found in sequences, hard or soft.

W, M, L   width of a motif, number of motifs, length of a sequence
x         one-hot or soft sequences [B, L, 4] in the order A, C, G, T
score     log-odds of a site against a uniform background, nats
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv2d, one_hot, pad

LETTERS = "ACGT"
IUPAC = {
    "A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT",
    "M": "AC", "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip
#: score of a place where the motif would hang over the end; no probability, no gradient
NO_SITE = -1e4
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, eq=False)
class Motif:
    """Independent positions.

    Attributes:
        name: unique in a set.
        probabilities: of A, C, G, T at each position [W, 4], float64.
    """

    name: str
    probabilities: Tensor

    def __post_init__(self) -> None:
        p = self.probabilities
        if p.ndim != 2 or p.shape[1] != 4 or not len(p) or not torch.isfinite(p).all():
            raise ValueError(f"motif {self.name}: {list(p.shape)} is no [W, 4] of numbers")
        if (p < 0).any() or (p.sum(1) - 1).abs().max() > 1e-6:
            raise ValueError(f"motif {self.name}: its rows are not probabilities")

    def reverse_complement(self) -> Tensor:
        """Probabilities on the other strand [W, 4]."""
        return self.probabilities.flip(0, 1)

    def best_score(self, pseudo: float = 0.0) -> float:
        """Score of the likeliest word; ``pseudo`` as in :func:`log_odds`."""
        return float(log_odds(self.probabilities, pseudo).amax(1).sum())


def iupac_motif(name: str, consensus: str, *, purity: float) -> Motif:
    """A motif from a consensus in IUPAC codes: allowed letters share ``purity``, the others 1 - it.

    Raises:
        ValueError: if a letter is no IUPAC code or ``purity`` is not in (0, 1].
    """
    if not consensus or set(consensus) - set(IUPAC) or not 0 < purity <= 1:
        raise ValueError(f"motif {name}: {consensus!r}, {purity}: no IUPAC word and purity")
    allowed = torch.tensor([[letter in IUPAC[code] for letter in LETTERS] for code in consensus])
    count = allowed.sum(1, keepdim=True).double()
    rare = (1 - purity) / (4 - count).clamp_min(1)
    p = torch.where(allowed, purity / count, rare)
    return Motif(name, p / p.sum(1, keepdim=True))


def log_odds(probabilities: Tensor, pseudo: float = 0.0) -> Tensor:
    """log(p / 0.25) [..., 4] nats, after mixing ``pseudo`` of the uniform distribution into p."""
    return (4 * ((1 - pseudo) * probabilities + pseudo / 4)).log()


class MotifScan:
    """Scores of motifs at every place of sequences, on both strands.

    Args:
        motifs: M of them.
        pseudo: share of the uniform distribution, [0, 1); keeps a letter that a motif never shows
            at a finite score.

    Raises:
        ValueError: if there is no motif, or two have one name.
    """

    def __init__(self, motifs: Sequence[Motif], *, pseudo: float = 0.01) -> None:
        names = [motif.name for motif in motifs]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"motifs: need some, with different names, got {names}")
        self.names, self.pseudo = names, pseudo
        self.best = torch.tensor([motif.best_score(pseudo) for motif in motifs])
        self._widths = torch.tensor([len(motif.probabilities) for motif in motifs])
        half = int(self._widths.max()) // 2
        self._half = half
        filters = torch.zeros(2 * len(names), 4, 2 * half + 1, dtype=torch.float64)
        self._first = half - self._widths // 2  # of a motif in its filter
        for m, motif in enumerate(motifs):
            columns = slice(int(self._first[m]), int(self._first[m] + self._widths[m]))
            filters[2 * m, :, columns] = log_odds(motif.probabilities, pseudo).T
            filters[2 * m + 1, :, columns] = log_odds(motif.reverse_complement(), pseudo).T
        self._filters = filters

    def __call__(self, x: Tensor) -> Tensor:
        """Log-sum-exp over strands of the score at each centre [B, M, L].

        Where the motif would not fit into the sequence: :data:`NO_SITE`.
        """
        weight = self._filters.to(x)[:, :, None]
        flat = pad(x.transpose(1, 2), (self._half, self._half))[:, :, None]
        both = conv2d(flat, weight)[:, :, 0].unflatten(1, (-1, 2))
        return torch.where(self._fits(x.shape[1]).to(x.device), both.logsumexp(2), NO_SITE)

    def _fits(self, length: int) -> Tensor:
        start = torch.arange(length) - self._half + self._first[:, None]
        return (start >= 0) & (start + self._widths[:, None] <= length)

    def counts(self, tokens: Tensor, *, threshold: float = 0.8, chunk: int = 512) -> Tensor:
        """Sites of each motif over all sequences [M], int64.

        Args:
            tokens: [B, L].
            threshold: a site scores at least this share of the best word.
            chunk: sequences at a time.
        """
        total = torch.zeros(len(self.names), dtype=torch.int64)
        for part in tokens.cpu().split(chunk):
            scores = self(one_hot(part, 4).float())
            total += (scores >= threshold * self.best[:, None].float()).sum((0, 2))
        return total


def read_motifs(path: Path) -> list[Motif]:
    """Motifs of a MEME file (minimal or full, DNA) or a JASPAR file (counts or PFM).

    Raises:
        ValueError: naming the file and the motif: neither format, no motif, another alphabet, a
            matrix that is not four columns of numbers, a name twice.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text (byte {error.start})") from None
    first = next((line.strip() for line in lines if line.strip()), "")
    if not first.startswith((">", "MEME version")):
        raise ValueError(f"{path}: begins neither with '>' (JASPAR) nor 'MEME version' (MEME)")
    parse = _parse_jaspar if first.startswith(">") else _parse_meme
    motifs: list[Motif] = []
    for name, matrix in parse(path, lines):
        rows = {len(row) for row in matrix}
        if not matrix or rows != {4} or any(value < 0 for row in matrix for value in row):
            raise ValueError(f"{path}: motif {name} is no matrix of four counts a position")
        table = torch.tensor(matrix, dtype=torch.float64)
        if not (table.sum(1) > 0).all():
            raise ValueError(f"{path}: motif {name} has a position without counts")
        motifs.append(Motif(name, table / table.sum(1, keepdim=True)))
    names = [motif.name for motif in motifs]
    if not names or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{path}: {f'motifs {twice} come twice' if names else 'no motif'}")
    return motifs


_Matrix = list[list[float]]


def _parse_jaspar(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, _Matrix]]:
    """Four rows of counts under each '>ID NAME', with or without letters and brackets."""
    name, rows = "", list[list[float]]()
    for line in [*lines, ">"]:
        if not line.startswith(">"):
            if numbers := _NUMBER.findall(line.strip().lstrip(LETTERS)):
                rows.append([float(number) for number in numbers])
            continue
        if name:
            if len(rows) != 4 or len({len(row) for row in rows}) > 1:
                raise ValueError(f"{path}: motif {name} is not four rows of the same length")
            yield name, [list(column) for column in zip(*rows, strict=True)]
        name, rows = " ".join(line[1:].split()), []


def _parse_meme(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, _Matrix]]:
    """Rows under 'letter-probability matrix:' of each 'MOTIF ID NAME'."""
    alphabet = [line.split("=")[1].split()[0] for line in lines if line.startswith("ALPHABET= ")]
    if alphabet and alphabet[0] != LETTERS:
        raise ValueError(f"{path}: alphabet {alphabet[0]}, not {LETTERS}")
    name = ""
    for number, line in enumerate(lines):
        if line.startswith("MOTIF"):
            name = " ".join(line.split()[1:])
        elif line.startswith("letter-probability matrix"):
            width = re.search(r"w=\s*(\d+)", line)
            if width is None or not name:
                raise ValueError(f"{path}: line {number + 1}: a matrix without width or motif")
            block = lines[number + 1 : number + 1 + int(width[1])]
            try:
                rows = [[float(word) for word in row.split()] for row in block]
            except ValueError:
                rows = []
            if len(rows) != int(width[1]):
                raise ValueError(f"{path}: motif {name} has not {width[1]} rows of numbers")
            yield name, rows
