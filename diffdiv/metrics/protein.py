"""What designed proteins are like: recovery, likelihood, stability, and whether they fold back.

B, L      rows, residues; see data/backbones.py
scRMSD    backbone RMSD of the structure predicted for a design from the one it was made for
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffdiv.data.backbones import Backbone, BackboneBatch
from diffdiv.data.structures import read_backbone
from diffdiv.metrics.sequences import Estimate
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives.inverse_folding import stratum_masks
from diffdiv.objectives.masked_denoising import masked_nll

#: angstrom; a design below it counts as folding back (arXiv 2410.13643)
MAX_RMSD = 2.0


def sequence_recovery(tokens: Tensor, batch: BackboneBatch) -> Tensor:
    """Share of the designed known residues that are as in the structure [B].

    NaN where a row has none. ``tokens`` [B, L] belong to the rows of ``batch``.
    """
    same = (tokens == batch.tokens) & batch.known
    return same.sum(1) / batch.known.sum(1)


@torch.no_grad()
def residue_nll(
    denoiser: TokenDenoiser, batch: BackboneBatch, *, draws: int = 8, seed: int = 0
) -> Tensor:
    """Upper bound of -log p(sequence | backbone) per known designed residue [B], nats.

    Unbiased for each backbone, from ``draws`` masks whose sizes are stratified; exp of its mean is
    the perplexity.
    """
    known, rows = batch.known.cpu(), range(len(batch.tokens))
    total = torch.zeros(len(rows), dtype=torch.float64)
    for draw in range(draws):
        masks = stratum_masks(known, draw, draws, rows, seed=seed, purpose="likelihood")
        nll = masked_nll(denoiser, batch.tokens, masks.to(batch.tokens.device))
        total += nll.double().cpu() / draws
    return total


def stability(scores: Tensor) -> dict[str, float]:
    """Figures of ddG predicted by an oracle that no training has seen [N], higher is more stable.

    Returns:
        "ddg" and "ddg_error": mean and its standard error; "ddg_median"; "stabilised": share above
        zero.
    """
    found = Estimate.of(scores)
    median, above = float(scores.median()), float((scores > 0).double().mean())
    return {"ddg": found.mean, "ddg_error": found.error, "ddg_median": median, "stabilised": above}


def backbone_rmsd(found: Backbone, target: Backbone) -> float:
    """RMSD of N, CA, C, O after the best superposition, angstrom.

    Residues that either side lacks are left out.

    Raises:
        ValueError: if the lengths differ, or fewer than 3 residues are left.
        ImportError: without gemmi.
    """
    if len(found) != len(target):
        raise ValueError(f"{found.name}: {len(found)} residues, {target.name} has {len(target)}")
    both = ~(found.missing | target.missing)
    if int(both.sum()) < 3:
        raise ValueError(f"{found.name}: fewer than 3 residues in common with {target.name}")
    try:
        gemmi = importlib.import_module("gemmi")
    except ImportError:
        raise ImportError("gemmi is not installed: pip install 'diffdiv[bio]'") from None
    points = [
        [gemmi.Position(*xyz) for xyz in side.coordinates[both].flatten(0, 1).tolist()]
        for side in (target, found)
    ]
    return float(gemmi.superpose_positions(*points).rmsd)


@dataclass(frozen=True)
class Folded:
    """A design and the structure that an external program predicted for it.

    Attributes:
        name: of the design, as in the FASTA.
        rmsd: scRMSD, angstrom.
        ddg: predicted stability, or None.
        is_success: rmsd below the limit, and ddg above 0 where it is known.
    """

    name: str
    rmsd: float
    ddg: float | None
    is_success: bool


def self_consistency(
    folder: Path,
    targets: Mapping[str, Backbone],
    *,
    ddg: Mapping[str, float] | None = None,
    max_rmsd: float = MAX_RMSD,
) -> list[Folded]:
    """Compare predicted structures with what they were designed for.

    Args:
        folder: one file for each design, named like it ("6MRR-0.pdb"); other files are passed over.
        targets: backbone of each design, by name.
        ddg: predicted stability of each design, by name.
        max_rmsd: limit of success, angstrom.

    Raises:
        ValueError: if a design has no file, or a structure cannot be read or compared.
        ImportError: without gemmi.
    """
    files = {path.name.partition(".")[0]: path for path in sorted(folder.iterdir())}
    if absent := sorted(set(targets) - set(files)):
        raise ValueError(f"{folder}: no structure of {len(absent)} designs: {absent[:5]}")
    table = []
    for name, target in targets.items():
        rmsd = backbone_rmsd(read_backbone(files[name]), target)
        value = None if ddg is None else ddg[name]
        good = rmsd < max_rmsd and (value is None or value > 0)
        table.append(Folded(name, rmsd, value, good))
    return table


def folding_rates(table: Sequence[Folded], *, max_rmsd: float = MAX_RMSD) -> dict[str, float]:
    """Figures of a table: mean scRMSD, share that folds back, share of successes."""
    if not table:
        raise ValueError("table: there is no design in it")
    count = len(table)
    return {
        "rmsd": sum(row.rmsd for row in table) / count,
        "folds_back": sum(row.rmsd < max_rmsd for row in table) / count,
        "success": sum(row.is_success for row in table) / count,
    }
