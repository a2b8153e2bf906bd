"""A masked diffusion small enough to enumerate: 4 positions, 4 tokens, 256 sequences, 625 states.

Written with products over positions and sums over states only, nothing of diffdiv/core/masking.py,
so it can judge it. Tables are [625, 4, 4]: at every state, position and token.
"""

import itertools
import math

import torch
from torch import Tensor, nn

LENGTH, TOKENS = 4, 4
MASK = TOKENS
STATES = torch.tensor(list(itertools.product(range(TOKENS + 1), repeat=LENGTH)))
MASKED = STATES == MASK
CLEAN = (~MASKED).all(1).nonzero()[:, 0]  # indices of the 256 sequences
START = len(STATES) - 1  # all masked
_PLACES = (TOKENS + 1) ** torch.arange(LENGTH - 1, -1, -1)


def index_of(tokens: Tensor) -> Tensor:
    """Row of STATES that each sequence [..., L] is."""
    return (tokens * _PLACES).sum(-1)


def chain_law(scale: float, seed: int) -> Tensor:
    """Log-probabilities of the 256 sequences: unary and neighbour tables of that scale."""
    generator = torch.Generator().manual_seed(seed)
    unary = scale * torch.randn(LENGTH, TOKENS, generator=generator, dtype=torch.float64)
    pair = scale * torch.randn(LENGTH - 1, TOKENS, TOKENS, generator=generator, dtype=torch.float64)
    x = STATES[CLEAN]
    total = sum(unary[i, x[:, i]] for i in range(LENGTH))
    total = total + sum(pair[i, x[:, i], x[:, i + 1]] for i in range(LENGTH - 1))
    return total - torch.logsumexp(total, 0)


def conditionals(log_law: Tensor) -> Tensor:
    """Log-probability of every token at every position given every state, [625, 4, 4].

    A consistent set of conditionals: that of the law itself. At shown positions: the token shown.
    """
    x = STATES[CLEAN]
    table = torch.full((len(STATES), LENGTH, TOKENS), -torch.inf, dtype=torch.float64)
    for s, state in enumerate(STATES):
        fits = ((state == MASK) | (x == state)).all(1)
        weights = log_law.masked_fill(~fits, -torch.inf)
        weights = weights - torch.logsumexp(weights, 0)
        for i, k in itertools.product(range(LENGTH), range(TOKENS)):
            table[s, i, k] = torch.logsumexp(weights.masked_fill(x[:, i] != k, -torch.inf), 0)
    return table


def transition(table: Tensor, rho: float) -> Tensor:
    """The step's full transition matrix [625, 625]: positions move independently of each other."""
    shown = nn.functional.one_hot(STATES, TOKENS + 1).double()
    moves = torch.cat([rho * table.exp(), torch.full_like(table[..., :1], 1 - rho)], -1)
    kernel = torch.where(MASKED[..., None], moves, shown)
    matrix = torch.ones(len(STATES), len(STATES), dtype=torch.float64)
    for i in range(LENGTH):
        matrix = matrix * kernel[:, i][:, STATES[:, i]]
    return matrix


def marginals(table: Tensor, rhos: list[float]) -> list[Tensor]:
    """Law of the state after 0, 1, ... steps, each [625]."""
    laws = [nn.functional.one_hot(torch.tensor(START), len(STATES)).double()]
    for rho in rhos:
        laws.append(laws[-1] @ transition(table, rho))
    return laws


def path_kl(table: Tensor, other: Tensor, rhos: list[float]) -> float:
    """KL of the chain's path law from the other's, by rows of transition matrices, nats."""
    total = 0.0
    for law, rho in zip(marginals(table, rhos), rhos, strict=False):
        p, q = transition(table, rho), transition(other, rho)
        rows = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(1)
        total += float(law @ rows)
    return total


# Every pair (state, state with some more positions shown): 9^4 of them, twelve times fewer than
# 625^2; what gradient ascent needs to be quick.
_WEAKER = (STATES[:, None] == STATES) | MASKED[:, None]
FROM, TO = (_WEAKER.all(2)).nonzero(as_tuple=True)
SHOWN = MASKED[FROM] & ~MASKED[TO]
NUM_SHOWN, NUM_LEFT = SHOWN.sum(1), MASKED[TO].sum(1)


