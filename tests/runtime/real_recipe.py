"""The f-distill recipe on a tiny teacher, for the tests that interrupt it.

Run in processes forked from a server that has imported everything heavy (`PRELOAD`).
"""

import os
import signal
import time
from collections.abc import MutableSequence, Sequence
from pathlib import Path

from diffdiv.api import prepare

CRITIC = 3
CYCLE = 2 * CRITIC + 1  # updates: fake and disc by turns, then one of the student
PRELOAD = [
    "diffdiv.api", "diffdiv.models.backbones", "diffdiv.models.discriminator",
    "diffdiv.models.generator", "diffdiv.objectives.f_distill", "diffdiv.runtime.preview",
    "diffdiv.runtime.run", "diffdiv.samplers", "diffdiv.sources", "sklearn.datasets",
    "diffusers.models.unets.unet_2d", "diffusers.schedulers.scheduling_edm_euler",
]  # fmt: skip


def items(folder: Path, teacher: Path, *more: str) -> list[str]:
    """Overrides of the digits demo: small batches, every part of the state at work."""
    return [
        f"run.folder={folder}", f"teacher.path={teacher}", "run.device=cpu", "run.trackers=[]",
        "run.batch_size=2", "run.log_every=2", "run.sample_every=null",
        "student.ema_half_lives=[20, 200]", f"critic_updates={CRITIC}",
        "divergence.name=jensen_shannon", "optimizer.betas=[0.9, 0.99]", *more,
    ]  # fmt: skip


def train(overrides: Sequence[str]) -> None:
    """A whole run in this process, or the rest of one."""
    recipe, config = prepare("configs/demo/digits.yaml", overrides)
    recipe.main(config)


def watched(
    overrides: Sequence[str],
    updates: MutableSequence[int],
    slow: float = 0.0,
    stop_after: int | None = None,
) -> None:
    """:func:`train` in a process of its own, one thread.

    Args:
        overrides: see :func:`items`.
        updates: shared; its only entry becomes the number of updates of all networks so far.
        slow: seconds added to each fsync, so that a kill often hits a save.
        stop_after: critic updates of a phase after which the process tells itself to stop.
    """
    import torch

    from diffdiv.runtime.run import Run

    torch.set_num_threads(1)
    fsync, update = os.fsync, Run.update

    def slow_fsync(descriptor: int) -> None:
        fsync(descriptor)
        time.sleep(slow)

    def counted(run: Run, name: str, loss: torch.Tensor) -> None:
        update(run, name, loss)
        updates[0] = sum(run.updates.values())
        if name == "fake" and run.updates["fake"] % CRITIC == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    os.fsync, Run.update = slow_fsync, counted
    train(overrides)
