"""The best state of a run so far, by a figure that it does not train on, kept as a run folder.

    runs/NAME/best/{config.yaml, best.json, state/step-*}

Every command that takes a run takes ``best`` too, so `diffdiv export runs/NAME/best OUT` exports
the student as it was then.
"""

import json
import math
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from diffdiv.runtime.run import Run

FOLDER = "best"


class KeepBest:
    """Attach it to the run, so that a resumed run goes on with the best figure so far.

    Args:
        run: whose states are kept.
        name: of the figure; higher is better.
    """

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name
        self._best = torch.full((), -math.inf, dtype=torch.float64)
        self._step = torch.full((), -1, dtype=torch.int64)

    def observe(self, value: float) -> None:
        """Take note of the figure at this step, the same on all ranks; in the turn that made it.

        So every state that is saved at the turn's end knows of it.
        """
        self._run.log({f"held_out/{self._name}": value})
        if value > float(self._best):
            self._best = torch.tensor(value, dtype=torch.float64)
            self._step = torch.tensor(self._run.step)

    def keep(self) -> None:
        """Keep the present state if it is the best; between turns or after restore, on all ranks.

        Raises:
            CheckpointError: if the state could not be written.
        """
        if int(self._step) != self._run.step:
            return
        state = self._run.save()
        if self._run.is_main:
            facts = {self._name: float(self._best), "step": self._run.step}
            _keep(self._run.folder, state, facts)

    def state_dict(self) -> dict[str, Tensor]:
        """The best figure and its step."""
        return {"best": self._best, "step": self._step}

    def load_state_dict(self, state: dict[str, Tensor], /) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._best, self._step = state["best"].clone(), state["step"].clone()


def _keep(run: Path, state: Path, facts: dict[str, float | int]) -> None:
    """Link the files of a state, which are never changed, into the folder of the best one."""
    best = run / FOLDER
    staged, kept = best / "state" / f".tmp-{state.name}", best / "state" / state.name
    shutil.rmtree(staged, ignore_errors=True)
    staged.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(state, staged, copy_function=_link)
    shutil.rmtree(kept, ignore_errors=True)
    staged.replace(kept)
    for other in kept.parent.iterdir():
        if other != kept:
            shutil.rmtree(other)
    shutil.copy2(run / "config.yaml", best / "config.yaml")
    (best / "best.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
