"""Stability oracles on variants whose stability is a known function of burial."""

import json
import os
import signal

import pytest
import torch
from builders import losses_of, state_of
from synthetic_proteins import buried, make, write

from diffdiv.api import prepare
from diffdiv.data.backbones import LETTERS
from diffdiv.data.stability import read_stability
from diffdiv.data.structures import read_backbones
from diffdiv.export_proteins import export_protein_design
from diffdiv.models.protein_networks import ProteinTokenNet
from diffdiv.rewards.protein import load_stability
from diffdiv.runtime.config import ConfigError
from diffdiv.runtime.run import Run

SMALL = [
    "run.device=cpu", "run.batch_size=16", "run.steps=4", "run.log_every=1", "run.trackers=[]",
    "run.sample_every=2", "run.save_every=2", "model.width=16", "model.encoder_depth=1",
    "model.decoder_depth=1", "model.neighbours=8", "model.dropout=0", "data.held_out=0.3",
    "ema_half_life=100", "lr=3e-3",
]  # fmt: skip
FAT = torch.tensor([k in "AFILMVWY" for k in LETTERS])


def law(backbone, tokens):
    """+1 for each fat residue inside, -1 outside, over the length."""
    side = torch.where(buried(backbone.coordinates), 1.0, -1.0)
    return float((side * FAT[tokens]).sum() / len(tokens))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten structures, twelve variants each, by sequence; a few by mutations."""
    folder, lines = tmp_path_factory.mktemp("stability"), ["structure,sequence,mutations,value"]
    (folder / "structures").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(10):
        backbone = make(f"s{i}", 12 + i % 3, i)
        write(folder / "structures", backbone)
        for _ in range(12):
            tokens = torch.randint(0, 20, (len(backbone),), generator=generator)
            lines.append(f"s{i},{backbone.text(tokens)},,{law(backbone, tokens):.4f}")
        first = LETTERS[int(backbone.tokens[2])]
        lines.append(f"s{i},,A:{first}3W,{0.5:.4f}")
    (folder / "ddg.csv").write_text("\n".join(lines) + "\n")
    return folder


def train(folder, files, *more):
    paths = [f"data.path={files / 'ddg.csv'}", f"structures.path={files / 'structures'}"]
    items = [*SMALL, f"run.folder={folder}", *paths, *more]
    recipe, config = prepare("configs/oracle/protein.yaml", items)
    recipe.main(config)
    return folder


def test_a_table_reads_as_its_letters_say(files):
    backbones = read_backbones(files / "structures").backbones
    found = read_stability(files / "ddg.csv", backbones)
    assert len(found) == 130 and not found.quarantine
    lines = (files / "ddg.csv").read_text().splitlines()[1:]
    sequence = lines[5].split(",")[1]
    assert backbones[0].text(found.tokens[5]) == sequence
    mutated = found.tokens[12]
    differs = (mutated[:12] != backbones[0].tokens).nonzero()[:, 0].tolist()
    assert LETTERS[int(mutated[2])] == "W" and set(differs) <= {2}
    parts = found.split({"a": 0.5, "b": 0.5}, by="structure")
    assert not set(parts["a"].numbers.tolist()) & set(parts["b"].numbers.tolist())
    assert len(parts["a"]) + len(parts["b"]) == 130


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("none,,,1", "there is no structure 'none'"),
        ("s0,AC,,1", "2 letters for 12 residues"),
        ("s0,,A:?3W,1", "is not written like"),
        ("s0,,A:W99W,1", "0 residues are so numbered"),
        ("s0,,,nan", "not finite"),
        ("s0,,,high", "could not convert"),
    ],
)
def test_rows_that_do_not_fit_are_set_aside(files, tmp_path, row, reason):
    backbones = read_backbones(files / "structures").backbones
    table = tmp_path / "t.csv"
    table.write_text((files / "ddg.csv").read_text() + row + "\n")
    [(name, said)] = read_stability(table, backbones).quarantine
    assert name == "line 132" and reason in said
    table.write_text(f"structure,sequence,mutations,value\n{row}\n")
    with pytest.raises(ValueError, match="1 of 1 rows cannot be used"):
        read_stability(table, backbones)


def test_missing_columns_are_named(files, tmp_path):
    (tmp_path / "t.csv").write_text("structure,ddg\n")
    with pytest.raises(ValueError, match="needed are the columns structure, value"):
        read_stability(tmp_path / "t.csv", read_backbones(files / "structures").backbones)
    with pytest.raises(ConfigError, match="must be a CSV of measured stability"):
        items = ["data.path=/no/such.csv", f"structures.path={files / 'structures'}"]
        prepare("configs/oracle/protein.yaml", items)


def test_two_oracles_are_written_and_resumed_bitwise(files, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", files, "data.noise=0.1")
    update = Run.update

    def stopping(self, net, loss):
        update(self, net, loss)
        if sum(self.updates.values()) == 5:  # between the two
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", files, "data.noise=0.1")
    monkeypatch.setattr(Run, "update", update)
    train(tmp_path / "cut", files, "data.noise=0.1")
    a, b = state_of(whole), state_of(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    rows = json.loads((whole / "export" / "evaluation.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["finetune", "evaluation"]
    nets = [load_stability(whole / "export" / name) for name in ("finetune", "evaluation")]
    assert not torch.equal(nets[0].head.weight, nets[1].head.weight)


def test_accumulation_changes_nothing_but_rounding(files, tmp_path):
    one = losses_of(train(tmp_path / "one", files, "data.noise=0.1"))
    four = losses_of(train(tmp_path / "four", files, "data.noise=0.1", "run.accumulation=4"))
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.slow  # half a minute of training
def test_oracles_learn_a_law_for_structures_they_have_not_seen(tmp_path):
    """The share of fat residues, from random weights. What depends on burial needs a start."""
    folder, lines = tmp_path / "structures", ["structure,sequence,value"]
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for i in range(60):
        backbone = make(f"s{i}", 16, 500 + i)
        write(folder, backbone)
        for _ in range(16):
            tokens = torch.randint(0, 20, (16,), generator=generator)
            lines.append(f"s{i},{backbone.text(tokens)},{float(FAT[tokens].float().mean()):.4f}")
    (tmp_path / "ddg.csv").write_text("\n".join(lines) + "\n")
    run = train(
        tmp_path / "run", tmp_path, "run.steps=180", "run.batch_size=32", "run.sample_every=180",
        "model.width=32", "model.neighbours=12", "ema_half_life=300", "run.save_every=180",
        "optimizer.decay_fraction=0.5",
    )  # fmt: skip
    rows = json.loads((run / "export" / "evaluation.json").read_text())["rows"]
    assert all(row["metrics"]["pearson"] > 0.9 for row in rows)


def test_oracles_begin_as_an_inverse_folding_model(files, tmp_path):
    torch.manual_seed(3)
    net = ProteinTokenNet(width=24, encoder_depth=1, decoder_depth=2, neighbours=5)
    start = export_protein_design(
        net, net.state_dict(), tmp_path / "start", num_steps=4, title="x", facts={}
    )
    run = train(tmp_path / "run", files, "run.steps=1", "lr=1e-9", f"start.path={start}")
    begun = load_stability(run / "export" / "finetune").trunk.state_dict()
    ours = net.state_dict()
    assert all(torch.allclose(begun[key], ours[key], atol=1e-6) for key in ours)
