"""The pretraining recipe on small networks, and the denoiser that ships."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import losses_of, state_of
from torch.nn.functional import one_hot

from diffdiv.api import prepare
from diffdiv.core.masking import counter_gumbel, log_linear, sample_ancestral
from diffdiv.data.dna_world import dna_world
from diffdiv.data.sequence_files import read_sequences, write_fasta
from diffdiv.export_sequences import load_token_denoiser
from diffdiv.metrics.sequences import Estimate, bits, diversity, kmer_pearson, log_likelihood_bound
from diffdiv.rewards.dna_world import read_front, score, world_reward
from diffdiv.runtime.config import ConfigError
from diffdiv.runtime.run import Run

ROOT = Path(__file__).resolve().parents[2]
ASSET = ROOT / "assets" / "embedded_dna"
SMALL = [
    "run.batch_size=8", "run.steps=6", "run.log_every=1", "run.trackers=[]", "run.device=cpu",
    "run.sample_every=3", "run.save_every=2", "data.held_out=[chr1]", "model.width=8",
    "model.kernel=3", "model.dilations=[1,2]", "export.num_steps=4", "export.num_evaluated=10",
    "ema_half_life=20", "lr=1e-2", "optimizer.warmup_steps=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """300 sequences of 20 bp, rich in A and in the word TATA."""
    file = tmp_path_factory.mktemp("peaks") / "peaks.fa"
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(torch.tensor([0.7, 0.1, 0.1, 0.1]), 6000, True, generator=generator)
    tokens = tokens.view(300, 20)
    tokens[:, 8:12] = torch.tensor([3, 0, 3, 0])
    write_fasta(file, tokens, names=[f"chr{i % 3}:{i}" for i in range(300)])
    return file


def train(folder, peaks, *more):
    items = [*SMALL, f"run.folder={folder}", f"data.path={peaks}", *more]
    recipe, config = prepare("configs/pretrain/dna.yaml", items)
    recipe.main(config)
    return folder


def test_it_learns_and_what_it_exports_is_what_it_measured(peaks, tmp_path):
    more = ["run.steps=150", "run.batch_size=32", "data.reverse_complement=false", "lr=1e-2"]
    more += ["model.width=16", "model.kernel=5", "model.dilations=[1,2,4]"]
    run = train(tmp_path, peaks, *more, "run.sample_every=50", "export.num_evaluated=100")
    held_out = [s["held_out/bits"] for s in losses_of(run) if "held_out/bits" in s]
    p = torch.tensor([0.66, 0.08, 0.08, 0.18])  # letters of the set
    letters_alone = float(-(p * p.log2()).sum())  # 1.41
    assert held_out[0] > 1.5 and len(held_out) == 3
    exported = json.loads((run / "export" / "export.json").read_text())
    assert exported["held_out/bits"] < letters_alone - 0.15
    denoiser = load_token_denoiser(run)
    train_set, test = read_sequences(peaks).split(["chr1"])
    again = bits(log_likelihood_bound(denoiser, test.tokens[:100], draws=16, seed=4), 20)
    assert abs(again.mean - exported["held_out/bits"]) < 5 * again.error
    samples = read_sequences(run / "samples" / "step-00000150.fa")
    assert len(samples) == 32 and samples.tokens.shape[1] == 20
    assert kmer_pearson(samples.tokens, train_set.tokens) > 0.8
    assert "NNNNTTTACNNNN" in (run / "export" / "README.md").read_text()


def test_stopped_and_resumed_it_ends_bitwise_equal(peaks, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", peaks)
    update = Run.update

    def stopping(self, net, loss):
        update(self, net, loss)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", peaks)
    monkeypatch.setattr(Run, "update", update)
    train(tmp_path / "cut", peaks)
    a, b = state_of(whole), state_of(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert losses_of(whole) == losses_of(tmp_path / "cut")
    files = [sorted((f / "samples").iterdir()) for f in (whole, tmp_path / "cut")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_accumulation_changes_nothing_but_rounding(peaks, tmp_path):
    """Half the batch and twice the accumulation: users of the released code saw another result."""
    one = losses_of(train(tmp_path / "one", peaks))
    four = losses_of(train(tmp_path / "four", peaks, "run.accumulation=4"))
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_the_embedded_world_and_the_transformer(tmp_path):
    items = [*SMALL[:-4], "data.held_out=[]", "model.kind=transformer", "model.heads=2"]
    items += ["model.depth=1", "data.length=30", f"run.folder={tmp_path}", "run.steps=2"]
    recipe, config = prepare("configs/pretrain/embedded_dna.yaml", items)
    recipe.main(config)
    index = json.loads((tmp_path / "export" / "model_index.json").read_text())
    assert index["denoiser"] == ["token_networks", "TransformerTokenNet"] and index["length"] == 30
    assert load_token_denoiser(tmp_path).log_probs(torch.full((1, 30), 4)).shape == (1, 30, 4)


@pytest.mark.parametrize(
    ("item", "word"),
    [
        ("data.path=/no/such.fa", "FASTA"),
        ("model.kind=unet", "dilated"),
        ("data.lenght=100", "length"),
        ("export.dtype=int4", "float16"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(peaks, item, word):
    with pytest.raises(ConfigError, match=word):
        prepare("configs/pretrain/dna.yaml", [f"data.path={peaks}", item])
    with pytest.raises(ConfigError, match="reverse_complement"):
        items = ["data.reverse_complement=true"]
        prepare("configs/pretrain/embedded_dna.yaml", items)


def test_set_aside_records_are_written_down(peaks, tmp_path):
    file = tmp_path / "b.fa"
    file.write_text(peaks.read_text() + ">chr2:bad\nACGN\n")
    run = train(tmp_path / "run", file, "run.steps=1")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["message"] for e in events if e["kind"] == "quarantine"] == [
        "chr2:bad: length 4, not 20"
    ]


READER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffdiv":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
for text in pipe(batch_size=16, generator=torch.Generator().manual_seed(3)).texts:
    print(text)
"""


