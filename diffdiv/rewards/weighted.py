"""Several rewards as one: scaled, hinged, normalised, warmed up, each with its gradient's norm.

x0        samples [B, C, H, W]           images    decoded, [B, 3, H', W'] in [-1, 1]
r         values of one reward [B]       u         scale * warm-up * (min(r, ceiling) - m) / s
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffdiv.core.noise import normal
from diffdiv.core.tensor import sum_over_ranks
from diffdiv.rewards.black_box import smoothed_gradient
from diffdiv.rewards.images import ImageReward, check_image_reward

Normalisation = Literal["running", "group"] | tuple[float, float] | None
_DECAY = 0.95  # per update, of running means


@dataclass(frozen=True)
class WeightedReward:
    """One of several rewards of a run.

    Attributes:
        reward: the reward.
        scale: alpha, its weight.
        ceiling: above this value nothing more is gained (a hinge); None = no ceiling.
        normalise: (m, s) as stated; "running": mean and standard deviation of earlier samples, and
            no pull in the first update; "group" (black boxes): see ``smoothed_gradient``.
        warmup_steps: updates in which the scale rises linearly from 0.
        decay_steps: updates in which it falls linearly to 0, and stays there; None = never.
        differentiable: whether its gradient is taken; if not, it is estimated.
        copies: black box: perturbed copies of each sample, even.
        smoothing: black box: their standard deviation, in the unit of x0.
    """

    reward: ImageReward
    scale: float = 1.0
    ceiling: float | None = None
    normalise: Normalisation = None
    warmup_steps: int = 0
    decay_steps: int | None = None
    differentiable: bool = True
    copies: int = 8
    smoothing: float = 0.1

    def held(self, value: Tensor) -> Tensor:
        """Values under the ceiling."""
        return value if self.ceiling is None else value.clamp_max(self.ceiling)

    def scale_at(self, updates: int) -> float:
        """Scale after so many updates."""
        rise = min(1.0, updates / self.warmup_steps) if self.warmup_steps else 1.0
        fall = 1.0 if self.decay_steps is None else max(0.0, 1 - updates / self.decay_steps)
        return self.scale * rise * fall


class WeightedRewards:
    """Sum of weighted rewards of decoded samples, differentiable in the samples to first order.

    Every reward's gradient in the images is taken at once, and its activations are freed before the
    decoder's backward begins; the norms come for nothing.

    Args:
        rewards: of different names.
        decode: samples -> images in [-1, 1], with gradient.
        seed: of the perturbations.

    Raises:
        ValueError: if two have one name.
    """

    def __init__(
        self, rewards: Sequence[WeightedReward], decode: Callable[[Tensor], Tensor], *, seed: int
    ) -> None:
        self.rewards = {weighted.reward.name: weighted for weighted in rewards}
        if len(self.rewards) < len(rewards):
            raise ValueError(f"rewards: {[w.reward.name for w in rewards]} have a name twice")
        self._decode, self._seed = decode, seed
        self._updates = torch.zeros((), dtype=torch.int64)
        # decayed sums over updates of 1, mean and mean square, and what this update has seen
        self._moments = {name: torch.zeros(3, dtype=torch.float64) for name in self.rewards}
        self._pending = {name: torch.zeros(3, dtype=torch.float64) for name in self.rewards}

    def check(self, size: int, prompt: str, device: torch.device) -> None:
        """Try every reward on pictures of ``size`` pixels; see :func:`check_image_reward`."""
        for weighted in self.rewards.values():
            needed = weighted.differentiable
            check_image_reward(weighted.reward, size, prompt, device, needs_gradient=needed)

    def __call__(
        self, x0: Tensor, prompts: Sequence[str], indices: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum [B], and the metrics of each reward; what is seen enters running means.

        Args:
            x0: samples with graph.
            prompts: one for each.
            indices: their global numbers, which decide the perturbations.

        Returns:
            Sum; ``reward/NAME``, the mean of its plain values; ``reward_gradient/NAME``, the mean
            norm of its weighted gradient per sample: in the images, of a black box in x0.
        """
        total, values, norms = self._evaluate(x0, prompts, indices)
        metrics = {}
        for name, value in values.items():
            row = torch.stack([torch.ones_like(value), value, value.square()])
            self._pending[name] += row.double().sum(1).cpu()
            metrics[f"reward/{name}"] = value.mean()
            metrics[f"reward_gradient/{name}"] = norms[name]
        return total, metrics

    def total(self, x0: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        """The weighted sum [B] alone, of which nothing is remembered."""
        return self._evaluate(x0, prompts, indices)[0]

    @property
    def is_over(self) -> bool:
        """Whether all of them have fallen to 0: nothing need be decoded any more."""
        ends = [weighted.decay_steps for weighted in self.rewards.values()]
        return all(end is not None and int(self._updates) >= end for end in ends)

    def commit(self) -> None:
        """Fold what was seen on all ranks into the running means; call once an update."""
        self._updates = self._updates + 1
        for name, pending in self._pending.items():
            sums = sum_over_ranks(pending)
            if sums[0] > 0:
                new = sums / sums[0]
                self._moments[name] = _DECAY * self._moments[name] + (1 - _DECAY) * new
            self._pending[name] = torch.zeros_like(pending)

    def state_dict(self) -> dict[str, Tensor]:
        """Number of updates and the running means by name."""
        moments = {f"moments.{name}": value for name, value in self._moments.items()}
        return {"updates": self._updates, **moments}

    def load_state_dict(self, state: dict[str, Tensor], /) -> None:
        """Take up a saved state; a reward that is new starts afresh."""
        self._updates = state["updates"].clone()
        for name in self._moments:
            if (kept := state.get(f"moments.{name}")) is not None:
                self._moments[name] = kept.clone()

    def _evaluate(
        self, x0: Tensor, prompts: Sequence[str], indices: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        images = self._decode(x0)
        total = torch.zeros(len(x0), device=images.device)
        in_images, in_x0 = torch.zeros_like(images), torch.zeros_like(x0, dtype=torch.float32)
        values, norms = {}, {}
        with torch.autocast(images.device.type, enabled=False):
            for name, weighted in self.rewards.items():
                mean, factor = self._affine(name)
                pull = in_images if weighted.differentiable else in_x0
                if factor == 0:  # only looked at
                    with torch.no_grad():
                        value = weighted.reward(images, prompts)
                    gradient = torch.zeros_like(pull)
                elif weighted.differentiable:
                    value, gradient = _gradient(weighted, images, prompts)
                else:
                    value, gradient = self._estimate(weighted, x0, images, prompts, indices)
                total = total + factor * (weighted.held(value) - mean)
                pull.add_(factor * gradient)
                values[name] = value
                norms[name] = factor * gradient.flatten(1).norm(dim=1).mean()
        return total + _first_order(images, in_images) + _first_order(x0, in_x0), values, norms

    def _affine(self, name: str) -> tuple[float, float]:
        """m, and the factor of (r - m)."""
        weighted = self.rewards[name]
        mean, std = 0.0, 1.0
        if isinstance(weighted.normalise, tuple):
            mean, std = weighted.normalise
        elif weighted.normalise == "running":
            weight, first, second = self._moments[name].tolist()
            if weight == 0:
                return 0.0, 0.0  # nothing is known of its unit yet
            mean = first / weight
            std = max(second / weight - mean**2, 1e-12) ** 0.5
        return mean, weighted.scale_at(int(self._updates)) / std

    def _estimate(
        self,
        weighted: WeightedReward,
        x0: Tensor,
        images: Tensor,
        prompts: Sequence[str],
        indices: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Values [B] and the estimated gradient in x0 of a black box."""
        shape = x0.shape[1:]
        purposes = [f"smoothing/{weighted.reward.name}/{k}" for k in range(weighted.copies // 2)]
        draws = [normal(shape, seed=self._seed, purpose=p, indices=indices) for p in purposes]
        eps = torch.stack(draws).to(x0.device)
        with torch.no_grad():
            value = weighted.reward(images, prompts)

        def reward(near: Tensor) -> Tensor:
            return weighted.held(weighted.reward(self._decode(near), prompts))

        return value, smoothed_gradient(
            reward,
            x0.float(),
            eps,
            smoothing=weighted.smoothing,
            group_normalised=weighted.normalise == "group",
        )


def _gradient(
    weighted: WeightedReward, images: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Values [B] and the gradient in the images of their values under the ceiling."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        value = weighted.reward(leaf, prompts)
        (gradient,) = torch.autograd.grad(weighted.held(value).sum(), leaf)
    return value.detach(), gradient


def _first_order(x: Tensor, gradient: Tensor) -> Tensor:
    """Zeros [B] whose derivative with respect to x is ``gradient``."""
    product = (x.float() * gradient).flatten(1).sum(1)
    return product - product.detach()
