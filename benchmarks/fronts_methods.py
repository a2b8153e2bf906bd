"""What benchmarks/drakes_fronts.py compares: each method as a stream of losses, or as a sampler.

target      the world's reward: what is judged, and what methods without reward gradients train on
surrogate   its smooth kin, for methods that differentiate the reward (the target's slope is
            flat on ordinary sequences)
twin        judged only
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch
from torch import Tensor

from diffdiv.core.divergence import get_divergence
from diffdiv.core.masking import Chain, Noise, counter_gumbel, log_linear
from diffdiv.core.noise import normal
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives import sequence_rivals as rivals
from diffdiv.objectives.drakes import SoftPath, drakes_loss
from diffdiv.objectives.policy_gradient import (
    Regulariser,
    leave_one_out,
    masked_cross_entropy,
    path_weights,
    policy_gradient_loss,
)
from diffdiv.objectives.rollout import Rollout, path_log_ratio, roll_out
from diffdiv.rewards.dna_world import world_affinity, world_reward, world_twin
from diffdiv.rewards.sequences import SequenceReward

LENGTH, BATCH, STEPS, TRAINING_STEPS = 100, 32, 20, 10


@dataclass(frozen=True)
class Problem:
    """The embedded world and one seed."""

    reference: TokenDenoiser
    seed: int
    chain: Chain = field(default_factory=lambda: log_linear().chain(STEPS))
    coarse: Chain = field(default_factory=lambda: log_linear().chain(TRAINING_STEPS))
    target: SequenceReward = field(default_factory=world_reward)
    surrogate: SequenceReward = field(default_factory=world_affinity)
    twin: SequenceReward = field(default_factory=world_twin)

    def start(self, size: int) -> Tensor:
        return self.reference.all_masked(size, LENGTH)

    def noise(self, purpose: str, indices: range) -> Noise:
        """Gumbel noise of a rollout."""
        return counter_gumbel((LENGTH, 5), seed=self.seed, purpose=purpose, indices=indices)

    def uniform(self, purpose: str, rows: int, columns: int) -> Tensor:
        """Uniform numbers [rows, columns]."""
        z = normal((columns,), seed=self.seed, purpose=purpose, indices=range(rows))
        return torch.special.ndtr(z)

    def sample(self, policy: TokenDenoiser, purpose: str, size: int = BATCH) -> Rollout:
        """Fresh trajectories of a policy, on the coarse grid."""
        return roll_out(policy, self.coarse, self.noise(purpose, range(size)), self.start(size))


#: ``losses(problem, policy, alpha)`` yields one loss per update of the policy
Losses = Callable[[Problem, TokenDenoiser, float], Iterator[Tensor]]


def drakes(
    problem: Problem, policy: TokenDenoiser, alpha: float, *, kl: str = "path"
) -> Iterator[Tensor]:
    """Back-propagation of the surrogate; kl: "path", "legacy", or "none"."""
    size = BATCH // 2  # twice as many updates: its gradients are quieter than the others'
    path = SoftPath(problem.coarse, num_soft=TRAINING_STEPS - 1)
    anchor = None if kl == "none" else problem.reference
    term = "legacy" if kl == "legacy" else "path"
    for update in count():
        noise = problem.noise(f"drakes/{update}", range(size))
        yield drakes_loss(
            policy, anchor, problem.surrogate, problem.start(size), noise,
            path=path, alpha=alpha, kl=term,
        )[0]  # fmt: skip


def policy_gradient(
    problem: Problem, policy: TokenDenoiser, alpha: float, *, graded: int = 5, smooth: bool = False
) -> Iterator[Tensor]:
    """Exact step probabilities, KL to the reference; smooth: trained on the surrogate instead."""
    regulariser = Regulariser(get_divergence("reverse_kl"), alpha)
    reward = problem.surrogate if smooth else problem.target
    for update in count():
        paths = problem.sample(policy, f"policy_gradient/{update}")
        advantage = regulariser.advantage(
            reward(paths.tokens), path_log_ratio(paths, problem.reference)
        )
        steps = (
            problem.uniform(f"graded/{update}", 1, TRAINING_STEPS)[0].argsort()[:graded].tolist()
        )
        yield policy_gradient_loss(policy, paths, leave_one_out(advantage), steps)


def weighted_denoising(
    problem: Problem, policy: TokenDenoiser, alpha: float, *, kept: int = 8, reuse: int = 2
) -> Iterator[Tensor]:
    """Path weights on a buffer of the last batches of trajectories, each masked anew ``reuse``
    times before the next batch comes."""
    buffer: list[tuple[Tensor, Tensor, Tensor]] = []
    for update in count():
        if update % reuse == 0:
            paths = problem.sample(policy, f"denoising/{update}", BATCH)
            ratio = path_log_ratio(paths, problem.reference)
            buffer = [*buffer, (paths.tokens, problem.target(paths.tokens), ratio)][-kept:]
        tokens, reward, ratio = (torch.cat(parts) for parts in zip(*buffer, strict=True))
        size = len(tokens)
        u = problem.uniform(f"masks/{update}", size, LENGTH + 1)
        # stratified in (0, 1]
        rates = 1 - (torch.arange(size) + u[:, -1]) / size * (1 - 1e-2)
        rates = rates[u[:, 0].argsort()]
        weights = path_weights(reward, ratio, alpha)
        yield masked_cross_entropy(policy, tokens, weights, rates, u[:, :-1])


def soft_policy(
    problem: Problem, policy: TokenDenoiser, alpha: float, *, refresh: int = 5, graded: int = 5
) -> Iterator[Tensor]:
    """Distillation of soft-optimal steps from an old policy that is refreshed now and then."""
    old = problem.reference
    for update in count():
        if update % refresh == 0 and update:
            old = policy.with_net(copy.deepcopy(policy.net).requires_grad_(False))
        paths = problem.sample(old, f"soft_policy/{update}", BATCH)
        steps = problem.uniform(f"graded/{update}", 1, TRAINING_STEPS)[0].argsort()[:graded]
        before, after = paths.states[steps].flatten(0, 1), paths.states[steps + 1].flatten(0, 1)
        yield rivals.soft_policy_distillation_loss(
            policy, old, problem.target, before, after, alpha=alpha
        )


def one_step(
    problem: Problem, policy: TokenDenoiser, alpha: float, *, inner: int = 4
) -> Iterator[Tensor]:
    """Group-relative with the likelihood of one call, ``inner`` updates for a batch of samples."""
    for update in count():
        paths = problem.sample(policy, f"one_step/{update}", BATCH)
        start, tokens = problem.start(BATCH), paths.tokens
        advantage = rivals.group_advantages(problem.target(tokens), BATCH)
        with torch.no_grad():
            old = rivals.one_step_log_probs(policy, tokens, start)
            ref = rivals.one_step_log_probs(problem.reference, tokens, start)
        for _ in range(inner):
            yield rivals.one_step_policy_loss(
                policy, tokens, start, advantage, old_log_p=old, ref_log_p=ref, beta=alpha
            )


def posterior_alignment(
    problem: Problem, policy: TokenDenoiser, alpha: float, *, pool: int = 512, candidates: int = 16
) -> Iterator[Tensor]:
    """Alignment of completions at states from masked samples of the reference."""
    stored = problem.sample(problem.reference, "pool", pool).tokens
    for update in count():
        u = problem.uniform(f"states/{update}", BATCH, LENGTH + 2)
        tokens = stored[(u[:, 0] * pool).long()]
        state = torch.where(u[:, 2:] < u[:, 1:2], problem.reference.mask_id, tokens)
        gumbel = torch.stack(
            [problem.noise(f"candidates/{update}/{n}", range(BATCH))(0)[..., :-1]
             for n in range(candidates)]
        )  # fmt: skip
        completed = rivals.posterior_candidates(problem.reference, state, gumbel)
        reward = problem.target(completed.flatten(0, 1)).view(BATCH, candidates)
        yield rivals.posterior_alignment_loss(
            policy, problem.reference, state, completed, reward, alpha=alpha
        )


def of_a_class(
    problem: Problem, policy: TokenDenoiser, share: float, *, pool: int = 1024
) -> Iterator[Tensor]:
    """A denoiser of the best-scoring share of the reference's samples, for guidance without a
    classifier."""
    stored = problem.sample(problem.reference, "pool", pool).tokens
    best = stored[problem.target(stored).topk(round(share * pool)).indices]
    for update in count():
        u = problem.uniform(f"class/{update}", BATCH, LENGTH + 1)
        chosen = best[(u[:, 0] * len(best)).long()]
        rates = 1 - (torch.arange(BATCH) + 0.5) / BATCH
        yield masked_cross_entropy(policy, chosen, torch.full((BATCH,), 1 / BATCH), rates, u[:, 1:])


TRAINED: dict[str, Losses] = {
    "DRAKES, path KL": drakes,
    "DRAKES, legacy KL": partial(drakes, kl="legacy"),
    "DRAKES, no KL": partial(drakes, kl="none"),
    "policy gradient": policy_gradient,
    "policy gradient, surrogate": partial(policy_gradient, smooth=True),
    "weighted denoising": weighted_denoising,
    "soft policy": soft_policy,
    "one-step likelihood": one_step,
    "posterior alignment": posterior_alignment,
}


def train(
    problem: Problem, losses: Losses, alpha: float, *, lr: float, seconds: float
) -> tuple[TokenDenoiser, int]:
    """The averaged policy after so many seconds of this process, and its number of updates.

    Adam, warm-up over 5 updates, then a rate that falls linearly in time to a tenth; gradients
    clipped to norm 1; weights averaged with decay 0.9. The same for all methods.
    """
    net = copy.deepcopy(problem.reference.net).requires_grad_(True)
    averaged = copy.deepcopy(net).requires_grad_(False)
    policy = problem.reference.with_net(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99))
    began, updates = time.process_time(), 0
    for loss in losses(problem, policy, alpha):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)
        spent = (time.process_time() - began) / seconds
        optimizer.param_groups[0]["lr"] = lr * min(1, (updates + 1) / 5, 1 - 0.9 * min(spent, 1))
        optimizer.step()
        updates += 1
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), net.parameters(), strict=True):
                mean.lerp_(now, 0.1)
        if spent >= 1:
            break
    return problem.reference.with_net(averaged), updates
