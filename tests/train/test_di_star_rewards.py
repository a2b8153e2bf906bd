"""Diff-Instruct* with several rewards at once, one of them a black box of the user's own."""

import json
import signal

import pytest
import torch
from builders import losses_of, state_of
from test_di_star_recipe import arguments, run, world  # noqa: F401  # a fixture

NAMES = ("clip_score", "hpsv2", "levels", "pickscore")


@pytest.fixture
def rewards(world, tmp_path):  # noqa: F811
    file = tmp_path / "levels.py"
    file.write_text(
        "def levels(images, prompts):\n"
        "    '''Brightness in steps: no gradient.'''\n"
        "    return (images.detach().mean((1, 2, 3)) * 2000).round() / 2000\n"
    )
    clip = world / "clip"
    return [
        f"rewards.clip_score.path={clip}", "rewards.clip_score.normalise=running",
        f"rewards.hpsv2.path={clip}", "rewards.hpsv2.warmup_steps=3", "rewards.hpsv2.ceiling=0.9",
        f"rewards.levels.file={file}:levels", "rewards.levels.allow_code=true",
        "rewards.levels.differentiable=false", "rewards.levels.normalise=group",
        "rewards.levels.copies=2",
    ]  # fmt: skip


@pytest.mark.slow
def test_several_rewards_killed_and_resumed(world, tmp_path, rewards):  # noqa: F811
    """Running means and perturbations go on where they stopped, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(arguments(world, "sd", whole, *rewards)) == 0
    assert run(arguments(world, "sd", killed, *rewards), 4 * 3 + 2) == -signal.SIGKILL
    assert run(arguments(world, "sd", killed, *rewards)) == 0
    a, b = state_of(whole), state_of(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    lines = losses_of(whole)
    assert lines == losses_of(killed)
    for name in NAMES:
        assert all(f"reward/{name}" in line for line in lines)
        assert lines[-1][f"reward_gradient/{name}"] > 0
    # the first update: nothing known of its unit, scale 0
    assert lines[0]["reward_gradient/clip_score"] == lines[0]["reward_gradient/hpsv2"] == 0
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    told = [event["message"] for event in events if event["kind"] == "weights"]
    assert any(message.startswith("pickscore/model.safetensors has SHA-256") for message in told)
