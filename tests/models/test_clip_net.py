"""The clip network: what it is told, what it means, and its files."""

import pytest
import torch

from diffdiv.core.schedule import from_diffusers
from diffdiv.models.clip_net import (
    ClipNet,
    clip_denoiser,
    clip_scheduler,
    load_clip_net,
    save_clip_net,
)
from diffdiv.models.denoiser import Condition


@pytest.fixture
def net() -> ClipNet:
    torch.manual_seed(0)
    return ClipNet(space=(4, 5), num_frames=3, width=16, num_blocks=1).eval()


def test_its_output_is_v_of_diffusers_scheduler(net: ClipNet) -> None:
    scheduler = clip_scheduler()
    x0, eps = torch.randn(2, 6, 3, 4, 5)
    image, t = x0[:, 0], torch.tensor([0, 10, 300, 700, 900, 999])
    x_t = scheduler.add_noise(x0, eps, t)
    denoiser = clip_denoiser(net, from_diffusers(scheduler), image)
    torch.testing.assert_close(
        denoiser.target(x0, eps, t.double()), scheduler.get_velocity(x0, eps, t)
    )
    v = net(x_t, t, image, torch.zeros(6))
    abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x0_hat = denoiser(x_t, t.double(), Condition())
    torch.testing.assert_close(x0_hat, abar.sqrt() * x_t - (1 - abar).sqrt() * v)


def test_all_it_is_told_matters(net: ClipNet) -> None:
    x_t, image = torch.randn(2, 3, 4, 5), torch.randn(2, 4, 5)
    t, level = torch.tensor([400.0, 500.0]), torch.zeros(2)
    base = net(x_t, t, image, level)
    for other in (
        net(x_t + 1, t, image, level),
        net(x_t, t + 50, image, level),
        net(x_t, t, image.flip(1), level),
        net(x_t, t, image * 2**0.5, level + 1),  # scaled back by the level, which is told too
    ):
        assert (other - base).abs().amax((1, 2, 3)).min() > 1e-4
    with torch.no_grad():
        net.stem.weight[:, 60:] = 0  # blind to the image: only x_t, t and level are left
    torch.testing.assert_close(net(x_t, t, image, level), net(x_t, t, 0 * image, level))


def test_what_the_network_is_shown_is_chosen_at_every_time(net: ClipNet) -> None:
    image, x_t = torch.randn(2, 4, 5), torch.randn(2, 3, 4, 5)
    schedule = from_diffusers(clip_scheduler())
    hidden = clip_denoiser(
        net, schedule, image, lambda y, t: (y * (t < 500)[:, None, None], torch.zeros(len(y)))
    )
    plain = clip_denoiser(net, schedule, image)
    early, late = (torch.full((2,), t, dtype=torch.float64) for t in (900.0, 100.0))
    cond = Condition()
    assert not torch.equal(hidden(x_t, early, cond), plain(x_t, early, cond))
    torch.testing.assert_close(hidden(x_t, late, cond), plain(x_t, late, cond))


def test_saved_in_half_precision_and_loaded(net: ClipNet, tmp_path) -> None:
    weights = {name: 2 * value for name, value in net.state_dict().items()}
    save_clip_net(net, weights, tmp_path)
    loaded, schedule = load_clip_net(tmp_path)
    assert loaded.config.num_frames == 3 and tuple(loaded.config.space) == (4, 5)
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and not value.requires_grad
        assert torch.equal(value, weights[name].half().float())
    assert schedule.family == "vp" and schedule.t_max == 999
    with pytest.raises(FileNotFoundError, match="no denoiser of clips"):
        load_clip_net(tmp_path / "none")
