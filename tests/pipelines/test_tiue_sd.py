"""The one-pass pipelines against the trainer's generator, as the stock ones would be called."""

import importlib.util

import pytest
import torch
from builders import tiny_stable_diffusion
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny_pipelines import tiny_sdxl

from diffdiv.models.backbones import PromptEncoder, load_denoiser
from diffdiv.models.shared_encoder import parallel_generator
from diffdiv.resources import resource

PROMPTS = ["a red seven", "two on white"]
TIMES = (751, 501, 251, 1)


def pipeline_file():
    spec = importlib.util.spec_from_file_location("tiue_sd", resource("pipelines/tiue_sd.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def case(request, tmp_path_factory):
    """A pipeline, and what the trainer makes of the same weights."""
    folder, module = tmp_path_factory.mktemp(request.param), pipeline_file()
    if request.param == "sd":
        teacher = tiny_stable_diffusion(folder)
        stock, kind = StableDiffusionPipeline.from_pretrained(teacher), module.TiUEPipeline
    else:
        torch.manual_seed(0)
        teacher = folder / "teacher"
        tiny_sdxl(folder / "scratch").save_pretrained(teacher)
        stock, kind = StableDiffusionXLPipeline.from_pretrained(teacher), module.TiUEXLPipeline
    base = load_denoiser(teacher)
    generator = parallel_generator(base, base.net, TIMES, None)
    scheduler = module.TiUEScheduler(
        encoder_time=751,
        decoder_times=TIMES,
        noise_gain=generator.steps.noise_gain,
        output_gains=tuple(generator.steps.output_gains.tolist()),
    )
    options = {"requires_safety_checker": False} if request.param == "sd" else {}
    pipe = kind(**{**stock.components, "scheduler": scheduler}, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, generator, PromptEncoder(teacher)


def noise(seeds):
    draws = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.cat(draws)


@torch.no_grad()
def test_latents_are_the_trainers(case):
    pipe, generator, encode = case
    z = noise([0, 1])
    found = pipe(PROMPTS, latents=z, output_type="latent").images
    expected = generator(z, encode(PROMPTS))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


@torch.no_grad()
def test_each_image_follows_from_its_own_seed(case):
    pipe, _, _ = case

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    several = pipe(PROMPTS[0], num_images_per_prompt=3, generator=seeded(5, 6, 7))
    alone = pipe(PROMPTS[0], generator=seeded(6), output_type="np").images
    assert len(several.images) == 3 and several.images[0].size == (16, 16)
    whole = pipe(
        PROMPTS[0], num_images_per_prompt=3, generator=seeded(5, 6, 7), output_type="np"
    ).images
    assert abs(whole[1] - alone[0]).max() < 1e-5
    latents = pipe(PROMPTS[0], generator=seeded(6), output_type="latent").images
    torch.testing.assert_close(
        latents, pipe(PROMPTS[0], latents=noise([6]), output_type="latent").images
    )


def test_it_is_called_like_the_stock_pipeline(case):
    pipe, _, _ = case
    seen = []

    def record(pipeline, step, time, values):
        seen.append((step, int(time), values["latents"].shape))
        return values

    images = pipe(
        PROMPTS, num_inference_steps=1, guidance_scale=0, callback_on_step_end=record,
        output_type="pt", return_dict=False,
    )[0]  # fmt: skip
    assert images.shape == (2, 3, 16, 16) and seen == [(0, 751, torch.Size([2, 4, 8, 8]))]
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_inference_steps": 4}, "one-pass"), ({"guidance_scale": 7.5}, "distilled into")],
)
def test_what_was_not_trained_is_refused(case, options, message):
    pipe, _, _ = case
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS, **options)


@torch.no_grad()
def test_half_precision_stays_near(case):
    pipe, _, _ = case
    z = noise([3])
    parts = [part for name, part in pipe.components.items() if name[:4] in ("unet", "text")]
    full = pipe(PROMPTS[:1], latents=z, output_type="latent").images
    for part in parts:
        part.to(torch.bfloat16)
    half = pipe(PROMPTS[:1], latents=z.bfloat16(), output_type="latent").images.float()
    for part in parts:
        part.float()
    assert float((half - full).abs().max() / full.abs().max()) < 0.05


def test_times_and_gains_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="2 for 4"):
        pipeline_file().TiUEScheduler(output_gains=(1.0, 2.0))
