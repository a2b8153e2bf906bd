"""The likelihood bound of masked diffusion, as a loss and as an estimate.

    tokens    clean sequences [B, L], int64
    n         how many positions of a sequence are masked, 1..L
    log_p     log-probabilities of the clean tokens, see models/tokens.py

In continuous time the bound does not depend on the mask schedule (MD4, arXiv 2406.04329): it is
    -log p(x0) <= sum over n of the mean, over all choices of n positions, of -log_p there,
that is L times the mean -log_p at the masked positions, n uniform in 1..L. Differs from the usual
integral over t in drawing n itself: no weight 1/t, and no chance that nothing is masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdiv.core.noise import normal, uniform
from diffdiv.models.tokens import TokenDenoiser


@dataclass(frozen=True)
class Masks:
    """Which positions of a batch are masked.

    Attributes:
        masked: [B, L] bool; each row has at least one.
    """

    masked: Tensor

    @classmethod
    def draw(
        cls, length: int, indices: Sequence[int], *, batch_size: int, seed: int, purpose: str
    ) -> "Masks":
        """Masks of global sample indices, on the CPU.

        The counts n of ``batch_size`` consecutive samples are evenly spread over 1..L, from a
        start drawn for each such block; that lowers the variance and leaves each n uniform.

        Args:
            length: L.
            indices: B global sample indices.
            batch_size: of an update, over all processes and micro-batches.
            seed, purpose: of the streams.
        """
        blocks = [i // batch_size for i in indices]
        start = uniform(seed=seed, purpose=f"{purpose}/start", indices=blocks)
        u = (start + torch.tensor(indices, dtype=torch.float64) / batch_size) % 1
        return cls._of(
            (u * length).long().clamp_max(length - 1) + 1, indices, length, seed, purpose
        )

    @classmethod
    def stratum(
        cls, length: int, part: int, parts: int, indices: Sequence[int], *, seed: int, purpose: str
    ) -> "Masks":
        """Masks with n uniform in the ``part``-th of ``parts`` equal shares of 1..L."""
        u = (part + uniform(seed=seed, purpose=f"{purpose}/{part}/n", indices=indices)) / parts
        count = (u * length).long().clamp_max(length - 1) + 1
        return cls._of(count, indices, length, seed, f"{purpose}/{part}")

    @classmethod
    def _of(
        cls, count: Tensor, indices: Sequence[int], length: int, seed: int, purpose: str
    ) -> "Masks":
        keys = normal((length,), seed=seed, purpose=f"{purpose}/places", indices=indices)
        return cls(keys.argsort(1).argsort(1) < count[:, None])

    def to(self, device: torch.device) -> "Masks":
        """The same on a device."""
        return Masks(self.masked.to(device))


def masked_nll(denoiser: TokenDenoiser, tokens: Tensor, masks: Masks) -> Tensor:
    """Mean -log_p at the masked positions [B], nats per base; its mean bounds the entropy rate."""
    masked = masks.masked
    log_p = denoiser.log_probs(torch.where(masked, denoiser.mask_id, tokens))
    nll = -log_p.gather(-1, tokens[..., None])[..., 0]
    return torch.where(masked, nll, 0.0).sum(1) / masked.sum(1)
