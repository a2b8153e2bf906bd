"""Schedules against diffusers, and quantile functions against the laws they stand for."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from diffdiv.core.schedule import edm, from_diffusers, rectified_flow, schedule_from_config

U = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("family", [DDPMScheduler, DDIMScheduler])
def test_vp_agrees_with_add_noise(family, beta_schedule):
    scheduler = family(beta_schedule=beta_schedule)
    schedule = from_diffusers(scheduler)
    x0, eps = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 17, 399, 998, 999])
    torch.testing.assert_close(
        schedule.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(5).double()
    )


def test_zero_terminal_snr_and_trained_betas():
    zero_snr = from_diffusers(DDIMScheduler(rescale_betas_zero_snr=True))
    assert float(zero_snr.alpha(torch.tensor([999]))) < 1e-3
    betas = DDPMScheduler(beta_schedule="scaled_linear").betas[:400].tolist()
    truncated = from_diffusers(LCMScheduler(num_train_timesteps=400, trained_betas=betas))
    full = from_diffusers(DDPMScheduler(beta_schedule="scaled_linear"))
    t = torch.tensor([0, 399])
    torch.testing.assert_close(truncated.alpha(t), full.alpha(t), rtol=1e-6, atol=0)
    assert truncated.t_max == 399


def test_flow_agrees_with_scale_noise():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = from_diffusers(scheduler)
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    timesteps = scheduler.timesteps[[0, 400, 900]]
    t = timesteps.double() / 1000
    torch.testing.assert_close(
        schedule.add_noise(x0, eps, t),
        scheduler.scale_noise(x0, timesteps, eps),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(schedule.net_time(t).float(), timesteps)


def test_shift_is_the_one_of_diffusers():
    sigmas = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:1000].double()
    # diffusers takes u = 1, 0.999, ..., 0.001
    u = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(rectified_flow(shift=3.0).sample_t(u), sigmas, rtol=1e-5, atol=1e-6)


def test_edm_times_are_log_normal():
    schedule = edm(p_mean=-1.2, p_std=1.2, sigma_min=1e-9, sigma_max=1e9)
    log_t = schedule.sample_t(U).log()
    assert float(log_t.mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(log_t.std()) == pytest.approx(1.2, abs=2e-3)
    assert float(edm(sigma_max=5.0).sample_t(U).max()) == 5.0


def test_vp_times_are_uniform_indices_and_ranges_restrict_them():
    schedule = from_diffusers(DDPMScheduler())
    t = schedule.sample_t(U)
    assert torch.equal(t.unique(), torch.arange(1000).double())
    assert set(torch.bincount(t.long()).tolist()) == {20}
    inner = schedule.between(0.02, 0.98).sample_t(U)
    assert (float(inner.min()), float(inner.max())) == (20, 979)
    with pytest.raises(ValueError, match=r"0 <= low < high <= 1, not 0.5, 0.5"):
        schedule.between(0.5, 0.5)


def test_kinds_and_refusals():
    assert schedule_from_config("DDIMScheduler", {"prediction_type": "v_prediction"})[1] == "v"
    assert from_diffusers(EDMEulerScheduler(sigma_max=9.0)).t_max == 9.0
    with pytest.raises(ValueError, match=r"scheduler VQDiffusionScheduler .* cannot be converted"):
        schedule_from_config("VQDiffusionScheduler", {})
    with pytest.raises(ValueError, match=r"prediction_type 'nonsense'"):
        schedule_from_config("DDIMScheduler", {"prediction_type": "nonsense"})
