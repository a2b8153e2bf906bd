"""Frechet distance between two sets of features, each taken as a Gaussian.

d^2 = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2)),
Dowson and Landau, J. Multivariate Analysis 12 (1982); as a metric of generators: Heusel et al.,
arXiv 1706.08500v6, eq. (6). m means [D], S covariances [D, D].
"""

import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two feature sets.

    Computed in float64 through symmetric eigendecompositions, which stay real and finite where a
    general matrix square root of a singular product does not.

    Args:
        features_a: [N, D], N >= 2.
        features_b: [M, D], M >= 2.

    Returns:
        The distance in squared feature units, >= 0 up to rounding.

    Raises:
        ValueError: if the shapes do not fit or a value is not finite.
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2 or features.shape[0] < 2:
            raise ValueError(f"{name}: shape {tuple(features.shape)} is not [N >= 2, D]")
        if not features.isfinite().all():
            raise ValueError(f"{name}: has a value that is not finite")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"features: widths {features_a.shape[1]} and {features_b.shape[1]} differ")
    mean_a, cov_a = _moments(features_a)
    mean_b, cov_b = _moments(features_b)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp_min(0).sqrt().sum()
    gap = (mean_a - mean_b).square().sum()
    return float(gap + cov_a.trace() + cov_b.trace() - 2 * cross)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.to(torch.float64)
    return features.mean(0), torch.atleast_2d(torch.cov(features.T))
