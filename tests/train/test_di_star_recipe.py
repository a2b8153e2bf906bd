"""Diff-Instruct* on a tiny pipeline: killed and resumed, exported, with every regulariser."""

import multiprocessing
import signal

import pytest
import torch
from builders import losses_of, state_of, tiny_stable_diffusion
from test_families_through_cli import PRELOAD, command_lines
from tiny_clip import write_clip
from tiny_pipelines import write_pipeline

from diffdiv.api import prepare
from diffdiv.export import export_run
from diffdiv.runtime.checkpoint import newest_valid
from diffdiv.runtime.config import ConfigError
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
    context.set_forkserver_preload([*PRELOAD, "diffdiv.rewards.images"])
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
    ],
)
def test_mistakes_in_the_configuration(world, tmp_path, items, message):
    with pytest.raises(ConfigError, match=message):
        prepare("configs/di_star/sdxl.yaml", arguments(world, "sd", tmp_path, *items)[2:])
