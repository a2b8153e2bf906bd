"""Image-to-video pipelines of stock diffusers, started at M: what their networks see."""

import json
import subprocess
import sys
from collections.abc import Mapping
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    StableVideoDiffusionPipeline,
)
from PIL import Image
from tiny_video_pipelines import saved, svd_scheduler, tiny_cogvideox, tiny_svd, tiny_wan
from torch import Tensor

from diffdiv.core.latent_stats import Granularity, LatentMoments, LatentSpace, LatentStats
from diffdiv.models.video import VideoCodec
from diffdiv.video_start import prepare_start, save_started, start_scheduler

STEPS = 5
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
SIZES = {"svd": (3, 16, 16), "wan": (5, 16, 16), "cogvideox": (5, 64, 64)}
SIZES["cogvideox-1.5"] = SIZES["cogvideox"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipes() -> Mapping[str, DiffusionPipeline]:
    made = {
        "svd": tiny_svd(),
        "wan": tiny_wan(),
        "cogvideox": tiny_cogvideox(),
        "cogvideox-1.5": tiny_cogvideox(patch_size_t=2),
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def stats_for(space: LatentSpace, granularity: Granularity = "shrunk") -> LatentStats:
    """Of 40 random videos with means far from 0."""
    moments = LatentMoments(space)
    offset = torch.linspace(-2, 3, space.channels).reshape(1, 1, -1, 1, 1)
    where = torch.randn(1, *space.shape, generator=generator(1))
    moments.add(offset + where + 0.7 * torch.randn(40, *space.shape, generator=generator(2)))
    return moments.stats(granularity)


def call(pipe: DiffusionPipeline, name: str, **options: object) -> Tensor:
    """The pipeline's call on one image, to latents; only what ``prepare_start`` leaves open."""
    fixed: dict[str, object] = {"output_type": "latent", "generator": generator()}
    if name == "wan":  # whose text cleaning wants a package of its own
        text = torch.randn(1, 16, 16, generator=generator(3))
        fixed |= {"prompt_embeds": text, "negative_prompt_embeds": -text}
    elif name != "svd":
        fixed |= {"prompt": "a cat", "max_sequence_length": 16}
    return pipe(IMAGE, **fixed, **options).frames


def first_input(
    pipe: DiffusionPipeline, name: str, **options: object
) -> tuple[Tensor, list[float]]:
    """What the network saw first, frames first, without its image; and all its times."""
    net = pipe.components["unet" if name == "svd" else "transformer"]
    seen, times = [], []

    def look(_module: object, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        times.append(float((args[1] if args else kwargs["timestep"]).flatten()[0]))

    hook = net.register_forward_pre_hook(look, with_kwargs=True)
    call(pipe, name, **options)
    hook.remove()
    x = seen[0][-1:]
    if name == "wan":
        x = x.transpose(1, 2)
    return x[:, :, : VideoCodec(pipe.vae).channels], sorted(set(times), reverse=True)


def expected(stats: LatentStats, alpha: float, sigma: float, eps: Tensor) -> Tensor:
    """x_M by hand."""
    return alpha * stats.mean + (sigma**2 + alpha**2 * stats.var).sqrt() * eps.double()


def test_svds_network_sees_exactly_x_m(pipes) -> None:
    pipe, size = pipes["svd"], SIZES["svd"]
    stats = stats_for(VideoCodec(pipe.vae).space(*size))
    start = prepare_start(
        pipe, stats, sigma=100.0, num_inference_steps=STEPS, generator=generator(7)
    )
    assert start.keys() == {"latents", "sigmas", "num_frames", "height", "width"}
    seen, times = first_input(pipe, "svd", **start)
    x_m = expected(stats, 1.0, 100.0, torch.randn(1, *stats.space.shape, generator=generator(7)))
    torch.testing.assert_close(seen.double() * sqrt(100**2 + 1), x_m, rtol=1e-6, atol=1e-6)
    ramp = [(100 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 100 ** (1 / 7))) ** 7 for i in range(5)]
    assert times == pytest.approx([0.25 * np.log(s) for s in ramp], rel=1e-4)
    assert pipe.scheduler.config.sigma_max == 700.0, "the pipeline itself is unchanged"


@pytest.mark.parametrize(
    "start", [0.94, *(pytest.param(m, marks=pytest.mark.slow) for m in (0.85, 0.6))]
)
def test_sigmas_of_the_call_equal_sigma_max_of_the_scheduler(pipes, start: float, tmp_path) -> None:
    """Two routes to M, and the second one again after save and reload."""
    pipe = pipes["svd"]
    stats = stats_for(VideoCodec(pipe.vae).space(*SIZES["svd"]))
    options = prepare_start(pipe, stats, start, num_inference_steps=STEPS, generator=generator(7))
    by_call = call(pipe, "svd", **options)
    del options["sigmas"]
    options["num_inference_steps"] = STEPS
    pipe.scheduler = start_scheduler(pipe.scheduler, start)
    by_scheduler = call(pipe, "svd", **options)
    save_started(pipe, tmp_path)
    pipe.scheduler = svd_scheduler()
    again = StableVideoDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    first = 0.002 ** (1 - start) * 700**start
    assert again.scheduler.config.sigma_max == pytest.approx(first)
    assert torch.equal(by_call, by_scheduler)
    assert torch.equal(call(again, "svd", **options), by_call)
    assert not torch.allclose(call(pipe, "svd", **options), by_call, rtol=0.01)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "cogvideox-1.5"])
