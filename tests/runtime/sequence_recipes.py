"""The sequence recipes on tiny networks, for the tests of several processes and of kills.

    sequence_recipes.py FILE     several runs in one process (of torchrun); JSON: [config, items]

A third entry "apart" leaves the gradients of each process to itself: the control.

In float64, since Adam divides gradients that are zero but for rounding by their own size. Each
run's first weights go to RUN/first.safetensors.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from diffdiv.runtime.launch import leave_group

PRELOAD = [
    "diffdiv.api", "diffdiv.export_sequences", "diffdiv.metrics.sequences",
    "diffdiv.objectives.drakes", "diffdiv.rewards.dna_world", "diffdiv.rewards.oracle",
    "diffdiv.runtime.run",
]  # fmt: skip


def train(config: str, items: Sequence[str]) -> None:
    """A whole run in this process, or the rest of one."""
    from diffdiv.api import prepare

    recipe, resolved = prepare(config, items)
    recipe.main(resolved)


def train_apart(config: str, items: Sequence[str]) -> None:
    """The same, but processes do not average their gradients."""
    from accelerate import Accelerator

    prepare = Accelerator.prepare_model
    Accelerator.prepare_model = lambda _, net: net
    train(config, items)
    Accelerator.prepare_model = prepare


def killed(config: str, items: Sequence[str], updates: int) -> None:
    """The same, in a process that dies by SIGKILL after so many updates of all networks."""
    import torch

    from diffdiv.runtime.run import Run

    torch.set_num_threads(1)
    update = Run.update

    def counted(run, name, loss):
        update(run, name, loss)
        if sum(run.updates.values()) == updates:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.update = counted
    train(config, items)


def in_double() -> None:
    """Make this process compute in float64 where the recipes say float32."""
    import torch

    from diffdiv import export_sequences
    from diffdiv.runtime.run import Run

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    load, restore = export_sequences.load_token_denoiser, Run.restore

    def load_double(path):
        found = load(path)
        return found.with_net(found.net.double())

    def remember(run):
        from safetensors.torch import save_file

        if run.is_main:
            first = {
                f"{net}/{key}": value.clone()
                for net, network in run.networks.items()
                for key, value in network.module.state_dict().items()
            }
            save_file(first, run.folder / "first.safetensors")
        return restore(run)

    export_sequences.load_token_denoiser, Run.restore = load_double, remember


if __name__ == "__main__":
    in_double()
    for config, items, *apart in json.loads(Path(sys.argv[1]).read_text()):
        (train_apart if apart else train)(config, items)
    leave_group(0)