def _log_weights(log_p: Tensor) -> Tensor:
    """Log-probability of the tokens that each pair shows, differentiable, [number of pairs]."""
    token = STATES[TO].clamp_max(TOKENS - 1)
    return torch.where(SHOWN, log_p[FROM[:, None], torch.arange(LENGTH), token], 0.0).sum(1)


def objective(
    log_p: Tensor, log_ref: Tensor, reward: Tensor, alpha: float, rhos: list[float] | None
) -> tuple[Tensor, Tensor]:
    """(E[reward] - alpha path KL, path KL) of a chain, exact and differentiable.

    ``rhos`` None: continuous time, that is one position at a time in uniformly random order.
    """
    weights = _log_weights(log_p).exp()
    gap = torch.where(MASKED[..., None], log_p.exp() * (log_p - log_ref), 0.0).sum((1, 2))
    law = nn.functional.one_hot(torch.tensor(START), len(STATES)).to(log_p.dtype)
    kl = log_p.new_zeros(())
    steps = [None] * LENGTH if rhos is None else rhos
    for rho in steps:
        if rho is None:
            left = MASKED.sum(1).clamp_min(1).double()
            share = torch.where(NUM_SHOWN == 1, 1 / left[FROM], 0.0)
            kl = kl + law @ (gap / left)
        else:
            share = rho ** NUM_SHOWN.double() * (1 - rho) ** NUM_LEFT.double()
            kl = kl + rho * (law @ gap)
        law = torch.zeros_like(law).index_add(0, TO, law[FROM] * weights * share)
    return law[CLEAN] @ reward - alpha * kl, kl


def value(log_law: Tensor, reward: Tensor, alpha: float) -> float:
    """alpha log E[exp(reward / alpha)], the best that any path law can do."""
    return float(alpha * torch.logsumexp(log_law + reward / alpha, 0))


class TableNet(nn.Module):
    """A logit for every state, position and token; multilinear in between."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return self.logits[index_of(x)]
        weights = x[:, 0]
        for i in range(1, LENGTH):
            weights = (weights[:, :, None] * x[:, i][:, None]).flatten(1)
        return (weights.to(self.logits.dtype) @ self.logits.flatten(1)).unflatten(
            1, (LENGTH, TOKENS)
        )


class Instance:
    """One problem: a consistent reference, a reward, a temperature."""

    def __init__(self, *, seed: int = 0, alpha: float = 0.5) -> None:
        self.log_law = chain_law(0.7, seed)
        reward = chain_law(0.7, seed + 1000)
        self.reward = reward - reward.mean()
        self.alpha = alpha
        table = conditionals(self.log_law)
        # finite where a token is already shown: the network's output there is never used
        self.reference = torch.where(table > -torch.inf, table, -30.0)

    def reference_net(self) -> TableNet:
        return TableNet(self.reference).requires_grad_(False)

    def perturbed(self, scale: float, seed: int) -> Tensor:
        """Logits away from the reference."""
        noise = torch.randn(
            self.reference.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return self.reference + scale * noise

    def reward_of(self, x: Tensor) -> Tensor:
        """Multilinear reward of one-hot sequences [B, L, V] -> [B]."""
        weights = x[:, 0]
        for i in range(1, LENGTH):
            weights = (weights[:, :, None] * x[:, i][:, None]).flatten(1)
        return weights @ self.reward.to(x.dtype)


def subs(logits: Tensor) -> Tensor:
    """Normalised log-probabilities of a table of logits; shown positions are not touched."""
    return torch.log_softmax(logits, -1)


def chi_square_bound(cells: int, false_alarm: float = 1e-6) -> float:
    """Quantile of the chi-square law with cells - 1 degrees (Wilson-Hilferty)."""
    df = cells - 1
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * false_alarm, dtype=torch.float64)))
    return df * (1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 3
