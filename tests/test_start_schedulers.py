"""Sampling from M through the real schedulers of diffusers, with the exact Gaussian denoiser."""

from math import log

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from diffdiv.core.latent_stats import LatentMoments, LatentSpace, StartLaw, analytic_init
from diffdiv.video_start import start_level, start_scheduler, start_sigma

MEAN, STD, STEPS = 0.6, 0.7, 50
SPACE = LatentSpace("vae", 1, 1, 100, 200)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "euler": EulerDiscreteScheduler(
        sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True, prediction_type="v_prediction",
        timestep_type="continuous", timestep_spacing="leading", steps_offset=1, **SD,
    ),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    ),
    "ddim": DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing", **SD
    ),
    "cogvideox": CogVideoXDDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    ),
    "cogvideox-dpm": CogVideoXDPMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    ),
}  # fmt: skip


def posterior(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x_t] of N(MEAN, STD^2)."""
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def network(name: str, scheduler, step: int, t: Tensor, x: Tensor) -> Tensor:
    """What a perfect network would return to this scheduler."""
    if name in ("flow", "unipc"):
        sigma = scheduler.sigmas[step].double()
        return (x - posterior(x, 1 - sigma, sigma)) / sigma
    if name == "euler":
        sigma = scheduler.sigmas[step].double()
        x0, one = posterior(x, torch.ones(()), sigma), sigma**2 + 1
        return (x / one - x0) * one.sqrt() / sigma
    abar = scheduler.alphas_cumprod[int(t)].double()
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    x0 = posterior(x, alpha, sigma)
    return alpha * (x - alpha * x0) / sigma - sigma * x0


def sampled(name: str, start: float, law: StartLaw | None) -> Tensor:
    """Samples from M; without a law from N(0, init_noise_sigma^2), as pipelines do."""
    scheduler = start_scheduler(SCHEDULERS[name], start)
    scheduler.set_timesteps(STEPS)
    half = torch.randn(1, 1, 1, 50, 200, generator=torch.Generator().manual_seed(0)).double()
    eps = torch.cat([half, -half], 3)  # its mean is 0 exactly
    plain = eps if name == "flow" else scheduler.init_noise_sigma * eps
    x = plain if law is None else law.draw(eps)
    before = None
    for step, t in enumerate(scheduler.timesteps):
        if name == "euler":
            scheduler.scale_model_input(x, t)  # it insists
        output = network(name, scheduler, step, t, x)
        if name == "cogvideox-dpm":
            back = scheduler.timesteps[step - 1] if step else None
            noise = torch.Generator().manual_seed(step)
            x, before = scheduler.step(
                output, before, t, back, x, generator=noise, return_dict=False
            )
        else:
            x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.fixture(scope="module")
def stats():
    """Of 20 million draws in closed form: two videos whose moments are exact."""
    moments = LatentMoments(SPACE)
    for sign in (-1, 1):
        moments.add(torch.full((1, *SPACE.shape), MEAN + sign * STD))
    return moments.stats("channel")


@pytest.fixture(scope="module")
def spreads() -> dict[str, float]:
    """Spread of samples from M = 1, by scheduler."""
    return {}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("start", [1.0, 0.94, 0.8, 0.6])
def test_moments_are_kept_by_analytic_init_and_lost_without(
    name: str, start: float, stats, spreads: dict[str, float]
) -> None:
    """N(0.6, 0.7^2), 20,000 values, 50 steps.

    Without it x_M has mean 0 instead of alpha E, and a deterministic sampler carries that gap to
    x0 shrunk by STD / std(x_M): the closed form of what must be lost. CogVideoX's DPM draws noise
    anew and forgets most of its start; its mean has a standard error of 0.005.
    """
    scheduler = start_scheduler(SCHEDULERS[name], start)
    scheduler.set_timesteps(STEPS)
    schedule, t = start_level(scheduler)
    law = analytic_init(stats, schedule, t)
    kept, plain = sampled(name, start, law), sampled(name, start, None)
    exact = name != "cogvideox-dpm"
    assert float(kept.mean()) == pytest.approx(MEAN, abs=1e-3 if exact else 0.02)
    # the solvers themselves lose up to 0.056 of the spread, from M = 1 as well
    assert float(kept.std()) == pytest.approx(STD, abs=0.06)
    spreads.setdefault(name, float(kept.std()))  # M = 1 is the first
    assert float(kept.std()) == pytest.approx(spreads[name], abs=0.035)
    if exact:
        alpha, sigma = (float(c(torch.tensor([t]))) for c in (schedule.alpha, schedule.sigma))
        gap = MEAN * alpha * STD / (alpha**2 * STD**2 + sigma**2) ** 0.5
        assert float(kept.mean() - plain.mean()) == pytest.approx(gap, abs=0.02 * gap + 0.01)
    lost = {"unipc": 0.2, "flow": 0.2, "ddim": 0.1, "cogvideox": 0.07, "euler": 0.07}
    if start == 0.6 and exact:
        assert float(plain.mean()) < MEAN - lost[name]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_grid_is_the_plain_one_without_its_first_steps(name: str) -> None:
    if name == "euler":
        pytest.skip("Euler spaces anew; see below")
    plain, late = SCHEDULERS[name], start_scheduler(SCHEDULERS[name], 0.8)
    plain.set_timesteps(STEPS)
    late.set_timesteps(STEPS)
    left = len(late.timesteps)
    assert 0 < left < STEPS
    assert torch.equal(late.timesteps, plain.timesteps[-left:])
    assert float(late.timesteps[0]) <= 800 < float(plain.timesteps[-left - 1]) + 1
    assert late.config["num_train_timesteps"] == plain.config["num_train_timesteps"] == 1000
    whole = start_scheduler(SCHEDULERS[name], 1.0)
    whole.set_timesteps(STEPS)
    assert torch.equal(whole.timesteps, plain.timesteps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_saved_scheduler_still_starts_at_m(name: str, tmp_path, caplog) -> None:
    late = start_scheduler(SCHEDULERS[name], 0.7)
    late.save_pretrained(tmp_path)
    again = type(late).from_pretrained(tmp_path)
    late.set_timesteps(20)
    again.set_timesteps(20)
    assert torch.equal(late.timesteps, again.timesteps)
    back = start_scheduler(again, 1.0)
    if name != "euler":  # its own sigma_max is M by now
        back.set_timesteps(20)
        assert len(back.timesteps) == 20
    assert not caplog.records


def test_euler_starts_by_sigma_max_and_keeps_all_its_steps() -> None:
    """ln sigma: 0.002^0.15 700^0.85 = 103; the network is told 0.25 ln sigma."""
    scheduler = start_scheduler(SCHEDULERS["euler"], 0.85)
    assert type(scheduler) is EulerDiscreteScheduler, "stock: saved and loaded as such"
    scheduler.set_timesteps(25)
    first = 0.002**0.15 * 700**0.85
    assert float(scheduler.sigmas[0]) == pytest.approx(first, rel=1e-6)
    assert float(scheduler.timesteps[0]) == pytest.approx(0.25 * log(first), rel=1e-6)
    assert len(scheduler.timesteps) == 25


def test_level_of_cogvideox_is_that_of_its_own_table() -> None:
    """SNR shift and zero-SNR rescaling come after the betas."""
    late = start_scheduler(SCHEDULERS["cogvideox"], 0.6)
    late.set_timesteps(STEPS)
    schedule, t = start_level(late)
    wanted = late.alphas_cumprod[int(t)].double()
    alpha = schedule.alpha(torch.tensor([t]))[0]
    torch.testing.assert_close(alpha**2, wanted, rtol=1e-9, atol=0)


def test_what_cannot_start_at_m_says_so() -> None:
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler cannot start at M; Euler"):
        start_scheduler(DPMSolverMultistepScheduler(), 0.9)
    with pytest.raises(ValueError, match="without use_flow_sigmas cannot start"):
        start_scheduler(UniPCMultistepScheduler(), 0.9)
    with pytest.raises(ValueError, match="needs use_karras_sigmas"):
        start_sigma(EulerDiscreteScheduler(), 0.9)
    for bad in (0.0, -1.0, 1.1, 940):
        with pytest.raises(ValueError, match=r"start must lie in \(0, 1\]"):
            start_scheduler(SCHEDULERS["ddim"], bad)
    late = start_scheduler(SCHEDULERS["flow"], 0.001)
    with pytest.raises(ValueError, match=r"start 0.001 lies below the last of 50 sampling steps"):
        late.set_timesteps(50)
