"""Distillation recipes on a tiny SDXL in float64, for the tests of several processes.

    sdxl_recipe.py FILE     several runs in one process (of torchrun); JSON, see Case

In float32 the order of a sum shows: Adam divides a gradient that is zero but for rounding (a bias
in front of a group norm) by its own size. So the network and all that comes of it are float64 here.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from diffdiv.runtime.launch import leave_group

COMMON = [
    "run.batch_size=4", "run.accumulation=1", "run.steps=2", "run.log_every=1", "run.trackers=[]",
    "run.device=cpu", "run.precision=fp32", "run.sample_every=2", "run.save_every=null",
    "student.ema_half_lives=[8]", "critic_updates=2", "gan.weight=0.1", "gan.r1_gamma=0",
    "teacher.dtype=fp32", "teacher.guidance_scale=2.0", "teacher.checkpointing=true",
    "data.kind=captions", "data.real=data",
]  # fmt: skip


class Case(TypedDict, total=False):
    """One run: overrides of a configuration, and what is done to it."""

    items: list[str]
    config: str
    stop_after: int  # updates of the fake score; the run is told to stop there, then continued
    is_averaged: bool  # False: gradients stay those of each process


def train(overrides: Sequence[str], config: str = "configs/f_distill/sd.yaml") -> None:
    """A whole run in this process, or the rest of one."""
    from diffdiv.api import prepare

    recipe, resolved = prepare(config, overrides)
    recipe.main(resolved)


def interrupted(overrides: Sequence[str], updates: int) -> None:
    """A run that is told to stop after so many updates of the fake score."""
    from diffdiv.runtime.run import Run

    update = Run.update

    def stopping(run, name, loss):
        update(run, name, loss)
        if name == "fake" and run.updates["fake"] == updates:
            os.kill(os.getpid(), signal.SIGTERM)

    Run.update = stopping
    try:
        train(overrides)
    except SystemExit as stopped:
        assert stopped.code == 75
    finally:
        Run.update = update


def in_double() -> None:
    """Make this process compute in float64 where the recipe says float32."""
    import torch
    from torch import nn

    from diffdiv.models import backbones, denoiser
    from diffdiv.runtime import preview

    torch.set_default_dtype(torch.float64)
    load, decode = backbones.load_denoiser, backbones.LatentCodec.decode
    with_gradient = backbones.LatentCodec.decode_with_gradient
    to_float = torch.Tensor.float

    def load_double(path: Path, *, dtype: torch.dtype = torch.float64) -> denoiser.Denoiser:
        found = load(path, dtype=torch.float64)

        def call(net, x_in, time, cond):
            return found.call(net, x_in.double(), time, cond.to(x_in.device, torch.float64))

        return replace(found, call=call)

    backbones.load_denoiser = load_double
    backbones.LatentCodec.decode = lambda codec, latents: decode(codec, latents.to(torch.float32))
    backbones.LatentCodec.decode_with_gradient = lambda codec, latents: with_gradient(
        codec, latents.to(torch.float32)
    )
    preview._INDICES = preview._INDICES[:8]
    nn.Module.float = lambda module: module
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else to_float(x)


def run_case(case: Case) -> None:
    from accelerate import Accelerator

    prepare = Accelerator.prepare_model
    if not case.get("is_averaged", True):
        Accelerator.prepare_model = lambda _, net: net
    if "stop_after" in case:
        interrupted(case["items"], case["stop_after"])
    train(case["items"], case.get("config", "configs/f_distill/sd.yaml"))
    Accelerator.prepare_model = prepare


if __name__ == "__main__":
    in_double()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case)
    leave_group(0)
