"""What generated sequences are like: naturalness, diversity, novelty, activity.

    tokens, reference    sequences [N, L] and [M, L], int64, 0..3

Log-likelihood alone is no measure of naturalness: where a reward asks for motifs, the best law has
*fewer* bits per base than the data. Read it as :func:`excess_bits`, at equal reward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffdiv.data.motifs import Motif, MotifScan
from diffdiv.data.sequences import reverse_complement_of
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives.masked_denoising import Masks, masked_nll


@dataclass(frozen=True)
class Estimate:
    """A mean over independent sequences.

    Attributes:
        mean: of the quantity.
        error: standard error of the mean.
        values: by sequence [N].
    """

    mean: float
    error: float
    values: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """From values [N], N >= 2."""
        values = values.double()
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"values: shape {list(values.shape)}; a mean needs two sequences")
        return cls(float(values.mean()), float(values.std() / len(values) ** 0.5), values)


@torch.no_grad()
def log_likelihood_bound(
    denoiser: TokenDenoiser,
    tokens: Tensor,
    *,
    draws: int = 8,
    seed: int = 0,
    chunk: int = 256,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Lower bound of log p(sequence), nats per sequence (the ELBO of masked diffusion).

    Unbiased for each sequence, from ``draws`` masks whose sizes are stratified; the standard error
    holds both the spread over sequences and the noise of the draws.

    Args:
        denoiser: on ``device``.
        tokens: [N, L].
        draws: network calls per sequence; more make it less noisy, none make it biased.
        seed: of the masks.
        chunk: sequences per call.
        device: to compute on.
    """
    length, bounds = tokens.shape[1], []
    for rows in torch.arange(len(tokens)).split(chunk):
        total = torch.zeros(len(rows), dtype=torch.float64)
        part = tokens[rows].to(device)
        for draw in range(draws):
            masks = Masks.stratum(
                length, draw, draws, rows.tolist(), seed=seed, purpose="likelihood"
            )
            nll = masked_nll(denoiser, part, masks.to(part.device))
            total -= length * nll.double().cpu() / draws
        bounds.append(total)
    return Estimate.of(torch.cat(bounds))


def bits(bound: Estimate, length: int) -> Estimate:
    """Bits per base, at least, of sequences with this log-likelihood bound in nats."""
    return Estimate.of(-bound.values / (length * log(2)))


def kmer_counts(tokens: Tensor, k: int) -> Tensor:
    """How often each word of k letters occurs, overlapping, over all sequences [4^k], int64."""
    if not 1 <= k <= min(12, tokens.shape[1]):
        raise ValueError(f"k: {k} is not in 1..{min(12, tokens.shape[1])}")
    powers = 4 ** torch.arange(k - 1, -1, -1, device=tokens.device)
    return torch.bincount((tokens.unfold(1, k, 1) * powers).sum(-1).flatten(), minlength=4**k)


def kmer_pearson(tokens: Tensor, reference: Tensor, *, k: int = 3) -> float:
    """Pearson correlation of k-mer frequencies, in [-1, 1]; NaN where one side has none."""
    return _pearson(kmer_counts(tokens, k).double(), kmer_counts(reference, k).double())


def motif_spearman(
    tokens: Tensor, reference: Tensor, motifs: Sequence[Motif], *, threshold: float = 0.8
) -> float:
    """Spearman correlation, over motifs, of their numbers of sites; in [-1, 1].

    Differs from DRAKES' evaluation in keeping motifs that one side lacks.

    Args:
        tokens, reference: [N, L], [M, L].
        motifs: at least 3.
        threshold: a site scores this share of the motif's best word.
    """
    if len(motifs) < 3:
        raise ValueError(f"motifs: {len(motifs)}, too few for a rank correlation")
    scan = MotifScan(motifs)
    rates = [
        scan.counts(side, threshold=threshold).double() / len(side) for side in (tokens, reference)
    ]
    return _pearson(_ranks(rates[0]), _ranks(rates[1]))


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.square().sum() * b.square().sum()).sqrt())


def _ranks(values: Tensor) -> Tensor:
    """Ranks, ties sharing their mean."""
    less = (values[:, None] > values).sum(1).double()
    equal = (values[:, None] == values).sum(1).double()
    return less + (equal - 1) / 2


