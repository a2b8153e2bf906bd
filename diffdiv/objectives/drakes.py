"""DRAKES: reward fine-tuning of a masked diffusion by back-propagation (arXiv 2410.13643).

    policy, reference    denoiser being trained; frozen denoiser it started from
    K, T                 steps of the chain; how many of its last steps are differentiated
    rho_k                probability that step k reveals a masked position
    alpha                reward units per nat

maximises  E[reward(x0)] - alpha KL(policy || reference),  KL on paths: the expected sum over steps
of rho_k times the sum over masked positions of KL(policy || reference) of the predicted token.

The first K - T steps are sampled on tokens without a graph; the last T are soft (Gumbel-softmax),
and the reward sees the hard sequence at their end, with the gradient of the soft one. Differs from
the released code in: the KL (see :func:`legacy_step_kl`), one network call per step instead of two,
no graph behind tokens, frozen networks without gradients.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

from diffdiv.core.masking import (
    Chain,
    LogProbs,
    Noise,
    ancestral_step,
    soft_step,
    step_kl,
    straight_through,
)
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives.policy_gradient import (
    Regulariser,
    leave_one_out,
    log_normaliser,
    policy_gradient_loss,
)
from diffdiv.objectives.rollout import Reward, path_log_ratio, roll_out

Metrics = dict[str, Tensor]
#: ``penalty(x, log_p, log_ref, chain, step)`` -> [B]
StepPenalty = Callable[[Tensor, Tensor, Tensor, Chain, int], Tensor]


@dataclass(frozen=True)
class SoftPath:
    """How a trajectory is differentiated.

    Attributes:
        chain: the grid, K steps.
        num_soft: T, how many of the last steps are soft (truncation), 1..K.
        tau: temperature of the Gumbel-softmax.
        hard: where states are made one-hot with the gradient of the soft ones: "end" once, at the
            end, so that the network sees mixtures (the paper); "step" after every step, so that it
            sees what it will see, and the trajectory has the law of the sampler.
        checkpointing: keep no activations; the backward calls the networks again, step by step.
    """

    chain: Chain
    num_soft: int
    tau: float = 1.0
    hard: Literal["end", "step"] = "end"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_soft <= self.chain.num_steps:
            raise ValueError(f"num_soft: {self.num_soft} is not in 1..{self.chain.num_steps}")
        if not self.tau > 0:
            raise ValueError(f"tau: {self.tau} is not positive")

    @property
    def num_hard(self) -> int:
        """K - T."""
        return self.chain.num_steps - self.num_soft


def exact_step_kl(x: Tensor, log_p: Tensor, log_ref: Tensor, chain: Chain, step: int) -> Tensor:
    """KL of the step, a term of the path KL [B], nats (soft states: by mask mass)."""
    return step_kl(x, log_p, log_ref, chain.rho(step))


def legacy_step_kl(x: Tensor, log_p: Tensor, log_ref: Tensor, chain: Chain, step: int) -> Tensor:
    """The term that DRAKES' released DNA code sums in place of the KL [B]; for reproduction.

    Weighs the generalised KL of token k at a position by (1 - mask mass) x_k / m_t, without the
    step's length: 0 on all tokens, masked or not, and on soft states only what has leaked out of
    the mask counts. It is not the KL of the method, and does not bound it.
    """
    p = log_p.exp()
    generalised = log_ref.exp() - p + p * (log_p - log_ref)
    kept = 1 - x[..., -1:]
    return (kept * x[..., :-1] * generalised).sum((1, 2)) / chain.mask_rates[step]


_PENALTIES: dict[str, StepPenalty] = {"path": exact_step_kl, "legacy": legacy_step_kl}


def drakes_loss(
    policy: TokenDenoiser,
    reference: TokenDenoiser | None,
    reward: Reward,
    start: Tensor,
    noise: Noise,
    *,
    path: SoftPath,
    alpha: float,
    kl: Literal["path", "legacy"] = "path",
    kl_steps: Collection[int] | None = None,
) -> tuple[Tensor, Metrics]:
    """-E[reward] + alpha KL, to be minimised.

    Args:
        policy: with trainable parameters.
        reference: frozen; None = no KL.
        reward: differentiable in its one-hot argument, its own parameters frozen.
        start: tokens to begin with [B, L].
        noise: Gumbel noise of step k [B, L, V+1]; the same at every call with the same k.
        path: how the trajectory is differentiated.
        alpha: weight of the KL, reward units per nat.
        kl: "path": the KL on paths; exact on the tokens of the first K - T steps and where states
            are hard, by mask mass on soft states. "legacy": see :func:`legacy_step_kl`.
        kl_steps: which of the first K - T steps the KL looks at, a uniformly random choice (their
            sum is scaled up, so the estimate is unbiased); None = all. "legacy" needs none.

    Returns:
        Loss, and metrics: mean reward and the KL estimate (nats; "legacy": in its own unit).

    Raises:
        ValueError: if the reference has trainable parameters, or a step is not among the first
            K - T.
    """
    _check(reference, path, kl_steps)
    kept: Collection[int] = range(path.num_hard) if kl_steps is None else kl_steps
    if reference is None or kl == "legacy":
        kept = ()
    tokens, seen = _hard_steps(policy, start, noise, path, kept)
    x = one_hot(tokens, policy.num_tokens + 1).float()
    x, penalty = _soft_steps(policy, reference, x, noise, path, _PENALTIES[kl])
    if reference is not None and seen:
        penalty = penalty + path.num_hard / len(seen) * _kl_on_tokens(reference, seen, path.chain)
    score = reward(straight_through(x[..., :-1]))
    loss = (alpha * penalty - score).mean()
    metrics = {
        "policy/reward": score.detach().mean(),
        "policy/kl": penalty.detach().mean(),
        "policy/loss": loss.detach(),
    }
    return loss, metrics


def divergence_drakes_loss(
    policy: TokenDenoiser,
    reference: TokenDenoiser,
    reward: Reward,
    start: Tensor,
    noise: Noise,
    *,
    path: SoftPath,
    regulariser: Regulariser,
    graded_steps: Sequence[int] | None = None,
) -> tuple[Tensor, Metrics]:
    """:func:`drakes_loss` with any f-divergence on paths in place of the KL.

    To the reference: -E[r] + alpha D_f. To the target: alpha D_f between the tilted law and the
    policy. Only a KL sums over steps. The others need log ratios of whole trajectories, so they
    take the exact gradient of the policy gradient, on token trajectories with the same noise (with
    hard = "step": on the same ones), while the reward's part of it is exchanged for the gradient
    through the trajectory. That part alone is biased; for "target" also the estimate of log Z, by
    order 1/B. There the bias weighs more, as the rest is largest where the reward is: prefer
    hard = "step", or the policy gradient. Costs a rollout, a pass of the reference and one of the
    policy more than "step", which is :func:`drakes_loss`.

    Args:
        policy, reference, reward, start, noise, path: as in :func:`drakes_loss`.
        regulariser: level "step" (reverse KL to the reference) is exact step by step.
        graded_steps: a uniformly random choice of the K steps for the score function; None = all.
    """
    if regulariser.level == "step":
        return drakes_loss(
            policy, reference, reward, start, noise, path=path, alpha=regulariser.alpha
        )
    loss, metrics = drakes_loss(policy, None, reward, start, noise, path=path, alpha=0.0)
    rollout = roll_out(policy, path.chain, noise, start)
    log_ratio = path_log_ratio(rollout, reference)
    with torch.no_grad():
        score = reward(rollout.one_hot(policy.num_tokens))
    is_target = regulariser.to == "target"
    log_z = log_normaliser(score, log_ratio, regulariser.alpha) if is_target else 0.0
    advantage = leave_one_out(regulariser.beyond_reward(score, log_ratio, log_z))
    rest = policy_gradient_loss(policy, rollout, advantage, graded_steps)
    return regulariser.reward_weight * loss + rest, metrics | {"policy/kl": log_ratio.mean()}


def _check(
    reference: TokenDenoiser | None, path: SoftPath, kl_steps: Collection[int] | None
) -> None:
    if reference and any(p.requires_grad for p in reference.net.parameters()):
        raise ValueError("reference: its parameters require gradients; freeze it first")
    outside = [k for k in kl_steps or () if not 0 <= k < path.num_hard]
    if outside or (kl_steps is not None and not kl_steps and path.num_hard):
        raise ValueError(f"kl_steps: {list(kl_steps or ())} is no choice of 0..{path.num_hard - 1}")


@dataclass(frozen=True)
class _Seen:
    """A step from tokens [B, L] whose prediction was kept with its graph."""

    step: int
    tokens: Tensor
    log_p: Tensor


def _hard_steps(
    policy: TokenDenoiser, tokens: Tensor, noise: Noise, path: SoftPath, kept: Collection[int]
) -> tuple[Tensor, list[_Seen]]:
    """Tokens after the first K - T steps; predictions have a graph at the steps in ``kept``."""
    seen = []
    for step in range(path.num_hard):
        with torch.set_grad_enabled(step in kept and torch.is_grad_enabled()):
            log_p = _maybe_checkpointed(path, policy.log_probs)(tokens)
        if step in kept:
            seen.append(_Seen(step, tokens, log_p))
        tokens = ancestral_step(tokens, log_p.detach(), path.chain.rho(step), noise(step))
    return tokens, seen


def _kl_on_tokens(reference: TokenDenoiser, seen: Sequence[_Seen], chain: Chain) -> Tensor:
    """Sum of the kept steps' KL [B]; the reference sees them all at once and needs no graph."""
    with torch.no_grad():
        log_ref = reference.log_probs(torch.cat([s.tokens for s in seen])).chunk(len(seen))
    terms = [
        exact_step_kl(s.tokens, s.log_p, ref, chain, s.step)
        for s, ref in zip(seen, log_ref, strict=True)
    ]
    return torch.stack(terms).sum(0)


