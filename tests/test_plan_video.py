"""The plan of a TimeNoise step against a real one, known sizes, and what the configuration says."""

import gc
import json
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_video_pipelines import saved, tiny_svd, tiny_wan, vision_config
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffdiv.counters import Counters
from diffdiv.plan import GIB, knobs, parse_gpu, plan_cycle, render
from diffdiv.plan_timenoise import timenoise_spec
from diffdiv.rehearsal_video import (
    SVD,
    VideoArchitecture,
    VideoRehearsal,
    VideoSpec,
    build_video_networks,
)
from diffdiv.runtime.config import ConfigError

CPU = torch.device("cpu")
CONFIG = "configs/timenoise/svd.yaml"


@pytest.fixture(scope="module")
def spec() -> VideoSpec:
    pipe = tiny_svd()
    shapes = VideoArchitecture(
        dict(pipe.unet.config), dict(pipe.vae.config), vision_config().to_dict()
    )
    return VideoSpec(shapes, 3, 16, 16, batch=2, rank=4, base_dtype="fp32", precision="fp32")


SLOW = pytest.mark.slow


def test_static_bytes_are_those_of_the_weights(spec: VideoSpec) -> None:
    cached = replace(spec, live=False)
    nets, plan = build_video_networks(cached), plan_cycle(cached)
    sizes = [4 * value.numel() for value in nets["model"].parameters()]
    adapter = sum(-(-size // 512) * 512 for size in sizes)  # the allocator's blocks
    every = sum(-(-4 * value.numel() // 512) * 512 for value in nets["base"].parameters())
    kinds = plan.peaks["training"]
    assert (kinds["trained weights"], kinds["EMA"]) == (adapter, adapter)
    assert kinds["frozen weights"] == every - adapter  # adapters are among the base's modules
    assert 2 * adapter <= kinds["optimiser"] <= 2 * adapter + 512 * len(sizes)
    assert plan.trained == {"model": sum(sizes) // 4} and set(plan.peaks) == {"training"}


@SLOW
@pytest.mark.parametrize(
    "changes",
    [{}, {"live": False}, {"rank": None, "checkpointing": False}],
    ids=["LoRA", "cached", "whole"],
)
def test_plan_equals_a_real_step(spec: VideoSpec, changes: dict[str, object]) -> None:
    """Every allocation by torch's own profiler, scratch of kernels included."""
    chosen, counters = replace(spec, **changes), Counters()
    gc.collect()  # what earlier tests have left must not be freed under the profiler
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, counters:
        VideoRehearsal(chosen, build_video_networks(chosen), CPU, counters).step()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    plan = plan_cycle(chosen)
    assert plan.peak == pytest.approx(peak, rel=0.15)
    counted = {phase: sum(kinds.values()) for phase, kinds in counters.peaks.items()}
    planned = {phase: sum(kinds.values()) for phase, kinds in plan.peaks.items()}
    assert planned == pytest.approx(counted, rel=0.02)
    assert set(planned) == ({"encoding", "training"} if chosen.live else {"training"})


@SLOW
def test_flops_equal_those_of_flop_counter_mode(spec: VideoSpec) -> None:
    chosen = replace(spec, checkpointing=False)
    rehearsal = VideoRehearsal(chosen, build_video_networks(chosen), CPU, Counters())
    with FlopCounterMode(display=False) as counter:
        rehearsal.step()
    assert sum(plan_cycle(chosen).flops.values()) == counter.get_total_flops()


def test_svd_has_the_released_sizes() -> None:
    nets = build_video_networks(VideoSpec(SVD, 14, 320, 512, batch=1, rank=None))
    sizes = {name: sum(value.numel() for value in net.parameters()) for name, net in nets.items()}
    assert sizes["base"] == 1_524_623_082  # arXiv 2311.15127: 1521 M, of which 656 M in time
    assert sizes["VAE"] == 97_742_847
    assert sizes["vision"] == 632_076_800  # CLIP ViT-H/14's image tower and its projection


@SLOW
def test_knobs_say_what_they_save(spec: VideoSpec) -> None:
    plan = plan_cycle(spec)
    peaks = {knob.name: knob.peak for knob in knobs(plan)}
    assert peaks["no EMA"] == plan_cycle(replace(spec, num_ema=0)).peak
    assert peaks["8-bit optimiser moments"] == plan_cycle(replace(spec, optimizer_bits=8)).peak
    for name in ("batch halved", "frames halved", "latents cached (videos.cache)"):
        assert peaks[name] < plan.peak < peaks["checkpointing off"]
    console = Console(file=StringIO(), width=160)
    console.print(render(plan, parse_gpu("A100-80")))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert text.startswith("fits on A100-80") and "step on 2 clips" in text


def test_what_the_configuration_says(tmp_path: Path) -> None:
    spec = timenoise_spec(CONFIG, ["videos.num_frames=25", "videos.cache=latents"], "svd")
    assert spec.architecture is SVD and (spec.frames, spec.height, spec.width) == (25, 320, 512)
    assert (spec.batch, spec.rank, spec.base_dtype, spec.live) == (1, 64, "bf16", False)
    whole = ["model.lora=null", "model.dtype=fp32", "model.checkpointing=false"]
    shared = timenoise_spec(CONFIG, [*whole, "run.sharding=fsdp2", "run.accumulation=1"], "svd", 2)
    assert (shared.rank, shared.shards, shared.batch) == (None, 2, 2)
    folder = saved(tiny_svd(), tmp_path / "svd")
    read = timenoise_spec(CONFIG, [f"model.path={folder}"])
    assert read.architecture.unet["block_out_channels"] == [32, 32]
    build_video_networks(read)
    with pytest.raises(ConfigError, match="--like svd"):
        timenoise_spec(CONFIG, [])
    with pytest.raises(ConfigError, match="num_frames"):
        timenoise_spec(CONFIG, ["videos.num_frames=0"], "svd")


def test_refusals(spec: VideoSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="16x17 pixels are no multiples of 2"):
        plan_cycle(replace(spec, width=17))
    with pytest.raises(ValueError, match="below 1"):
        plan_cycle(replace(spec, batch=0))
    wan = saved(tiny_wan(), tmp_path / "wan")
    with pytest.raises(ValueError, match=r"unet.config\.json: not there, so this is not Stable"):
        timenoise_spec(CONFIG, [f"model.path={wan}"])
    for name in ("unet", "image_encoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": "UNet3D"}))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text("{}")
    with pytest.raises(ValueError, match="UNet3D cannot be planned yet"):
        timenoise_spec(CONFIG, [f"model.path={tmp_path}"])


@SLOW
def test_real_size_in_a_minute() -> None:
    """The shipped configuration fits a 24 GB card; whole in float32 it fits no card of 24."""
    spec = timenoise_spec(CONFIG, [], "svd")
    start = time.process_time()
    plan = plan_cycle(spec)
    assert time.process_time() - start < 60
    weights = plan.peaks["training"]["frozen weights"]
    assert weights == pytest.approx(2 * 1_524_623_082, rel=0.001)
    assert 10 * GIB < plan.peak < 20 * GIB
