"""The moving worlds against enumeration by numpy; the ideal denoiser against what it beats."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffdiv.core.noise import normal
from diffdiv.core.schedule import edm, rectified_flow, vp_from_betas
from diffdiv.data.moving_digits import (
    MovingDigits,
    MovingWorld,
    bayes_denoiser,
    first_frames,
    strip_world,
    torus_world,
)
from diffdiv.models.denoiser import Condition
from diffdiv.samplers import sample_ode, time_grid

WORLDS = {"strip": strip_world(), "torus": torus_world(max_speed=1, num_frames=4)}
LEVELS = [(0.07, 0.998), (0.4, 0.9), (0.9, 0.43), (1.0, 3.0)]
VP = vp_from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def rolled(world: MovingWorld, image: np.ndarray, velocity: tuple[int, ...]) -> np.ndarray:
    axes = tuple(range(image.ndim))
    frames = range(world.num_frames)
    return np.stack([np.roll(image, [f * v for v in velocity], axes) for f in frames])


def batch(world: MovingWorld, size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    image = first_frames(world, "test")[:size].double()
    motion = world.draw_motion(range(size), seed=1, purpose="test")
    return world.clips(image, motion), image, motion


@pytest.mark.parametrize("name", WORLDS)
def test_clips_are_rolled_images(name: str) -> None:
    world = WORLDS[name]
    x0, image, motion = batch(world)
    every = world.every_clip(image)
    assert every.shape == (7, len(world.prior), world.num_frames, *world.space)
    for row in range(7):
        velocity = tuple(world.velocities[motion[row]].tolist())
        np.testing.assert_array_equal(x0[row], rolled(world, image[row].numpy(), velocity))
        for k, velocity in enumerate(world.velocities.tolist()):
            wanted = rolled(world, image[row].numpy(), tuple(velocity))
            np.testing.assert_array_equal(every[row, k], wanted)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_posterior_and_mean_agree_with_enumeration(name: str, alpha: float, sigma: float) -> None:
    world = WORLDS[name]
    x0, image, _ = batch(world)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=x0.dtype)
    x_t = alpha * x0 + sigma * eps
    share, mean = (f(x_t, image, alpha, sigma).numpy() for f in (world.posterior, world.x0_mean))
    for row in range(len(x0)):
        clips = np.stack(
            [rolled(world, image[row].numpy(), tuple(v)) for v in world.velocities.tolist()]
        )
        density = stats.norm.logpdf(x_t[row].numpy(), alpha * clips, sigma)
        joint = density.reshape(len(clips), -1).sum(1) + np.log(world.prior.numpy())
        wanted = np.exp(joint - np.logaddexp.reduce(joint))
        np.testing.assert_allclose(share[row], wanted, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(mean[row], np.tensordot(wanted, clips, 1), rtol=1e-9, atol=1e-11)


def test_the_mean_obeys_tweedie() -> None:
    """x0_mean = (x_t + sigma^2 grad log p(x_t)) / alpha, the gradient by autograd."""
    world, alpha, sigma = WORLDS["strip"], 0.5, 0.8
    x0, image, _ = batch(world)
    x_t = (alpha * x0 + sigma * torch.randn_like(x0)).requires_grad_()
    clips = world.every_clip(image).flatten(2)
    components = torch.distributions.Independent(
        torch.distributions.Normal(alpha * clips, torch.tensor(sigma, dtype=torch.float64)), 1
    )
    prior = torch.distributions.Categorical(world.prior.expand(len(x0), -1))
    log_p = torch.distributions.MixtureSameFamily(prior, components).log_prob(x_t.flatten(1))
    (gradient,) = torch.autograd.grad(log_p.sum(), x_t)
    tweedie = (x_t + sigma**2 * gradient).detach() / alpha
    torch.testing.assert_close(world.x0_mean(x_t.detach(), image, alpha, sigma), tweedie)


@pytest.mark.parametrize("t", [950.0, 800.0, 600.0])
def test_no_linear_denoiser_is_better(t: float) -> None:
    """Least squares on (x_t, image, 1) over 6,000 fresh clips, tested on 2,000 others."""
    world = WORLDS["strip"]
    frames = first_frames(world, "train")
    image = frames[torch.arange(8000) % len(frames)]
    x0 = world.clips(image, world.draw_motion(range(8000), seed=0, purpose="test"))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    at = torch.full((8000,), t, dtype=torch.float64)
    x_t = VP.add_noise(x0, eps, at)
    x0_hat = bayes_denoiser(world, VP, image)(x_t, at, Condition())
    inputs = torch.cat([x_t.flatten(1), image, torch.ones(8000, 1)], 1).double()
    linear = torch.linalg.lstsq(inputs[:6000], x0[:6000].flatten(1).double()).solution
    error = (inputs[6000:] @ linear - x0[6000:].flatten(1)).square().mean()
    assert (x0_hat[6000:] - x0[6000:]).square().mean() < error
    # the residual of a posterior mean is orthogonal to functions of (x_t, image): 5 sigma
    product = (x0_hat - x0).flatten(1) * (x0_hat - world.clips(image, at.long() * 0)).flatten(1)
    sums = product.sum(1).double()
    assert abs(sums.mean()) < 5 * sums.std() / len(sums) ** 0.5


@pytest.mark.parametrize("family", ["vp", "flow", "edm"])
def test_the_ideal_denoiser_is_told_t_in_every_family(family: str) -> None:
    world = WORLDS["strip"]
    schedule = {"vp": VP, "flow": rectified_flow(), "edm": edm()}[family]
    x0, image, _ = batch(world)
    t = {"vp": 700.0, "flow": 0.7, "edm": 1.5}[family]
    at = torch.full((len(x0),), t, dtype=torch.float64)
    x_t = schedule.add_noise(x0, torch.randn_like(x0), at)
    x0_hat = bayes_denoiser(world, schedule, image)(x_t, at, Condition())
    alpha, sigma = float(schedule.alpha(at)[0]), float(schedule.sigma(at)[0])
    torch.testing.assert_close(x0_hat, world.x0_mean(x_t, image, alpha, sigma))


def test_sampling_with_it_recovers_the_law_of_velocities() -> None:
    """Rectified flow starts from N(0, I) exactly; 3,000 clips, 60 Euler steps.

    Shares within 5 standard errors of the prior plus 0.01 for the steps.
    """
    world, num = WORLDS["strip"], 3000
    flow = rectified_flow()
    image = first_frames(world, "test")[torch.arange(num) % 297]
    z = normal((6, 16), seed=0, purpose="test", indices=range(num))
    clips = sample_ode(bayes_denoiser(world, flow, image), z, Condition(), time_grid(flow, 60))
    motion = world.nearest_motion(clips, image)
    assert (clips - world.clips(image, motion)).square().mean() < 1e-4
    share = torch.bincount(motion, minlength=5) / num
    error = (world.prior * (1 - world.prior) / num).sqrt()
    assert ((share - world.prior).abs() < 5 * error + 0.01).all()


def test_pairs_stay_and_fresh_clips_change() -> None:
    world = strip_world()
    pairs = MovingDigits(world, num_pairs=8, seed=3)
    x0, image = pairs.batch(range(80))
    assert len({tuple(row.tolist()) for row in image}) == 8
    assert len({tuple(row.tolist()) for row in x0.flatten(1)}) == 8
    torch.testing.assert_close(x0[:, 0], image)
    again, _ = MovingDigits(world, num_pairs=8, seed=3).batch(range(40, 80))
    torch.testing.assert_close(again, x0[40:], rtol=0, atol=0)
    fresh = MovingDigits(world, num_pairs=None, seed=3)
    x0, image = fresh.batch(range(3000))
    still = (x0 == image[:, None]).flatten(1).all(1).double().mean()
    assert abs(still - 0.6) < 5 * (0.24 / 3000) ** 0.5
    assert len({tuple(row.tolist()) for row in image}) > 1400


def test_velocities_are_dealt_out_in_proportion() -> None:
    """64 pairs at 6.4, 6.4, 38.4, 6.4, 6.4: every count within one; which image moves is chance."""
    data = [MovingDigits(strip_world(), num_pairs=64, seed=seed) for seed in (0, 1)]
    for pairs in data:
        counts = torch.bincount(pairs.motion, minlength=5)
        assert counts.sum() == 64 and ((counts - 64 * pairs.world.prior).abs() < 1).all()
    assert (data[0].motion != data[1].motion).any()


def test_no_image_is_in_both_splits() -> None:
    for world in WORLDS.values():
        train, test = (first_frames(world, split).flatten(1) for split in ("train", "test"))
        assert len(train) == 1500 and len(test) == 297
        assert torch.cdist(train, test).min() > 1e-3
        assert train.max() <= 1 and train.min() == -1


def test_what_makes_no_world_is_refused() -> None:
    with pytest.raises(ValueError, match="velocities"):
        MovingWorld((16,), 6, torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="prior"):
        MovingWorld((16,), 6, torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match="still_probability: 1"):
        strip_world(still_probability=1.0)
    with pytest.raises(ValueError, match="num_pairs: 0"):
        MovingDigits(strip_world(), num_pairs=0, seed=0)
    with pytest.raises(ValueError, match="image: shape"):
        strip_world().every_clip(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="clips: shape"):
        strip_world().posterior(torch.zeros(1, 5, 16), torch.zeros(1, 16), 1.0, 1.0)
