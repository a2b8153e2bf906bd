"""Masked (absorbing-state) diffusion of token sequences; t = 0 is data, t = 1 is all masked.

    tokens    [B, L], int64: 0..V-1, and V for a masked position (the mask id)
    x         tokens, or a soft state [B, L, V+1] whose rows are probabilities (last: mask mass)
    m         mask rate, the probability that a position is masked at t
    log_p     log-probabilities of x0 at every position [B, L, V], float32 or better
    rho       (m_t - m_s) / m_t, the probability that a masked position is revealed between t and s
    gumbel    standard Gumbel noise [B, L, V+1], all the randomness of one step

Forward, reverse and SUBS parametrisation: MDLM (arXiv 2406.07524). Of the reverse process a model
chooses only *which* token appears; *whether* one appears is rho, whatever the model. Hence
    KL(step of p || step of q) = rho * sum over masked positions of KL(p || q),          (step KL)
and the KL of two chains on paths is the expected sum of it along the first one (path KL).
Soft steps: straight-through Gumbel-softmax as in DRAKES (arXiv 2410.13643).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from diffdiv.core.noise import normal

#: log-probability of what cannot happen: finite, so 0 * log 0 is 0 and gradients are numbers
LOG_ZERO = -1e6

#: ``noise(k)`` is the Gumbel noise of step k, [B, L, V+1]; the same at every call
Noise = Callable[[int], Tensor]
#: ``log_probs(x)`` -> log_p
LogProbs = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chain:
    """A grid of times, from all masked (first) to data (last).

    Attributes:
        times: K+1 decreasing times.
        mask_rates: m at these times.
    """

    times: tuple[float, ...]
    mask_rates: tuple[float, ...]

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.times) - 1

    def rho(self, step: int) -> float:
        """Probability that a masked position is revealed in that step (0..K-1)."""
        before, after = self.mask_rates[step : step + 2]
        return (before - after) / before


@dataclass(frozen=True)
class MaskSchedule:
    """How the mask rate grows with time.

    Attributes:
        name: as in YAML and reports.
        mask_rate: t in [0, 1] -> m, increasing, 0 at 0; float64.
        reveal_rate: t in (0, 1] -> m'/m, the rate per unit time at which a masked position is
            revealed in the reverse process, and the weight of the pretraining loss; float64.
    """

    name: str
    mask_rate: Callable[[Tensor], Tensor]
    reveal_rate: Callable[[Tensor], Tensor]

    def chain(self, num_steps: int, *, t_end: float = 0.0) -> Chain:
        """An even grid of ``num_steps`` steps from 1 to ``t_end``.

        Raises:
            ValueError: if there is no step, or ``t_end`` is not in [0, 1).
        """
        if num_steps < 1 or not 0 <= t_end < 1:
            raise ValueError(f"num_steps, t_end: {num_steps}, {t_end} are no grid from 1 to t_end")
        times = torch.linspace(1.0, t_end, num_steps + 1, dtype=torch.float64)
        return Chain(tuple(times.tolist()), tuple(self.mask_rate(times).tolist()))

    def mask(self, tokens: Tensor, t: Tensor, u: Tensor, mask_id: int) -> Tensor:
        """Tokens noised to time t: masked where u < m_t.

        Args:
            tokens: clean sequences [B, L].
            t: [B].
            u: uniform numbers in [0, 1) [B, L].
            mask_id: V.
        """
        return torch.where(u < self.mask_rate(t)[:, None], mask_id, tokens)


def log_linear(*, eps: float = 1e-3) -> MaskSchedule:
    """m = (1 - eps) t, MDLM's default: exp(-integral of the rate) falls linearly."""
    return MaskSchedule("log_linear", lambda t: (1 - eps) * t, lambda t: 1 / t)


def cosine() -> MaskSchedule:
    """m = sin(pi t / 2): MaskGIT's cosine in reverse time (arXiv 2202.04200)."""
    return MaskSchedule(
        "cosine",
        lambda t: torch.sin(pi / 2 * t),
        lambda t: pi / 2 / torch.tan(pi / 2 * t),
    )


def polynomial(power: float) -> MaskSchedule:
    """m = t^power (MD4, arXiv 2406.04329); ``power`` > 0."""
    if not power > 0:
        raise ValueError(f"power: {power} is not positive")
    return MaskSchedule("polynomial", lambda t: t**power, lambda t: power / t)


def mask_mass(x: Tensor, num_tokens: int) -> Tensor:
    """How much of each position is masked [B, L]: 0 or 1 for tokens, in [0, 1] for soft states."""
    return x[..., num_tokens] if x.is_floating_point() else (x == num_tokens).float()


def subs_log_probs(logits: Tensor, x: Tensor, num_tokens: int) -> Tensor:
    """Log-probabilities of x0 in the SUBS parametrisation.

    The mask is never predicted, and a revealed position keeps its token. A soft state counts as
    revealed where its largest entry is not the mask.

    Args:
        logits: network output [B, L, >= V]; columns from V on are ignored.
        x: the state that the network saw.
        num_tokens: V.

    Returns:
        log_p, float32 or better; :data:`LOG_ZERO` where impossible.
    """
    logits = logits[..., :num_tokens]
    log_p = log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    tokens = x.argmax(-1) if x.is_floating_point() else x
    revealed = (tokens != num_tokens)[..., None]
    index = tokens.clamp_max(num_tokens - 1)[..., None]
    kept = torch.full_like(log_p, LOG_ZERO).scatter(-1, index, 0.0)
    return torch.where(revealed, kept, log_p)