@pytest.mark.parametrize("start", [1.0, 0.8])
def test_other_hosts_run_from_m(pipes, name: str, start: float) -> None:
    pipe = pipes[name]
    stats = stats_for(VideoCodec(pipe.vae).space(*SIZES[name]))
    options = prepare_start(pipe, stats, start, num_inference_steps=10, generator=generator(7))
    seen, times = first_input(pipe, name, **options)
    eps = torch.randn(seen.shape, generator=generator(7))
    if name == "wan":
        sigma = float(pipe.scheduler.sigmas[0])
        assert start - 0.1 < sigma <= start
        x_m = expected(stats, 1 - sigma, sigma, eps)
    else:
        abar = float(pipe.scheduler.alphas_cumprod[int(times[0])])
        assert times[0] == 1000 * start - 1
        x_m = expected(stats, sqrt(abar), sqrt(1 - abar), eps)
    torch.testing.assert_close(seen.double(), x_m, rtol=1e-5, atol=1e-6)
    # a trailing grid: 3 t' / (1 + 2 t') <= 0.8 leaves 5 of 10 flow times
    left = 10 if start == 1 else {"wan": 5}.get(name, 8)
    assert len(times) == left
    frames = call(pipe, name, **options)
    assert frames.isfinite().all() and frames.shape[-1] == stats.space.width


def test_without_statistics_only_the_times_change(pipes) -> None:
    start = prepare_start(pipes["svd"], None, 0.9, num_inference_steps=STEPS)
    assert start.keys() == {"sigmas"} and len(start["sigmas"]) == STEPS + 1
    assert call(pipes["svd"], "svd", num_frames=3, height=16, width=16, **start).isfinite().all()
    assert prepare_start(pipes["wan"], None, 0.9) == {"num_inference_steps": 50}


def test_statistics_by_channel_serve_any_size(pipes, tmp_path) -> None:
    pipe = pipes["svd"]
    file = tmp_path / "stats.safetensors"
    stats_for(VideoCodec(pipe.vae).space(2, 8, 8), "channel").save(file)
    start = prepare_start(pipe, file, num_inference_steps=2, size=(3, 16, 32), num_videos=2)
    assert start["latents"].shape == (2, 3, 4, 8, 16)
    assert (start["num_frames"], start["height"], start["width"]) == (3, 16, 32)


def test_padding_frames_have_the_law_of_the_first(pipes) -> None:
    """CogVideoX 1.5: 9 pixel frames are 3 latents and one in front."""
    pipe = pipes["cogvideox-1.5"]
    stats = stats_for(VideoCodec(pipe.vae).space(9, 64, 64))
    start = prepare_start(pipe, stats, 0.5, num_inference_steps=4, generator=generator(7))
    assert start["latents"].shape == (1, 4, 4, 8, 8)
    abar = float(pipe.scheduler.alphas_cumprod[499])
    eps = torch.randn(1, 4, 4, 8, 8, generator=generator(7))
    front = expected(stats, sqrt(abar), sqrt(1 - abar), eps[:, :1])[:, :1]
    torch.testing.assert_close(start["latents"][:, :1].double(), front, rtol=1e-5, atol=1e-5)
    assert call(pipe, "cogvideox-1.5", **start).shape == (1, 4, 4, 8, 8)


