"""The leakage meter on denoisers whose leakage is known in closed form."""

import pytest
import torch
from torch import Tensor, nn

from diffdiv.core.schedule import rectified_flow, vp_from_betas
from diffdiv.data.moving_digits import bayes_denoiser, first_frames, strip_world
from diffdiv.metrics.leakage import leakage_curve, leakage_table
from diffdiv.models.denoiser import Condition, Denoiser

VP = vp_from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
WORLD = strip_world()
TIMES = (999.0, 900.0, 700.0)


def clips(num: int, seed: int) -> tuple[Tensor, Tensor]:
    image = first_frames(WORLD, "test")[:num]
    motion = WORLD.draw_motion(range(num), seed=seed, purpose="test")
    return WORLD.clips(image, motion), image


def fixed(answer: Tensor) -> Denoiser:
    """A denoiser that says this, whatever it is shown."""
    return Denoiser(nn.Identity(), lambda *_: answer, VP, "x0")


def still(image: Tensor) -> Denoiser:
    """A denoiser that answers with the image, repeated: leakage at its worst."""
    return fixed(image[:, None].expand(-1, 6, -1))


def test_errors_of_a_copier_and_of_one_who_knows_by_heart() -> None:
    x0, image = clips(60, seed=0)
    copier = leakage_curve(still, x0, image, TIMES, seed=0, batch=25)
    wanted = float((x0 - image[:, None]).square().mean())
    for point, t in zip(copier, TIMES, strict=True):
        assert point.t == t and point.motion == 0
        assert point.error == pytest.approx(wanted, rel=1e-6)
    knows = leakage_curve(lambda _: fixed(x0), x0, image, TIMES, seed=0)
    assert all(point.error == 0 and point.motion == pytest.approx(1) for point in knows)
    half = leakage_curve(lambda _: fixed(x0 / 2), x0, image, TIMES, seed=0)
    assert all(point.motion == pytest.approx(0.25) for point in half)


def test_the_curve_of_the_ideal_denoiser_is_its_posterior_variance() -> None:
    """E|x0 - x0_hat|^2 = E[sum_k p_k |clip_k|^2 - |x0_hat|^2], from the same noise: 5 sigma."""
    x0, image = clips(297, seed=1)
    t = torch.full((297,), 850.0, dtype=torch.float64)
    (point,) = leakage_curve(
        lambda i: bayes_denoiser(WORLD, VP, i), x0, image, [850.0], seed=2, batch=1000
    )
    eps = torch.randn(297, 6, 16, generator=torch.Generator().manual_seed(0))
    x_t = VP.add_noise(x0, eps, t)
    share = WORLD.posterior(x_t, image, VP.alpha(t), VP.sigma(t))
    every = WORLD.every_clip(image).flatten(2)
    mean = (share[:, None] @ every).squeeze(1)
    variance = ((share * every.square().sum(2)).sum(1) - mean.square().sum(1)) / 96
    sigma = variance.std() / 297**0.5
    assert abs(point.error - variance.mean()) < 5 * 2**0.5 * 1.5 * sigma


def test_batches_and_draws_do_not_change_which_noise_is_seen() -> None:
    x0, image = clips(40, seed=0)

    def bayes(i: Tensor) -> Denoiser:
        return bayes_denoiser(WORLD, VP, i)

    one, many = (
        leakage_curve(bayes, x0, image, TIMES, seed=0, draws=2, batch=size) for size in (40, 7)
    )
    for a, b in zip(one, many, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-5)
        assert a.motion == pytest.approx(b.motion, rel=1e-4)


def test_table_names_what_leaks() -> None:
    seen, unseen = clips(50, seed=0), clips(50, seed=9)
    motion_by_image = {tuple(i.tolist()): c for c, i in zip(*seen, strict=True)}

    def by_heart(image: Tensor) -> Denoiser:
        return fixed(torch.stack([motion_by_image[tuple(i.tolist())] for i in image]))

    rows = leakage_table(
        {"bayes": lambda i: bayes_denoiser(WORLD, VP, i), "by heart": by_heart},
        {"seen": seen, "unseen": unseen},
        [900.0],
        seed=0,
    )
    over = {(row["model"], row["set"]): row["over_bayes"] for row in rows}
    assert over["bayes", "seen"] == over["bayes", "unseen"] == 1
    assert over["by heart", "seen"] == 0
    assert over["by heart", "unseen"] > 1.3
    without = leakage_table({"copier": still}, {"unseen": unseen}, [900.0], seed=0)
    assert "over_bayes" not in without[0]


def test_clips_that_stand_still_are_refused() -> None:
    image = first_frames(WORLD, "test")[:3]
    with pytest.raises(ValueError, match="no clip moves"):
        leakage_curve(still, image[:, None].expand(-1, 6, -1), image, [900.0], seed=0)


def test_other_families_of_schedules() -> None:
    x0, image = clips(30, seed=0)
    curve = leakage_curve(
        lambda i: bayes_denoiser(WORLD, rectified_flow(), i), x0, image, [0.99, 0.5], seed=0
    )
    assert curve[0].error > curve[1].error and curve[0].motion < curve[1].motion
    assert bayes_denoiser(WORLD, VP, image)(x0, torch.full((30,), 1.0), Condition()).shape == (
        x0.shape
    )