def _soft_steps(
    policy: TokenDenoiser,
    reference: TokenDenoiser | None,
    x: Tensor,
    noise: Noise,
    path: SoftPath,
    term: StepPenalty,
) -> tuple[Tensor, Tensor]:
    """The soft state after the last T steps [B, L, V+1] and the sum of their penalties [B]."""
    # the calls are checkpointed one by one: the backward holds one network's activations at a time
    predict = _maybe_checkpointed(path, policy.log_probs)
    total = x.new_zeros(len(x))
    for step in range(path.num_hard, path.chain.num_steps):
        log_p = predict(x)
        if reference is not None:
            of = partial(_soft_term, reference, path.chain, step, term)
            total = total + _graded_at_once(of, x, log_p)
        x = soft_step(x, log_p, path.chain.rho(step), noise(step), path.tau)
        if path.hard == "step":
            x = straight_through(x)
    return x, total


def _soft_term(
    reference: TokenDenoiser, chain: Chain, step: int, term: StepPenalty, x: Tensor, log_p: Tensor
) -> Tensor:
    return term(x, log_p, reference.log_probs(x), chain, step)


def _graded_at_once(of: Callable[[Tensor, Tensor], Tensor], x: Tensor, log_p: Tensor) -> Tensor:
    """of(x, log_p) [B] with its first derivatives, and no graph behind it.

    Row b must depend on row b of the arguments alone. Nothing later needs the reference but
    through these terms, so its activations go as they come, and it is never called a second time.
    """
    outer = [t for t in (x, log_p) if t.requires_grad and torch.is_grad_enabled()]
    if not outer:
        return of(x, log_p)
    inner = [t.detach().requires_grad_(t.requires_grad) for t in (x, log_p)]
    value = of(*inner)
    slopes = torch.autograd.grad(value.sum(), [t for t in inner if t.requires_grad])
    total = value.detach()
    for argument, slope in zip(outer, slopes, strict=True):
        total = total + (slope * (argument - argument.detach())).flatten(1).sum(1)
    return total


def _maybe_checkpointed(path: SoftPath, log_probs: LogProbs) -> LogProbs:
    if not path.checkpointing:
        return log_probs
    return partial(checkpoint, log_probs, use_reentrant=False)
