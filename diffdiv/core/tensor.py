"""Small tensor helpers shared by every layer above."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def expand_like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshape a per-sample coefficient so that it broadcasts against a batch.

    Args:
        coefficient: shape [B] or [] (any dtype).
        x: batch, shape [B, ...].

    Returns:
        The coefficient in the dtype of ``x``, shape [B, 1, ..., 1] or [].
    """
    coefficient = coefficient.to(device=x.device, dtype=x.dtype)
    if coefficient.ndim == 0:
        return coefficient
    return coefficient.reshape(coefficient.shape[0], *([1] * (x.ndim - 1)))


def flat_mean(x: Tensor) -> Tensor:
    """Mean over everything but the first axis: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)


def at_once(shape: Sequence[int]) -> int:
    """How many samples [..., H, W] are made in one call: 64 of 16x16, one of 128x128 (SDXL's).

    Without gradients nothing else bounds a batch, and a batch that fits in training must not fail
    when its samples are looked at.
    """
    return max(1, min(64, 2**14 // (shape[-2] * shape[-1])))


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of a detached tensor over all processes; the tensor itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    # NCCL reduces device tensors only; the few numbers that come here may live on the CPU
    device = torch.device("cuda") if dist.get_backend() == "nccl" else x.device
    total = x.detach().to(device, copy=True)
    dist.all_reduce(total)
    return total.to(x.device)


def loss_with_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Scalar whose derivative with respect to ``x`` is exactly ``grad``.

    Its value is <grad, x>; backward multiplies ``grad`` by one, so no bit of it changes. It is how
    every score-based objective (whose gradient is known but is not the gradient of a cheap
    function) meets an optimiser.

    Raises:
        ValueError: if the shapes differ.
    """
    if x.shape != grad.shape:
        raise ValueError(f"gradient of shape {list(grad.shape)} for x of shape {list(x.shape)}")
    return torch.sum(grad.detach() * x)
