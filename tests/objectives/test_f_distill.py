"""f-distill against plain compositions, exact densities and closed forms."""

import copy
from math import log

import pytest
import torch
from torch.nn.functional import softplus

from diffdiv.core.divergence import DIVERGENCES, get_divergence
from diffdiv.core.schedule import Noising, edm, rectified_flow
from diffdiv.data.toy import gaussian_ring
from diffdiv.models.backbones import call_unet2d
from diffdiv.models.denoiser import Condition, Denoiser, GuidedDenoiser
from diffdiv.models.discriminator import heads_for
from diffdiv.objectives.denoising import denoising_loss
from diffdiv.objectives.f_distill import (
    Critic,
    RatioStatistics,
    Real,
    density_ratio_loss,
    fake_score_loss,
    student_loss,
    vsd_direction,
)

SHAPE, COUNT, BLOCKS = (1, 8, 8), 4, ["mid_block"]
CPU = torch.device("cpu")


def network(seed, **options):
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16),
        layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, num_class_embeds=3,
        **options,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def world():
    """Teacher, fake, heads (float64), a batch of samples with graph, its noising."""
    schedule = edm(sigma_max=10.0)
    teacher = Denoiser(network(0).double(), call_unet2d, schedule, "x0", 0.5)
    teacher.net.requires_grad_(False)
    fake = teacher.with_net(network(1).double())
    cond = Condition(label=torch.tensor([0, 1, 2, 0]))
    disc = _double(heads_for(teacher.with_net(network(0)), SHAPE, cond[:1], BLOCKS, seed=3))
    z = torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    at, real_at = (
        Noising.draw(schedule, SHAPE, range(COUNT), seed=0, purpose=p, device=CPU) for p in "ab"
    )
    at, real_at = (Noising(a.t, a.u, a.eps.double()) for a in (at, real_at))
    return teacher, fake, disc, cond, z, at, Real(0.5 * z.flip(0), cond, real_at)


