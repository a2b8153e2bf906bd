"""Masks of proteins of different length, for the bound of objectives/masked_denoising.py.

    known    positions to learn from [B, L] bool, n_b of them in backbone b; see data/backbones.py

Differs from DRAKES' pretraining (arXiv 2410.13643) in the loss: theirs is a label-smoothed
cross-entropy over all positions, shown ones too; this is the likelihood bound, per residue.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffdiv.core.noise import normal, uniform
from diffdiv.objectives.masked_denoising import Masks


def draw_masks(
    known: Tensor, indices: Sequence[int], *, batch_size: int, seed: int, purpose: str
) -> Masks:
    """Masks of global sample indices, on the CPU; padding does not change them.

    The shares n / n_b of ``batch_size`` consecutive samples are evenly spread, as in
    :meth:`diffdiv.objectives.masked_denoising.Masks.draw`; each n is uniform in 1..n_b.

    Raises:
        ValueError: if a backbone has nothing to learn from.
    """
    blocks = [i // batch_size for i in indices]
    start = uniform(seed=seed, purpose=f"{purpose}/start", indices=blocks)
    u = (start + torch.tensor(indices, dtype=torch.float64) / batch_size) % 1
    return _masks(known, u, indices, seed, purpose)


def stratum_masks(
    known: Tensor, part: int, parts: int, indices: Sequence[int], *, seed: int, purpose: str
) -> Masks:
    """Masks with n uniform in the ``part``-th of ``parts`` equal shares of 1..n_b."""
    purpose = f"{purpose}/{part}"
    u = (part + uniform(seed=seed, purpose=f"{purpose}/n", indices=indices)) / parts
    return _masks(known, u, indices, seed, purpose)


def _masks(known: Tensor, u: Tensor, indices: Sequence[int], seed: int, purpose: str) -> Masks:
    masked = torch.zeros_like(known)
    for row, (share, index) in enumerate(zip(u.tolist(), indices, strict=True)):
        places = known[row].nonzero()[:, 0]
        if not len(places):
            raise ValueError(f"known: row {row} has no residue to learn from")
        keys = normal((len(places),), seed=seed, purpose=f"{purpose}/places", indices=[index])[0]
        count = min(int(share * len(places)), len(places) - 1) + 1
        masked[row, places[keys.argsort()[:count]]] = True
    return Masks(masked)
