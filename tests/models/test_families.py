"""Every family against its own stock pipeline: same latents, embeddings and steps."""

from collections.abc import Callable
from dataclasses import replace
from math import exp
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from diffdiv.core.tensor import expand_like
from diffdiv.models.adapters import SharedBase, enable_checkpointing
from diffdiv.models.backbones import load_denoiser, stored_shape
from diffdiv.models.denoiser import Condition, Denoiser, guided
from diffdiv.models.families import (
    FAMILIES,
    latent_shape,
    lora_targets,
    middle_block,
    schedule_for,
)
from diffdiv.samplers import sample_ode, time_grid

WIDTH, LENGTH, BATCH = 8, 5, 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sdxl() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=WIDTH,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def pixart(sample_size: int = 8) -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=12,
        caption_channels=WIDTH,
        sample_size=sample_size,
        norm_num_groups=4,
    )


def sana() -> nn.Module:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=1,
        timestep_scale=2.0,
    )


def flux(guidance_embeds: bool = True) -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "sdxl": sdxl,
    "sd3": sd3,
    "pixart": pixart,
    "pixart told its size": lambda: pixart(128),
    "sana": sana,
    "flux dev": flux,
    "flux schnell": lambda: flux(guidance_embeds=False),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = BUILDERS[name]().eval()
    for parameter in net.parameters():  # output layers start at zero: nothing would be compared
        if not parameter.any():
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return net


def condition(name: str, seed: int = 1) -> Condition:
    text, pooled = draw(BATCH, LENGTH, WIDTH, seed=seed), draw(BATCH, WIDTH, seed=seed + 1)
    match name.split()[0]:
        case "sdxl":
            size = torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(BATCH, 6)
            return Condition(text=text, pooled=pooled, time_ids=size)
        case "pixart" | "sana":
            mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
            return Condition(text=text, text_mask=mask)
    return Condition(text=text, pooled=pooled)


DDIM = DDIMScheduler(
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=True,
    timestep_spacing="trailing",
)
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
DYNAMIC = FlowMatchEulerDiscreteScheduler(
    use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
)


def scheduler(name: str) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    by_family = {"sdxl": DDIM, "pixart": DDIM, "flux": DYNAMIC}
    return by_family.get(name.split()[0], FLOW)


def denoiser(name: str, net: nn.Module) -> Denoiser:
    settings = scheduler(name)
    schedule, kind = schedule_for(type(settings).__name__, settings.config, (4, 8, 8))
    call = FAMILIES[type(net).__name__].bind(net.config)
    return Denoiser(net=net, call=call, schedule=schedule, prediction=kind)


