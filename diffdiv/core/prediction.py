"""What a network predicts, and the one linear solve that turns it into anything else.

    x_t = alpha x0 + sigma eps          pred = a x0 + b eps

    kind     a            b             singular when
    x0       1            0             sigma = 0
    eps      0            1             alpha = 0
    v        -sigma       alpha         never (alpha, sigma > 0 or one of them 0)
    flow     -1           1             never; d x_t / d t of x_t = (1 - t) x0 + t eps
    score    0            -1/sigma      alpha = 0 or sigma = 0

v: Salimans & Ho, arXiv 2202.00512; flow: Lipman et al., arXiv 2210.02747, Liu et al., 2209.03003.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from diffdiv.core.tensor import expand_like

PredictionKind = Literal["x0", "eps", "v", "flow", "score"]
PREDICTION_KINDS: tuple[str, ...] = get_args(PredictionKind)


def coefficients(kind: PredictionKind, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (a, b) of ``pred = a x0 + b eps``, each in the shape of ``alpha``.

    Raises:
        ValueError: if ``kind`` is unknown.
    """
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    match kind:
        case "x0":
            return one, zero
        case "eps":
            return zero, one
        case "v":
            return -sigma, alpha
        case "flow":
            return -one, one
        case "score":
            return zero, -1.0 / sigma
    raise ValueError(f"prediction kind {kind!r} is not one of {', '.join(PREDICTION_KINDS)}")


def convert(
    pred: Tensor,
    from_: PredictionKind,
    to: PredictionKind,
    x_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
) -> Tensor:
    """Convert a prediction to another kind at the same x_t.

    Solves [x_t; pred] = [[alpha, sigma], [a, b]] [x0; eps] and applies the coefficients of ``to``.

    Args:
        pred: network output of kind ``from_``, shape [B, ...].
        from_: kind of ``pred``.
        to: kind wanted.
        x_t: noised sample, shape of ``pred``.
        alpha: signal coefficient at t, shape [B] or [].
        sigma: noise coefficient (standard deviation) at t, shape [B] or [].

    Returns:
        The prediction of kind ``to``, in the dtype of ``pred``.

    Raises:
        ValueError: if ``pred`` does not determine x0 at this t (tested where the coefficients are
            on the CPU; :func:`check_convertible` tests a whole schedule once, without a device
            synchronisation in every step).
    """
    if from_ == to:
        return pred
    # The coefficients are few: solve in float64, then meet the batch in its own dtype.
    alpha, sigma = alpha.double(), sigma.double()
    if alpha.device.type == "cpu":
        check_convertible(from_, alpha, sigma)
    a, b = coefficients(from_, alpha, sigma)
    determinant = alpha * b - sigma * a
    c, d = coefficients(to, alpha, sigma)
    # to = c x0 + d eps with x0 = (b x_t - sigma pred) / det and eps = (alpha pred - a x_t) / det
    of_x_t = (c * b - d * a) / determinant
    of_pred = (d * alpha - c * sigma) / determinant
    return expand_like(of_x_t, pred) * x_t + expand_like(of_pred, pred) * pred


def check_convertible(kind: PredictionKind, alpha: Tensor, sigma: Tensor) -> None:
    """Raise ValueError if predictions of ``kind`` do not determine x0 at some (alpha, sigma)."""
    alpha, sigma = alpha.double(), sigma.double()
    a, b = coefficients(kind, alpha, sigma)
    determinant = alpha * b - sigma * a
    bad = ~torch.isfinite(determinant) | (determinant.abs() < 1e-12)
    if bool(bad.any()):
        raise ValueError(
            f"prediction kind {kind!r} does not determine x0 at {int(bad.sum())} of "
            f"{bad.numel()} noise levels (alpha or sigma is 0 there); use 'v' or 'flow'"
        )
