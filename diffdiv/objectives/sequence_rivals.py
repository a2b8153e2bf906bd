"""Other ways to train a masked diffusion for reward, beside DRAKES and the policy gradient.

    policy, reference    denoiser in training; frozen denoiser it started from
    r                    reward of a sequence
    alpha                temperature, reward units per nat; the aim: P_reference exp(r / alpha) / Z

Distillation of the soft-optimal step policy (VIDD, arXiv 2507.00445); group-relative policy
optimisation with the likelihood of one call (diffu-GRPO of d1, arXiv 2504.12216); alignment of the
posteriors of single states. None needs a gradient of the reward, none follows a trajectory in
training. The weighted denoising cross-entropy is in objectives/policy_gradient.py.
"""

import torch
from torch import Tensor

from diffdiv.core.masking import step_log_prob
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives.particles import likeliest
from diffdiv.objectives.rollout import Reward


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
        old: frozen; also gives the values, rewards of its likeliest tokens.
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


def group_advantages(reward: Tensor, group: int) -> Tensor:
    """Each reward [B] minus the mean of its group of consecutive samples; no division by a spread.

    Raises:
        ValueError: if the samples are not whole groups of two or more.
    """
    if group < 2 or len(reward) % group:
        raise ValueError(f"group: {len(reward)} samples are no groups of {group}, 2 at least")
    groups = reward.view(-1, group)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def one_step_log_probs(denoiser: TokenDenoiser, tokens: Tensor, start: Tensor) -> Tensor:
    """log p of each token given ``start`` alone, from one call [B, L]; 0 where start shows it.

    Their sum is the likelihood of a product of positions, not of the sequence: from an all-masked
    start it knows nothing of what goes together.
    """
    log_p = denoiser.log_probs(start).gather(-1, tokens[..., None])[..., 0]
    return torch.where(start == denoiser.mask_id, log_p, 0.0)


def one_step_policy_loss(
    policy: TokenDenoiser,
    tokens: Tensor,
    start: Tensor,
    advantage: Tensor,
    *,
    old_log_p: Tensor,
    ref_log_p: Tensor,
    beta: float,
    clip: float = 0.5,
) -> Tensor:
    """Clipped, group-relative, with the likelihood of one call in place of the path's, [].

    -mean over masked positions of min(rho A, clip(rho) A) - beta k3, rho = p / p_old,
    k3 = p_ref / p - log(p_ref / p) - 1. On samples of the policy the gradient of k3 is that of
    KL(reference || policy), the *forward* KL, of the product of positions.

    The bias: nothing is learnt at any state but ``start``, so of the law of sequences only single
    positions move. Where positions are independent under the policy it is the exact policy
    gradient; else it is not the gradient of E[r].

    Args:
        policy: with trainable parameters.
        tokens: its samples [B, L].
        start: what they began with [B, L].
        advantage: [B], see :func:`group_advantages`.
        old_log_p, ref_log_p: :func:`one_step_log_probs` of the policy that sampled, and of the
            reference; no graph.
        beta: weight of k3, reward units per nat and position.
        clip: rho counts within 1 - clip .. 1 + clip.
    """
    log_p = one_step_log_probs(policy, tokens, start)
    rho = (log_p - old_log_p.detach()).exp()
    a = advantage.detach()[:, None]
    gain = torch.minimum(rho * a, rho.clamp(1 - clip, 1 + clip) * a)
    log_r = ref_log_p.detach() - log_p
    k3 = log_r.exp() - log_r - 1
    masked = start == policy.mask_id
    return -torch.where(masked, gain - beta * k3, 0.0).sum() / masked.sum()


def posterior_candidates(reference: TokenDenoiser, state: Tensor, gumbel: Tensor) -> Tensor:
    """N completions of each state from one call: positions drawn independently, [B, N, L].

    Args:
        reference: frozen.
        state: partly masked tokens [B, L].
        gumbel: Gumbel noise [N, B, L, V].
    """
    with torch.no_grad():
        return (reference.log_probs(state) + gumbel).argmax(-1).transpose(0, 1)


def posterior_alignment_loss(
    policy: TokenDenoiser,
    reference: TokenDenoiser,
    state: Tensor,
    candidates: Tensor,
    reward: Tensor,
    *,
    alpha: float,
) -> Tensor:
    """Cross-entropy from softmax(r / alpha) to softmax(log policy / reference) over candidates, [].

    Asks that the policy's completion of a state be the reference's times exp(r / alpha); no
    trajectory, any reward, any stored state. Exact at states with one masked position, whatever the
    candidates; elsewhere both sides are products over positions, which the tilted posterior is not.
    Kin of the stepwise alignment of arXiv 2507.04832, whose formulas were not at hand; derived
    here.

    Args:
        policy: with trainable parameters.
        reference: frozen; the candidates should be its completions.
        state: partly masked tokens [B, L].
        candidates: N completions of each state [B, N, L].
        reward: of the candidates [B, N].
        alpha: temperature > 0.
    """
    with torch.no_grad():
        log_ref = _completion_log_probs(reference, state, candidates)
        target = torch.softmax(reward / alpha, 1)
    log_ratio = _completion_log_probs(policy, state, candidates) - log_ref
    return -(target * torch.log_softmax(log_ratio, 1)).sum(1).mean()


def _completion_log_probs(denoiser: TokenDenoiser, state: Tensor, candidates: Tensor) -> Tensor:
    """Log-probabilities [B, N] of completions given a state, as products over its masked places."""
    log_p = denoiser.log_probs(state)[:, None].expand(-1, candidates.shape[1], -1, -1)
    picked = log_p.gather(-1, candidates[..., None])[..., 0]
    return torch.where(state[:, None] == denoiser.mask_id, picked, 0.0).sum(-1)
