"""Samples that are only looked at are drawn a few at a time, whatever is asked for."""

import pytest
import torch

from diffdiv.core.tensor import at_once
from diffdiv.models.denoiser import Condition
from diffdiv.samplers import sample_in_parts


@pytest.mark.parametrize(
    ("shape", "count"),
    [((4, 8, 8), 64), ((4, 16, 16), 64), ((4, 64, 64), 4), ((4, 128, 128), 1), ((3, 512, 512), 1)],
)
def test_big_samples_are_made_one_by_one(shape: tuple[int, ...], count: int) -> None:
    assert at_once(shape) == count


def test_parts_get_their_own_conditions_in_order() -> None:
    z, label = torch.randn(10, 2, 64, 64), torch.arange(10)
    sizes = []

    def sampler(z: torch.Tensor, cond: Condition) -> torch.Tensor:
        sizes.append(len(z))
        assert cond.label is not None
        return z * cond.label[:, None, None, None]

    x0 = sample_in_parts(sampler, z, Condition(label=label))
    assert torch.equal(x0, z * label[:, None, None, None]) and sizes == [4, 4, 2]