def diversity(tokens: Tensor) -> dict[str, float]:
    """How varied the sequences are among themselves.

    Returns:
        "hamming": mean share of positions in which two different sequences differ; "distinct":
        share of sequences that are not a repetition; "kmer_entropy": of 6-mer frequencies, bits
        (12 at most; shorter words where L < 6).
    """
    count = len(tokens)
    if count < 2:
        raise ValueError("tokens: one sequence has no diversity")
    letters = one_hot(tokens, 4).sum(0).double()  # [L, 4]
    same = (letters * (letters - 1)).sum(1) / (count * (count - 1))
    p = kmer_counts(tokens, min(6, tokens.shape[1])).double()
    p = p[p > 0] / p.sum()
    return {
        "hamming": float(1 - same.mean()),
        "distinct": len(torch.unique(tokens, dim=0)) / count,
        "kmer_entropy": float(-(p * p.log2()).sum()),
    }


def novelty(tokens: Tensor, reference: Tensor, *, chunk: int = 256) -> dict[str, float]:
    """How far the sequences are from known ones, on either strand.

    Returns:
        "new": share that does not occur in the reference; "nearest": mean share of positions in
        which a sequence differs from the nearest one of the reference.
    """
    if tokens.shape[1] != reference.shape[1]:
        raise ValueError(f"lengths: {tokens.shape[1]} and {reference.shape[1]} differ")
    known = one_hot(torch.cat([reference, reverse_complement_of(reference)]), 4)
    known, nearest = known.flatten(1).float().T.contiguous(), []
    for part in tokens.split(chunk):
        same = one_hot(part, 4).flatten(1).float() @ known
        nearest.append(1 - same.amax(1) / tokens.shape[1])
    distance = torch.cat(nearest)
    return {"new": float((distance > 0).double().mean()), "nearest": float(distance.mean())}


@torch.no_grad()
def activity(
    reward: Callable[[Tensor], Tensor], tokens: Tensor, *, chunk: int = 256
) -> dict[str, float]:
    """Scores of sequences by a held-out oracle that no training has seen: mean, error, median."""
    scores = torch.cat([reward(one_hot(part, 4).float()) for part in tokens.split(chunk)]).cpu()
    found = Estimate.of(scores)
    return {"mean": found.mean, "error": found.error, "median": float(scores.median())}


def excess_bits(bits_per_base: float, reward: float, front: Sequence[tuple[float, float]]) -> float:
    """Bits per base beyond those of the best law with the same reward.

    Args:
        bits_per_base: of the sequences, under the law of the data.
        reward: their mean reward.
        front: (reward, bits per base) of best laws; see rewards/dna_world.py.

    Raises:
        ValueError: if the front ends before this reward.
    """
    points = sorted(front)
    if not points[0][0] - 1e-9 <= reward <= points[-1][0] + 1e-9:
        raise ValueError(f"reward: {reward:.3g} is not in {points[0][0]:.3g}..{points[-1][0]:.3g}")
    for (r0, b0), (r1, b1) in pairwise(points):
        if reward <= r1 + 1e-9:
            return bits_per_base - (b0 + (b1 - b0) * (reward - r0) / (r1 - r0))
    raise AssertionError("unreachable")


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counting half.

    Args:
        scores: [N].
        labels: 1 or 0 [N].

    Raises:
        ValueError: if one class is missing.
    """
    positive = labels > 0.5
    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        raise ValueError(f"labels: {p} positive and {n} negative; both are needed")
    _, place, count = scores.double().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0).double() - (count - 1) / 2)[place]  # mean rank of tied scores, from 1
    return float((rank[positive].sum() - p * (p + 1) / 2) / (p * n))


def prediction_metrics(outputs: Tensor, values: Tensor, *, is_classes: bool) -> dict[str, float]:
    """How well an oracle predicts.

    Args:
        outputs, values: [N, D].
        is_classes: whether values are 1 and 0 (D = 1) rather than measurements.

    Returns:
        "auroc" and "accuracy"; or, averaged over the D outputs, "pearson" and "mse_share", the
        mean squared error over the variance.
    """
    if is_classes:
        right = (outputs > 0) == (values > 0.5)
        area = auroc(outputs[:, 0], values[:, 0])
        return {"auroc": area, "accuracy": float(right.double().mean())}
    pairs = list(zip(outputs.double().T, values.double().T, strict=True))
    share = (outputs - values).double().square().mean(0) / values.double().var(0)
    pearson = sum(_pearson(a, b) for a, b in pairs) / len(pairs)
    return {"pearson": pearson, "mse_share": float(share.mean())}
