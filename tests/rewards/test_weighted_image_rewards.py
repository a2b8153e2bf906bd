"""Several rewards as one, and black boxes, against autograd and closed forms."""

import math

import pytest
import torch
from torch import nn

from diffdiv.rewards.black_box import smoothed_gradient
from diffdiv.rewards.images import ImageReward
from diffdiv.rewards.weighted import WeightedReward, WeightedRewards

BATCH, SHAPE = 4, (3, 2, 2)


def bright(images, prompts):
    return images.flatten(1).mean(1)


def wavy(images, prompts):
    return images.flatten(1).sin().sum(1) * torch.tensor([len(prompt) for prompt in prompts])


def samples(seed=0):
    return torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(seed))


def make(*rewards, decode=lambda x: x, seed=5):
    return WeightedRewards(rewards, decode, seed=seed)


def test_the_sum_and_its_gradient_are_those_of_autograd():
    """Through a decoder that is not linear; norms of each part's gradient in the images."""
    torch.manual_seed(1)
    decode = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh())
    rewards = make(
        WeightedReward(ImageReward("bright", bright), 2.0, normalise=(0.3, 0.5)),
        WeightedReward(ImageReward("wavy", wavy), 0.1),
        decode=decode,
    )
    x0, prompts = samples().requires_grad_(), ["a", "bb", "ccc", "d"]
    total, metrics = rewards(x0, prompts, range(BATCH))
    images = decode(x0)
    parts = [2.0 * (bright(images, prompts) - 0.3) / 0.5, 0.1 * wavy(images, prompts)]
    torch.testing.assert_close(total.detach(), sum(parts).detach())
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0])
    (found,) = torch.autograd.grad((weights * total).sum(), x0, retain_graph=True)
    (wanted,) = torch.autograd.grad((weights * sum(parts)).sum(), x0, retain_graph=True)
    torch.testing.assert_close(found, wanted)
    for name, part in zip(("bright", "wavy"), parts, strict=True):
        (gradient,) = torch.autograd.grad(part.sum(), images, retain_graph=True)
        norm = gradient.flatten(1).norm(dim=1).mean()
        torch.testing.assert_close(metrics[f"reward_gradient/{name}"], norm)
    torch.testing.assert_close(metrics["reward/bright"], bright(images, prompts).mean().detach())
    assert not any(value.requires_grad for value in metrics.values())


def test_above_the_ceiling_nothing_is_gained():
    x0 = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, 3, 4, 4).clone().requires_grad_()
    rewards = make(WeightedReward(ImageReward("bright", bright), 2.0, ceiling=0.5))
    total, metrics = rewards(x0, ["a", "b"], range(2))
    torch.testing.assert_close(total.detach(), torch.tensor([0.4, 1.0]))
    torch.testing.assert_close(metrics["reward/bright"], torch.tensor(0.5))
    (gradient,) = torch.autograd.grad(total.sum(), x0)
    assert bool(gradient[0].any()) and not bool(gradient[1].any())


def test_the_scale_rises_over_the_warm_up():
    rewards = make(WeightedReward(ImageReward("bright", bright), 3.0, warmup_steps=4))
    x0, shares = samples(), []
    for _ in range(6):
        total = rewards.total(x0, ["a"] * BATCH, range(BATCH))
        shares.append(float(total.sum() / (3 * bright(x0, []).sum())))
        rewards.commit()
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], abs=1e-6)


def test_a_reward_that_has_decayed_is_over():
    rewards = make(WeightedReward(ImageReward("bright", bright), 3.0, decay_steps=4))
    x0, shares, over = samples(), [], []
    for _ in range(6):
        total = rewards.total(x0, ["a"] * BATCH, range(BATCH))
        shares.append(float(total.sum() / (3 * bright(x0, []).sum())))
        over.append(rewards.is_over)
        rewards.commit()
    assert shares == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0], abs=1e-6)
    assert over == [False] * 4 + [True] * 2
    assert not make(WeightedReward(ImageReward("bright", bright))).is_over


def test_running_normalisation_is_by_earlier_samples_and_survives_a_restart():
    """No pull in the first update; then the moments of what was seen before, whatever the batch."""

    def fresh():
        return make(WeightedReward(ImageReward("bright", bright), normalise="running"))

    rewards, split, prompts = fresh(), fresh(), ["a"] * BATCH
    weight = first = second = 0.0
    for update in range(4):
        x0 = samples(seed=update)
        value = bright(x0, prompts).double()
        if update == 0:
            wanted = torch.zeros(BATCH, dtype=torch.float64)
        else:
            mean = first / weight
            wanted = (value - mean) / math.sqrt(second / weight - mean**2)
        total, _ = rewards(x0, prompts, range(BATCH))
        torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
        for half in (slice(0, 1), slice(1, BATCH)):
            split(x0[half], prompts[half], list(range(BATCH))[half])
        rewards.total(samples(seed=99), prompts, range(BATCH))  # leaves no trace
        rewards.commit()
        split.commit()
        weight = 0.95 * weight + 0.05
        first = 0.95 * first + 0.05 * float(value.mean())
        second = 0.95 * second + 0.05 * float(value.square().mean())
    again = fresh()
    again.load_state_dict({name: value.clone() for name, value in rewards.state_dict().items()})
    x0 = samples(seed=7)
    total = rewards.total(x0, prompts, range(BATCH))
    assert torch.equal(total, again.total(x0, prompts, range(BATCH)))
    torch.testing.assert_close(total, split.total(x0, prompts, range(BATCH)))


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ValueError, match="a name twice"):
        make(*[WeightedReward(ImageReward("bright", bright))] * 2)