def stock(name: str, net: nn.Module, z: Tensor, cond: Condition, steps: int) -> Tensor:
    """Latents of the family's own pipeline after ``steps`` steps without guidance."""
    nothing = dict.fromkeys(
        ("vae text_encoder text_encoder_2 text_encoder_3 tokenizer tokenizer_2 tokenizer_3").split()
    )
    shared = {
        "prompt_embeds": cond.text,
        "num_inference_steps": steps,
        "output_type": "latent",
        "latents": z,
    }
    sigmas = [1 - i / steps for i in range(steps)]
    match name.split()[0]:
        case "sdxl":
            for key in ("text_encoder_3", "tokenizer_3"):
                del nothing[key]
            pipe = StableDiffusionXLPipeline(
                **nothing, unet=net, scheduler=DDIM, add_watermarker=False
            )
            options = {"pooled_prompt_embeds": cond.pooled, "guidance_scale": 0, "height": 64}
        case "sd3":
            pipe = StableDiffusion3Pipeline(**nothing, transformer=net, scheduler=FLOW)
            options = {"pooled_prompt_embeds": cond.pooled, "guidance_scale": 0, "height": 64}
            options["sigmas"] = sigmas
        case "pixart" | "sana":
            nothing = {key: None for key in ("vae", "text_encoder", "tokenizer")}
            kind = PixArtAlphaPipeline if "pixart" in name else SanaPipeline
            pipe = kind(**nothing, transformer=net, scheduler=scheduler(name))
            options = {"prompt_attention_mask": cond.text_mask, "guidance_scale": 0}
            options |= {"use_resolution_binning": False, "negative_prompt": None}
            if "sana" in name:
                options |= {"sigmas": sigmas, "height": 256, "width": 256}
            else:
                options["height"] = 64
        case _:
            for key in ("text_encoder_3", "tokenizer_3"):
                del nothing[key]
            pipe = FluxPipeline(**nothing, transformer=net, scheduler=DYNAMIC)
            packed = FluxPipeline._pack_latents(z, *z.shape)
            options = {"pooled_prompt_embeds": cond.pooled, "latents": packed, "height": 64}
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(**{"width": 64, **shared, **options}).images
    if "flux" in name:
        latents = FluxPipeline._unpack_latents(latents, 64, 64, 8)
    return latents


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", BUILDERS)
def test_steps_equal_those_of_the_stock_pipeline(name: str, steps: int) -> None:
    net, cond, z = build(name), condition(name), draw(BATCH, 4, 8, 8)
    ours = denoiser(name, net)
    times = time_grid(ours.schedule, steps)
    first = expand_like(ours.schedule.sigma(times[:1]), z)  # diffusers starts from z itself
    found = sample_ode(ours, z / first, cond, times)
    with torch.no_grad():
        expected = stock(name, net, z, cond, steps)
        other = stock(name, net, z, condition(name, seed=7), steps)
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    assert (other - expected).abs().max() > 1e-3 * scale  # the condition is heard


