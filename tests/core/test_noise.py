"""Counter-based draws: partition invariance, independence, law."""

import torch

from diffdiv.core.noise import normal, permuted, uniform
from diffdiv.core.tensor import loss_with_gradient


def test_any_partition_of_a_batch_sees_the_same_samples():
    whole = normal((2, 3), seed=1, purpose="z", indices=range(8))
    parts = [normal((2, 3), seed=1, purpose="z", indices=[i]) for i in range(8)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[[6, 2]], normal((2, 3), seed=1, purpose="z", indices=[6, 2]))


def test_streams_differ_by_seed_purpose_and_index():
    draws = [
        normal((4,), seed=s, purpose=p, indices=[i]) for s in (0, 1) for p in "ab" for i in (0, 1)
    ]
    assert torch.stack(draws).unique(dim=0).shape[0] == 8


def test_law():
    x = normal((64,), seed=0, purpose="z", indices=range(2000), dtype=torch.float64)
    # 128,000 numbers: each bound is more than 5 standard errors wide (false alarm below 1e-6)
    assert abs(float(x.mean())) < 5 / 128_000**0.5
    assert abs(float(x.var()) - 1) < 5 * (2 / 128_000) ** 0.5
    u = uniform(seed=0, purpose="t", indices=range(20_000))
    assert abs(float(u.mean()) - 0.5) < 5 / (12 * 20_000) ** 0.5
    assert 0 <= float(u.min()) < float(u.max()) < 1


def test_permutation_visits_every_item_once_an_epoch():
    first = [permuted(i, 7, seed=0, purpose="data") for i in range(7)]
    second = [permuted(i, 7, seed=0, purpose="data") for i in range(7, 14)]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_loss_with_gradient_backpropagates_it_unchanged():
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    loss_with_gradient(x, grad).backward()
    assert torch.equal(x.grad, grad)
