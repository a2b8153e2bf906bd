"""DRAKES on backbones: designs move, fixed residues stay, backbones are encoded once."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from builders import losses_of, state_of
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from synthetic_proteins import make, write, write_world

from diffdiv.api import prepare
from diffdiv.data.backbones import LETTERS
from diffdiv.data.structures import read_backbone
from diffdiv.export_proteins import export_protein_design, load_protein_net
from diffdiv.models import protein_networks
from diffdiv.models.protein_networks import ProteinTokenNet
from diffdiv.rewards.protein import StabilityNet
from diffdiv.runtime.config import ConfigError
from diffdiv.runtime.run import Run

SMALL = [
    "run.device=cpu", "run.batch_size=16", "run.steps=4", "run.log_every=1", "run.trackers=[]",
    "run.sample_every=2", "run.save_every=2", "run.accumulation=1", "objective.num_steps=6",
    "objective.num_soft=4", "objective.num_graded=2", "objective.checkpointing=false",
    "num_evaluated=32", "ema_half_life=20", "lr=5e-3",
]  # fmt: skip
REAL = Path(__file__).parents[1] / "data" / "6mrr_backbone.pdb"
SIZES = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "neighbours": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An untrained denoiser, structures, energies that want fat residues at eight places."""
    folder = tmp_path_factory.mktemp("designs")
    torch.manual_seed(0)
    net = ProteinTokenNet(**SIZES)
    export_protein_design(
        net, net.state_dict(), folder / "model", num_steps=6, title="small", facts={}
    )
    write(folder, make("one", 14, 1))
    write_world(folder / "many", 5, length=10)
    values = {letter: 1.0 if letter in "AFILMVWY" else -0.5 for letter in LETTERS[:-1]}
    rows = "".join(f"A,{i},{k},{v}\n" for i in range(2, 10) for k, v in values.items())
    (folder / "one.csv").write_text("chain,position,amino_acid,value\n" + rows)
    for number, part in enumerate(("finetune", "evaluation")):
        torch.manual_seed(number)
        StabilityNet(**SIZES, scale=300.0).save_pretrained(folder / "oracle" / part)
    return folder


def one(files):
    return [
        f"reference.path={files / 'model'}", f"backbones.path={files / 'one.pdb'}",
        "reward.kind=energies", f"reward.path={files / 'one.csv'}", "backbones.design=A:2-9",
    ]  # fmt: skip


def many(files):
    return [
        f"reference.path={files / 'model'}", f"backbones.path={files / 'many'}",
        "reward.kind=stability", f"reward.path={files / 'oracle'}",
    ]  # fmt: skip


def train(folder, items, *more):
    recipe, config = prepare(
        "configs/drakes/protein.yaml", [*SMALL, f"run.folder={folder}", *items, *more]
    )
    recipe.main(config)
    return folder


def figures(run):
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    return {row["name"]: row["metrics"] for row in rows}


GRADIENT = ["objective.name=policy_gradient", "objective.num_graded=3"]
CROSS = ["objective.name=masked_cross_entropy", "objective.num_graded=4", "objective.alpha=0.5"]


METHODS = pytest.mark.parametrize(
    "method",
    [
        pytest.param([], id="drakes"),
        pytest.param(GRADIENT, id="gradient", marks=pytest.mark.slow),
        pytest.param(CROSS, id="cross", marks=pytest.mark.slow),
    ],
)


@METHODS
def test_energies_rise_and_fixed_residues_stay(files, tmp_path, method):
    run = train(tmp_path, one(files), "run.steps=20", "run.sample_every=20", "lr=1e-2", *method)
    found = figures(run)
    assert found["reference"]["path_kl"] == 0.0
    gain = found["policy"]["reward"] - found["reference"]["reward"]
    assert gain > 4 * found["reference"]["reward_error"]
    assert found["policy"]["path_kl"] > 0
    native = read_backbone(files / "one.pdb")
    text = native.text(native.tokens)
    designs = (run / "samples" / "policy.fa").read_text().splitlines()
    assert designs[0].startswith(">one-0 reward=") and len(designs) == 64
    assert {line[0] + line[9:] for line in designs[1::2]} == {text[0] + text[9:]}
    assert len({line[1:9] for line in designs[1::2]}) > 8
    score = sum(value for value in (float(line.split("=")[1]) for line in designs[::2]))
    fat = sum(1.0 if k in "AFILMVWY" else -0.5 for line in designs[1::2] for k in line[1:9])
    assert score == pytest.approx(fat, rel=1e-4)


def test_a_backbone_is_encoded_once_per_run(files, tmp_path, monkeypatch):
    """By the shared frozen encoder of policy and reference, and once by each oracle."""
    calls = Counter()
    forward = protein_networks._Structure.forward

    def counting(self, coordinates, *rest):
        calls.update([(id(self), tuple(row[2].flatten().tolist())) for row in coordinates])
        return forward(self, coordinates, *rest)

    monkeypatch.setattr(protein_networks._Structure, "forward", counting)
    train(tmp_path, many(files))
    assert set(calls.values()) == {1}
    assert len(calls) == 3 * 5  # reference, oracle, twin; five backbones
    assert len({net for net, _ in calls}) == 3


