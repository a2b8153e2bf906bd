"""Reward fine-tuning of a masked diffusion from trajectories alone: no gradient of the reward.

    l        path log ratio, log P_policy(path) / P_reference(path), nats
    r        reward of a sequence
    D_f      E_policy[f(R)], R = P_reference / P_policy = exp(-l), of core/divergence.py
    pen(l)   f(R) - R f'(R) = integral from 0 to l of h at log R = -s, up to a constant

Any f-divergence is a reward in disguise: E[r] - alpha D_f has the gradient
E[(r - alpha pen(l)) grad log P_policy(path)], whose optimum on paths is the optimum on sequences.
Policy gradients with exact step probabilities; the weighted denoising cross-entropy is the forward
KL from the tilted law P_reference exp(r / alpha) / Z, as in MDNS (arXiv 2508.10684).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffdiv.core.divergence import Divergence
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives.rollout import Rollout, step_log_probs


@lru_cache(maxsize=1)
def _nodes() -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1], float64."""
    nodes, weights = np.polynomial.legendre.leggauss(128)
    return torch.from_numpy(nodes / 2 + 0.5), torch.from_numpy(weights / 2)


def penalty(log_ratio: Tensor, divergence: Divergence) -> Tensor:
    """pen(l), the price in nats of having moved a trajectory by that log ratio; 0 at 0.

    Integrates the table's h, which unlike f stays exact where R is large. Increasing in l: without
    bound for reverse KL, up to 1 for forward KL, log 2 for Jensen-Shannon.

    Args:
        log_ratio: l, any shape, nats; |l| up to about 50.
        divergence: supplies h.

    Returns:
        Same shape and dtype; no graph.
    """
    nodes, weights = (v.to(log_ratio.device) for v in _nodes())
    at = log_ratio.detach().double()[..., None]
    return (at[..., 0] * (weights * divergence.h(-at * nodes)).sum(-1)).to(log_ratio.dtype)


@dataclass(frozen=True)
class Regulariser:
    """What keeps the policy near where it started.

    Attributes:
        divergence: between laws on paths.
        alpha: its weight, reward units per nat, positive. Not comparable between divergences.
        to: "reference": maximise E[r] - alpha D_f(reference, policy). "target": minimise D_f
            between the tilted law P_reference exp(r / alpha) / Z and the policy, times alpha; all
            divergences then have the same optimum, and differ in how they get there.
        level: "path" needs log ratios of whole trajectories. "step" sums divergences of steps,
            which is the same thing for reverse KL only.
        clip: bounds on the log ratio before the penalty; None = none. Forward KL and the chi2
            divergences grow exponentially on one side.
    """

    divergence: Divergence
    alpha: float
    to: Literal["reference", "target"] = "reference"
    level: Literal["path", "step"] = "path"
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha: {self.alpha} is not positive")
        name = self.divergence.name
        if self.level == "step" and (name != "reverse_kl" or self.to != "reference"):
            raise ValueError(
                f"level 'step' with {name} to the {self.to}: only reverse_kl to the reference is a "
                "sum over steps; everything else needs the log ratio of a rollout, level 'path'"
            )

    def advantage(self, reward: Tensor, log_ratio: Tensor, log_z: Tensor | float = 0.0) -> Tensor:
        """What the policy gradient multiplies grad log P with [B], without a baseline; no graph.

        Args:
            reward: r [B].
            log_ratio: l [B], nats.
            log_z: log E_reference[exp(r / alpha)] for "target", see :func:`log_normaliser`.
        """
        if self.to == "reference":
            return reward.detach() - self.alpha * penalty(self._clipped(log_ratio), self.divergence)
        log_t = log_ratio - reward / self.alpha + log_z
        return -self.alpha * penalty(self._clipped(log_t), self.divergence)

    def beyond_reward(
        self, reward: Tensor, log_ratio: Tensor, log_z: Tensor | float = 0.0
    ) -> Tensor:
        """:meth:`advantage` less :attr:`reward_weight` times the reward [B]; no graph.

        What is left for the score function when the reward's own gradient is taken another way.
        """
        return self.advantage(reward, log_ratio, log_z) - self.reward_weight * reward.detach()

    @property
    def reward_weight(self) -> float:
        """How much of the reward itself is in the objective: 1 to the reference; to the target
        h(1), the slope of -alpha pen in r / alpha where policy and target agree."""
        return 1.0 if self.to == "reference" else float(self.divergence.h(torch.zeros(())))

    def _clipped(self, log_ratio: Tensor) -> Tensor:
        return log_ratio if self.clip is None else log_ratio.clamp(*self.clip)


