"""TimeNoise against its closed-form law, noise for whiteness, the low-pass against scipy."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.ndimage import gaussian_filter
from torch import Tensor

from diffdiv.core.leakage import (
    ConditionDraw,
    ConstantNoise,
    LowPass,
    TimeNoise,
    gaussian_blur,
    time_map,
)
from diffdiv.core.schedule import edm, rectified_flow, vp_from_betas

SVD_LAW = edm(sigma_min=0.002, sigma_max=700.0, p_mean=0.7, p_std=1.6)
NUM = 50_000


def identity(t: Tensor) -> Tensor:
    return t.double()


def draws(num: int, shape: tuple[int, ...] = (1,), seed: int = 0) -> ConditionDraw:
    """As :meth:`ConditionDraw.draw` makes them, but quickly."""
    generator = torch.Generator().manual_seed(seed)
    return ConditionDraw(
        torch.randn(num, generator=generator, dtype=torch.float64),
        torch.rand(num, generator=generator, dtype=torch.float64),
        torch.randn(num, *shape, generator=generator),
    )


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("settings", [(15.0, 5.0, 1.0), (3.0, 1.0, 4.0)])
def test_levels_follow_the_logit_normal(tau: float, settings: tuple[float, float, float]) -> None:
    """Kolmogorov-Smirnov on 50,000 levels, p > 1e-5, against the density written by hand.

    p(b) = beta_m / (s sqrt(2 pi) b (beta_m - b)) exp(-(logit(b / beta_m) - mu)^2 / (2 s^2)).
    """
    beta_m, a, mu_max = settings
    noise = TimeNoise(identity, beta_m, a=a, mu_max=mu_max, clean_probability=0.0)
    t = torch.full((NUM,), tau, dtype=torch.float64)
    _, level = noise(torch.zeros(NUM, 1), t, draws(NUM))
    mu = mu_max * (2 * tau**a - 1)
    b = np.linspace(0, beta_m, 200_002)[1:-1]
    logit = np.log(b / (beta_m - b))
    density = beta_m / (np.sqrt(2 * np.pi) * b * (beta_m - b)) * np.exp(-((logit - mu) ** 2) / 2)
    cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(b))])
    assert cdf[-1] == pytest.approx(1, abs=1e-3)
    found = stats.kstest(level.numpy(), lambda x: np.interp(x, b, cdf))
    assert found.pvalue > 1e-5
    for p in (0.05, 0.5, 0.95):
        wanted = np.interp(p, cdf, b)
        assert float(noise.quantile(p, t[:1])) == pytest.approx(wanted, rel=2e-3, abs=2e-4)


def test_published_shape_of_the_law() -> None:
    """beta_m 15, a 5, mu_max 1: medians 4.03 at t = 0 and 10.97 at t = 1, by 15 sigmoid(-+1)."""
    noise = TimeNoise(identity, 15.0, mu_max=1.0)
    ends = torch.tensor([0.0, 1.0])
    assert noise.quantile(0.5, ends).tolist() == pytest.approx([4.0341, 10.9659], abs=1e-4)


@pytest.mark.parametrize("law", [SVD_LAW, edm(p_mean=-1.2, p_std=1.2), rectified_flow(shift=3.0)])
def test_rank_is_the_distribution_function_of_training_times(law) -> None:
    u = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rank = time_map(law)(law.sample_t(u))
    torch.testing.assert_close(rank, u, rtol=0, atol=1e-4)
    assert time_map(law)(torch.tensor([0.0, 1e9])).tolist() == [0.0, 1.0]


def test_rank_of_indices() -> None:
    law = vp_from_betas(torch.linspace(1e-4, 0.02, 1000))
    t = torch.arange(1000).double()
    torch.testing.assert_close(time_map(law)(t), (t + 0.5) / 1000, rtol=0, atol=1e-3)


def test_time_dependence_is_real_under_svds_own_law() -> None:
    """With t = sigma / 700 the level ignores the time (the released code); by rank it does not."""
    u = torch.rand(NUM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, y, noise = SVD_LAW.sample_t(u), torch.zeros(NUM, 1), draws(NUM)
    correlation = {}
    for kind in ("time", "rank", "log_snr"):
        _, level = TimeNoise(time_map(SVD_LAW, kind), 15.0, mu_max=1.0, clean_probability=0)(
            y, t, noise
        )
        correlation[kind] = float(stats.spearmanr(level, t).statistic)
    assert abs(correlation["time"]) < 0.02  # 4.5 standard errors
    assert correlation["rank"] > 0.25 and correlation["log_snr"] > 0.1  # 22 standard errors
    strong = TimeNoise(time_map(SVD_LAW), 15.0, clean_probability=0)(y, t, noise)[1]
    early, late = strong[u > 0.98].median(), strong[u < 0.5].median()
    assert early > 30 * late, "clean images where the video is clean, hardly any image where not"


def test_noise_is_white_per_sample_and_pixel() -> None:
    """No shared offset: the mean of 4,096 pixels spreads by 1/64 of the level, not by all of it."""
    shape, indices = (4, 32, 32), range(200)
    noise = ConditionDraw.draw(shape, indices, seed=3)
    y = torch.randn(200, *shape, generator=torch.Generator().manual_seed(2))
    noised, level = ConstantNoise(2.0, clean_probability=0)(y, torch.zeros(200), noise)
    eps = (noised - y) / level[:, None, None, None]
    assert float(eps.std()) == pytest.approx(1, abs=0.005)
    assert float(eps.mean((1, 2, 3)).std()) == pytest.approx(1 / 64, rel=0.3)
    pixels = eps.flatten(1)
    neighbours = torch.corrcoef(torch.stack([pixels[:, :-1].flatten(), pixels[:, 1:].flatten()]))
    samples = torch.corrcoef(torch.stack([pixels[:-1].flatten(), pixels[1:].flatten()]))
    for found in (neighbours[0, 1], samples[0, 1]):
        assert abs(float(found)) < 5 / pixels.numel() ** 0.5


def test_draws_depend_on_the_index_alone() -> None:
    whole = ConditionDraw.draw((2, 3), range(6), seed=1)
    parts = [ConditionDraw.draw((2, 3), part, seed=1) for part in ([0, 1, 2], [3, 4, 5])]
    for name in ("z", "u", "eps"):
        assert torch.equal(vars(whole)[name], torch.cat([vars(part)[name] for part in parts]))
    assert not torch.equal(whole.eps, ConditionDraw.draw((2, 3), range(6), seed=2).eps)


@pytest.mark.parametrize("kind", ["time_noise", "constant", "low_pass"])
def test_clean_conditions_are_untouched_and_as_frequent_as_asked(kind: str) -> None:
    make = {
        "time_noise": TimeNoise(identity, 3.0, clean_probability=0.3),
        "constant": ConstantNoise(3.0, clean_probability=0.3),
        "low_pass": LowPass(identity, 3.0, axes=1, clean_probability=0.3),
    }[kind]
    y = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    degraded, level = make(y, torch.full((20_000,), 0.5), draws(20_000, (8,)))
    clean = level == 0
    assert float(clean.double().mean()) == pytest.approx(0.3, abs=0.0145)  # 4.5 standard errors
    assert torch.equal(degraded[clean], y[clean])
    assert bool((degraded[~clean] != y[~clean]).any(1).all())
    assert (level.dtype, degraded.dtype, make.space) == (torch.float32, y.dtype, "latent")


@pytest.mark.parametrize("width", [1.7, 2.0, 5.0])
def test_blur_is_scipys(width: float) -> None:
    image = torch.randn(1, 2, 24, 30, generator=torch.Generator().manual_seed(0))
    found = gaussian_blur(image, torch.tensor([width]))[0].numpy()
    for channel in range(2):
        wanted = gaussian_filter(image[0, channel].numpy(), width, mode="reflect", truncate=8)
        # scipy samples the kernel, the formula its spectrum: equal where neither aliases
        np.testing.assert_allclose(found[channel], wanted, atol=1e-5)


def test_blur_grows_with_time_sample_by_sample() -> None:
    y = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = LowPass(identity, 4.0, clean_probability=0.0)
    blurred, level = noise(y, torch.tensor([0.0, 0.5, 1.0]), draws(3))
    assert level.tolist() == [0.0, 2.0, 4.0]
    torch.testing.assert_close(blurred.mean((1, 2, 3)), y.mean((1, 2, 3)))
    spread = blurred.std((1, 2, 3))
    assert torch.equal(blurred[0], y[0]) and spread[0] > 3 * spread[1] > 3 * spread[2]


def test_bad_settings_are_told() -> None:
    with pytest.raises(ValueError, match="beta_m must be positive, not 0"):
        TimeNoise(identity, 0.0)
    with pytest.raises(ValueError, match="clean_probability"):
        ConstantNoise(1.0, clean_probability=1.5)
    with pytest.raises(ValueError, match="width"):
        LowPass(identity, -1.0)
    with pytest.raises(ValueError, match="without signal; take 'rank'"):
        time_map(rectified_flow(), "log_snr")