@pytest.mark.slow
def test_stability_rises_over_backbones_of_different_length(files, tmp_path):
    run = train(tmp_path, many(files), "run.steps=15", "run.sample_every=15", "lr=1e-2",
                "objective.alpha=0.001")  # fmt: skip
    found = figures(run)
    gain = found["policy"]["reward"] - found["reference"]["reward"]
    assert gain > 4 * found["reference"]["reward_error"]
    assert {"twin", "recovery", "path_kl_error"} <= set(found["policy"])
    lines = (run / "samples" / "policy.fa").read_text().splitlines()
    assert len({line.split()[0].rpartition("-")[0] for line in lines[::2]}) == 5
    assert {len(line) for line in lines[1::2]} == {10, 11, 12, 13, 14}
    assert not set("".join(lines[1::2])) - set("ACDEFGHIKLMNPQRSTVWY")


def test_only_the_decoder_is_trained_and_exported_with_the_rest(files, tmp_path):
    run = train(tmp_path, one(files))
    before = load_protein_net(files / "model").state_dict()
    after = load_protein_net(run).state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and not [key for key in moved if key.startswith("structure.")]


@METHODS
def test_accumulation_changes_nothing_but_rounding(files, tmp_path, method):
    items = one(files) if method is CROSS else many(files)
    single = losses_of(train(tmp_path / "one", items, *method))
    four = losses_of(train(tmp_path / "four", items, *method, "run.accumulation=4"))
    for a, b in zip(single, four, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)


def test_stopped_and_resumed_it_ends_bitwise_equal(files, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", many(files))
    update = Run.update

    def stopping(self, net, loss):
        update(self, net, loss)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", many(files))
    monkeypatch.setattr(Run, "update", update)
    train(tmp_path / "cut", many(files))
    a, b = state_of(whole), state_of(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert losses_of(whole) == losses_of(tmp_path / "cut")


@pytest.mark.parametrize(
    ("items", "word"),
    [
        (["backbones.path=null"], "wants backbones"),
        (["backbones.path=/no/such.pdb"], "must be a structure"),
        (["reward.path=/no/such.csv"], "must be a CSV of energies"),
        (["reward.kind=stability"], r"must hold finetune/ \(see train/stability.py\)"),
        (["reward.kind=dna_world"], "dna_world has no backbones"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(files, items, word):
    with pytest.raises(ConfigError, match=word):
        prepare("configs/drakes/protein.yaml", [*SMALL, *one(files), *items])


def test_weights_of_several_backbones_are_not_mixed(files, tmp_path):
    with pytest.raises(ValueError, match=r"so it needs one backbone, not 5"):
        train(tmp_path, many(files), *CROSS)


def test_a_dna_model_is_no_reference_for_backbones(files, tmp_path):
    with pytest.raises(ValueError, match="no ProteinTokenNet there"):
        train(tmp_path, [*one(files), "reference.path=assets/embedded_dna"])


@pytest.mark.slow
def test_from_structures_to_designs_for_a_real_backbone(tmp_path, monkeypatch):
    """Inverse folding, fine-tuning for energies, an export that designs: 6MRR, a part of it."""
    structures = write_world(tmp_path / "structures", 60, length=16)
    shape = [f"model.{key}={value}" for key, value in SIZES.items()]
    recipe, config = prepare(
        "configs/pretrain/protein.yaml",
        [
            "run.device=cpu", "run.batch_size=8", "run.steps=40", "run.trackers=[]", *shape,
            "run.sample_every=null", "run.save_every=null", "model.dropout=0", "data.share=0.2",
            "export.num_evaluated=4", "export.num_steps=4", "lr=1e-2", "ema_half_life=40",
            "optimizer.warmup_steps=0", f"data.path={structures}",
            f"run.folder={tmp_path / 'protein'}",
        ],
    )  # fmt: skip
    recipe.main(config)
    native = read_backbone(REAL, design="A:10-24")
    lines = [f"A,{i},{k},0.5" for i in range(10, 25) for k in "KE"]
    (tmp_path / "e.csv").write_text("\n".join(["chain,position,amino_acid,value", *lines]))
    items = [
        f"reference.path={tmp_path / 'protein'}", f"reward.path={tmp_path / 'e.csv'}",
        "reward.kind=energies", f"backbones.path={REAL}", "backbones.design=A:10-24",
        "run.steps=15", "run.batch_size=8", "run.sample_every=null", "lr=1e-2",
    ]  # fmt: skip
    found = figures(train(tmp_path / "run", items))
    gain = found["policy"]["reward"] - found["reference"]["reward"]
    assert gain > 4 * found["reference"]["reward_error"]
    designs = (tmp_path / "run" / "samples" / "policy.fa").read_text().splitlines()
    text = native.text(native.tokens)
    assert {line[:9] + line[24:] for line in designs[1::2]} == {text[:9] + text[24:]}
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "export", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = pipe(REAL, design="A:10-24", num_designs=64, generator=generator).texts
    score = sum(0.5 for text in made for k in text[9:24] if k in "KE") / 64
    assert abs(score - found["policy"]["reward"]) < 6 * found["policy"]["reward_error"]
