"""Judge and sampler of moving digits against the world's law, hand-made samples and diffusers."""

import math

import pytest
import torch
from torch import Tensor, nn

from diffdiv.core.leakage import LowPass, TimeNoise, time_map
from diffdiv.core.noise import normal
from diffdiv.core.schedule import from_diffusers
from diffdiv.data.moving_digits import MovingDigits, strip_world
from diffdiv.metrics.moving_digits import (
    Trial,
    clip_stats,
    noised_through,
    principal_features,
    sample_clips,
    shown_through,
    told_through,
)
from diffdiv.models.clip_net import ClipNet, clip_denoiser, clip_scheduler
from diffdiv.models.denoiser import Denoiser

WORLD = strip_world()
SCHEDULE = from_diffusers(clip_scheduler())


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial.of(MovingDigits(WORLD, num_pairs=64, seed=0), SCHEDULE, num_images=20, seeds=30)


def test_real_clips_are_judged_as_real(trial: Trial) -> None:
    """Means within 5 standard errors of the law's; the scatter of 30 samples has a known mean."""
    found = trial.judge.measure(trial.judge.real(seed=0))
    assert found["fit_error"] == found["first_frame_error"] == 0
    # cross-correlation finds the velocity of every clip here
    speeds, num = WORLD.speeds, len(trial.judge.image)
    mean = float((WORLD.prior * speeds).sum())
    std = float((WORLD.prior * speeds.square()).sum() - mean**2) ** 0.5
    assert abs(found["motion"] - mean) < 5 * std / num**0.5
    assert abs(found["static_fraction"] - 0.6) < 5 * (0.24 / num) ** 0.5
    draws = torch.distributions.Multinomial(30, WORLD.prior).sample((20_000,))
    distance = (draws / 30 - WORLD.prior).abs().sum(1) / 2
    assert abs(found["image_law_distance"] - distance.mean()) < 5 * distance.std() / 20**0.5
    assert 0 < found["frechet_distance"] < 0.5


def test_what_the_image_decides_is_found(trial: Trial) -> None:
    judge = trial.judge
    decided = WORLD.clips(judge.image, judge.groups % 5)  # one velocity for each image
    found = judge.measure(decided)
    by_hand = [1 - float(WORLD.prior[k]) for k in range(5)]
    assert found["image_law_distance"] == pytest.approx(sum(by_hand) / 5)
    assert found["motion"] == pytest.approx(float(WORLD.speeds.mean()))
    assert found["frechet_distance"] > judge.measure(judge.real(seed=0))["frechet_distance"]
    blurred = judge.measure(decided.mean(0, keepdim=True).expand_as(decided))
    assert blurred["fit_error"] > 0.05 and blurred["first_frame_error"] > 0.05


