"""Counter-based randomness: every draw is a function of (seed, purpose, global sample index).

One process with batch 8 and two with batch 4 see the same samples, a resumed run sees the samples
the uninterrupted one would have seen, and nothing about random state has to be saved. Draws are
made on the CPU and moved, so CPU and GPU runs agree.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def _generator(seed: int, purpose: str, index: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    # torch accepts seeds up to 2**63 - 1 without wrapping
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(
    shape: Sequence[int],
    *,
    seed: int,
    purpose: str,
    indices: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, one independent stream per sample.

    Args:
        shape: shape of one sample.
        seed: seed of the run.
        purpose: name of the stream ("student_z", "fake_eps", ...); streams are independent.
        indices: global sample indices, length B.
        dtype: of the result; float64 draws are not rounded float32 draws.

    Returns:
        Noise on the CPU, shape [B, *shape].
    """
    out = torch.empty((len(indices), *shape), dtype=dtype)
    for row, index in enumerate(indices):
        torch.randn(*shape, generator=_generator(seed, purpose, int(index)), out=out[row])
    return out


def uniform(*, seed: int, purpose: str, indices: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), shape [B], float64, CPU; arguments as in :func:`normal`."""
    out = torch.empty(len(indices), dtype=torch.float64)
    for row, index in enumerate(indices):
        torch.rand((), generator=_generator(seed, purpose, int(index)), out=out[row])
    return out


def permuted(index: int, size: int, *, seed: int, purpose: str) -> int:
    """Item that the global sample ``index`` reads from a set of ``size`` items.

    Epoch ``index // size`` visits every item once, in an order drawn from (seed, purpose, epoch).
    """
    epoch, position = divmod(index, size)
    return int(_permutation(seed, purpose, epoch, size)[position])


@lru_cache(maxsize=8)
def _permutation(seed: int, purpose: str, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=_generator(seed, purpose, epoch))