@pytest.mark.parametrize("name", BUILDERS)
def test_batched_guidance_equals_two_calls(name: str) -> None:
    ours, x_t = denoiser(name, build(name).double()), draw(BATCH, 4, 8, 8).double()
    double = {"device": x_t.device, "dtype": x_t.dtype}
    cond, uncond = condition(name).to(**double), condition(name, seed=5)[:1].to(**double)
    t = ours.schedule.sample_t(torch.tensor([0.3, 0.6]))
    with torch.no_grad():
        found = guided(ours, 3.0, uncond)(x_t, t, cond)
        x0, base = ours(x_t, t, cond), ours(x_t, t, uncond.expand(BATCH))
    assert torch.allclose(found, base + 3.0 * (x0 - base), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_masked_text_is_not_heard(name: str) -> None:
    ours, x_t, cond = denoiser(name, build(name)), draw(BATCH, 4, 8, 8), condition(name)
    assert cond.text is not None
    t = ours.schedule.sample_t(torch.tensor([0.3, 0.6]))
    changed = cond.text.clone()
    changed[0, 3:] = 9.0  # beyond the mask of the first sample
    with torch.no_grad():
        first, second = (ours(x_t, t, c) for c in (cond, replace(cond, text=changed)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_shared_base_of_every_family(name: str) -> None:
    """Adapters reach many layers; checkpointing keeps gradients through two roles exact."""
    net, cond, x_t = build(name).double(), condition(name), draw(BATCH, 4, 8, 8).double()
    cond = cond.to(x_t.device, torch.float64)
    plain = denoiser(name, build(name).double().requires_grad_(False))
    t = plain.schedule.sample_t(torch.tensor([0.3, 0.6]))
    shared = SharedBase(net)
    targets = lora_targets(net)
    student = shared.add("student", rank=2, alpha=2, targets=targets, seed=0)
    fake = shared.add("fake", rank=2, alpha=2, targets=targets, seed=1)
    for parameter in [*student.parameters(), *fake.parameters()]:
        parameter.data += 0.1
    ours = denoiser(name, net)

    def gradients() -> tuple[Tensor, ...]:
        x0 = ours.with_net(student)(x_t, t, cond)
        judged = ours.with_net(fake)(x0, t, cond) - ours(x0, t, cond)
        return torch.autograd.grad(judged.square().sum(), list(student.parameters()))

    expected = gradients()
    enable_checkpointing(shared)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    silent = [
        n for (n, _), g in zip(student.named_parameters(), expected, strict=True) if not g.any()
    ]
    # the text stream ends in SD3's last block: nothing reads what its text queries find
    last = "transformer_blocks.1.attn.add_q_proj.lora_"
    assert silent == ([f"{last}A.weight", f"{last}B.weight"] if name == "sd3" else [])
    assert torch.equal(ours(x_t, t, cond), plain(x_t, t, cond))


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart", "sana", "flux dev"])
def test_a_folder_of_every_family_is_loaded(name: str, tmp_path: Path) -> None:
    net, cond = build(name), condition(name)
    folder = FAMILIES[type(net).__name__].folder
    net.save_pretrained(tmp_path / folder)
    scheduler(name).save_pretrained(tmp_path / "scheduler")
    loaded = load_denoiser(tmp_path)
    shape = (4, 128, 128) if "flux" in name else (4, 8, 8)
    assert stored_shape(tmp_path) == shape
    x_t, times = draw(BATCH, 4, 8, 8), torch.tensor([300.0, 600.0])
    with torch.no_grad():
        expected = denoiser(name, net).call(net, x_t, times, cond)
        assert torch.equal(loaded.call(loaded.net, x_t, times, cond), expected)
    if "flux" in name:  # 4096 patches: the largest shift
        middle = float(loaded.schedule.sample_t(torch.tensor([0.5])))
        assert middle == pytest.approx(exp(1.15) / (1 + exp(1.15)))


@pytest.mark.parametrize("name", BUILDERS)
def test_features_are_maps_of_the_image(name: str) -> None:
    """Changing one corner of the image changes that corner of an early feature the most."""
    ours, cond = denoiser(name, build(name)), condition(name)
    block = "down_blocks.0" if name == "sdxl" else "transformer_blocks.0"
    x_t = draw(BATCH, 4, 8, 12)  # wider than high
    t = ours.schedule.sample_t(torch.tensor([0.3, 0.6]))
    changed = x_t.clone()
    changed[:, :, :2, 10:] += 1.0
    with torch.no_grad():
        (first,), (second,) = (ours.features(x, t, cond, [block]) for x in (x_t, changed))
        x0, (beside,) = ours.with_features(x_t, t, cond, [block])
    assert torch.equal(beside, first) and x0.shape == x_t.shape
    assert first.ndim == 4 and first.shape[3] * 2 == first.shape[2] * 3
    change = (second - first).abs().sum((0, 1))
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert row <= change.shape[0] / 4 and column >= change.shape[1] * 3 / 4


def test_flow_modes_of_multistep_solvers_are_rectified_flows() -> None:
    settings = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    schedule, kind = schedule_for("DPMSolverMultistepScheduler", settings.config, (4, 8, 8))
    assert kind == "flow"
    assert float(schedule.sample_t(torch.tensor([0.5]))) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    assert float(schedule.net_time(torch.tensor([0.25]))) == 250


def test_sample_shapes() -> None:
    assert latent_shape(sd3().config) == (4, 8, 8)
    assert latent_shape(flux().config) == (4, 128, 128)
    assert latent_shape({"in_channels": 3, "sample_size": [4, 6]}) == (3, 4, 6)


def test_targets_that_a_small_network_lacks_are_left_out() -> None:
    net = UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    assert "downsamplers.0.conv" not in lora_targets(net)
    assert {"conv1", "conv2", "time_emb_proj"} < set(lora_targets(net))


def test_unknown_added_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="addition_embed_type 'image' is not supported"):
        FAMILIES["UNet2DConditionModel"].bind({"addition_embed_type": "image"})


def test_the_middle_block_exists_in_every_family() -> None:
    for name in BUILDERS:
        net = build(name)
        name_of_block = middle_block(net)
        assert name_of_block in dict(net.named_modules()), (name, name_of_block)