class _double(torch.nn.Module):
    """Heads in float64 (the shipped ones work in float32)."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads.heads.double()

    def forward(self, features):
        logits = [head(f) for head, f in zip(self.heads, features, strict=True)]
        return torch.cat(logits, 1).mean(1)


def student_gradient(world, divergence, *, gan_weight=None, balance=False, guidance=None, **trunk):
    teacher, fake, disc, cond, z, at, _ = world
    if guidance:
        teacher = GuidedDenoiser(teacher, guidance, Condition(label=torch.tensor([0])))
    x0 = (0.5 * z).requires_grad_()
    ratio = RatioStatistics(get_divergence(divergence))
    critic = Critic(teacher, fake, disc, BLOCKS, trunk.get("trunk", "teacher"))
    loss, metrics = student_loss(
        x0, cond, at, critic=critic, ratio=ratio, gan_weight=gan_weight, balance_gan=balance
    )
    loss.backward()
    return x0.grad, metrics


def plain_vsd_gradient(world, guidance=None):
    """DMD's gradient, composed the usual way; returns it and the teacher's logits."""
    teacher, fake, disc, cond, z, at, _ = world
    x0 = 0.5 * z
    x_t = x0 + at.t[:, None, None, None] * at.eps
    with torch.no_grad():
        teacher_x0 = teacher(x_t, at.t, cond)
        if guidance:
            uncond = teacher(x_t, at.t, Condition(label=torch.zeros(COUNT, dtype=torch.long)))
            teacher_x0 = uncond + guidance * (teacher_x0 - uncond)
        fake_x0 = fake(x_t, at.t, cond)
        log_r = disc(teacher.with_features(x_t, at.t, cond, BLOCKS)[1])
    scale = (x0 - teacher_x0).abs().mean((1, 2, 3), keepdim=True)
    return (fake_x0 - teacher_x0) / scale / x0.numel(), log_r


def test_reverse_kl_is_plain_vsd_bit_for_bit(world):
    teacher, fake, _, cond, z, at, _ = world
    with_heads, _ = student_gradient(world, "reverse_kl")
    x0 = (0.5 * z).requires_grad_()
    critic = Critic(teacher, fake, None, BLOCKS, "teacher")
    student_loss(x0, cond, at, critic=critic, ratio=None)[0].backward()
    assert torch.equal(with_heads, x0.grad)
    torch.testing.assert_close(x0.grad, plain_vsd_gradient(world)[0], rtol=1e-12, atol=1e-15)


def test_reverse_kl_stays_a_no_op_whatever_was_observed():
    ratio = RatioStatistics(get_divergence("reverse_kl"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        log_r, u = torch.randn(5, generator=generator), torch.rand(5, generator=generator)
        ratio.observe(log_r, u)
        ratio.commit()
        assert torch.equal(ratio.weights(log_r, u), torch.ones(5))


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("name", [d.name for d in DIVERGENCES])
def test_gradient_equals_the_plain_composition(world, name, guidance):
    divergence = get_divergence(name)
    got, _ = student_gradient(world, name, guidance=guidance)
    plain, log_r = plain_vsd_gradient(world, guidance)
    h = divergence.h(log_r) / divergence.h(torch.zeros(()))  # nothing observed yet
    torch.testing.assert_close(got, h[:, None, None, None] * plain, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("trunk", ["teacher", "fake"])
def test_gan_gradient_equals_autograd_through_a_separate_pass(world, trunk):
    teacher, fake, disc, cond, z, at, _ = world
    without, _ = student_gradient(world, "jensen_shannon", trunk=trunk)
    got, metrics = student_gradient(world, "jensen_shannon", gan_weight=0.3, trunk=trunk)
    x0 = (0.5 * z).requires_grad_()
    x_t = x0 + at.t[:, None, None, None] * at.eps
    source = teacher if trunk == "teacher" else fake
    loss = softplus(-disc(source.with_features(x_t, at.t, cond, BLOCKS)[1])).mean()
    (gan_grad,) = torch.autograd.grad(0.3 * loss, x0)
    torch.testing.assert_close(got - without, gan_grad, rtol=1e-8, atol=1e-14)
    assert float(metrics["student/gan_loss"]) == pytest.approx(float(loss.detach()))


def test_balanced_gan_gradient_has_the_asked_share(world):
    without, _ = student_gradient(world, "jensen_shannon")
    got, metrics = student_gradient(world, "jensen_shannon", gan_weight=0.25, balance=True)
    assert float((got - without).norm() / without.norm()) == pytest.approx(0.25, rel=1e-9)
    assert float(metrics["student/gan_gradient_norm"]) == pytest.approx(
        float(0.25 * without.norm())
    )


def test_vsd_direction_is_the_score_difference():
    """(fake_x0 - teacher_x0) = sigma^2/alpha (s_fake - s_teacher), with exact densities."""
    p, q = gaussian_ring(8), gaussian_ring(3)
    schedule = rectified_flow()
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    generator = torch.Generator().manual_seed(0)
    x0, x_t = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    got = vsd_direction(x0, p.x0_mean(x_t, alpha, sigma), q.x0_mean(x_t, alpha, sigma))
    scale = (x0 - p.x0_mean(x_t, alpha, sigma)).abs().mean(1, keepdim=True)
    gap = q.score(x_t, alpha, sigma) - p.score(x_t, alpha, sigma)
    torch.testing.assert_close(
        got * scale, (sigma**2 / alpha)[:, None] * gap, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", ["jensen_shannon", "forward_kl", "squared_hellinger", "jeffreys"])
def test_weights_converge_to_h_over_its_mean(name):
    """p = N(1, 1), q = N(0, 1): log r = x - 1/2 and E_q[h] is known by quadrature."""
    divergence = get_divergence(name)
    ratio = RatioStatistics(divergence, decay=0.99, clip=(1e-4, 1e4))
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        x = torch.randn(256, generator=generator, dtype=torch.float64)
        # a miscalibrated discriminator: stage 1 must take the constant factor out again
        ratio.observe(x - 0.5 + 0.7, torch.rand(256, generator=generator))
        ratio.commit()
    grid = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2) / (2 * torch.pi) ** 0.5 * (grid[1] - grid[0])
    mean = (density * divergence.h(grid - 0.5)).sum()
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    expected = divergence.h(x - 0.5) / mean.float()
    # the averages hold 256 * 199 samples; the widest law (forward KL) has relative error 0.6 %
    # per bin mean 2 %: 10 % is five standard errors
    got = ratio.weights(x - 0.5 + 0.7, torch.full((4,), 0.35))
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0)


def test_first_commit_is_bias_corrected_and_bins_are_quantiles():
    ratio = RatioStatistics(get_divergence("forward_kl"), decay=0.9, clip=(1e-6, 1e6))
    u = torch.tensor([0.05, 0.06, 0.95])
    ratio.observe(torch.tensor([log(2.0), log(4.0), log(5.0)]), u)
    ratio.commit()
    total, weight = ratio.mean_r
    assert (total / weight)[[0, 9]].tolist() == pytest.approx([3.0, 5.0])
    assert weight[1:9].abs().max() == 0, "empty bins must not decay towards anything"
    # E_q[r] = 1: r = 3 in the first bin is r = 1 after stage 1
    assert float(ratio._normalised_log_r(torch.tensor([log(3.0)]), u[:1])) == pytest.approx(
        0, abs=1e-6
    )


def test_a_lone_sample_is_not_normalised_by_itself():
    """With the batch's own mean a bin that holds one sample would always say r = 1."""
    ratio = RatioStatistics(get_divergence("jensen_shannon"))
    weights = [float(ratio.weights(torch.tensor([a]), torch.tensor([0.5]))) for a in (-1.0, 1.0)]
    assert weights[0] < 0.6 < 1.4 < weights[1]