@pytest.mark.slow  # a process that imports torch and diffusers
def test_stock_diffusers_draws_the_same_sequences_from_an_export(peaks, tmp_path):
    run = train(tmp_path / "run", peaks)
    out = subprocess.run(
        [sys.executable, "-c", READER, str(run / "export")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr
    texts = out.stdout.split()
    assert len(texts) == 16 and {len(text) for text in texts} == {20}
    denoiser, generator = load_token_denoiser(run), torch.Generator().manual_seed(3)
    draws = torch.randn(4, 16, 20, 5, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        tokens = sample_ancestral(
            denoiser.log_probs,
            log_linear().chain(4),
            lambda k: (-(-torch.special.log_ndtr(draws[k])).log()).float(),
            denoiser.all_masked(16, 20),
        )
    assert texts == ["".join("ACGT"[i] for i in row) for row in tokens.tolist()]


def test_the_embedded_denoisers_bound():
    """At most 0.05 bits per base above the exact likelihood, on 512 sequences new to it.

    Paired with the exact log-likelihoods, whose spread is several times that of the difference.
    """
    weights = ASSET / "denoiser" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 2**20
    world = dna_world()
    tokens = world.sample(range(512), seed=77)
    bound = log_likelihood_bound(load_token_denoiser(ASSET), tokens, draws=8)
    gap = bits(Estimate.of(bound.values - world.log_prob(tokens)), 100)
    assert -4 * gap.error < gap.mean and gap.mean + 3 * gap.error < 0.05


@pytest.mark.slow  # 1,024 sequences in 128 steps, a minute
def test_the_embedded_denoisers_samples():
    denoiser, length = load_token_denoiser(ASSET), 100
    with torch.no_grad():
        tokens = torch.cat([
            sample_ancestral(
                denoiser.log_probs,
                log_linear().chain(128),
                counter_gumbel((length, 5), seed=9, purpose="z", indices=range(i, i + 128)),
                denoiser.all_masked(128, length),
            )
            for i in range(0, 1024, 128)
        ])  # fmt: skip
    reward = float(score(world_reward(), tokens).mean())
    assert reward >= 0.8 * read_front().rows[0].reward
    assert kmer_pearson(tokens, dna_world().sample(range(2000), seed=78)) >= 0.98
    assert diversity(tokens)["distinct"] == 1
    assert one_hot(tokens, 4).shape == (1024, length, 4)


@pytest.mark.slow
def test_real_peaks(tmp_path):
    """ELBO below an order-3 Markov chain on held-out chromosomes, by 0.05 (CTCF), 0.03 (PU.1)."""
    folder = Path(os.environ.get("DIFFDIV_DNA_DATA", "/nonexistent"))
    if not (folder / "ctcf.fa.gz").is_file():
        pytest.skip("DIFFDIV_DNA_DATA names no folder with ctcf.fa.gz and pu1.fa.gz")
    items = [
        "run.device=cpu", "run.precision=bf16", "run.batch_size=64", "run.steps=1000",
        "run.log_every=100", "run.sample_every=null", "run.save_every=null", "run.trackers=[]",
        "model.width=48", "model.kernel=7", "model.dilations=[1,2,4,8,1,2]", "lr=8e-3",
        "export.num_evaluated=2048", "export.num_steps=64", "ema_half_life=2500",
        "optimizer.betas=[0.9,0.98]", "optimizer.weight_decay=0.01", "optimizer.warmup_steps=40",
        "optimizer.decay_fraction=1",
    ]  # fmt: skip
    for name, margin in (("ctcf", 0.05), ("pu1", 0.03)):
        path = folder / f"{name}.fa.gz"
        recipe, config = prepare(
            "configs/pretrain/dna.yaml",
            [*items, f"data.path={path}", f"run.folder={tmp_path / name}"],
        )
        recipe.main(config)
        found = json.loads((tmp_path / name / "export" / "export.json").read_text())
        known, held_out = read_sequences(path).split(["chr8", "chr9"])
        assert found["held_out/bits"] < markov_bits(known.tokens, held_out.tokens, 3) - margin


def markov_bits(known, tokens, order):
    """Bits per base of an order-k Markov chain with pseudo-count 1/2, from the k-th base on."""

    def codes(t):
        return (t.unfold(1, order + 1, 1) * 4 ** torch.arange(order, -1, -1)).sum(-1).flatten()

    counts = torch.bincount(codes(known), minlength=4 ** (order + 1)).double().view(-1, 4) + 0.5
    p = (counts / counts.sum(1, keepdim=True)).flatten()
    return float(-p[codes(tokens)].log2().mean())
