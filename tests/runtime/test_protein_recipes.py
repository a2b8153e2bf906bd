"""Inverse folding, stability oracles, DRAKES on backbones: two processes are one."""

import json
import os
import subprocess
import sys

import protein_recipes
import pytest
import torch
from builders import state_of
from processes import CODE
from safetensors.torch import load_file
from synthetic_proteins import write_world

from diffdiv.data.structures import read_backbones
from diffdiv.export_proteins import export_protein_design
from diffdiv.models.protein_networks import ProteinTokenNet
from diffdiv.rewards.protein import StabilityNet

SIZES = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "neighbours": 6}
COMMON = [
    "run.batch_size=8", "run.accumulation=1", "run.steps=3", "run.log_every=1", "run.trackers=[]",
    "run.device=cpu", "run.sample_every=null", "run.save_every=null", "lr=1e-2",
    "optimizer.warmup_steps=0",
]  # fmt: skip
SHAPE = [f"model.{key}={value}" for key, value in SIZES.items()]
DRAKES = [
    "objective.num_steps=5", "objective.num_soft=3", "objective.num_graded=2", "num_evaluated=16",
    "reward.kind=stability",
]  # fmt: skip
CASES = {
    "pretrain": [*SHAPE, "model.dropout=0", "data.share=0.3", "export.num_evaluated=2"],
    "oracle": [*SHAPE, "model.dropout=0", "data.held_out=0.3"],
    "drakes": DRAKES,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All recipes by one process and by two."""
    folder = tmp_path_factory.mktemp("proteins")
    structures = write_world(folder / "structures", 12, length=9)
    torch.manual_seed(0)
    net = ProteinTokenNet(**SIZES)
    export_protein_design(net, net.state_dict(), folder / "m", num_steps=5, title="x", facts={})
    for part in ("finetune", "evaluation"):
        StabilityNet(**SIZES, scale=100.0).save_pretrained(folder / "oracles" / part)
    rows = "".join(
        f"{b.name},{b.text(b.tokens.roll(i))},{i}.5\n"
        for b in read_backbones(structures).backbones
        for i in range(4)
    )
    (folder / "ddg.csv").write_text("structure,sequence,value\n" + rows)
    paths = {
        "pretrain": {"data.path": "structures"},
        "oracle": {"data.path": "ddg.csv", "structures.path": "structures"},
        "drakes": {"reference.path": "m", "reward.path": "oracles", "backbones.path": "structures"},
    }

    def cases(place):
        for name, items in CASES.items():
            given = paths[name] | {"run.folder": f"{place}/{name}"}
            named = [f"{key}={folder / path}" for key, path in given.items()]
            yield f"configs/{name}/protein.yaml", [*COMMON, *items, *named]

    for start, runs in (([], [*cases("one")]), (["-c", CODE], [*cases("two")])):
        (folder / "cases.json").write_text(json.dumps(runs))
        done = subprocess.run(
            [sys.executable, *start, protein_recipes.__file__, folder / "cases.json"],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_where_one_ends(world, name):
    one, two = state_of(world / "one" / name), state_of(world / "two" / name)
    start = load_file(world / "one" / name / "first.safetensors")
    assert one.keys() == two.keys()
    for net in {key.partition("/")[0] for key in start}:
        keys = [key for key in start if key.startswith(f"{net}/")]
        moved = torch.stack([(one[key] - start[key]).norm() for key in keys]).norm()
        apart = torch.stack([(one[key] - two[key]).norm() for key in keys]).norm()
        assert moved > 0 and apart / moved < 1e-11