def log_normaliser(reward: Tensor, log_ratio: Tensor, alpha: float) -> Tensor:
    """Estimate of log Z = log E_reference[exp(r / alpha)] from a batch of the policy, []."""
    terms = (reward / alpha - log_ratio).detach()
    return torch.logsumexp(terms, 0) - log(len(terms))


def leave_one_out(values: Tensor) -> Tensor:
    """Each value [B] minus the mean of the others: an unbiased baseline."""
    if len(values) < 2:
        raise ValueError("a baseline from the other samples needs at least two samples")
    return (values - values.mean()) * (len(values) / (len(values) - 1))


def policy_gradient_loss(
    policy: TokenDenoiser,
    rollout: Rollout,
    advantage: Tensor,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Loss [] whose gradient is -E[advantage * grad log P_policy(path)].

    Exact step probabilities: the policy is called again, with a graph, on the states of the chosen
    steps in one batch.

    Args:
        policy: with trainable parameters; the one that sampled, or close to it.
        rollout: its trajectories.
        advantage: [B], no graph; pass it through :func:`leave_one_out` first.
        steps: a uniformly random choice of S of the K steps (the sum is scaled by K / S, so the
            gradient is unbiased); None = all.
    """
    log_p = step_log_probs(policy, rollout, steps)
    scale = rollout.chain.num_steps / len(log_p)
    return -(advantage.detach() * scale * log_p.sum(0)).mean()


def path_weights(reward: Tensor, log_ratio: Tensor, alpha: float) -> Tensor:
    """Self-normalised weights of the tilted law on a batch of the policy, [B], sum 1, no graph."""
    return torch.softmax((reward / alpha - log_ratio).detach(), 0)


def effective_sample_size(weights: Tensor) -> Tensor:
    """1 / sum of squares of weights that sum to one, in 1..B, []."""
    return 1 / weights.square().sum()


def masked_cross_entropy(
    denoiser: TokenDenoiser, tokens: Tensor, weights: Tensor, mask_rates: Tensor, u: Tensor
) -> Tensor:
    """Weighted denoising cross-entropy, [], nats per sequence.

    sum over sequences of weight * (1/m) * sum over masked positions of -log p. With m uniform on
    (0, 1) this bounds the negative log-likelihood from above whatever the mask schedule (MDLM,
    arXiv 2406.07524). With :func:`path_weights` it is the loss of MDNS; with 1/B, of pretraining.

    Args:
        denoiser: with trainable parameters.
        tokens: clean sequences [B, L].
        weights: of the sequences [B], no graph.
        mask_rates: m of each sequence in (0, 1] [B]; stratified ones have less variance.
        u: uniform numbers [B, L]; a position is masked where its number is below m.
    """
    masked = u < mask_rates[:, None]
    x = torch.where(masked, denoiser.mask_id, tokens)
    log_p = denoiser.log_probs(x).gather(-1, tokens[..., None])[..., 0]
    nll = -torch.where(masked, log_p, 0.0).sum(1) / mask_rates
    return (weights.detach() * nll.to(weights.dtype)).sum()


class KlController:
    """Adapts alpha so that the KL settles at a target (arXiv 1909.08593, section 2.2).

    alpha *= 1 + gain * clip(KL / target - 1, -limit, limit) after every update.

    Args:
        alpha: where to begin, positive.
        target: KL, nats, positive.
        gain: relative change of alpha per update at a relative error of one.
        limit: bound on the relative error.
    """

    def __init__(
        self, alpha: float, *, target: float, gain: float = 0.1, limit: float = 0.2
    ) -> None:
        if not (alpha > 0 and target > 0 and gain > 0 and 0 < limit <= 1 and gain * limit < 1):
            raise ValueError(
                f"alpha, target, gain, limit: {alpha}, {target}, {gain}, {limit} are not positive "
                "with limit <= 1 and gain * limit < 1"
            )
        self.target, self.gain, self.limit = target, gain, limit
        self._alpha = torch.tensor(alpha, dtype=torch.float64)

    @property
    def alpha(self) -> float:
        """The weight to use now."""
        return float(self._alpha)

    def observe(self, kl: float) -> None:
        """Take the KL of an update into account, mean over all processes, nats."""
        error = min(max(kl / self.target - 1, -self.limit), self.limit)
        self._alpha = self._alpha * (1 + self.gain * error)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"alpha": self._alpha}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._alpha = state["alpha"].clone()