def test_the_reference_is_the_law_itself(trial: Trial) -> None:
    """Its moments are those of the mixture of every image's clips, weighted by the prior."""
    judge = trial.judge
    every = WORLD.every_clip(judge.image[::30]).double().flatten(2)
    mean = (WORLD.prior[:, None] * every).sum(1).mean(0)
    square = (WORLD.prior[:, None] * every.square()).sum(1).mean(0)
    flat = judge.reference.double().flatten(1)
    torch.testing.assert_close(flat.mean(0), mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(flat.square().mean(0), square, atol=1e-6, rtol=0)


def test_principal_features_hold_the_greatest_variances(trial: Trial) -> None:
    clips = trial.judge.reference
    found = principal_features(clips, 5)(clips)
    wanted = torch.linalg.svdvals(clips.flatten(1).double() - clips.flatten(1).double().mean(0))
    torch.testing.assert_close(found.var(0).flip(0), wanted[:5].square() / (len(clips) - 1))


def recorded(seen: list[tuple[float, Tensor]]) -> Denoiser:
    def call(_net: nn.Module, x_t: Tensor, t: Tensor, _cond: object) -> Tensor:
        seen.append((float(t[0]), x_t.clone()))
        return torch.zeros_like(x_t)

    return Denoiser(nn.Identity(), call, SCHEDULE, "x0")


@pytest.mark.parametrize("start", [1.0, 0.94, 0.8])
@pytest.mark.parametrize("kind", [None, "channel", "shrunk"])
def test_the_network_sees_the_start_that_was_asked_for(trial: Trial, start, kind) -> None:
    seen: list[tuple[float, Tensor]] = []
    shape = (4000, 6, 16)
    stats = None if kind is None else trial.stats[kind]
    sample_clips(recorded(seen), shape, seed=3, num_steps=2, start=start, stats=stats)
    t, x_m = seen[0]
    assert t == round(1000 * start) - 1
    assert seen[1][0] == pytest.approx((t + 1) / 2 - 1, abs=1)
    eps = normal((6, 16), seed=3, purpose="clip.sample", indices=range(4000))
    if kind is None:
        torch.testing.assert_close(x_m, eps, rtol=1e-5, atol=1e-6)
        return
    abar = float(clip_scheduler().alphas_cumprod[int(t)])
    clips = trial.sets["seen"][0].double()
    mean, var = clips.mean(), clips.var(correction=0)
    if kind == "channel":
        wanted = abar**0.5 * mean + (1 - abar + abar * var).sqrt() * eps
        torch.testing.assert_close(x_m, wanted.float(), rtol=1e-5, atol=1e-5)
    else:  # nearer to the mean of each cell than the mean of all cells is
        gap = x_m.double().mean(0) / abar**0.5
        assert (gap - clips.mean(0)).square().mean() < (mean - clips.mean(0)).square().mean() / 2


def test_sampling_is_diffusers_ddim(trial: Trial) -> None:
    torch.manual_seed(0)
    net = ClipNet(width=16, num_blocks=1).eval()
    image = trial.judge.image[:7]
    clips = sample_clips(clip_denoiser(net, SCHEDULE, image), (7, 6, 16), seed=1, num_steps=10)
    scheduler = clip_scheduler()
    scheduler.set_timesteps(10)
    x = normal((6, 16), seed=1, purpose="clip.sample", indices=range(7))
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = net(x, t.expand(7), image, torch.zeros(7))
            x0 = (
                scheduler.alphas_cumprod[t] ** 0.5 * x
                - (1 - scheduler.alphas_cumprod[t]) ** 0.5 * v
            )
            x = scheduler.step(v, t, x).prev_sample
    torch.testing.assert_close(clips, x0, rtol=1e-4, atol=1e-4)


def test_an_earlier_start_from_noise_gives_the_ideal_denoiser_false_motion(trial: Trial) -> None:
    """The control: it cannot leak, yet its motion rises, and so does the distance to real clips."""
    judge = trial.judge
    full, early = (judge.measure(trial.samples(trial.bayes, seed=0, start=m)) for m in (1.0, 0.8))
    init = judge.measure(trial.samples(trial.bayes, seed=0, start=0.8, init="shrunk"))
    assert early["motion"] > full["motion"] + 0.08 > judge.measure(judge.real(seed=0))["motion"]
    assert early["frechet_distance"] > 3 * full["frechet_distance"]
    assert init["frechet_distance"] < early["frechet_distance"] / 3
    assert full["fit_error"] < 1e-4


def test_blurring_at_inference_hides_fine_structure_early_and_none_late() -> None:
    blur = shown_through(LowPass(time_map(SCHEDULE), 2.0, axes=1, clean_probability=0.0))
    image = torch.eye(16)[:2]
    early, level = blur(image, torch.full((2,), 999.0).double())
    late, _ = blur(image, torch.zeros(2).double())
    assert early.max() < 0.4 and late.max() > 0.99
    assert level.tolist() == [0, 0]  # the network is not told
    torch.testing.assert_close(early.sum(1), image.sum(1))


def test_noise_at_inference_is_the_median_of_training_and_fresh_at_every_t() -> None:
    train = TimeNoise(time_map(SCHEDULE), 5.0, clean_probability=0.0)
    show = noised_through(train, seed=0)
    image = torch.zeros(500, 16)
    (late, level), (later, high) = (show(image, torch.full((500,), t).double()) for t in (900, 999))
    for found, told, tau in ((late, level, 0.9005), (later, high, 0.9995)):
        wanted = 5 / (1 + math.exp(-4 * (2 * tau**5 - 1)))
        # ranks are tabulated to 2^-15, and d ln(level) / d tau is 8.5 at tau = 0.9
        assert told.tolist() == pytest.approx([wanted] * 500, rel=3e-4)
        assert abs(found.var() / wanted**2 - 1) < 5 * (2 / found.numel()) ** 0.5
    assert abs(torch.corrcoef(torch.stack([late.flatten(), later.flatten()]))[0, 1]) < 5 / 8000**0.5


def test_a_clean_image_is_told_the_level_that_a_noised_one_would_have() -> None:
    train = TimeNoise(time_map(SCHEDULE), 5.0, clean_probability=0.5)
    noise = TimeNoise(time_map(SCHEDULE), 5.0, clean_probability=0.0)
    image, t = torch.randn(3, 16), torch.full((3,), 800.0).double()
    shown, told = told_through(train)(image, t)
    assert torch.equal(shown, image)
    assert torch.equal(told, noised_through(noise, seed=0)(image, t)[1])
    torch.testing.assert_close(told.double(), noise.quantile(0.5, t), rtol=1e-6, atol=0)


def test_plentiful_data_has_no_seen_pairs() -> None:
    data = MovingDigits(WORLD, num_pairs=None, seed=0)
    trial = Trial.of(data, SCHEDULE, num_images=3, seeds=2)
    assert set(trial.sets) == {"unseen"} and trial.judge.seeds == 2
    assert trial.stats["channel"].count == 1500
    stats = clip_stats(trial.sets["unseen"][0], "channel")
    assert float(stats.mean) == pytest.approx(float(trial.sets["unseen"][0].mean()), abs=1e-5)
