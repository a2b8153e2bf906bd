"""The plan of a Diff-Instruct* cycle against a real one, and what the configuration says."""

import gc
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import builders
import pytest
import torch
from rich.console import Console
from tiny_clip import write_clip
from torch.profiler import ProfilerActivity, profile

from diffdiv.api import plan_config
from diffdiv.counters import Counters
from diffdiv.models.architectures import ARCHITECTURES, Architecture
from diffdiv.plan import GIB, Assumptions, knobs, parse_gpu, plan_cycle, render
from diffdiv.plan_di_star import di_star_spec
from diffdiv.rehearsal_reward import (
    CLIP_H,
    RewardRehearsal,
    RewardShape,
    RewardSpec,
    build_reward_networks,
)
from diffdiv.runtime.config import ConfigError

CPU = torch.device("cpu")
WHOLE, LORA = "configs/di_star/sdxl.yaml", "configs/di_star/sdxl_lora_24gb.yaml"
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CLIP = {
    "text_config": _TOWER | {"vocab_size": 64, "max_position_embeddings": 16},
    "vision_config": _TOWER | {"image_size": 16, "patch_size": 8},
    "projection_dim": 8,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
}
VAE = {
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
}
TINY = RewardSpec(
    Architecture(UNET, VAE, ()),
    size=64,
    batch=2,
    guidance_scale=2.0,
    student_rank=4,
    fake_rank=4,
    base_dtype="fp32",
    precision="fp32",
    critic_updates=1,
    rewards=(RewardShape("pickscore", CLIP),),
)
OTHERS = [
    replace(TINY, regulariser="didr", student_rank=None, accumulates=True),
    replace(TINY, regulariser="ikl", fake_rank=None, checkpointing=False, num_vaes=2),
    replace(
        TINY,
        has_guidance_reward=True,
        regulariser="squared",
        rewards=(
            RewardShape("pickscore", CLIP),
            RewardShape("jpeg", CLIP, differentiable=False, copies=2),
            RewardShape("hpsv2", CLIP, scale=0.0),
        ),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [TINY, *OTHERS],
    ids=["adapters", "DIDR, accumulated", "integral KL, copies", "three rewards"],
)
def test_plan_equals_a_real_cycle(spec: RewardSpec) -> None:
    """Every allocation by torch's own profiler, scratch of kernels included."""
    counters = Counters()
    gc.collect()  # what earlier tests have left must not be freed under the profiler
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, counters:
        nets = build_reward_networks(spec)
        RewardRehearsal(spec, nets, CPU, counters).cycle(critic_updates=1)
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    plan = plan_cycle(spec)
    assert plan.peak == pytest.approx(peak, rel=0.15)
    counted = {phase: sum(kinds.values()) for phase, kinds in counters.peaks.items()}
    planned = {phase: sum(kinds.values()) for phase, kinds in plan.peaks.items()}
    assert planned == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
def test_gradients_of_earlier_micro_batches_are_held() -> None:
    plan = plan_cycle(replace(TINY, accumulates=True))
    assert plan.peaks["student: reward"]["gradients"] >= 4 * plan.trained["student"]
    sizes = [
        value.numel() for value in build_reward_networks(TINY)["reward/pickscore"].parameters()
    ]
    weights = sum(-(-4 * size // 512) * 512 for size in sizes)  # the allocator's blocks
    assert weights <= plan.peaks["samples"]["rewards"] <= weights + 2048  # and position numbers


@pytest.mark.slow
def test_knobs_offer_what_the_recipe_can_do() -> None:
    half = replace(TINY, base_dtype="bf16", precision="bf16")
    plan = plan_cycle(half)
    trebled = plan_cycle(replace(half, critic_updates=3))
    assert trebled.flops["fake score"] == 3 * plan.flops["fake score"]
    named = {knob.name for knob in knobs(plan)}
    assert "batch halved" in named and not any("int8" in name or "VAE" in name for name in named)


def test_what_the_configuration_says(tmp_path: Path) -> None:
    spec = di_star_spec(LORA, [], "sdxl")
    assert spec.architecture is ARCHITECTURES["sdxl"] and spec.size == 1024
    assert (spec.batch, spec.student_rank, spec.fake_rank, spec.base_dtype) == (1, 32, 32, "bf16")
    assert spec.accumulates and spec.num_vaes == 1 and spec.gan_blocks is None
    assert spec.rewards == (RewardShape("pickscore", CLIP_H, is_assumed=True),)
    clip = write_clip(tmp_path / "clip")
    items = [f"rewards.pickscore.path={clip}", "rewards.hpsv2_1.path=HPSv2", "data.cache=null"]
    items += ["rewards.hpsv2_1.scale=0", "regulariser.name=didr", "run.accumulation=4"]
    whole = plan_config(WHOLE, items, "sdxl", 2)
    assert isinstance(whole, RewardSpec)
    assert (whole.batch, whole.student_rank, whole.fake_rank) == (4, None, 64)
    assert (whole.regulariser, whole.num_vaes) == ("didr", 2)
    known, guessed = whole.rewards
    assert known.clip is not None and not known.is_assumed
    assert known.clip["vision_config"]["image_size"] == 16
    assert (guessed.name, guessed.scale, guessed.is_assumed) == ("hpsv2_1", 0.0, True)
    assert whole.notes() == ["assumed to be of CLIP ViT-H/14's size: hpsv2_1"]
    off = ["rewards.pickscore=null", "rewards.aesthetic.path=nowhere"]
    assert [shape.name for shape in di_star_spec(LORA, off, "sdxl").rewards] == ["aesthetic"]


@pytest.mark.slow
def test_tiny_folders_and_what_is_said(tmp_path: Path) -> None:
    folder = builders.tiny_stable_diffusion(tmp_path / "sd")
    items = [f"teacher.path={folder}", "teacher.dtype=fp32", "run.precision=fp32"]
    plan = plan_cycle(
        di_star_spec(LORA, [*items, f"rewards.pickscore.path={write_clip(tmp_path / 'c')}"])
    )
    assert 0 < plan.peak < GIB / 4
    console = Console(file=StringIO(), width=200)
    guessed = replace(plan.spec, rewards=(RewardShape("pickscore", CLIP, is_assumed=True),))
    console.print(render(replace(plan, spec=guessed), parse_gpu("24GB")))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert text.startswith("fits on a 24 GB card") and "cycle of 1 images" in text
    assert "5 critic updates a cycle; assumed to be of CLIP ViT-H/14's size: pickscore" in text


def test_wrong_input_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder stable-diffusion.*--like sd15"):
        di_star_spec(LORA, [])
    with pytest.raises(ConfigError, match="path of aesthetic is missing"):
        di_star_spec(LORA, ["rewards.aesthetic.scale=1"], "sdxl")
    with pytest.raises(ConfigError, match="'pikscore' is unknown"):
        di_star_spec(LORA, ["rewards.pikscore.path=there"], "sdxl")
    with pytest.raises(ConfigError, match="has no gradient at its inputs"):
        di_star_spec(LORA, ["teacher.dtype=int8"], "sdxl")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(ConfigError, match="'blip' is no CLIP"):
        di_star_spec(LORA, [f"rewards.pickscore.path={tmp_path}"], "sdxl")
    with pytest.raises(ConfigError, match="only f_distill, timenoise and di_star"):
        plan_config("configs/demo/tiue.yaml", [], None)


@pytest.mark.slow
def test_the_shipped_configuration_fits_its_card() -> None:
    """Adapters of rank 32 and all: weights of 2.57 G in bfloat16 are the least of it."""
    plan = plan_cycle(di_star_spec(LORA, [], "sdxl"))
    assert Assumptions().needed(plan.peak) <= parse_gpu("24GB").bytes
    weights = plan.peaks["student: backward"]["frozen weights"]
    assert weights == pytest.approx(2 * 2_567_463_684, rel=0.001)
    reward = plan.peaks["samples"]["rewards"]
    assert reward == pytest.approx(4 * 986_109_441, rel=0.001)  # CLIP ViT-H/14, both towers
