"""K fixed DDIM steps as one linear map, against diffusers' own scheduler."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from diffdiv.core.parallel_steps import ParallelSteps


def stable_diffusion(**changes: object) -> DDIMScheduler:
    settings: dict[str, object] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    return DDIMScheduler(**{**settings, **changes})


def in_float64(scheduler: DDIMScheduler) -> DDIMScheduler:
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_combination_is_the_sequential_loop(
    kind: str, spacing: str, to_one: bool, num_steps: int
) -> None:
    scheduler = in_float64(
        stable_diffusion(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=to_one)
    )
    steps = ParallelSteps.of_scheduler(scheduler, num_steps)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    outputs = torch.randn(num_steps, 2, 3, 4, 4, dtype=torch.float64, generator=generator)

    state = z
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        state = scheduler.step(output, int(t), state).prev_sample

    found = steps.combine(z, outputs)
    assert float((found - state).abs().max()) < 1e-12 * float(state.abs().max().clamp_min(1))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_predicted_noise_is_that_of_the_sequential_loop(kind: str) -> None:
    scheduler = in_float64(stable_diffusion(prediction_type=kind, timestep_spacing="trailing"))
    steps = ParallelSteps.of_scheduler(scheduler, 4)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=generator)
    outputs = torch.randn(4, 2, 1, 2, 2, dtype=torch.float64, generator=generator)

    state, expected = z, []
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        step = scheduler.step(output, int(t), state)
        alpha_bar = scheduler.alphas_cumprod[int(t)]
        noise = (state - alpha_bar.sqrt() * step.pred_original_sample) / (1 - alpha_bar).sqrt()
        expected.append(noise)
        state = step.prev_sample

    torch.testing.assert_close(
        steps.predicted_noise(z, outputs), torch.stack(expected), rtol=0, atol=1e-12
    )


def test_the_papers_setting_telescopes() -> None:
    """eps on contiguous times: E_k = sqrt(final) (s_{k+1} - s_k), s = sqrt((1 - a) / a)."""
    scheduler = in_float64(stable_diffusion())
    table, final = scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod)
    steps = ParallelSteps.listed("eps", (751, 501, 251, 1), table, final)
    assert steps.times == ParallelSteps.of_scheduler(scheduler, 4).times

    levels = [float(table[t]) for t in steps.times] + [final]
    s = [math.sqrt((1 - a) / a) for a in levels]
    expected = [math.sqrt(final) * (low - high) for high, low in pairwise(s)]
    torch.testing.assert_close(steps.output_gains, torch.tensor(expected, dtype=torch.float64))
    assert steps.noise_gain == pytest.approx(math.sqrt(final / levels[0]), rel=1e-12)
    # the last decoder of the paper's grid is nearly idle
    share = steps.output_gains.abs() / steps.output_gains.abs().sum()
    assert float(share[-1]) < 0.005


def test_linspace_needs_the_general_form() -> None:
    """The step lands beside the next listed time, so the telescoped form would be wrong."""
    steps = ParallelSteps.of_scheduler(stable_diffusion(timestep_spacing="linspace"), 4)
    assert not torch.allclose(steps.landing[:-1], steps.alpha_bar[1:])


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_what_is_not_linear_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        ParallelSteps.of_scheduler(stable_diffusion(**{setting: True}), 4)


@pytest.mark.parametrize("times", [(), (1, 751), (751, 751), (1000, 1), (5, -1)])
def test_times_that_do_not_fall_are_refused(times: tuple[int, ...]) -> None:
    table = stable_diffusion().alphas_cumprod
    with pytest.raises(ValueError, match="falling indices"):
        ParallelSteps.listed("eps", times, table, 1.0)


def test_noise_prediction_at_zero_signal_is_refused() -> None:
    table = stable_diffusion().alphas_cumprod.clone()
    table[-1] = 0
    with pytest.raises(ValueError, match="does not determine x0"):
        ParallelSteps.listed("eps", (999, 499), table, 1.0)
    ParallelSteps.listed("v", (999, 499), table, 1.0)
