"""Statistics of latents against numpy, and Analytic-Init against numerical minimisation."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffdiv.core.latent_stats import LatentMoments, LatentSpace, LatentStats, analytic_init
from diffdiv.core.schedule import Schedule, edm, rectified_flow, vp_from_betas

SPACE = LatentSpace("AutoencoderKLTemporalDecoder", 2, 3, 2, 2, (0.18215,), (0.0,))
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
# schedule, start, scale of the data in training
FAMILIES: dict[str, tuple[Schedule, float, float]] = {
    "vp": (vp_from_betas(BETAS), 700.0, 1.0),
    "vp, rescaled": (vp_from_betas(BETAS), 700.0, 0.7),
    "edm": (edm(sigma_max=700.0), 3.0, 1.0),
    "flow": (rectified_flow(shift=3.0), 0.7, 1.0),
}


def videos(count: int, seed: int = 0) -> Tensor:
    """Values of different mean and spread, not Gaussian: a mixture of two bumps a value."""
    draw = np.random.default_rng(seed)
    mean = np.linspace(-1, 2, 24).reshape(SPACE.shape)
    spread = np.linspace(0.5, 1.5, 24).reshape(SPACE.shape)
    bump = draw.integers(0, 2, (count, *SPACE.shape)) * 2 - 1
    return torch.from_numpy(mean + spread * (bump + 0.3 * draw.normal(size=bump.shape)))


def measured(data: Tensor, batch: int = 7) -> LatentMoments:
    moments = LatentMoments(SPACE)
    for part in data.split(batch):
        moments.add(part)
    return moments


def test_moments_are_those_of_numpy() -> None:
    data = videos(150)
    numbers, moments = data.numpy(), measured(data)
    pixel, channel = moments.stats("pixel"), moments.stats("channel")
    np.testing.assert_allclose(pixel.mean, numbers.mean(0), rtol=1e-12)
    np.testing.assert_allclose(pixel.var, numbers.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(channel.mean.flatten(), numbers.mean((0, 1, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(channel.var.flatten(), numbers.var((0, 1, 3, 4)), rtol=1e-12)
    first = ((numbers - numbers[:, :1]) ** 2).mean((0, 1, 3, 4))
    np.testing.assert_allclose(channel.var_about_first.flatten(), first, rtol=1e-12)


def test_a_large_offset_costs_no_precision() -> None:
    """A sum of squares in float32 would lose all of this variance."""
    data = videos(150)
    shifted = measured(data + 1e6).stats("channel")
    torch.testing.assert_close(shifted.var, measured(data).stats("channel").var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cut", [0, 1, 60, 150])
def test_merged_parts_are_the_whole(cut: int) -> None:
    data = videos(150)
    whole, merged = measured(data), measured(data[:cut])
    merged.merge(measured(data[cut:]))
    a, b = whole.stats("pixel"), merged.stats("pixel")
    assert a.count == b.count == 150
    for name in ("mean", "var", "var_about_first"):
        torch.testing.assert_close(vars(a)[name], vars(b)[name], rtol=1e-12, atol=1e-12)


def test_pixel_means_of_few_videos_are_refused() -> None:
    moments = measured(videos(99))
    with pytest.raises(ValueError, match=r"99 videos .* 100 are needed.*'channel' or 'shrunk'"):
        moments.stats("pixel")
    assert moments.stats("shrunk").mean.shape == SPACE.shape
    with pytest.raises(ValueError, match="0 videos"):
        LatentMoments(SPACE).stats("channel")


@pytest.mark.parametrize("signal", [0.0, 0.1, 1.0])
def test_shrunk_means_are_never_worse_than_the_better_of_both(signal: float) -> None:
    """12 videos of 16x16 maps of means: error against the truth, averaged over 40 worlds.

    False alarm: the margin of 5 % is 6 standard errors of these averages.
    """
    space = LatentSpace("vae", 1, 4, 16, 16)
    errors = dict.fromkeys(("channel", "pixel", "shrunk"), 0.0)
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        truth = 0.5 + signal * torch.randn(space.shape, generator=draw, dtype=torch.float64)
        moments = LatentMoments(space)
        moments.add(truth + torch.randn(12, *space.shape, generator=draw, dtype=torch.float64))
        found = {name: moments.stats(name).mean for name in ("channel", "shrunk")}
        found["pixel"] = moments.mean
        for name, mean in found.items():
            errors[name] += float((mean - truth).square().mean()) / 40
    assert errors["shrunk"] <= 1.05 * min(errors["channel"], errors["pixel"]) + 1e-3


@pytest.mark.parametrize("variance", ["scalar", "channel", "pixel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_moment_matching_is_the_numerical_optimum(family: str, variance: str) -> None:
    """Cross-entropy of 20,000 samples of q(x_M), minimised over mean and log-variance by LBFGS.

    Means free a value; variances shared as asked. The noise eps enters by its own two moments, so
    there is no Monte-Carlo error: E over eps of (x_M - m)^2 = (a x0 - m)^2 + sigma^2.
    """
    schedule, start, scale = FAMILIES[family]
    data = videos(20_000)
    t = torch.tensor([start], dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(t)) * scale, float(schedule.sigma(t))
    shape = {"scalar": (1, 1, 1, 1), "channel": (1, 2, 1, 1), "pixel": SPACE.shape}[variance]
    mean = torch.zeros(SPACE.shape, dtype=torch.float64, requires_grad=True)
    log_var = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [mean, log_var], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )
    moments = (alpha * data).mean(0), (alpha * data).square().mean(0)

    def cross_entropy() -> Tensor:
        optimizer.zero_grad()
        squares = moments[1] - 2 * mean * moments[0] + mean**2 + sigma**2
        loss = ((squares / log_var.exp() + log_var) / 2).mean()
        loss.backward()
        return loss

    optimizer.step(cross_entropy)
    stats = measured(data, 500).stats("pixel")
    law = analytic_init(stats, schedule, start, variance=variance, data_scale=scale)
    torch.testing.assert_close(law.mean, mean.detach(), rtol=1e-4, atol=1e-5)
    # the optimum is the population variance, the estimate divides by n - 1
    torch.testing.assert_close(
        law.std.expand(shape) ** 2, log_var.detach().exp(), rtol=2e-4, atol=0
    )


def test_a_mean_by_channel_is_the_optimum_among_those() -> None:
    """By enumeration: moving mean or variance of a channel either way only raises the KL."""
    data, (schedule, start, _) = videos(500), FAMILIES["vp"]
    t = torch.tensor([start], dtype=torch.float64)
    law = analytic_init(measured(data).stats("channel"), schedule, start)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))

    def cross_entropy(mean: Tensor, std: Tensor) -> float:
        squares = (alpha * data - mean).square() + sigma**2
        return float((squares / std**2 / 2 + std.log()).mean())

    best = cross_entropy(law.mean, law.std)
    for channel in range(2):
        step = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
        step[0, channel] = 0.01
        for mean, std in ((step, 0 * step), (-step, 0 * step), (0 * step, step), (0 * step, -step)):
            assert cross_entropy(law.mean + mean, law.std + std) > best


def test_draws_have_the_law_and_its_dtype() -> None:
    law = analytic_init(measured(videos(100)).stats("shrunk"), *FAMILIES["edm"][:2])
    eps = torch.randn(20_000, *SPACE.shape, generator=torch.Generator().manual_seed(0))
    x = law.draw(eps)
    assert x.dtype == torch.float32
    # 7 standard errors at std about 3.2
    torch.testing.assert_close(x.double().mean(0), law.mean, rtol=0, atol=0.16)
    spread = law.std.expand(SPACE.shape)
    torch.testing.assert_close(x.double().std(0), spread, rtol=0.036, atol=0)


def test_a_start_from_the_image_has_the_spread_about_it() -> None:
    data, (schedule, start, _) = videos(200), FAMILIES["flow"]
    stats = measured(data).stats("channel")
    law = analytic_init(stats, schedule, start, condition=data[:5, :1])
    assert law.draw(torch.zeros(5, *SPACE.shape)).shape == (5, *SPACE.shape)
    torch.testing.assert_close(law.mean, 0.3 * data[:5, :1])
    gap = (data - data[:, :1]).square().mean((0, 1, 3, 4))
    torch.testing.assert_close(law.std.flatten() ** 2, 0.49 + 0.09 * gap)


def test_a_file_comes_back_whole_and_others_are_told(tmp_path) -> None:
    stats = measured(videos(120)).stats("pixel")
    stats.save(tmp_path / "a.safetensors")
    again = LatentStats.load(tmp_path / "a.safetensors")
    for name in ("mean", "var", "var_about_first"):
        assert torch.equal(vars(again)[name], vars(stats)[name])
    assert (again.space, again.count, again.granularity) == (SPACE, 120, "pixel")
    (tmp_path / "b").write_text("no")
    save_file({"mean": torch.zeros(1)}, tmp_path / "c")
    for name in ("b", "c", "absent"):
        with pytest.raises(ValueError, match="no latent statistics there"):
            LatentStats.load(tmp_path / name)


def test_statistics_of_another_space_are_refused_in_a_sentence() -> None:
    moments = measured(videos(120))
    larger = LatentSpace(SPACE.vae, 2, 3, 4, 2, SPACE.scale, SPACE.shift)
    moments.stats("channel").require(larger)  # one number a channel fits every size
    with pytest.raises(ValueError, match=r"3 frames of 2x2x2 do not fit .* 2x4x2 \(height 2, not"):
        moments.stats("pixel").require(larger)
    other = LatentSpace("AutoencoderKL", 2, 3, 2, 2, SPACE.scale, SPACE.shift)
    with pytest.raises(ValueError, match=r"vae .* again for this model"):
        moments.stats("channel").require(other)
    with pytest.raises(ValueError, match="do not add up"):
        moments.merge(LatentMoments(larger))


def test_bad_latents_and_variances_are_refused() -> None:
    moments = measured(videos(3))
    with pytest.raises(FloatingPointError, match="not finite"):
        moments.add(torch.full((1, *SPACE.shape), torch.nan))
    with pytest.raises(ValueError, match="latents"):
        moments.add(torch.zeros(1, 3, 2, 2, 3))
    assert moments.count == 3
    with pytest.raises(ValueError, match="needs statistics by pixel"):
        analytic_init(moments.stats("shrunk"), *FAMILIES["vp"][:2], variance="pixel")
