"""How varied samples are: within a prompt, and over the modes of a mixture that is known."""

import torch
from torch import Tensor

from diffdiv.data.toy import GaussianMixture


def in_batch_similarity(features: Tensor, groups: Tensor) -> float:
    """Mean cosine between different samples of one group, over all groups; lower = more varied.

    Args:
        features: [B, D], of a network that knows what images show.
        groups: [B], samples of one prompt share a number. Groups of one are left out.

    Returns:
        The mean over groups of the mean over pairs, in [-1, 1].

    Raises:
        ValueError: if no group has two samples.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    means = []
    for group in groups.unique():
        rows = unit[groups == group]
        if len(rows) > 1:
            # |sum of unit vectors|^2 = n + sum of cosines over ordered pairs
            pairs = rows.sum(0).square().sum() - len(rows)
            means.append(pairs / (len(rows) * (len(rows) - 1)))
    if not means:
        raise ValueError("groups: none has two samples, so there is nothing to compare")
    return float(torch.stack(means).mean())


def density_and_coverage(fake: Tensor, real: Tensor, *, neighbours: int = 5) -> tuple[float, float]:
    """How densely samples lie among real ones, and how many real ones have a sample near.

    Density and coverage of arXiv 2002.09797: balls around each real feature reach to its
    ``neighbours``-th nearest other real one. Unlike improved precision and recall they bear
    outliers. Both depend on the number of samples.

    Args:
        fake: features of generated images [N, D].
        real: features of real images [M, D], M > neighbours.
        neighbours: k.

    Returns:
        Density (1 when fake follows real; can exceed it) and coverage in [0, 1].

    Raises:
        ValueError: if there are too few real features.
    """
    if len(real) <= neighbours:
        raise ValueError(f"real: {len(real)} features, more than {neighbours} are needed")
    among = torch.cdist(real.double(), real.double())
    radius = among.kthvalue(neighbours + 1, dim=1).values  # the first is itself
    inside = torch.cdist(real.double(), fake.double()) <= radius[:, None]
    density = inside.double().sum() / (neighbours * len(fake))
    return float(density), float(inside.any(1).double().mean())


def mode_metrics(x0: Tensor, mixture: GaussianMixture, *, share: float = 0.5) -> dict[str, float]:
    """How samples spread over the modes of the mixture they should follow.

    A sample belongs to the mode that most probably made it.

    Args:
        x0: [B, D].
        mixture: the law aimed at.
        share: a mode counts as covered if it holds at least this part of its rightful mass.

    Returns:
        "mode_coverage": fraction of modes covered; "mode_mass_error": total variation distance
        between found and rightful masses, 0..1; "mode_spread": standard deviation around the modes'
        own means relative to the mixture's, 1 is right (NaN if no mode holds D + 1 samples);
        "mode_distance": root mean square distance to the mode's centre over that of the mixture.
    """
    means = mixture.means.to(x0.device)
    mode = mixture.mode_probabilities(x0.double()).argmax(1)
    mass = torch.bincount(mode, minlength=len(means)) / len(x0)
    weights = mixture.weights.to(x0.device)
    offsets = x0.double() - means[mode]
    squares, count = 0.0, 0
    for k in range(len(means)):
        rows = offsets[mode == k]
        if len(rows) > means.shape[1]:
            squares += float((rows - rows.mean(0)).square().sum())
            count += (len(rows) - 1) * means.shape[1]
    return {
        "mode_coverage": float((mass >= share * weights).double().mean()),
        "mode_mass_error": float((mass - weights).abs().sum() / 2),
        "mode_spread": (squares / count) ** 0.5 / mixture.std if count else float("nan"),
        "mode_distance": float(offsets.square().mean().sqrt() / mixture.std),
    }
