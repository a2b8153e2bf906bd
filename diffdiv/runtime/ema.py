"""Exponential moving average of a network's trained parameters, with its half-life in images."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffdiv.runtime.fsdp import like


class EMA:
    """Averaged copies of parameters; an image's influence halves after ``half_life`` images.

    The half-life is in images, so it means the same at every batch size:
    average <- d average + (1 - d) parameter, d = 0.5 ** (batch_size / half_life).
    Early in a run the half-life is at most a fifth of the images seen (EDM's ramp-up, with another
    constant): after n updates the initial weights keep a share of only n ** (-5 ln 2), 1e-7 at 100.
    The copies are at least float32: in bfloat16 a slow average would never move.

    Args:
        parameters: by plain name; the average starts at their present values.
        half_life: in images, positive.

    Raises:
        ValueError: if ``half_life`` is not positive.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, half_life: int) -> None:
        if half_life <= 0:
            raise ValueError(f"half-life of an average must be positive, got {half_life} images")
        self.half_life = half_life
        self.weights = {
            name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
            for name, value in parameters.items()
        }

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], *, images: int, images_seen: int) -> None:
        """Move towards ``parameters`` after ``images`` more images, ``images_seen`` in all."""
        half_life = min(self.half_life, images_seen / 5)
        averages = list(self.weights.values())
        values = [parameters[name].to(average) for name, average in self.weights.items()]
        torch._foreach_lerp_(averages, values, 1 - 0.5 ** (images / half_life))

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over saved averages; KeyError if a name is missing."""
        for name, average in self.weights.items():
            average.copy_(like(weights[name], average))
