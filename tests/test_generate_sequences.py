"""Exports of sequences: loaded with our own code only, sampled into FASTA, checked from outside."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import diffdiv
from diffdiv import cli, generate_sequences
from diffdiv.data.sequence_files import read_sequences, write_fasta
from diffdiv.export_sequences import export_masked_sequences, load_token_denoiser
from diffdiv.models.token_networks import DilatedTokenNet
from diffdiv.rewards.dna_world import world_reward

ASSET = Path(__file__).resolve().parents[1] / "assets" / "embedded_dna"
JASPAR = ">MA0001.1 BOX\nA [0 10 0 10 10 0]\nC [0 0 0 0 0 0]\nG [0 0 0 0 0 0]\nT [10 0 10 0 0 10]\n"
TEMPLATE = "NNNNNNNTATAATNNNNNNN"


@pytest.fixture
def export(tmp_path):
    torch.manual_seed(0)
    net = DilatedTokenNet(num_tokens=4, width=16, kernel=5, dilations=(1, 2))
    return export_masked_sequences(
        net, net.state_dict(), tmp_path / "dna", length=20, num_steps=6, title="x", facts={}
    )


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["diffdiv", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as error:
        return error.code or 0
    return 0


def test_the_shipped_asset_is_loaded_with_our_code_and_its_own_weights():
    assert not list(ASSET.rglob("*.py"))
    pipe = diffdiv.load(ASSET)
    denoiser = load_token_denoiser(ASSET)
    x = torch.full((2, 100), 4)
    x[1, :50] = 2
    with torch.no_grad():
        told = pipe.denoiser(x).logits.log_softmax(-1)
        torch.testing.assert_close(told[0], denoiser.log_probs(x)[0])
    assert (pipe.config.length, pipe.config.num_inference_steps) == (100, 128)


@pytest.mark.parametrize(
    "file", ["masked_sequences.py", "denoiser/token_networks.py", "scheduler/scheduling_masked.py"]
)
def test_code_that_is_not_ours_is_never_run(export, tmp_path, file):
    (export / file).unlink()  # what lacks is taken from here
    assert diffdiv.load(export)(batch_size=1).texts
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'trap')!r}).touch()\n"
    (export / file).write_text(trap)
    with pytest.raises(ValueError, match="brings code that does not ship"):
        diffdiv.load(export)
    assert not (tmp_path / "trap").exists()


def test_a_pipeline_cannot_name_files_outside_its_folder(export):
    index = json.loads((export / "model_index.json").read_text())
    index["../denoiser"] = index.pop("denoiser")
    (export / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="brings code"):
        diffdiv.load(export)


def test_sample_writes_scored_fasta_that_keeps_the_template(export, tmp_path, monkeypatch, capsys):
    motifs, out = tmp_path / "box.jaspar", tmp_path / "out"
    motifs.write_text(JASPAR)
    flags = ["--num", 3, "--seed", 5, "--out", out, "--reward", motifs]
    assert run(monkeypatch, "sample", export, "--prompt", TEMPLATE, *flags) == 0
    file = out / "sequences.fa"
    assert capsys.readouterr().out.strip().endswith("sequences.fa")
    found = read_sequences(file)
    assert found.tokens.shape == (3, 20) and len(torch.unique(found.tokens, dim=0)) == 3
    lines = file.read_text().splitlines()
    assert all(line[7:13] == "TATAAT" for line in lines[1::2])
    reward = generate_sequences.open_rewards(str(motifs))[0]
    told = [float(line.rpartition("=")[2]) for line in lines[::2]]
    assert told == pytest.approx(reward(found.tokens).tolist(), rel=1e-5)
    # the i-th sequence is a function of seed + i
    again = generate_sequences.sample_sequences(
        diffdiv.load(export), [TEMPLATE], 1, 6, tmp_path / "again.fa"
    )
    assert torch.equal(read_sequences(again).tokens[0], found.tokens[1])


def test_sample_without_template_and_from_a_run(export, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(export, folder / "export")
    (folder / "config.yaml").write_text("recipe: drakes\n")
    out = tmp_path / "out"
    flags = ["--num", 2, "--out", out, "--reward", "dna_world"]
    assert run(monkeypatch, "sample", folder, *flags) == 0
    found = read_sequences(out / "sequences.fa").tokens
    header = (out / "sequences.fa").read_text().splitlines()[0]
    assert header == f">sequence-0 dna_world={float(world_reward()(found)[0]):.6g}"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompt", "NNXN"], r"letters \['X'\]"),
        (["--prompt", "NNN", "--prompt", "NNNN"], r"lengths \[3, 4\] differ"),
        (["--reward", "no_such"], "'no_such' is not one of dna_world"),
    ],
)
def test_mistakes_are_one_sentence(export, tmp_path, monkeypatch, capsys, more, words):
    assert run(monkeypatch, "sample", export, "--out", tmp_path / "out", *more) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert re.search(words, told)


def test_an_oracle_scores(export, tmp_path):
    from diffdiv.rewards.oracle import SequenceOracle

    for name in ("finetune", "evaluation"):
        SequenceOracle(width=8, kernel=5).save_pretrained(tmp_path / "oracle" / name)
    rewards = generate_sequences.open_rewards(str(tmp_path / "oracle"))
    assert [reward.name for reward in rewards] == ["oracle-finetune", "oracle-evaluation"]
    tokens = torch.randint(0, 4, (3, 20))
    write_fasta(tmp_path / "a.fa", tokens, scores={r.name: r(tokens) for r in rewards})
