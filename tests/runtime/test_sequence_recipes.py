"""DRAKES and its rivals, pretraining, oracles: two processes are one, a kill leaves no trace."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import sequence_recipes
import torch
from builders import losses_of, state_of
from safetensors.torch import load_file
from test_two_processes import CODE

from diffdiv.data.sequence_files import write_fasta
from diffdiv.export_sequences import export_masked_sequences
from diffdiv.models.token_networks import DilatedTokenNet

JASPAR = ">MA0001.1 BOX\nA [0 10 0 10 10 0]\nC [0 0 0 0 0 0]\nG [0 0 0 0 0 0]\nT [10 0 10 0 0 10]\n"
COMMON = [
    "run.batch_size=8", "run.accumulation=1", "run.steps=4", "run.log_every=1", "run.trackers=[]",
    "run.device=cpu", "run.sample_every=2", "run.save_every=2", "lr=1e-2", "ema_half_life=20",
    "optimizer.warmup_steps=0",
]  # fmt: skip
DRAKES = [
    "reward.kind=motifs", "objective.num_steps=6", "objective.num_soft=4",
    "objective.num_graded=2", "objective.checkpointing=false", "num_evaluated=16",
]  # fmt: skip
PRETRAIN = [
    "model.width=8", "model.kernel=3", "model.dilations=[1,2]", "export.num_steps=4",
    "export.num_evaluated=10", "data.held_out=[chr0]",
]  # fmt: skip
ORACLE = [
    "model.width=8", "model.kernel=7", "data.held_out=[chr0]", "data.finetune=[chr1,chr2]",
    "data.evaluation=[chr3,chr4]",
]  # fmt: skip
GRADIENT = ["objective.name=policy_gradient", "objective.num_graded=3"]
# name: configuration, overrides, updates of all networks after which it is killed
CASES = {
    "drakes": ("drakes", DRAKES, 3),
    "drakes, every state hard": ("drakes", [*DRAKES, "objective.hard=step"], 3),
    "policy_gradient": ("drakes", [*DRAKES, *GRADIENT], 3),
    "policy_gradient, target": ("drakes", [*DRAKES, *GRADIENT, "objective.target_kl=0.1"], 3),
    "masked_cross_entropy": ("drakes", [*DRAKES, "objective.name=masked_cross_entropy"], 3),
    "masked_pretrain": ("pretrain", PRETRAIN, 3),
    "oracle": ("oracle", ORACLE, 7),  # in the fourth step, one of two
}
BOUND = 1e-12  # of the movement


class World:
    """A folder with data and a reference, and runs in it."""

    def __init__(self, folder):
        self.folder, generator = folder, torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        net = DilatedTokenNet(num_tokens=4, width=16, kernel=5, dilations=(1, 2))
        export_masked_sequences(
            net, net.state_dict(), folder / "dna", length=20, num_steps=6, title="x", facts={}
        )
        (folder / "box.jaspar").write_text(JASPAR)
        for name in ("a", "b"):
            tokens = torch.randint(0, 4, (100, 20), generator=generator)
            write_fasta(
                folder / f"{name}.fa", tokens, names=[f"chr{i % 5}:{i}" for i in range(100)]
            )

    def case(self, place, name, *more):
        """[configuration, overrides] of a run in the folder ``place``."""
        kind, items, _ = CASES[name]
        paths = {
            "drakes": {"reference.path": "dna", "reward.path": "box.jaspar"},
            "pretrain": {"data.path": "a.fa"},
            "oracle": {"data.positive": "a.fa", "data.negative": "b.fa"},
        }[kind] | {"run.folder": f"{place}/{name}"}
        given = [f"{key}={self.folder / path}" for key, path in paths.items()]
        return f"configs/{kind}/dna.yaml", [*COMMON, *items, *given, *more]

    def run(self, processes, cases):
        file = self.folder / f"cases-{processes}.json"
        file.write_text(json.dumps(cases))
        start = ["-c", CODE] if processes > 1 else []
        done = subprocess.run(
            [sys.executable, *start, sequence_recipes.__file__, file], capture_output=True,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]

    def apart(self, one, other):
        """Largest distance of a network between two runs, relative to how far it moved."""
        a, b = state_of(self.folder / one), state_of(self.folder / other)
        start = load_file(self.folder / one / "first.safetensors")
        assert a.keys() == b.keys() and start
        found = []
        for net in {key.partition("/")[0] for key in start}:
            keys = [key for key in start if key.startswith(f"{net}/")]
            assert all(a[key].dtype == torch.float64 for key in keys)
            moved = torch.stack([(a[key] - start[key]).norm() for key in keys]).norm()
            found.append(float(torch.stack([(a[k] - b[k]).norm() for k in keys]).norm() / moved))
        return max(found)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Every case by one process, by two, and with the batch in eight micro-batches."""
    world = World(tmp_path_factory.mktemp("sequences"))
    control = (*world.case("apart", "drakes"), "apart")
    world.run(2, [*(world.case("two", name) for name in CASES), control])
    split = [world.case("split", name, "run.accumulation=8") for name in CASES]
    world.run(1, [*(world.case("one", name) for name in CASES), *split])
    return world


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("other", ["two", "split"])
def test_two_processes_and_eight_micro_batches_end_where_one_ends(world, name, other):
    assert world.apart(f"one/{name}", f"{other}/{name}") < BOUND


@pytest.mark.slow
def test_control_gradients_that_are_not_averaged_show(world):
    assert world.apart("one/drakes", "apart/drakes") > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_metrics_and_figures_of_two_processes_are_those_of_one(world, name):
    one, two = world.folder / "one" / name, world.folder / "two" / name
    for a, b in zip(losses_of(one), losses_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
    place = "export/evaluation.json" if name == "oracle" else "evaluation.json"
    if name != "masked_pretrain":
        rows = [json.loads((run / place).read_text())["rows"] for run in (one, two)]
        for a, b in zip(*rows, strict=True):
            assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-9, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_it_ends_bitwise_equal(world, name):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sequence_recipes.PRELOAD)
    config, items = world.case("killed", name)
    process = context.Process(target=sequence_recipes.killed, args=(config, items, CASES[name][2]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    sequence_recipes.train(config, items)
    sequence_recipes.train(*world.case("whole", name))
    runs = [world.folder / place / name for place in ("killed", "whole")]
    a, b = map(state_of, runs)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    lines = list(map(losses_of, runs))
    assert lines[0] == lines[1] and len(lines[0]) == 4
    assert "resume" in (runs[0] / "events.jsonl").read_text()
