"""The denoiser contract on tiny diffusers networks: preconditioning, guidance, feature taps."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, UNet2DConditionModel, UNet2DModel

from diffdiv.core.prediction import PREDICTION_KINDS
from diffdiv.core.schedule import edm, rectified_flow, schedule_from_config
from diffdiv.models.backbones import call_sd_unet, call_unet2d, load_denoiser
from diffdiv.models.denoiser import Condition, Denoiser, concatenate, guided, tap
from diffdiv.models.discriminator import heads_for
from diffdiv.models.generator import Generator


def tiny_unet(**options):
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, **options,
    )  # fmt: skip
    return net.eval()


def tiny_sd():
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
        cross_attention_dim=6, attention_head_dim=2,
    )  # fmt: skip
    schedule, kind = schedule_from_config("DDPMScheduler", {"prediction_type": "v_prediction"})
    return Denoiser(net.eval(), call_sd_unet, schedule, kind)


def batch(shape, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, count, *shape, generator=generator)


class Ideal(torch.nn.Module):
    """A network that returns what a perfect one would, for a known pair (x0, eps)."""

    def __init__(self):
        super().__init__()
        self.raw = None

    def forward(self):
        return self.raw


@pytest.mark.parametrize("sigma_data", [None, 0.5])
@pytest.mark.parametrize("kind", PREDICTION_KINDS)
def test_the_target_of_a_denoiser_is_inverted_by_it(kind, sigma_data):
    schedule = edm() if sigma_data else rectified_flow()
    net = Ideal()
    denoiser = Denoiser(net, lambda n, x, t, c: n(), schedule, kind, sigma_data)
    x0, eps = batch((1, 4, 4))
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    net.raw = denoiser.target(x0, eps, t)
    x_t = schedule.add_noise(x0, eps, t)
    torch.testing.assert_close(denoiser(x_t, t, Condition()), x0, rtol=1e-4, atol=1e-5)
    score = denoiser.predict(x_t, t, Condition(), as_="score")
    torch.testing.assert_close(score, -eps / t.float()[:, None, None, None], rtol=1e-3, atol=1e-3)


def test_edm_preconditioning_is_the_published_one():
    """Input variance 1, target variance 1 for data of std sigma_data (EDM, appendix B.6)."""
    seen = {}

    def call(_net, x_in, time, _cond):
        seen.update(x_in=x_in, time=time)
        return torch.zeros_like(x_in)

    denoiser = Denoiser(torch.nn.Identity(), call, edm(), "x0", 0.5)
    x0, eps = batch((1, 64, 64), count=3)
    t = torch.tensor([0.01, 0.5, 30.0], dtype=torch.float64)
    x_t = denoiser.schedule.add_noise(0.5 * x0, eps, t)
    denoiser(x_t, t, Condition())
    # 4096 numbers each: 5 standard errors of a variance are 0.11 (false alarm below 1e-6)
    assert seen["x_in"].var((1, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=0.11)
    target = denoiser.target(0.5 * x0, eps, t)
    assert target.var((1, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=0.11)
    torch.testing.assert_close(seen["time"], 250 * t.log())


def test_guidance_in_one_forward_equals_two():
    denoiser = tiny_sd()
    x_t, _ = batch((4, 8, 8))
    cond = Condition(text=torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2)))
    uncond = Condition(text=torch.zeros(1, 5, 6))
    t = torch.tensor([10.0, 399, 900], dtype=torch.float64)
    x0_cond, x0_uncond = denoiser(x_t, t, cond), denoiser(x_t, t, uncond.expand(3))
    expected = x0_uncond + 3.0 * (x0_cond - x0_uncond)
    teacher = guided(denoiser, 3.0, uncond)
    torch.testing.assert_close(teacher(x_t, t, cond), expected, rtol=1e-5, atol=1e-5)
    x0, (feature,) = teacher.with_features(x_t, t, cond, ["mid_block"])
    apart, (with_graph,) = teacher.with_features(x_t.requires_grad_(), t, cond, ["mid_block"])
    torch.testing.assert_close(x0, apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feature, with_graph, rtol=1e-5, atol=1e-5)
    assert with_graph.requires_grad and not apart.requires_grad and torch.is_grad_enabled()
    assert guided(denoiser, None, None) is denoiser and guided(denoiser, 1.0, None) is denoiser
    with pytest.raises(ValueError, match=r"guidance 2: this teacher has no unconditional branch"):
        guided(denoiser, 2.0, None)


def test_features_stop_the_forward_and_equal_the_full_one():
    net = tiny_unet(num_class_embeds=3)
    denoiser = Denoiser(net, call_unet2d, rectified_flow(), "flow")
    x_t, _ = batch((1, 8, 8))
    t, cond = torch.full((3,), 0.5), Condition(label=torch.tensor([0, 1, 2]))
    ran = []
    handle = net.up_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    names = ["mid_block", "down_blocks.0"]
    early = denoiser.features(x_t, t, cond, names)
    assert not ran, "the decoder ran although only encoder features were asked for"
    graph = []
    net.up_blocks[1].register_forward_hook(lambda *parts: graph.append(parts[-1].requires_grad))
    x0, full = denoiser.with_features(x_t.requires_grad_(), t, cond, names)
    handle.remove()
    assert ran and graph == [False], "the decoder built a graph that no loss on features needs"
    for a, b in zip(early, full, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(x0, denoiser(x_t, t, cond))
    assert [f.shape[1] for f in full] == [16, 8]
    assert not net.mid_block._forward_hooks
    with pytest.raises(ValueError, match=r"no block 'middle' in UNet2DModel; blocks: .*mid_block"):
        denoiser.features(x_t, t, cond, ["middle"])


def test_hooks_are_removed_when_the_forward_fails():
    net = tiny_unet()
    with pytest.raises(RuntimeError), tap(net, ["mid_block"]):
        net(torch.zeros(1, 2, 8, 8), 0)
    assert not net.mid_block._forward_hooks


@pytest.mark.parametrize("convention", ["unit", "ve"])
def test_generator_conventions(convention):
    denoiser = tiny_sd()
    z, _ = batch((4, 8, 8))
    cond = Condition(text=torch.ones(3, 5, 6))
    t = torch.full((3,), 399.0, dtype=torch.float64)
    alpha, sigma = (float(f(t[:1])) for f in (denoiser.schedule.alpha, denoiser.schedule.sigma))
    x_t = z if convention == "unit" else z * sigma
    v = denoiser.net(x_t, 399, encoder_hidden_states=cond.text).sample
    expected = alpha * x_t - sigma * v
    got = Generator(denoiser, 399, convention)(z, cond)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"t_init must lie in \(0, 999\], not 1000"):
        Generator(denoiser, 1000, convention)


def test_heads_fit_the_tapped_blocks_and_are_seeded():
    denoiser = Denoiser(tiny_unet(), call_unet2d, rectified_flow(), "flow")
    names = ["down_blocks.0", "mid_block"]
    heads = [heads_for(denoiser, (1, 8, 8), Condition(), names, seed=s) for s in (0, 0, 1)]
    features = denoiser.features(batch((1, 8, 8))[0], torch.full((3,), 0.5), Condition(), names)
    log_r = [h(features) for h in heads]
    assert log_r[0].shape == (3,)
    assert torch.equal(log_r[0], log_r[1]) and not torch.equal(log_r[0], log_r[2])


def test_conditions_join_and_refuse_a_mixture():
    a = Condition(label=torch.tensor([1]))
    joined = concatenate([a, Condition(label=torch.tensor([2, 3]))])
    assert joined.label.tolist() == [1, 2, 3]
    assert joined[1:].label.tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"field 'label' is set in some parts only"):
        concatenate([a, Condition()])


def test_a_saved_edm_network_is_loaded_with_its_preconditioning(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "unet")
    EDMEulerScheduler(sigma_data=0.7, sigma_max=9.0).save_pretrained(tmp_path / "scheduler")
    loaded = load_denoiser(tmp_path)
    assert (loaded.sigma_data, loaded.schedule.t_max) == (0.7, 9.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "unet" / "config.json").unlink(), r"no unet/config.json"),
        (lambda p: (p / "unet" / "config.json").write_text("{"), r"not valid JSON"),
        (
            lambda p: (p / "unet" / "config.json").write_text('{"_class_name": "X"}'),
            r"X is not one",
        ),
        (
            lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no"),
            r"weights cannot be read",
        ),
        (
            lambda p: (p / "scheduler" / "scheduler_config.json").write_text(
                '{"_class_name": "VQDiffusionScheduler"}'
            ),
            r"scheduler VQDiffusionScheduler .* cannot be converted",
        ),
    ],
)
def test_unreadable_teacher_folders_get_one_sentence(tmp_path, damage, message):
    tiny_unet().save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_denoiser(tmp_path)