# -- black boxes -----------------------------------------------------------------------------------


def mean_and_error(reward, x0, *, smoothing, pairs, draws):
    """Mean of the estimate over so many draws, and its standard error, elementwise."""
    generator = torch.Generator().manual_seed(11)
    found = torch.stack([
        smoothed_gradient(
            reward, x0, torch.randn(pairs, *x0.shape, generator=generator, dtype=x0.dtype),
            smoothing=smoothing,
        )
        for _ in range(draws)
    ])  # fmt: skip
    return found.mean(0), found.std(0) / draws**0.5, found


def test_the_estimate_is_the_gradient_of_the_smoothed_reward():
    """Of sin: cos(x) exp(-s^2 / 2), which is not the gradient itself; 4 standard errors."""
    x0 = samples().double()[:2]
    mean, error, _ = mean_and_error(
        lambda x: x.flatten(1).sin().sum(1), x0, smoothing=0.8, pairs=2, draws=4000
    )
    smooth = x0.cos() * math.exp(-(0.8**2) / 2)
    assert float(((mean - smooth) / error).abs().max()) < 4
    assert float(((mean - x0.cos()) / error).abs().max()) > 8  # the bias of smoothing is seen


def test_the_estimate_of_a_quadratic_reward_has_no_bias_and_the_stated_variance():
    """Against autograd; of a linear reward the total variance is (D + 1) |g|^2 / M."""
    x0 = samples().double()[:1].requires_grad_()
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=x0.dtype)

    def quadratic(x):
        flat = x.flatten(1)
        return flat[:, 0] + ((flat @ matrix) * flat).sum(1) / 12

    (exact,) = torch.autograd.grad(quadratic(x0).sum(), x0)
    mean, error, _ = mean_and_error(quadratic, x0.detach(), smoothing=0.5, pairs=3, draws=2000)
    assert float(((mean - exact) / error).abs().max()) < 4
    slope = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=x0.dtype)
    _, _, found = mean_and_error(
        lambda x: x.flatten(1) @ slope, x0.detach(), smoothing=0.1, pairs=3, draws=2000
    )
    variance = found.var(0).sum() / slope.square().sum()
    assert float(variance) == pytest.approx((12 + 1) / 3, rel=0.08)


def test_group_normalised_advantages_know_no_unit():
    x0, eps = samples(), torch.randn(4, BATCH, *SHAPE, generator=torch.Generator().manual_seed(4))

    def estimate(factor, offset):
        return smoothed_gradient(
            lambda x: factor * bright(x, []) + offset, x0, eps, smoothing=0.1,
            group_normalised=True,
        )  # fmt: skip

    torch.testing.assert_close(estimate(1, 0), estimate(50, 3), rtol=1e-3, atol=1e-3)
    assert not bool(estimate(0, 1).any())
    # one direction that all copies agree on has advantages of unit variance
    assert 2 < float(estimate(1, 0).flatten(1).norm(dim=1).mean()) * 0.1 * 12**0.5 < 8


def test_a_black_box_in_the_sum():
    """Its values count as they are; its estimate depends on the sample, not on the batch."""

    def box(images, prompts):
        return bright(images, prompts).detach().round(decimals=1)

    rewards = make(
        WeightedReward(ImageReward("box", box), 2.0, differentiable=False, copies=16),
        WeightedReward(ImageReward("wavy", wavy), 0.0),
        decode=lambda x: 2 * x,
    )
    x0, prompts = samples().requires_grad_(), ["a"] * BATCH
    total, metrics = rewards(x0, prompts, range(BATCH))
    torch.testing.assert_close(total.detach(), 2 * box(2 * x0, prompts))
    (gradient,) = torch.autograd.grad(total.sum(), x0)
    norms = gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(metrics["reward_gradient/box"], norms.mean())
    part = rewards.total(x0[2:], prompts[2:], [2, 3])
    (alone,) = torch.autograd.grad(part.sum(), x0)
    torch.testing.assert_close(alone[2:], gradient[2:])
    # along the true gradient, which is constant (4 / 12 in each element)
    slopes = gradient.flatten(1).mean(1)
    assert float(slopes.mean()) == pytest.approx(4 / 12, rel=0.3)


def test_a_differentiable_reward_and_its_black_box_agree_in_the_mean():
    """Over 2000 samples of one place, within 4 standard errors; the smoothing is small."""
    place = samples()[:1]
    x0 = place.expand(2000, *SHAPE).clone().requires_grad_()
    prompts = ["aa"] * 2000

    def gradient(is_differentiable):
        rewards = make(
            WeightedReward(
                ImageReward("wavy", wavy),
                differentiable=is_differentiable,
                copies=4,
                smoothing=0.02,
            )
        )
        total = rewards.total(x0, prompts, range(2000))
        return torch.autograd.grad(total.sum(), x0)[0]

    exact, estimated = gradient(True)[0], gradient(False)
    error = estimated.std(0) / 2000**0.5
    assert float(((estimated.mean(0) - exact) / error).abs().max()) < 4