def test_accumulation_does_not_change_the_statistics():
    generator = torch.Generator().manual_seed(0)
    log_r, u = torch.randn(8, generator=generator), torch.rand(8, generator=generator)
    whole, parts = (RatioStatistics(get_divergence("jeffreys")) for _ in range(2))
    whole.observe(log_r, u)
    for row in range(8):
        parts.observe(log_r[row : row + 1], u[row : row + 1])
    whole.commit()
    parts.commit()
    torch.testing.assert_close(whole.mean_r, parts.mean_r, rtol=1e-14, atol=0)
    torch.testing.assert_close(whole.mean_h, parts.mean_h, rtol=1e-14, atol=0)
    restored = RatioStatistics(get_divergence("jeffreys"))
    restored.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert torch.equal(restored.weights(log_r, u), whole.weights(log_r, u))


def test_small_batches_are_warned_of_where_the_divergence_is_noisy():
    quiet, noisy = (RatioStatistics(get_divergence(n), decay=0.5) for n in ("reverse_kl", "kl"))
    generator = torch.Generator().manual_seed(0)
    for ratio in (quiet, noisy):
        for _ in range(20):
            ratio.observe(
                3 * torch.randn(2, generator=generator), torch.rand(2, generator=generator)
            )
            ratio.commit()
    assert quiet.warning() is None
    assert "forward_kl is known to" in (noisy.warning() or "")


def test_bad_ratio_input():
    with pytest.raises(ValueError, match=r"increasing and positive, not \(2, 1\)"):
        RatioStatistics(get_divergence("js"), clip=(2, 1))
    with pytest.raises(ValueError, match=r"shape \[B\], not \[2, 1\]"):
        RatioStatistics(get_divergence("js")).weights(torch.zeros(2, 1), torch.zeros(2))


def test_density_ratio_loss_equals_separate_passes_and_leaves_the_trunk_alone(world):
    teacher, fake, disc, cond, z, at, real = world
    for trunk, source in (("teacher", teacher), ("fake", fake)):
        ratio = RatioStatistics(get_divergence("jensen_shannon"))
        critic = Critic(teacher, fake, disc, BLOCKS, trunk)
        loss, _ = density_ratio_loss(0.5 * z, cond, at, real, critic=critic, ratio=ratio)
        with torch.no_grad():
            x_t = 0.5 * z + at.t[:, None, None, None] * at.eps
            x_t_real = real.x0 + real.at.t[:, None, None, None] * real.at.eps
            log_fake = disc(source.with_features(x_t, at.t, cond, BLOCKS)[1])
            log_real = disc(source.with_features(x_t_real, real.at.t, cond, BLOCKS)[1])
        expected = softplus(log_fake).mean() + softplus(-log_real).mean()
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-10)
        disc.zero_grad()
        fake.net.zero_grad()
        loss.backward()
        assert all(p.grad is None for p in fake.net.parameters())
        assert any(p.grad is not None for p in disc.parameters())


def test_fake_score_loss_of_edm_is_the_weighted_x0_error(world):
    _, fake, _, cond, z, at, _ = world
    loss, _ = fake_score_loss(fake, 0.5 * z, cond, at)
    x_t = 0.5 * z + at.t[:, None, None, None] * at.eps
    weight = (at.t**2 + 0.25) / (at.t * 0.5) ** 2  # EDM's lambda(sigma)
    error = (fake(x_t, at.t, cond) - 0.5 * z).square().mean((1, 2, 3))
    assert float(loss.detach()) == pytest.approx(float((weight * error).mean().detach()), rel=1e-6)
    assert torch.equal(denoising_loss(fake, 0.5 * z, cond, at), loss)
