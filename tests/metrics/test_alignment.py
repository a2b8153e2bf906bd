"""Hacking diagnostics against closed forms, scipy and PIL, and on rewards hacked on purpose."""

import colorsys
import io
from math import pi

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import pdist

from diffdiv.core.schedule import edm, vp_from_betas
from diffdiv.metrics import alignment
from diffdiv.models.denoiser import Condition


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(red, green, blue, size=16):
    pixels = torch.tensor([red, green, blue]).view(1, 3, 1, 1).expand(2, 3, size, size)
    return pixels * 2 - 1


def test_colours_of_one_colour_are_those_of_colorsys():
    found = alignment.colour_and_texture(flat(0.8, 0.2, 0.4) + 1e-3 * seeded(2, 3, 16, 16))
    _, saturation, _ = colorsys.rgb_to_hsv(0.8, 0.2, 0.4)
    luma, _, _ = colorsys.rgb_to_yiq(0.8, 0.2, 0.4)
    assert found["saturation"] == pytest.approx(saturation, abs=5e-3)
    assert found["brightness"] == pytest.approx(luma, abs=5e-3)
    assert found["clipped"] == 0 and found["contrast"] < 1e-3


def test_half_black_half_white_and_a_ramp():
    halves = torch.full((1, 3, 8, 8), -1.0)
    halves[..., 4:] = 1
    found = alignment.colour_and_texture(halves)
    assert found["contrast"] == pytest.approx(0.5) and found["clipped"] == 1
    assert found["saturation"] == pytest.approx(0, abs=1e-6)
    assert found["edges"] == pytest.approx(1 / 7)  # one of seven columns of differences
    ramp = torch.linspace(-0.9, 0.9, 10).expand(1, 3, 10, 10)
    assert alignment.colour_and_texture(ramp)["edges"] == pytest.approx(0.9 / 9)


@pytest.mark.parametrize(("cycles", "expected"), [(3, 0.0), (7, 0.0), (9, 1.0), (15, 1.0)])
def test_high_frequencies_of_one_wave(cycles, expected):
    wave = torch.sin(2 * pi * cycles * torch.arange(32) / 32).expand(1, 3, 32, 32)
    assert alignment.high_frequency_share(wave) == pytest.approx(expected, abs=1e-6)


def test_high_frequencies_of_white_noise_are_an_area():
    """Mean of 4 x 128^2 powers, each exponential: 4 standard errors are 0.8 %."""
    share = alignment.high_frequency_share(seeded(4, 3, 128, 128))
    assert share == pytest.approx(1 - pi * 0.25 / 4, abs=0.01)


def test_blur_is_scipys_gaussian():
    images = seeded(1, 3, 64, 64)
    expected = gaussian_filter(images.numpy(), 1.0, axes=(2, 3), mode="mirror", truncate=3)
    assert np.allclose(alignment.blur(images).numpy(), expected, atol=1e-5)


def test_crop_stretches_a_ramp():
    x = torch.arange(32.0).add(0.5).div(16).sub(1)  # centres of pixels in [-1, 1]
    found = alignment.crop(x.expand(1, 3, 32, 32))
    assert torch.allclose(found[0, 0, 16, 1:-1], x[1:-1] * 7 / 8, atol=1e-6)


def test_jpeg_is_pils():
    images = seeded(2, 3, 16, 16).clamp(-1, 1)
    levels = ((images[1] + 1) / 2).mul(255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, format="JPEG", quality=50)
    expected = np.asarray(Image.open(file), dtype=np.float32) / 127.5 - 1
    assert np.allclose(alignment.jpeg(images)[1].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    # of one colour only the DC coefficient is left, in steps of 2 levels
    grey = flat(0.5, 0.5, 0.5)
    assert (alignment.jpeg(grey) - grey).abs().max() <= 1.51 / 127.5


def test_an_adversarial_gain_vanishes_under_change_and_an_honest_one_stays():
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    images = (0.5 + 0.2 * board).expand(4, 3, 32, 32)
    hacked = alignment.under_perturbations(
        lambda x, _: (x * board).mean((1, 2, 3)), images, [""] * 4
    )
    honest = alignment.under_perturbations(lambda x, _: x.mean((1, 2, 3)), images, [""] * 4)
    assert set(hacked) == {"plain", "JPEG", "blur", "crop"}
    assert hacked["plain"] == pytest.approx(0.2, abs=1e-6)
    assert hacked["blur"] < 0.1 and hacked["crop"] < 0.1
    assert all(value == pytest.approx(0.5, abs=0.02) for value in honest.values())


def test_exchanged_prompts():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    prompts = ["0", "1", "2", "3", "1", "0"]

    def obeys(x, asked):
        return (x[:, 0, 0, 0] == torch.tensor([float(a) for a in asked])).float()

    # 0 to 3 show what was asked; 1 and 4 have the same prompt, and take that of the next image
    assert alignment.prompt_dependence(obeys, images, prompts) == pytest.approx(4 / 6)
    ignores = alignment.prompt_dependence(lambda x, _: x[:, 0, 0, 0], images, prompts)
    assert ignores == 0
    with pytest.raises(ValueError, match="all are the same"):
        alignment.prompt_dependence(obeys, images, ["1"] * 6)


def test_distance_within_is_scipys():
    features = seeded(12, 5)
    expected = np.mean([pdist(part.numpy()).mean() for part in features.split(4)])
    assert alignment.distance_within(features, 3) == pytest.approx(expected, rel=1e-6)


def gaussian(mean, std, schedule):
    """The exact denoiser of N(mean, std^2)."""

    def denoise(x_t, t, cond):
        alpha, sigma = (part(t)[:, None].double() for part in (schedule.alpha, schedule.sigma))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x_t - alpha * mean)

    return denoise


@pytest.mark.parametrize("name", ["vp", "edm"])
def test_by_time_is_the_closed_form_on_gaussians(name):
    """40,000 numbers a figure; within 4 standard errors of each (0.01 % false alarms of all)."""
    schedule = edm() if name == "edm" else vp_from_betas(torch.linspace(1e-4, 0.02, 1000))
    mean, std, other, wide = 0.5, 0.7, -0.2, 1.1
    x0 = mean + std * seeded(10_000, 4, seed=3).double()
    times = (0.3, 2.0) if name == "edm" else (200, 700)
    exact, reference = gaussian(mean, std, schedule), gaussian(other, wide, schedule)
    common = {"reference": reference, "schedule": schedule, "seed": 0}
    found = alignment.by_time(x0, Condition(), times, fake=exact, **common)
    for row in found:
        t = torch.tensor([row.t])
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        variance = alpha**2 * std**2 + sigma**2
        gains = [alpha * s**2 / (alpha**2 * s**2 + sigma**2) for s in (std, wide)]
        posterior = std**2 * sigma**2 / variance
        # fake - reference is linear in x_t ~ N(alpha mean, variance)
        at_mean = mean - other - gains[1] * alpha * (mean - other)
        gap = at_mean**2 + (gains[0] - gains[1]) ** 2 * variance
        tolerance = {"rel": 4 * (2 / 40_000) ** 0.5 * 1.5}
        assert row.fake_loss == pytest.approx(posterior, **tolerance)
        assert row.gap == pytest.approx((alpha / sigma) ** 2 * gap, **tolerance)
        assert row.reference_loss == pytest.approx(posterior + gap, **tolerance)
    lagging = alignment.by_time(x0, Condition(), times, fake=reference, **common)
    assert all(row.gap == 0 and row.fake_loss == row.reference_loss for row in lagging)
