"""Distances between sets of images.

FID: Heusel et al., arXiv 1706.08500; KID: Binkowski et al., arXiv 1801.01401; precision and
recall: Kynkaanniemi et al., arXiv 1904.06991. All compare features, and only features of one
particular Inception network give numbers that may be called FID or KID. Nothing is downloaded.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from cleanfid.fid import fid_from_feats
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from diffdiv.metrics.card import file_sha256
from diffdiv.metrics.frechet import frechet_distance

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
Features = Callable[[Tensor], Tensor]
_NEIGHBOURS = 3  # of precision and recall


@torch.no_grad()
def image_metrics(
    real: Iterable[Tensor],
    fake: Iterable[Tensor],
    *,
    inception: Path | Features,
    cross_check: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Frechet and kernel distance, precision and recall of generated against real images.

    Args:
        real: batches [B, 1 or 3, H, W] in [-1, 1].
        fake: generated images, likewise; more than three of each.
        inception: path of the Inception weights of FID, or another network that maps uint8 images
            [B, 3, H, W] to features [B, D].
        cross_check: also the Frechet distance by clean-fid's formula, from the same features.
        device: of the Inception network.

    Returns:
        "fid", "kid", "precision" and "recall" with Inception weights, otherwise
        "frechet_distance", "kernel_distance", "precision" and "recall".

    Raises:
        FileNotFoundError: without the weights; says which they are and where they come from.
        ValueError: if the file is another one, or there are too few images.
    """
    names = (
        ("fid", "kid") if isinstance(inception, Path) else ("frechet_distance", "kernel_distance")
    )
    network = _inception(inception, device) if isinstance(inception, Path) else inception
    features_fake, features_real = (
        torch.cat([network(to_uint8(batch)).float() for batch in batches])
        for batches in (fake, real)
    )
    fewest = min(len(features_real), len(features_fake))
    if fewest <= _NEIGHBOURS:
        raise ValueError(f"{fewest} images are too few for {_NEIGHBOURS} neighbours")
    kernel = kid_features_to_metric(
        features_fake, features_real, kid_subset_size=min(fewest, 1000), verbose=False
    )
    overlap = prc_features_to_metric(
        features_fake,
        features_real,
        prc_neighborhood=_NEIGHBOURS,
        save_cpu_ram=True,  # the same figures from parts of the matrix of distances
        verbose=False,
    )
    metrics = {
        names[0]: frechet_distance(features_real, features_fake),
        names[1]: float(kernel["kernel_inception_distance_mean"]),
        "precision": float(overlap["precision"]),
        "recall": float(overlap["recall"]),
    }
    if cross_check:
        arrays = (features.double().numpy() for features in (features_real, features_fake))
        metrics[f"{names[0]}_clean_fid"] = float(fid_from_feats(*arrays))
    return metrics


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, as an image file would store it; grey becomes RGB."""
    rounded = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rounded.expand(-1, 3, -1, -1)


def require_inception(path: Path) -> None:
    """Check that this is the file of the FID's weights.

    Raises:
        FileNotFoundError: if it is not there; says which it is and where it comes from.
        ValueError: if it is another file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; FID needs {INCEPTION_FILE} (Apache-2.0) from the release v0.2.0"
            " of github.com/toshas/torch-fidelity, and no other features may be called FID"
        )
    # torch-fidelity unpickles without restrictions: only the one published file may reach it.
    if file_sha256(path) != INCEPTION_SHA256:
        raise ValueError(f"{path}: is not {INCEPTION_FILE} (its SHA-256 differs), so gives no FID")


def _inception(path: Path, device: torch.device | str) -> Features:
    require_inception(path)
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    ).to(device)
    return lambda images: network(images.to(device))[0].cpu()
