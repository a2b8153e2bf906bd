"""Rewards of images: how well they fit their prompts, or please, with gradient in the pixels.

    images    [B, 3, H, W] in [-1, 1]        prompts    one for each
    reward    [B], higher is better

This is what a reward is; rewards/zoo.py opens those there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffdiv.rewards.sequences import RewardError


class ImageRewardFunction(Protocol):
    """Scores images; see :class:`ImageReward` for what it is given."""

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        """Rewards [B]."""


@dataclass(frozen=True)
class ImageReward:
    """A reward function with its name.

    Attributes:
        name: in reports and errors.
        function: scores images in [-1, 1]; each score depends on its own image and prompt only.
    """

    name: str
    function: ImageRewardFunction

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        """Rewards [B], float32.

        Raises:
            RewardError: if the result is not a finite number for each image.
        """
        found = self.function(images, prompts)
        if not isinstance(found, Tensor) or found.shape != images.shape[:1]:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RewardError(f"reward {self.name}: returned {got}, not a tensor [{len(images)}]")
        if not torch.isfinite(found.detach()).all():
            bad = int((~torch.isfinite(found.detach())).sum())
            raise RewardError(f"reward {self.name}: {bad} of {len(images)} values are not finite")
        return found.float()


def check_image_reward(
    reward: ImageReward,
    size: int,
    prompt: str,
    device: torch.device,
    *,
    needs_gradient: bool = True,
) -> None:
    """Try a reward on random pictures, so that a faulty one is named before the first step.

    Args:
        reward: to try.
        size: of the pictures, in pixels.
        prompt: of both.
        device: to try on.
        needs_gradient: whether training differentiates it; not so of a black box.

    Raises:
        RewardError: if it raises, returns another shape or a number that is not finite, depends on
            the other pictures of the batch, or has no usable gradient although one is needed.
    """
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(2, 3, size, size, generator=generator) * 2 - 1).to(device)
    images.requires_grad_(needs_gradient)
    gradient = None
    try:
        together = reward(images, [prompt] * 2)
        alone = reward(images[:1].detach(), [prompt])
        if needs_gradient and together.requires_grad:
            gradient = torch.autograd.grad(together.sum(), images, allow_unused=True)[0]
    except RewardError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise RewardError(f"reward {reward.name}: raised {what}") from error
    if needs_gradient and (gradient is None or not torch.isfinite(gradient).all()):
        raise RewardError(
            f"reward {reward.name}: no usable gradient in the pixels; differentiable: false "
            "estimates one"
        )
    if not torch.allclose(together[:1].detach(), alone.detach(), rtol=1e-2, atol=1e-3):
        raise RewardError(f"reward {reward.name}: depends on the other images of its batch")
