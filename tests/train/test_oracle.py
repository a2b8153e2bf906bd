"""The oracle recipe: two oracles that never see the same chromosome, classes or measurements."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from builders import losses_of, state_of
from safetensors.torch import save_file
from torch.nn.functional import one_hot

from diffdiv.api import prepare
from diffdiv.data.sequence_files import read_sequences, write_fasta
from diffdiv.data.sequences import encode
from diffdiv.models.enformer import EnformerTrunk
from diffdiv.rewards.oracle import load_oracle, oracle_reward
from diffdiv.rewards.sequences import check_reward
from diffdiv.runtime.config import ConfigError
from diffdiv.runtime.run import Run

ENFORMER = [
    "model.kind=enformer", "model.trunk.channels=24", "model.trunk.num_conv=3", "model.dropout=0.2",
    "model.trunk.num_transformer=1", "model.trunk.heads=2", "model.trunk.key_size=4",
    "model.trunk.divisor=4",
]  # fmt: skip
SMALL = [
    "run.batch_size=16", "run.steps=4", "run.log_every=1", "run.trackers=[]", "run.device=cpu",
    "run.sample_every=2", "run.save_every=2", "model.width=8", "model.kernel=7",
    "ema_half_life=64", "lr=1e-2", "data.held_out=[chr0]", "data.finetune=[chr1,chr2]",
    "data.evaluation=[chr3,chr4]", "optimizer.warmup_steps=0",
]  # fmt: skip
WORD = encode(["TGACTCA"])[0]


def random_tokens(count, seed):
    return torch.randint(0, 4, (count, 24), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Positives hold a word somewhere, negatives do not."""
    folder = tmp_path_factory.mktemp("classes")
    positive, negative = random_tokens(400, 0), random_tokens(400, 1)
    for i, row in enumerate(positive):
        row[i % 17 : i % 17 + 7] = WORD
    for name, tokens in (("positive", positive), ("negative", negative)):
        names = [f"chr{i % 6}:{i}" for i in range(400)]
        write_fasta(folder / f"{name}.fa", tokens, names=names)
    return [f"data.{name}={folder / name}.fa" for name in ("positive", "negative")]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Activity: ten times the share of G and C, plus 100; and its negative."""
    file = tmp_path_factory.mktemp("table") / "mpra.csv"
    lines = ["seq,where,up,down"]
    for i, row in enumerate(random_tokens(400, 2).tolist()):
        letters, value = (
            "".join("ACGT"[t] for t in row),
            100 + 10 * (row.count(1) + row.count(2)) / 24,
        )
        lines.append(f"{letters},chr{i % 5},{value},{-value}")
    file.write_text("\n".join(lines) + "\n")
    names = ["data.sequence_column=seq", "data.chromosome_column=where", "data.values=[up,down]"]
    return [f"data.path={file}", *names]


def train(folder, *items):
    recipe, config = prepare("configs/oracle/dna.yaml", [*SMALL, f"run.folder={folder}", *items])
    recipe.main(config)
    return folder


def figures(run):
    content = json.loads((run / "export" / "evaluation.json").read_text())
    return {row["name"]: row["metrics"] for row in content["rows"]}


def test_classes_are_learned_by_two_oracles(classes, tmp_path):
    run = train(tmp_path, *classes, "run.steps=200", "run.batch_size=32", "run.sample_every=null")
    found = figures(run)
    assert min(metrics["auroc"] for metrics in found.values()) > 0.9
    oracles = [load_oracle(run / "export" / name) for name in ("finetune", "evaluation")]
    weights = [oracle.conv1.weight for oracle in oracles]
    assert not torch.equal(*weights)
    plain = random_tokens(50, 7)
    with_word = plain.clone()
    with_word[:, 9:16] = WORD
    for oracle in oracles:
        reward = oracle_reward(oracle, bound=4.0)
        check_reward(reward, 24, needs_gradient=True)
        assert float((reward(with_word) - reward(plain)).mean()) > 1
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    messages = [e["message"] for e in events if e["kind"] == "data"]
    assert "held out" in messages[0] and messages[0].endswith("unused")  # chr5


def test_measurements_are_predicted_in_their_own_unit(table, tmp_path):
    run = train(tmp_path, *table, "run.steps=150", "run.batch_size=32", "run.sample_every=null")
    found = figures(run)
    assert min(metrics["pearson"] for metrics in found.values()) > 0.9
    oracle = load_oracle(run / "export" / "evaluation")
    up, down = oracle_reward(oracle), oracle_reward(oracle, output=1)
    tokens = random_tokens(200, 8)
    wanted = 100 + 10 * ((tokens == 1) | (tokens == 2)).float().mean(1)
    assert (up(tokens) - wanted).abs().mean() < 0.5
    assert (down(tokens) + wanted).abs().mean() < 0.5


def test_stopped_and_resumed_it_ends_bitwise_equal(classes, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", *classes, "model.dropout=0.2")
    update = Run.update

    def stopping(self, net, loss):
        update(self, net, loss)
        if self.updates["evaluation"] == 3 and net == "evaluation":  # before the other's turn
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", *classes, "model.dropout=0.2")
    monkeypatch.setattr(Run, "update", update)
    train(tmp_path / "cut", *classes, "model.dropout=0.2")
    a, b = state_of(whole), state_of(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert losses_of(whole) == losses_of(tmp_path / "cut")


def test_enformer_begins_from_a_file_resumes_and_is_reloaded(classes, tmp_path, monkeypatch):
    torch.manual_seed(5)
    sizes = {"channels": 24, "num_conv": 3, "num_transformer": 1, "heads": 2, "key_size": 4}
    state = EnformerTrunk(**sizes, divisor=4).state_dict()
    state["stem.1.fn.0.running_var"] += 1
    save_file(state, tmp_path / "trunk.safetensors")
    items = [*classes, *ENFORMER, f"model.trunk.path={tmp_path / 'trunk.safetensors'}"]
    whole = train(tmp_path / "whole", *items, "lr=1e-6")
    update = Run.update

    def stopping(self, net, loss):
        update(self, net, loss)
        if self.updates["evaluation"] == 3 and net == "evaluation":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", *items, "lr=1e-6")
    monkeypatch.setattr(Run, "update", update)
    train(tmp_path / "cut", *items, "lr=1e-6")
    a, b = state_of(whole), state_of(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    oracles = [load_oracle(whole / "export" / name) for name in ("finetune", "evaluation")]
    assert not torch.equal(oracles[0].head.weight, oracles[1].head.weight)
    for oracle in oracles:
        for name, value in oracle.trunk.state_dict().items():
            torch.testing.assert_close(value, state[name], atol=2e-5, rtol=0)
        check_reward(oracle_reward(oracle), 24, needs_gradient=True)
        x = one_hot(random_tokens(3, 9), 4).float()
        torch.testing.assert_close(oracle(x), oracle(x.flip(1, 2)))


def test_enformer_learns_a_share(table, tmp_path):
    run = train(tmp_path, *table, *ENFORMER, "model.dropout=0", "run.steps=40",
                "run.batch_size=32", "run.sample_every=null", "run.save_every=null")  # fmt: skip
    assert min(metrics["pearson"] for metrics in figures(run).values()) > 0.8
    up = oracle_reward(load_oracle(run / "export" / "finetune"))
    assert abs(float(up(random_tokens(200, 8)).mean()) - 105) < 1


def test_accumulation_changes_nothing_but_rounding(classes, tmp_path):
    one = losses_of(train(tmp_path / "one", *classes))
    four = losses_of(train(tmp_path / "four", *classes, "run.accumulation=4"))
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


def test_mistakes(classes, table, tmp_path):
    for items, word in [
        ([], "negative"),
        (classes[:1], "negative"),
        ([*classes, table[0]], "not both"),
        (["data.path=/no/such.csv"], "must be a file"),
        ([*classes, "model.trunk.heads=4"], "kind=enformer"),
        ([*classes, ENFORMER[0], "model.trunk.path=/no/such.safetensors"], "there is no file"),
    ]:
        with pytest.raises(ConfigError, match=word):
            prepare("configs/oracle/dna.yaml", items)
    with pytest.raises(ValueError, match="in two groups"):
        train(tmp_path / "a", *classes, "data.evaluation=[chr1]")
    with pytest.raises(ValueError, match="no column"):
        train(tmp_path / "b", *table[:3], "data.values=[activity]")
    fasta = classes[0].split("=")[1]
    with pytest.raises(ValueError, match="table of activities"):
        train(tmp_path / "c", f"data.path={fasta}")


@pytest.mark.slow
def test_real_peaks(tmp_path):
    """CTCF against PU.1 on chromosomes that neither oracle has seen: AUROC at least 0.98."""
    folder = Path(os.environ.get("DIFFDIV_DNA_DATA", "/nonexistent"))
    if not (folder / "ctcf.fa.gz").is_file():
        pytest.skip("DIFFDIV_DNA_DATA names no folder with ctcf.fa.gz and pu1.fa.gz")
    files = [f"data.positive={folder / 'ctcf.fa.gz'}", f"data.negative={folder / 'pu1.fa.gz'}"]
    recipe, config = prepare(
        "configs/oracle/dna.yaml",
        [*files, f"run.folder={tmp_path}", "run.device=cpu", "run.trackers=[]", "run.steps=400",
         "run.sample_every=null", "run.save_every=null", "run.precision=bf16",
         "ema_half_life=4000"],
    )  # fmt: skip
    recipe.main(config)
    assert min(metrics["auroc"] for metrics in figures(tmp_path).values()) >= 0.98
    assert len(read_sequences(folder / "pu1.fa.gz")) > 25_000
