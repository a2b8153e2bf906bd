"""Choosing among samples instead of training: best of N, sequential Monte Carlo.

    reference    frozen denoiser, what is sampled
    v(x)         value guess of a state: reward of the likeliest tokens under one call
    alpha        temperature, reward units per nat; the aim: P_reference exp(r / alpha) / Z

With a guided model as proposal sequential Monte Carlo is twisted sampling (arXiv 2306.17775).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffdiv.core.masking import Chain, LogProbs, Noise, ancestral_step, step_log_prob
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives.rollout import Reward

#: ``uniform(step)`` -> numbers in [0, 1) that choose the particles after that step, []
Uniform = Callable[[int], Tensor]


def likeliest(log_p: Tensor) -> Tensor:
    """One-hot sequences of the likeliest tokens [B, L, V], float32."""
    return one_hot(log_p.argmax(-1), log_p.shape[-1]).float()


def best_of_n(reward: Tensor, group: int) -> Tensor:
    """Index of the best of each group of N consecutive samples, [B / N].

    Raises:
        ValueError: if the samples are not whole groups.
    """
    if group < 1 or len(reward) % group:
        raise ValueError(f"group: {len(reward)} samples are no groups of {group}")
    best = reward.view(-1, group).argmax(1)
    return best + group * torch.arange(len(best), device=reward.device)


def best_of_n_kl(group: int) -> float:
    """KL of the best of N paths from one path, nats: log N - (N - 1) / N; less where ties occur."""
    return log(group) - (group - 1) / group


def systematic_resampling(log_weights: Tensor, u: Tensor) -> Tensor:
    """Indices [B] of the particles that go on; particle b is kept B w_b times on average.

    Args:
        log_weights: of the particles [B], not normalised.
        u: one uniform number in [0, 1), [].
    """
    size = len(log_weights)
    edges = torch.softmax(log_weights.double(), 0).cumsum(0)
    places = (torch.arange(size, device=edges.device) + u.to(edges.device)) / size
    return torch.searchsorted(edges, places).clamp_max(size - 1)


@dataclass(frozen=True)
class Particles:
    """What sequential Monte Carlo returns.

    Attributes:
        tokens: sequences [B, L].
        log_weights: normalised [B].
        log_normaliser: log of an unbiased estimate of Z = E_reference[exp(r / alpha)], []. Its mean
            over runs is below log Z, by at least the KL of the law of a particle, drawn by weight,
            from the aim. So E[r] / alpha - E[log_normaliser] bounds that law's KL from the
            reference, on paths, from above.
    """

    tokens: Tensor
    log_weights: Tensor
    log_normaliser: Tensor


@torch.no_grad()
def sequential_monte_carlo(
    reference: TokenDenoiser,
    reward: Reward,
    alpha: float,
    chain: Chain,
    noise: Noise,
    uniform: Uniform,
    start: Tensor,
    *,
    proposal: LogProbs | None = None,
    threshold: float = 0.5,
) -> Particles:
    """Particles for the law P_reference exp(r / alpha) / Z, and their weights.

    Weights grow by log P_reference - log proposal of what is revealed plus the change of
    v / alpha; the last value is the reward itself, so the weighted particles are consistent for
    that law as B grows, whatever proposal and values. Particles are resampled when their effective
    number falls below ``threshold`` B, not at every step.

    Args:
        reference: frozen.
        reward: of one-hot sequences; its gradient is not used here.
        alpha: temperature > 0.
        chain: grid that ends at t = 0.
        noise: Gumbel noise of step k [B, L, V+1].
        uniform: of the resampling.
        start: B particles at the beginning [B, L].
        proposal: what is sampled from; None = the reference. Guidance, see
            objectives/sequence_guidance.py, gives twisted sampling.
        threshold: share of B in [0, 1]; 0 = importance sampling.
    """
    tokens, log_ref = start, reference.log_probs(start)
    value = reward(likeliest(log_ref)).double()
    log_weights, size = value / alpha, log(len(start))
    for step in range(chain.num_steps):
        log_q = log_ref if proposal is None else proposal(tokens)
        after = ancestral_step(tokens, log_q, chain.rho(step), noise(step))
        gained = step_log_prob(tokens, after, log_ref) - step_log_prob(tokens, after, log_q)
        log_weights = log_weights + gained - value / alpha
        # behind the last step the likeliest tokens are the tokens, and the value is the reward
        tokens, log_ref = after, reference.log_probs(after)
        value = reward(likeliest(log_ref)).double()
        log_weights = log_weights + value / alpha
        share = torch.softmax(log_weights, 0).square().sum().reciprocal() / len(tokens)
        if step < chain.num_steps - 1 and float(share) < threshold:
            kept = systematic_resampling(log_weights, uniform(step))
            tokens, log_ref, value = tokens[kept], log_ref[kept], value[kept]
            # alike from here on, at the mean weight: the estimate of Z goes on
            log_weights = (log_weights.logsumexp(0) - size).expand(len(tokens))
    return Particles(tokens, torch.log_softmax(log_weights, 0), log_weights.logsumexp(0) - size)
