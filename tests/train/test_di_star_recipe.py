"""Diff-Instruct* on a tiny pipeline: killed and resumed, exported, with every regulariser."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import sdxl_recipe
import torch
from builders import losses_of, state_of, tiny_stable_diffusion
from diffusers import StableDiffusionXLPipeline
from processes import CODE
from safetensors.torch import load_file
from test_families_through_cli import PRELOAD, command_lines
from tiny_clip import write_clip
from tiny_pipelines import write_pipeline

from diffdiv.api import prepare
from diffdiv.export import export_lora, export_run
from diffdiv.models.adapters import SharedBase
from diffdiv.models.backbones import load_denoiser
from diffdiv.models.families import lora_targets
from diffdiv.runtime.checkpoint import load_weights, newest_valid
from diffdiv.runtime.config import ConfigError
from diffdiv.runtime.student import open_run
from diffdiv.verify import verify_export

COMMON = [
    "run.batch_size=2", "run.accumulation=1", "run.steps=6", "run.save_every=2", "run.log_every=1",
    "run.trackers=[]", "run.device=cpu", "run.precision=fp32", "run.sample_every=null",
    "teacher.dtype=fp32", "teacher.guidance_scale=2.0", "student.ema_half_lives=[8]",
    "student.lr=1.0e-3", "fake_lr=3.0e-3", "fake_lora.rank=4", "fake_lora.alpha=4",
    "critic_updates=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("di_star")
    tiny_stable_diffusion(root / "sd")
    write_pipeline("sdxl", root / "sdxl")
    write_clip(root / "clip")
    (root / "prompts.txt").write_text("a red seven\ntwo on white\na cat\n")
    return root


def arguments(world, kind, folder, *more):
    teacher = world / kind / "teacher"
    return [
        "train", "configs/di_star/sdxl.yaml", *COMMON, f"run.folder={folder}",
        f"teacher.path={teacher}", f"student.path={teacher}", f"data.path={world / 'prompts.txt'}",
        f"data.cache={world / f'cache-{kind}'}", f"rewards.pickscore.path={world / 'clip'}",
        "student.t_init=399", *more,
    ]  # fmt: skip


def run(items, kill_after=None):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "diffdiv.rewards.zoo"])
    process = context.Process(target=command_lines, args=([items], kill_after))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_killed_resumed_exported(world, tmp_path, kind):
    """Through VAE and a CLIP reward; SIGKILL within a critic phase; stock diffusers in the end."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(arguments(world, kind, whole)) == 0
    for after in (2 * 3 + 1, 4 * 3 + 2):
        assert run(arguments(world, kind, killed), after) == -signal.SIGKILL
        assert newest_valid(killed)
    assert run(arguments(world, kind, killed)) == 0
    a, b = state_of(whole), state_of(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert losses_of(whole) == losses_of(killed) and len(losses_of(whole)) == 6
    assert all("reward/pickscore" in line for line in losses_of(whole))
    export = export_run(whole, tmp_path / "export")
    assert verify_export(whole, export) < 1e-4


@pytest.fixture(scope="module")
def adapter(world):
    """A random adapter on the tiny SDXL, written by diffusers."""
    teacher = world / "sdxl/teacher"
    net = load_denoiser(teacher).net
    view = SharedBase(net).add("student", rank=4, alpha=4, targets=lora_targets(net), seed=1)
    torch.manual_seed(2)
    weights = {k: 0.1 * torch.randn_like(v) for k, v in view.state_dict().items()}
    pipe = StableDiffusionXLPipeline.from_pretrained(teacher)
    pipe.save_lora_weights(world / "adapter", unet_lora_layers=weights)
    return world / "adapter"


STEERED = [
    "regulariser.target=0.01", "run.sample_every=1", "keep_best=clip_score",
    "rewards.clip_score.scale=0",
]  # fmt: skip


@pytest.mark.slow
def test_adapters_on_one_base_steered_and_the_best_kept(world, adapter, tmp_path):
    """Student and fake score on the reference's network; controller and best state survive."""
    more = ["student.lora.rank=4", "student.lora.alpha=4", f"student.path={adapter}", *STEERED]
    more += [f"rewards.clip_score.path={world / 'clip'}", "student.lr=3.0e-2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(arguments(world, "sdxl", whole, *more)) == 0
    for after in (2 * 3 + 3, 4 * 3 + 2):
        assert run(arguments(world, "sdxl", killed, *more), after) == -signal.SIGKILL
    assert run(arguments(world, "sdxl", killed, *more)) == 0
    a, b = state_of(whole), state_of(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    lines = losses_of(whole)
    assert lines == losses_of(killed) and len(lines) == 6
    # the gap lies above its target, so the weight rises, by 2 % at most
    weights = [line["regulariser/weight"] for line in lines]
    assert all(line["regulariser/score_gap"] > 0.012 for line in lines)
    assert weights == pytest.approx([1.02**n for n in range(6)])
    looks = [line["held_out/clip_score"] for line in lines]
    for folder in (whole, killed):
        best = json.loads((folder / "best/best.json").read_text())
        assert best == {"clip_score": max(looks), "step": looks.index(max(looks)) + 1}
        state = newest_valid(folder / "best")
        assert state is not None and int(state.name.split("-")[1]) == best["step"]
    names = ("student", 8)
    first, second = (load_weights(f / "best", *names) for f in (whole, killed))
    assert all(torch.equal(first[key], second[key]) for key in first)

    # before: what stock diffusers makes of the adapter
    pipe = StableDiffusionXLPipeline.from_pretrained(world / "sdxl/teacher")
    pipe.load_lora_weights(adapter)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    start = open_run(whole, torch.device("cpu")).untrained.denoiser.net.state_dict()
    for key, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(start[key], value)
    assert verify_export(whole, export_run(whole, tmp_path / "export")) < 1e-4
    assert (export_lora(whole, tmp_path / "lora") / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_end_where_one_ends(world, tmp_path):
    """Networks in float64, VAE and rewards in float32; the control does not average gradients."""

    def cases(place, *names):
        shape = ["run.batch_size=4", "run.steps=2", "rewards.pickscore.scale=10", *STEERED]
        shape += [f"rewards.clip_score.path={world / 'clip'}"]
        found = []
        for name in names:
            items = arguments(world, "sdxl", tmp_path / place / name, *shape)[2:]
            case = {"items": items, "config": "configs/di_star/sdxl.yaml"}
            found.append(case | ({"is_averaged": False} if name == "apart" else {}))
        return found

    for processes, place, names in ((1, "one", ["full"]), (2, "two", ["full", "apart"])):
        file = tmp_path / f"{place}.json"
        file.write_text(json.dumps(cases(place, *names)))
        start = ["-c", CODE] if processes > 1 else []
        done = subprocess.run(
            [sys.executable, *start, sdxl_recipe.__file__, file],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    start = load_file(world / "sdxl/teacher/unet/diffusion_pytorch_model.safetensors")
    one = state_of(tmp_path / "one/full")
    keys = [key for key in one if key.startswith("student/")]

    def apart(name):
        other = state_of(tmp_path / "two" / name)
        moved = [(one[k] - start[k.removeprefix("student/")].double()).norm() for k in keys]
        gaps = [(one[k] - other[k]).norm() for k in keys]
        return float(torch.stack(gaps).norm() / torch.stack(moved).norm())

    assert apart("full") < 1e-4
    assert apart("apart") > 1e-2
    looks = [losses_of(tmp_path / place / "full") for place in ("one", "two")]
    for ours, theirs in zip(*looks, strict=True):
        for key in ("held_out/clip_score", "regulariser/weight", "regulariser/score_gap"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pseudo_huber", "ikl", "didr"])
def test_the_reward_rises_under_every_regulariser(world, tmp_path, name):
    """A strong reward on a tiny net: what is asked for happens, whatever holds it back."""
    more = [f"regulariser.name={name}", "run.steps=15", "run.save_every=null", "run.batch_size=4"]
    more += ["rewards.pickscore.scale=50", "regulariser.beta=0.02", "student.lr=3.0e-3"]
    more += ["critic_updates=1", "regulariser.guidance_reward=0.5"]
    assert run(arguments(world, "sd", tmp_path / "run", *more)) == 0
    lines = losses_of(tmp_path / "run")
    if name == "didr":  # the reward is not in the loss: only that it runs, and stays finite
        assert len(lines) == 15
        return
    first = sum(line["reward/pickscore"] for line in lines[:5])
    last = sum(line["reward/pickscore"] for line in lines[-5:])
    assert last > first


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["rewards.pickscore=null"], "no reward is set"),
        (["regulariser.name=kl"], "pseudo_huber"),
        (["regulariser.c=0"], r"regulariser\.c"),
        (["teacher.dtype=bf16", "run.precision=fp32"], "needs run.precision"),
        (["rewards.pickscore.path=nowhere"], "there is no folder 'nowhere'"),
        (["student.lora.rank=4"], r"does not hold an adapter"),
        (["regulariser.name=didr", "regulariser.target=1"], "beta says how far"),
        (["keep_best=pickscore", "run.sample_every=1"], "is no reward of scale 0"),
        (["keep_best=pickscore", "rewards.pickscore.scale=0"], "sample_every updates, which is n"),
    ],
)
def test_mistakes_in_the_configuration(world, tmp_path, items, message):
    with pytest.raises(ConfigError, match=message):
        prepare("configs/di_star/sdxl.yaml", arguments(world, "sd", tmp_path, *items)[2:])
