"""Other ways to sequences of high reward, beside DRAKES and the policy gradient.

    policy, reference    denoisers; without training the reference is also what is sampled
    v(x)                 value guess of a state: reward of the likeliest tokens under one call
    alpha                temperature, reward units per nat; the aim: P_reference exp(r / alpha) / Z

Without training: best of N, sequential Monte Carlo with the reference or a guided model as its
proposal (twisted, arXiv 2306.17775), guidance by the gradient of the reward at the *probabilities*
of the tokens. With training: distillation of the soft-optimal step policy (VIDD, arXiv 2507.00445).
"""

from collections.abc import Callable

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

    Its path KL to the reference is at most log N - (N - 1) / N nats.

    Raises:
        ValueError: if the samples are not whole groups.
    """
    if group < 1 or len(reward) % group:
        raise ValueError(f"group: {len(reward)} samples are no groups of {group}")
    best = reward.view(-1, group).argmax(1)
    return best + group * torch.arange(len(best), device=reward.device)


def guided_log_probs(reference: TokenDenoiser, reward: Reward, alpha: float) -> LogProbs:
    """The reference tilted towards reward, position by position: log p + g / alpha, normalised.

    g is the gradient of the reward at the expected one-hot sequence, the probabilities of the
    tokens, with revealed tokens as they are. The rate at which positions are revealed is unchanged
    (arXiv 2406.01572 changes it).
    """

    def log_probs(x: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = reference.log_probs(x)
        with torch.enable_grad():
            expected = log_p.exp().requires_grad_()
            (g,) = torch.autograd.grad(reward(expected).sum(), expected)
        # a revealed position stays: what cannot happen is too far below for any sane gradient
        return torch.log_softmax(log_p + g / alpha, -1)

    return log_probs


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
) -> tuple[Tensor, Tensor]:
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
        proposal: what is sampled from; None = the reference. :func:`guided_log_probs` gives twisted
            sampling.
        threshold: share of B in [0, 1]; 0 = importance sampling.

    Returns:
        Tokens [B, L] and normalised log-weights [B].
    """
    tokens, log_ref = start, reference.log_probs(start)
    value = reward(likeliest(log_ref)).double()
    log_weights = value / alpha
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
            log_weights = torch.zeros_like(log_weights)
    return tokens, torch.log_softmax(log_weights, 0)


def soft_policy_distillation_loss(
    policy: TokenDenoiser,
    old: TokenDenoiser,
    reward: Reward,
    before: Tensor,
    after: Tensor,
    *,
    alpha: float,
    max_log_weight: float = 10.0,
) -> Tensor:
    """-E[exp((v(after) - v(before)) / alpha) log policy(after | before)], [].

    The soft-optimal step from ``old``, which the transitions must be drawn from. VIDD refreshes old
    to the policy now and then: every refresh multiplies the tilt, so after n of them the aim is
    P_reference exp(n r / alpha), not an anchored law.

    Args:
        policy: with trainable parameters.
        old: frozen; also gives the values.
        reward: of one-hot sequences; its gradient is not used.
        before, after: tokens around a step of old [B, L].
        alpha: temperature > 0.
        max_log_weight: bound on the exponent.
    """
    with torch.no_grad():
        gain = reward(likeliest(old.log_probs(after))) - reward(likeliest(old.log_probs(before)))
        weights = (gain / alpha).clamp_max(max_log_weight).exp()
    log_p = step_log_prob(before, after, policy.log_probs(before))
    return -(weights * log_p).mean()
