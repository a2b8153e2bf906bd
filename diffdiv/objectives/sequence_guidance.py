"""Guidance: the reference's prediction is changed at every step of sampling; nothing is trained.

    log_p     prediction of the reference at a state [B, L, V]
    phi       what is sampled instead, log-probabilities [B, L, V]
    r, w      reward of a sequence; guidance scale
    alpha     reward units per nat

Everything here works on *probabilities* of clean tokens and returns normalised log-probabilities;
a revealed position keeps its token, and the rate of revealing is unchanged (arXiv 2406.01572
changes it). Guidance at every step is exact where one position is left; how far the law of whole
sequences is from the aim depends on what the guide knows of the positions still masked.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffdiv.core.masking import Chain, LogProbs, Noise, ancestral_step, step_kl, step_log_prob
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives.rollout import Reward, Rollout

#: ``guide(x, log_p, step)`` -> phi, from the state, the reference's prediction, and the step
Guide = Callable[[Tensor, Tensor, int], Tensor]
#: ``slope(phi, update)`` -> estimate of dE[r]/dp at every token [B, L, V], under the product of phi
Slope = Callable[[Tensor, int], Tensor]
#: ``gumbel(update)`` -> Gumbel noise of N samples [N, B, L, V]
SampleNoise = Callable[[int], Tensor]


def reward_guidance(log_p: Tensor, reward: Reward, alpha: float) -> Tensor:
    """The prediction tilted towards reward, position by position: log p + g / alpha, normalised.

    g is the gradient of the reward at the expected one-hot sequence, the probabilities of the
    tokens, with revealed tokens as they are.
    """
    with torch.enable_grad():
        expected = log_p.exp().requires_grad_()
        (g,) = torch.autograd.grad(reward(expected).sum(), expected)
    # a revealed position stays: what cannot happen is too far below for any sane gradient
    return torch.log_softmax(log_p + g / alpha, -1)


def guided_log_probs(reference: TokenDenoiser, reward: Reward, alpha: float) -> LogProbs:
    """:func:`reward_guidance` of a reference as a function of the state."""

    def log_probs(x: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = reference.log_probs(x)
        return reward_guidance(log_p, reward, alpha)

    return log_probs


def classifier_free_guidance(log_conditional: Tensor, log_p: Tensor, scale: float) -> Tensor:
    """log p + w (log p(.|y) - log p), normalised (arXiv 2207.12598, for tokens).

    With consistent predictions w = 1 samples the class; w > 1 samples p(x) p(y|x)^w for the last
    position only, not for whole sequences.

    Args:
        log_conditional: prediction of a denoiser of the class [B, L, V]; for a reward, of the
            sequences that score best.
        log_p: prediction without condition.
        scale: w.
    """
    return torch.log_softmax(log_p + scale * (log_conditional - log_p), -1)


def corrected_log_probs(
    log_p: Tensor, slope: Slope, *, alpha: float, num_updates: int = 1, rate: float = 1.0
) -> Tensor:
    """Logits moved towards reward without a call of the network, and held by the KL.

    phi <- phi + rate (slope / alpha - (phi - log p)), normalised, is natural-gradient ascent of
    E[r(y)] - alpha KL(phi || p), y drawn from the product of the positions; it rests at its
    mean-field optimum, which for one masked position is p exp(r / alpha) / Z. Kin of the correction
    of logits in arXiv 2606.06303, whose formulas were not at hand; derived here.

    Args:
        log_p: prediction to begin with, and to stay near [B, L, V].
        slope: :func:`gradient_slope` or, for rewards without gradient, :func:`score_slope`.
        alpha: positive.
        num_updates: at least 1.
        rate: in (0, 1]; below 1 the noise of the samples is averaged over updates.

    Raises:
        ValueError: if there is no update or the rate is not in (0, 1].
    """
    if num_updates < 1 or not 0 < rate <= 1:
        raise ValueError(f"num_updates, rate: {num_updates}, {rate}; need 1 or more, in (0, 1]")
    phi = log_p
    for update in range(num_updates):
        phi = torch.log_softmax(phi + rate * (slope(phi, update) / alpha - (phi - log_p)), -1)
    return phi


def gradient_slope(reward: Reward, gumbel: SampleNoise) -> Slope:
    """Mean gradient of a differentiable reward at hard samples (straight through).

    Unbiased where the reward is linear in the one-hot rows of each position by itself.
    """

    def slope(phi: Tensor, update: int) -> Tensor:
        samples = _hard_samples(phi, gumbel(update))
        with torch.enable_grad():
            y = samples.flatten(0, 1).requires_grad_()
            (g,) = torch.autograd.grad(reward(y).sum(), y)
        return g.view_as(samples).mean(0)

    return slope


def score_slope(reward: Reward, gumbel: SampleNoise) -> Slope:
    """E[r | token k here] - E[r] from samples and their rewards alone.

    The others' mean is the baseline. Unbiased for tokens of probability 1/N and more; a rarer one
    counts as if it had 1/N, which keeps the variance finite and the slope too small.
    """

    def slope(phi: Tensor, update: int) -> Tensor:
        samples = _hard_samples(phi, gumbel(update))
        count = len(samples)
        with torch.no_grad():
            r = reward(samples.flatten(0, 1)).view(count, -1)
        advantage = (r - r.mean(0)) * (count / (count - 1))
        mean = (advantage[..., None, None] * samples).mean(0)
        return mean / phi.exp().clamp_min(1 / count)

    return slope


def _hard_samples(phi: Tensor, gumbel: Tensor) -> Tensor:
    """One-hot sequences [N, B, L, V]."""
    return one_hot((phi + gumbel).argmax(-1), phi.shape[-1]).to(phi.dtype)


@torch.no_grad()
def guided_roll_out(
    guide: Guide, reference: TokenDenoiser, chain: Chain, noise: Noise, start: Tensor
) -> tuple[Rollout, Tensor]:
    """Sample with guidance.

    Args:
        guide: changes the reference's prediction.
        reference: called once per step, plus whatever the guide calls.
        chain: grid that ends at t = 0.
        noise: Gumbel noise of step k [B, L, V+1].
        start: tokens to begin with [B, L].

    Returns:
        The trajectories, and the path KL from the reference, estimated from each [B], nats: the sum
        of the exact KLs of the steps. A guide with noise of its own samples a mixture of the steps
        it draws; the mean is then an upper bound.
    """
    states, log_q, kl = [start], [], start.new_zeros(len(start), dtype=torch.float32)
    for step in range(chain.num_steps):
        x, rho = states[-1], chain.rho(step)
        log_p = reference.log_probs(x)
        phi = guide(x, log_p, step)
        kl = kl + step_kl(x, phi, log_p, rho)
        states.append(ancestral_step(x, phi, rho, noise(step)))
        log_q.append(step_log_prob(x, states[-1], phi))
    return Rollout(chain, torch.stack(states), torch.stack(log_q)), kl
