"""Denoisers and noise for the enumerable problem, as the objectives take them."""

import torch
from enumerable_masked import CLEAN, LENGTH, MASK, STATES, TOKENS, TableNet
from torch import Tensor

from diffdiv.core import masking
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives.rollout import Rollout


def denoiser(net: TableNet) -> TokenDenoiser:
    return TokenDenoiser(net, lambda net, x: net(x), TOKENS)


def start(batch: int) -> Tensor:
    return torch.full((batch, LENGTH), MASK)


def gumbel(*shape: int, seed: int) -> Tensor:
    """Float64 Gumbel noise from one generator."""
    generator = torch.Generator().manual_seed(seed)
    return masking.gumbel_from_normal(torch.randn(shape, generator=generator, dtype=torch.float64))


def noise(batch: int, seed: int = 0) -> masking.Noise:
    """Gumbel noise of a whole batch from one generator per step."""
    return lambda step: gumbel(batch, LENGTH, TOKENS + 1, seed=1000 * seed + step)


def gradient(loss: Tensor, of: TokenDenoiser) -> Tensor:
    grads = torch.autograd.grad(loss, list(of.net.parameters()))
    return torch.cat([g.flatten() for g in grads])


def all_paths(rho: float) -> tuple[Rollout, Tensor]:
    """Every path of two steps: state in between (any of 625), then a clean sequence.

    Returns the paths as a batch, with the part of their probabilities that is about reveal times.
    """
    fits = ((STATES[:, None] == STATES[CLEAN]) | (STATES[:, None] == MASK)).all(2)
    between, end = fits.nonzero(as_tuple=True)
    states = torch.stack([start(len(end)), STATES[between], STATES[CLEAN][end]])
    shown = (STATES[between] != MASK).sum(1).double()
    times = rho**shown * (1 - rho) ** (LENGTH - shown)
    chain = masking.Chain((1.0, 0.5, 0.0), (1.0, 1 - rho, 0.0))
    return Rollout(chain, states, torch.zeros(2, len(end))), times
