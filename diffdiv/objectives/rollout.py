"""Trajectories of a masked diffusion policy, and what every objective needs of them.

    K, B, L    steps of the chain, batch, length
    rho_k      probability that step k reveals a masked position

Models choose which tokens appear, not when; so the log ratio of two models on a path is the sum,
over steps, of the log ratios of the revealed tokens; its expectation, the path KL, is the sum of
rho_k times the KL of the predictions at the masked positions (see core/masking.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffdiv.core.masking import Chain, Noise, ancestral_step, step_kl, step_log_prob
from diffdiv.models.tokens import TokenDenoiser

#: ``reward(x)`` of one-hot sequences [B, L, V] -> [B]
Reward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rollout:
    """Trajectories of a policy, without a graph.

    Attributes:
        chain: the grid they were sampled on.
        states: tokens before the first, between, and after the last step [K+1, B, L], int64.
        log_p: log-probability, under the policy that sampled, of what each step revealed [K, B].
    """

    chain: Chain
    states: Tensor
    log_p: Tensor

    @property
    def tokens(self) -> Tensor:
        """The sequences [B, L]."""
        return self.states[-1]

    def one_hot(self, num_tokens: int) -> Tensor:
        """The sequences as rewards take them [B, L, V], float32."""
        return one_hot(self.tokens, num_tokens).float()


@torch.no_grad()
def roll_out(policy: TokenDenoiser, chain: Chain, noise: Noise, start: Tensor) -> Rollout:
    """Sample trajectories.

    Args:
        policy: denoiser.
        chain: grid that ends at t = 0.
        noise: Gumbel noise of step k [B, L, V+1].
        start: tokens to begin with [B, L]; what they show is kept.

    Raises:
        ValueError: if the chain ends before t = 0, with positions still masked.
    """
    if chain.mask_rates[-1] > 0:
        raise ValueError(f"chain: its last mask rate is {chain.mask_rates[-1]:g}, not 0")
    states, log_p = [start], []
    for step in range(chain.num_steps):
        at = policy.log_probs(states[-1])
        states.append(ancestral_step(states[-1], at, chain.rho(step), noise(step)))
        log_p.append(step_log_prob(states[-2], states[-1], at))
    return Rollout(chain, torch.stack(states), torch.stack(log_p))


def step_log_probs(
    denoiser: TokenDenoiser, rollout: Rollout, steps: Sequence[int] | None = None
) -> Tensor:
    """Log-probabilities [S, B] of what the chosen steps revealed, under ``denoiser``.

    One batched call; with a graph unless under no_grad.
    """
    chosen = list(range(rollout.chain.num_steps) if steps is None else steps)
    before, after = rollout.states[chosen], rollout.states[[k + 1 for k in chosen]]
    log_p = denoiser.log_probs(before.flatten(0, 1))
    return step_log_prob(before.flatten(0, 1), after.flatten(0, 1), log_p).unflatten(
        0, before.shape[:2]
    )


@torch.no_grad()
def path_log_ratio(
    rollout: Rollout, reference: TokenDenoiser, *, steps_per_call: int = 8
) -> Tensor:
    """log P_policy(path) / P_reference(path) of each trajectory [B], nats.

    Args:
        rollout: of the policy.
        reference: the other model.
        steps_per_call: steps that go through the reference in one batch.
    """
    total = torch.zeros_like(rollout.log_p[0])
    for steps in torch.arange(rollout.chain.num_steps).split(steps_per_call):
        # differences first: exactly 0 at policy = reference
        total += (rollout.log_p[steps] - step_log_probs(reference, rollout, steps.tolist())).sum(0)
    return total


def path_kl(
    policy: TokenDenoiser,
    reference: TokenDenoiser,
    rollout: Rollout,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Unbiased estimate of the path KL from each trajectory [B], nats.

    Sums the exact KL of every step, given its start, over the chosen steps, times K / S for a
    uniformly random choice of S. The graph of the policy is kept; the reference runs without one,
    all steps in one batch. Exactly 0 at policy = reference.
    """
    chosen = list(range(rollout.chain.num_steps) if steps is None else steps)
    x = rollout.states[chosen].flatten(0, 1)
    with torch.no_grad():
        log_ref = reference.log_probs(x)
    kl = step_kl(x, policy.log_probs(x), log_ref, 1.0).unflatten(0, (len(chosen), -1))
    rho = torch.tensor([rollout.chain.rho(k) for k in chosen], dtype=kl.dtype, device=kl.device)
    return rollout.chain.num_steps / len(chosen) * (rho[:, None] * kl).sum(0)
