"""Gaussian mixtures: data whose diffused density, score and denoiser are exact.

Under x_t = alpha x0 + sigma eps a mixture sum_k w_k N(m_k, s^2 I) stays a mixture, with means
alpha m_k and variance v = alpha^2 s^2 + sigma^2. K: components; D: dimension; B: samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdiv.core.noise import normal, uniform


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Isotropic Gaussian mixture in D dimensions, diffused in closed form.

    Functions of ``x_t`` take [B, D] (or [B, ...] with D numbers a sample), compute in its dtype and
    on its device, and take ``alpha`` and ``sigma`` as [B] or as numbers.

    Attributes:
        means: [K, D], float64.
        weights: [K], positive, sum one, float64.
        std: standard deviation of every component in every direction.
    """

    means: Tensor
    weights: Tensor
    std: float

    def __post_init__(self) -> None:
        """Raise ValueError for shapes, weights or a std that make no mixture."""
        if self.means.ndim != 2 or self.weights.shape != self.means.shape[:1]:
            shapes = [list(self.means.shape), list(self.weights.shape)]
            raise ValueError(f"means, weights: shapes {shapes} are not [K, D] and [K]")
        if not (self.weights > 0).all() or abs(float(self.weights.sum()) - 1) > 1e-9:
            raise ValueError(f"weights: {self.weights.tolist()} are not positive with sum one")
        if not self.std > 0:
            raise ValueError(f"std: {self.std} is not positive")

    def log_prob(self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Logarithm of the diffused density in nats, [B]."""
        return self._log_joint(x_t, alpha, sigma).logsumexp(1)

    def mode_probabilities(
        self, x_t: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0
    ) -> Tensor:
        """Posterior probability of each component given ``x_t``, [B, K]."""
        return self._log_joint(x_t, alpha, sigma).softmax(1)

    def score(self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Gradient of ``log_prob`` in ``x_t``, shape of ``x_t``."""
        share = self.mode_probabilities(x_t, alpha, sigma)
        centre = _column(alpha, x_t) * (share @ self.means.to(x_t))
        return ((centre - x_t.flatten(1)) / self._variance(x_t, alpha, sigma)).view_as(x_t)

    def x0_mean(self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Mean of x0 given ``x_t`` (the ideal denoiser), shape of ``x_t``; finite at alpha = 0."""
        centre = self.mode_probabilities(x_t, alpha, sigma) @ self.means.to(x_t)
        scale = _column(alpha, x_t)
        gain = scale * self.std**2 / self._variance(x_t, alpha, sigma)
        return (centre + gain * (x_t.flatten(1) - scale * centre)).view_as(x_t)

    def sample(
        self, indices: Sequence[int], *, seed: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Draws for global sample indices: x0 [B, D] and the component [B], int64, of each."""
        draws = uniform(seed=seed, purpose="toy.mode", indices=indices)
        mode = torch.searchsorted(self.weights.cumsum(0), draws, right=True)
        mode = mode.clamp_max(len(self.weights) - 1)
        eps = normal(self.means.shape[1:], seed=seed, purpose="toy.point", indices=indices)
        return (self.means[mode] + self.std * eps).to(dtype), mode

    def _variance(self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        return (_column(alpha, x_t) * self.std) ** 2 + _column(sigma, x_t) ** 2

    def _log_joint(self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        variance = self._variance(x_t, alpha, sigma)
        gap = x_t.flatten(1)[:, None] - _column(alpha, x_t)[:, None] * self.means.to(x_t)
        log_normaliser = 0.5 * self.means.shape[1] * (2 * torch.pi * variance).log()
        return self.weights.log().to(x_t) - 0.5 * gap.square().sum(2) / variance - log_normaliser


def gaussian_ring(num_modes: int = 8, *, radius: float = 1.0, std: float = 0.1) -> GaussianMixture:
    """Modes evenly on a circle, with weights in the ratio 1 : 2 : 3 : 4 : 1 : 2 : ..."""
    angle = torch.arange(num_modes, dtype=torch.float64) * (2 * torch.pi / num_modes)
    weights = (torch.arange(num_modes) % 4 + 1).to(torch.float64)
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, weights / weights.sum(), std)


def _column(value: Tensor | float, x_t: Tensor) -> Tensor:
    """A number or [B] as a [B or 1, 1] tensor in the dtype and on the device of ``x_t``."""
    return torch.as_tensor(value, dtype=x_t.dtype, device=x_t.device).reshape(-1, 1)
