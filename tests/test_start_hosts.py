"""Further hosts started at M, at tiny random size: what their networks see, and when."""

from math import sqrt

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from test_video_start import expected, generator, stats_for
from tiny_start_pipelines import STARTED, tiny_started
from torch import Tensor

from diffdiv.models.video import VideoCodec
from diffdiv.video_start import prepare_start

START, STEPS = 0.8, 10
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
SIZES = {"ltx": (17, 32, 32), "i2vgen-xl": (3, 16, 16), "hunyuan-1.5": (5, 16, 16)}
CLEAN_FIRST = ("wan-2.2-5b", "skyreels-v2-forcing", "ltx", "hunyuan")  # the image is a frame


def words(name: str) -> dict[str, object]:
    """A text's embedding in place of a text, where the encoders are left out."""
    text, pooled = (torch.randn(*n, generator=generator(3)) for n in ((1, 6, 16), (1, 16)))
    mask = torch.ones(1, 6, dtype=torch.int64)
    if name.startswith("hunyuan-1.5"):
        return {
            "prompt_embeds": text, "prompt_embeds_mask": mask, "prompt_embeds_2": text,
            "prompt_embeds_mask_2": mask,
        }  # fmt: skip
    if name.startswith(("hunyuan", "skyreels-v1")):
        return {
            "prompt_embeds": text, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask,
        }  # fmt: skip
    if name == "ltx":
        return {"prompt_embeds": text, "prompt_attention_mask": mask, "guidance_scale": 1.0}
    if name == "i2vgen-xl":
        return {"prompt_embeds": text, "negative_prompt_embeds": -text, "target_fps": 8}
    return {"prompt_embeds": text, "negative_prompt_embeds": -text, "guidance_scale": 1.0}


def called(
    pipe: DiffusionPipeline, name: str, **options: object
) -> tuple[Tensor, list[float], Tensor]:
    """First input of the network, its times, and the latents in the end."""
    seen: list[Tensor] = []
    times: list[float] = []

    def look(_module: object, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        times.append(float((args[1] if args else kwargs["timestep"]).max()))

    nets = [pipe.components.get(part) for part in ("unet", "transformer", "transformer_2")]
    hooks = [n.register_forward_pre_hook(look, with_kwargs=True) for n in nets if n is not None]
    frames = pipe(
        image=IMAGE, output_type="latent", generator=generator(), **words(name), **options
    )
    for hook in hooks:
        hook.remove()
    return seen[0][-1:], sorted(set(times), reverse=True), frames.frames


@pytest.mark.parametrize("name", STARTED)
def test_a_host_runs_from_m(name: str) -> None:
    pipe, size = tiny_started(name), SIZES.get(name, (5, 16, 16))
    codec = VideoCodec(pipe.components["vae"])
    stats = stats_for(codec.space(*size))
    start = prepare_start(
        pipe, stats, START, num_inference_steps=STEPS, generator=generator(7), size=size,
        image=IMAGE,
    )  # fmt: skip
    seen, times, frames = called(pipe, name, **start)
    eps = torch.randn(1, *stats.space.shape, generator=generator(7))
    scheduler = pipe.components["scheduler"]
    if name == "i2vgen-xl":
        abar = float(scheduler.alphas_cumprod[int(times[0])])
        alpha, sigma = sqrt(abar), sqrt(1 - abar)
        assert times[0] <= 1000 * START - 1 < times[0] + 100
    else:
        sigma = float(scheduler.sigmas[0])
        alpha = 1 - sigma
        assert START - 0.1 < sigma <= START + 1e-6 and times[0] == pytest.approx(
            1000 * sigma, abs=1
        )
    assert 2 < len(times) <= STEPS
    if name == "ltx":
        seen = pipe._unpack_latents(seen, *stats.space.shape[:1], *stats.space.shape[2:])
    x, x_m = seen.transpose(1, 2)[:, :, : codec.channels], expected(stats, alpha, sigma, eps)
    first = int(name in CLEAN_FIRST)
    tolerance = 1e-5 if name.startswith("hunyuan") else 1e-6  # which mixes and divides
    if name in ("hunyuan", "hunyuan-concat"):  # 0.1 % of the image is mixed into what it is given
        x_m = x_m + 0.001 * clean(codec, size).double()
    torch.testing.assert_close(x[:, first:].double(), x_m[:, first:], rtol=1e-5, atol=tolerance)
    if first:
        torch.testing.assert_close(x[:, :1], clean(codec, size), rtol=1e-4, atol=1e-5)
    assert frames.isfinite().all()


def clean(codec: VideoCodec, size: tuple[int, int, int]) -> Tensor:
    """Latent of the image, [1, 1, C, H, W]."""
    small = torch.tensor(np.array(IMAGE.resize(size[:0:-1], Image.Resampling.LANCZOS)))
    frame = small.permute(2, 0, 1)[None, None] / 127.5 - 1
    return codec.scaled(codec.posterior(frame)[0])


def test_ltx_starts_at_m_by_its_scheduler_alone_and_wants_the_image_else() -> None:
    pipe = tiny_started("ltx")
    start = prepare_start(pipe, None, START, num_inference_steps=STEPS)
    assert start == {"num_inference_steps": STEPS}
    _, times, frames = called(pipe, "ltx", num_frames=17, height=32, width=32, **start)
    assert 600 < times[0] <= 1000 * START and len(times) < STEPS and frames.isfinite().all()
    stats = stats_for(VideoCodec(pipe.components["vae"]).space(17, 32, 32))
    with pytest.raises(ValueError, match=r"hold the clean first frame: give image= too"):
        prepare_start(pipe, stats, START)


def test_latents_of_further_autoencoders_are_scaled_as_their_pipelines_do() -> None:
    ltx, later = tiny_started("ltx"), tiny_started("hunyuan-1.5")
    z = torch.randn(1, 3, 8, 4, 4, generator=generator())
    vae = ltx.vae
    own = ltx._normalize_latents(z.transpose(1, 2), vae.latents_mean, vae.latents_std)
    torch.testing.assert_close(VideoCodec(vae).scaled(z), own.transpose(1, 2))
    torch.testing.assert_close(VideoCodec(later.vae).scaled(z), z * 1.03682)
    for pipe, frames, size in ((ltx, 17, 32), (later, 5, 16)):
        codec = VideoCodec(pipe.vae)
        video = torch.randn(1, frames, 3, size, size, generator=generator())
        mean, std = codec.posterior(video)
        assert mean.shape == std.shape == (1, *codec.space(frames, size, size).shape)


def test_below_the_boundary_wans_first_expert_rests() -> None:
    """Wan 2.2: at M = 0.8 every step is the second network's."""
    pipe, ran = tiny_started("wan-2.2"), []
    for name in ("transformer", "transformer_2"):
        net = pipe.components[name]
        net.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    called(pipe, "wan-2.2", num_frames=5, height=16, width=16,
           **prepare_start(pipe, None, START, num_inference_steps=STEPS))  # fmt: skip
    assert set(ran) == {"transformer_2"}
    ran.clear()
    called(pipe, "wan-2.2", num_frames=5, height=16, width=16,
           **prepare_start(pipe, None, 1.0, num_inference_steps=STEPS))  # fmt: skip
    assert set(ran) == {"transformer", "transformer_2"}