def test_hunyuans_shift_and_mixing_are_undone() -> None:
    """Its own ``prepare_latents`` mixes 0.1 % of the image into what it is given."""

    class Host(HunyuanVideoImageToVideoPipeline):
        def __init__(self, vae: object, scheduler: object) -> None:  # no 8 B text encoder
            DiffusionPipeline.__init__(self)
            self.register_modules(vae=vae, scheduler=scheduler)
            self.vae_scale_factor_temporal, self.vae_scale_factor_spatial = 4, 8
            self.vae_scaling_factor = 1.0

    pipe = Host(tiny_cogvideox().vae, FlowMatchEulerDiscreteScheduler(shift=7.0))
    stats = stats_for(VideoCodec(pipe.vae).space(5, 64, 64))
    start = prepare_start(pipe, stats, 0.8, num_inference_steps=STEPS, generator=generator(7))
    pipe.scheduler.set_timesteps(sigmas=start["sigmas"])
    assert float(pipe.scheduler.sigmas[0]) == pytest.approx(0.8)
    assert len(pipe.scheduler.timesteps) == STEPS
    eps = torch.randn(1, 2, 4, 8, 8, generator=generator(7))
    x_m = expected(stats, 0.2, 0.8, eps).transpose(1, 2)
    image = torch.zeros(1, 3, 64, 64)
    y = pipe.vae.encode(image[:, :, None]).latent_dist.mode()
    used, _ = pipe.prepare_latents(
        image, 1, 4, 64, 64, 5, torch.float32, torch.device("cpu"), None, start["latents"]
    )
    torch.testing.assert_close(used.double(), x_m + 0.001 * y, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_told_in_a_sentence(pipes, tmp_path) -> None:
    pipe = pipes["svd"]
    space = VideoCodec(pipe.vae).space(3, 16, 16)
    with pytest.raises(ValueError, match=r"3 frames of 4x8x8 do not fit .* 4x8x16 .*by channel"):
        prepare_start(pipe, stats_for(space), size=(3, 16, 32))
    with pytest.raises(ValueError, match=r"for this model"):
        prepare_start(pipes["wan"], stats_for(space), size=(5, 16, 16))
    with pytest.raises(ValueError, match=r"5 frames of 16x17 pixels do not fit"):
        prepare_start(pipe, stats_for(space), size=(5, 16, 17))
    with pytest.raises(ValueError, match=r"^DiffusionPipeline cannot start at M; Stable"):
        prepare_start(DiffusionPipeline(), None)
    with pytest.raises(ValueError, match="no latent statistics there"):
        prepare_start(pipe, tmp_path / "absent")
    with pytest.raises(ValueError, match="start must lie in"):
        prepare_start(pipe, None, sigma=701.0)


READER = """
import sys, torch

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffdiv":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.scheduler.set_timesteps(20)
print(type(pipe).__name__, type(pipe.scheduler).__name__, pipe.scheduler.timesteps.tolist())
"""


@pytest.mark.slow
def test_a_saved_host_starts_at_m_without_diffdiv(pipes, tmp_path: Path) -> None:
    pipe = pipes["wan"]
    pipe.scheduler = start_scheduler(pipe.scheduler, 0.8)
    save_started(pipe, tmp_path)
    pipe.scheduler.set_timesteps(20)
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, tmp_path], check=True, capture_output=True, text=True
    )
    pipeline, scheduler, times = done.stdout.split(maxsplit=2)
    assert (pipeline, scheduler) == ("WanImageToVideoPipeline", "StartUniPCMultistepScheduler")
    assert json.loads(times) == pipe.scheduler.timesteps.tolist()
    assert max(json.loads(times)) <= 800


def test_a_pipeline_folder_has_the_codec(pipes, tmp_path) -> None:
    folder = saved(pipes["wan"], tmp_path / "wan")
    codec = VideoCodec.load(folder, torch.device("cpu"))
    assert codec.space(5, 16, 16) == VideoCodec(pipes["wan"].vae).space(5, 16, 16)
    with pytest.raises(ValueError, match=r"no vae/config.json there"):
        VideoCodec.load(tmp_path, torch.device("cpu"))
    z = torch.randn(2, 2, 16, 2, 2, generator=generator())
    mean, std = (torch.tensor(pipes["wan"].vae.config[f"latents_{k}"]) for k in ("mean", "std"))
    by_hand = (z - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(codec.scaled(z), by_hand)