def gumbel_from_normal(z: Tensor) -> Tensor:
    """Standard Gumbel noise as a function of standard normal noise, elementwise."""
    return -(-torch.special.log_ndtr(z)).log()


def counter_gumbel(
    shape: Sequence[int],
    *,
    seed: int,
    purpose: str,
    indices: Sequence[int],
    device: torch.device | str = "cpu",
) -> Noise:
    """Gumbel noise by (seed, purpose, step, global sample index); see core/noise.py.

    Args:
        shape: of one sample and step, [L, V+1].
        seed, purpose, indices: as in :func:`diffdiv.core.noise.normal`.
        device: where the noise goes, as float32; made from float64 on the CPU, so that the rare
            tokens of a large vocabulary are not cut off.
    """

    def noise(step: int) -> Tensor:
        z = normal(
            shape, seed=seed, purpose=f"{purpose}/{step}", indices=indices, dtype=torch.float64
        )
        return gumbel_from_normal(z).float().to(device)

    return noise


def _perturbed(log_p: Tensor, rho: float, gumbel: Tensor) -> Tensor:
    """Noisy log-probabilities of the V+1 outcomes at a masked position; their argmax is a draw."""
    stay = log(1 - rho) if rho < 1 else LOG_ZERO
    return torch.cat([log_p + log(rho), torch.full_like(log_p[..., :1], stay)], -1) + gumbel


def ancestral_step(tokens: Tensor, log_p: Tensor, rho: float, gumbel: Tensor) -> Tensor:
    """Tokens after one step of the reverse chain, [B, L]."""
    drawn = _perturbed(log_p, rho, gumbel).argmax(-1)
    return torch.where(tokens == log_p.shape[-1], drawn, tokens)


def soft_step(x: Tensor, log_p: Tensor, rho: float, gumbel: Tensor, tau: float) -> Tensor:
    """Differentiable step: the mask mass of each position is spread by a Gumbel-softmax.

    x' = c x + (1 - c) y, c = 1 - (mask mass), y = softmax((log q + gumbel) / tau). From one-hot
    rows, argmax x' is :func:`ancestral_step` with the same noise.

    Args:
        x: soft state [B, L, V+1].
        log_p: [B, L, V], with gradient.
        rho, gumbel: of the step.
        tau: temperature > 0.
    """
    y = torch.softmax(_perturbed(log_p, rho, gumbel) / tau, -1)
    masked = x[..., -1:]
    return (1 - masked) * x + masked * y


def straight_through(x: Tensor) -> Tensor:
    """One-hot rows of the largest entries; backward passes to ``x`` unchanged. Shape of x."""
    return one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype) + (x - x.detach())


def sample_ancestral(log_probs: LogProbs, chain: Chain, noise: Noise, tokens: Tensor) -> Tensor:
    """Run the chain; what ``tokens`` already shows is kept.

    Positions still masked at the end (a grid that ends before t = 0) take their likeliest token.

    Returns:
        Clean sequences [B, L].
    """
    for step in range(chain.num_steps):
        tokens = ancestral_step(tokens, log_probs(tokens), chain.rho(step), noise(step))
    if chain.mask_rates[-1] == 0:
        return tokens
    return log_probs(tokens).argmax(-1)


def sample_first_hitting(
    log_probs: LogProbs, order: Tensor, noise: Noise, tokens: Tensor
) -> Tensor:
    """One token per step: the continuous-time process, without parallel-unmasking error.

    The reveal times of the positions are independent of the tokens and alike for all positions, so
    their order is uniform and a network without time input never sees the times (first-hitting
    sampler, arXiv 2409.02908). Costs L calls.

    Args:
        log_probs: of a network without time input.
        order: a permutation of the positions for each sequence [B, L]; ``u.argsort(-1)`` of uniform
            u is right.
        noise: Gumbel noise of step k; only the revealed position's is used.
        tokens: start; what it already shows is kept.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    for step in range(order.shape[1]):
        place = order[:, step]
        log_p = log_probs(tokens)
        drawn = (log_p + noise(step)[..., :-1])[rows, place].argmax(-1)  # revealed rows: kept
        tokens = tokens.index_put((rows, place), drawn)
    return tokens


def position_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) at every position [B, L], nats; 0 where both are at a revealed token."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def step_kl(x: Tensor, log_p: Tensor, log_q: Tensor, rho: float) -> Tensor:
    """KL of one step of chain p from the same step of chain q, given its start [B], nats.

    Exact for tokens; at a soft state each position counts by its mask mass.
    """
    masked = mask_mass(x, log_p.shape[-1])
    return rho * (masked * position_kl(log_p, log_q)).sum(-1)


def step_log_prob(tokens: Tensor, after: Tensor, log_p: Tensor) -> Tensor:
    """Log-probability of what a step revealed [B], nats.

    Which positions were revealed is left out: no model changes it, it cancels in every ratio.
    """
    num_tokens = log_p.shape[-1]
    revealed = (tokens == num_tokens) & (after != num_tokens)
    picked = log_p.gather(-1, after.clamp_max(num_tokens - 1)[..., None])[..., 0]
    return torch.where(revealed, picked, 0.0).sum(-1)
