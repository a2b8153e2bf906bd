"""Gradients of rewards that have none: antithetic perturbations of each sample.

    x0      [B, C, H, W], samples of a one-step generator
    eps     [M, B, C, H, W], standard normal; copies are x0 + smoothing eps and x0 - smoothing eps
    A       advantage of a copy within the 2 M copies of its sample

A one-step generator is deterministic given its noise, so there is no policy to differentiate. One
is made: x0 is the mean of a normal law of standard deviation ``smoothing``. The policy gradient of
that law with respect to its mean is E[A eps] / smoothing (Williams 1992), that is the gradient of
the reward smoothed by the same law (evolution strategies: Salimans et al., arXiv 1703.03864).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffdiv.core.tensor import expand_like


@torch.no_grad()
def smoothed_gradient(
    reward: Callable[[Tensor], Tensor],
    x0: Tensor,
    eps: Tensor,
    *,
    smoothing: float,
    group_normalised: bool = False,
) -> Tensor:
    """Estimate of the gradient of E[reward(x0 + smoothing eps)] at each sample.

    Without bias for the smoothed reward, exact in the mean for a quadratic one. Its variance grows
    with the number of elements D: of a linear reward of slope g it is (D + 1)|g|^2 / M in total, so
    a single estimate points the right way only when M is near D; training averages over batches.

    Args:
        reward: samples [B, C, H, W] -> values [B]; called 2 M times, without gradient.
        x0: samples.
        eps: noise of M pairs.
        smoothing: standard deviation, in the unit of x0.
        group_normalised: divide the advantages by their standard deviation over a sample's copies:
            rewards of any unit then pull alike (and the estimate is no longer unbiased); copies
            that all earn the same pull nowhere.

    Returns:
        Gradient like ``x0``, float32.
    """
    up = torch.stack([reward(x0 + smoothing * e) for e in eps])
    down = torch.stack([reward(x0 - smoothing * e) for e in eps])
    advantage = (up - down) / 2
    if group_normalised:
        spread = torch.cat([up, down]).std(0)
        advantage = torch.where(spread > 0, advantage / spread.clamp_min(1e-12), 0.0)
    weighted = torch.stack([expand_like(a, e) * e for a, e in zip(advantage, eps, strict=True)])
    return weighted.mean(0) / smoothing
