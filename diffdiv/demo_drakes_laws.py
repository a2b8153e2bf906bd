"""The laws that `diffdiv demo drakes` compares: sampled without training, and judged alike."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from diffdiv.core.masking import counter_gumbel, log_linear, sample_ancestral
from diffdiv.core.noise import uniform
from diffdiv.data.dna_world import dna_world
from diffdiv.data.sequence_files import read_sequences, write_fasta
from diffdiv.demo_drakes_figures import draw
from diffdiv.export_sequences import load_token_denoiser, stored_length
from diffdiv.metrics.card import Evaluation, Row, metric_card, write_evaluation
from diffdiv.metrics.sequences import Estimate, bits, diversity, excess_bits, kmer_pearson
from diffdiv.objectives.particles import (
    best_of_n,
    best_of_n_kl,
    sequential_monte_carlo,
    systematic_resampling,
)
from diffdiv.resources import resource
from diffdiv.rewards.dna_world import read_front, score, world_reward, world_twin

REFERENCE = "assets/embedded_dna"
SEED, POOL, RUNS, PARTICLES = 0, 2048, 4, 64


@dataclass(frozen=True)
class Law:
    """Sequences of a method [N, L], the KL of its law from the pretrained model, and the price.

    Attributes:
        kl, kl_error: nats, of paths; upper bounds for best-of-N and Monte Carlo.
        calls: network calls for a sequence.
        cpu_seconds: of training, where there is any, and sampling.
    """

    name: str
    tokens: Tensor
    kl: float
    kl_error: float
    calls: int
    cpu_seconds: float


def sampled_laws(folder: Path, steps: int) -> list[Law]:
    """The pretrained model, best-of-N and sequential Monte Carlo; kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    kept, wanted = folder / "laws.json", {"steps": steps, "pool": POOL, "seed": SEED}
    if kept.is_file():
        content = json.loads(kept.read_text("utf-8"))
        if content["made with"] == wanted:
            return [
                Law(tokens=read_sequences(folder / file).tokens, **facts)
                for file, facts in content["laws"].items()
            ]
    laws = _sample_all(steps)
    found = {}
    for i, law in enumerate(laws):
        write_fasta(folder / f"{i}.fa", law.tokens)
        found[f"{i}.fa"] = {key: value for key, value in vars(law).items() if key != "tokens"}
    kept.write_text(json.dumps({"made with": wanted, "laws": found}, indent=1), encoding="utf-8")
    return laws


def _sample_all(steps: int) -> list[Law]:
    reference = load_token_denoiser(resource(REFERENCE))
    length, chain = stored_length(resource(REFERENCE)), log_linear().chain(steps)
    noise = partial(counter_gumbel, (length, 5), seed=SEED)
    began, parts = process_time(), []
    with torch.no_grad():
        for rows in torch.arange(POOL).split(256):
            draws = noise(purpose="pool", indices=rows.tolist())
            start = reference.all_masked(len(rows), length)
            parts.append(sample_ancestral(reference.log_probs, chain, draws, start))
    pool, seconds = torch.cat(parts), process_time() - began
    reward = score(world_reward(), pool)
    laws = [Law("pretrained", pool, 0.0, 0.0, steps, seconds)]
    for group in (4, 16):
        best, kl = pool[best_of_n(reward, group)], best_of_n_kl(group)
        laws.append(Law(f"best of {group}", best, kl, 0.0, group * steps, seconds))
    for alpha in (1.0, 0.5):
        laws.append(_monte_carlo(alpha, steps))
    return laws


def _monte_carlo(alpha: float, steps: int) -> Law:
    """Independent populations; the KL bound and its error come from their spread."""
    reference = load_token_denoiser(resource(REFERENCE))
    length, chain, reward = (
        stored_length(resource(REFERENCE)),
        log_linear().chain(steps),
        world_reward(),
    )
    began, tokens, kls = process_time(), [], []
    for run in range(RUNS):
        rows = range(run * PARTICLES, (run + 1) * PARTICLES)
        u = uniform(seed=SEED, purpose=f"particles/{run}", indices=range(steps + 1))
        found = sequential_monte_carlo(
            reference, reward, alpha, chain,
            counter_gumbel((length, 5), seed=SEED, purpose=f"smc {alpha}", indices=rows),
            u.__getitem__, reference.all_masked(PARTICLES, length),
        )  # fmt: skip
        tokens.append(found.tokens[systematic_resampling(found.log_weights, u[-1])])
        mean = found.log_weights.exp() @ score(reward, found.tokens).double()
        kls.append(mean / alpha - found.log_normaliser)
    kl = Estimate.of(torch.stack(kls))
    name = f"Monte Carlo, alpha {alpha:g}"
    return Law(name, torch.cat(tokens), kl.mean, kl.error, steps + 1, process_time() - began)


def judge(out: Path, laws: Sequence[Law], *, shown: str) -> Evaluation:
    """Measure all laws alike; writes evaluation.json and sequences.json.

    Args:
        out: folder of the demo.
        laws: the first is the pretrained model.
        shown: name of the law whose sequences are shown beside it.
    """
    world = dna_world(stored_length(resource(REFERENCE)))
    natural = world.sample(range(2048), seed=SEED)
    rows = [
        Row(name=law.name, network_evaluations=law.calls, metrics=_metrics(law, natural))
        for law in laws
    ]
    card = metric_card(
        n=min(len(law.tokens) for law in laws), seed=SEED, device="cpu",
        features="none: the world's own reward, its twin, its exact likelihood",
        command="diffdiv demo drakes",
        details={
            "summary": summary(rows, shown),
            "sequences": {law.name: len(law.tokens) for law in laws},
            "path_kl": "of best-of-N and Monte Carlo: an upper bound",
            "below_front": "reward below the exact front of the world at the same KL; beyond the "
            "front's last row (4.7 nats) below a bound of it, so too much rather than too little",
            "exact_front": "its KL is from the world, that of a method from the pretrained model",
            "excess_bits": "exact bits per base beyond those of the best law with the same reward",
            "three_mer": "correlation of 3-mer frequencies with 2,048 sequences of the world",
            "cpu_seconds": "training and sampling, imports included, one thread",
        },
    )  # fmt: skip
    write_evaluation(out, rows, card)
    pair = [laws[0], *(law for law in laws if law.name == shown)]
    figures = draw({law.name: law.tokens for law in pair})
    (out / "sequences.json").write_text(figures.model_dump_json(), encoding="utf-8")
    return {"rows": rows, "card": card}


def _metrics(law: Law, natural: Tensor) -> dict[str, float]:
    """Figures of a law. Likelihood alone says nothing: motifs make the best laws *likelier*."""
    front, length = read_front(), law.tokens.shape[1]
    found = dict[str, float]()
    for name, reward in (("reward", world_reward()), ("twin", world_twin())):
        estimate = Estimate.of(score(reward, law.tokens))
        found |= {name: estimate.mean, f"{name}_error": estimate.error}
    cost = bits(Estimate.of(dna_world(length).log_prob(law.tokens)), length)
    curve = [(row.reward, row.bits_per_base) for row in front.rows]
    # below the mean reward of the world itself the world is what to compare with
    inside = min(max(found["reward"], curve[0][0]), curve[-1][0])
    is_in_table = law.kl <= front.rows[-1].kl
    best = front.reward_at(max(law.kl, 0.0)) if is_in_table else front.bound_at(law.kl)
    return {
        **found,
        "path_kl": law.kl,
        "path_kl_error": law.kl_error,
        "below_front": best - found["reward"],
        "excess_bits": excess_bits(cost.mean, inside, curve),
        "three_mer": kmer_pearson(law.tokens, natural),
        **{key: value for key, value in diversity(law.tokens).items() if key != "kmer_entropy"},
        "cpu_seconds": round(law.cpu_seconds, 1),
    }


def summary(rows: Sequence[Row], name: str) -> str:
    """One sentence on the law ``name``, one on who comes nearest to the front."""
    by_name = {row["name"]: row["metrics"] for row in rows}
    first, ours = by_name["pretrained"], by_name[name]
    nearest = min(
        (row for row in rows if row["metrics"]["path_kl"] > 0.1),
        key=lambda row: row["metrics"]["below_front"],
    )
    gap = nearest["metrics"]
    return (
        f"{name}: reward {first['reward']:.2f} to {ours['reward']:.2f}, its twin "
        f"{first['twin']:.2f} to {ours['twin']:.2f}, at {ours['path_kl']:.2f} nats. Nearest to the "
        f"exact front is {nearest['name']}: {gap['below_front']:.2f} below it at "
        f"{gap['path_kl']:.2f} nats. One seed."
    )


def front_table(evaluation: Evaluation) -> Table:
    """evaluation.json for the terminal, a row a method: fits 80 characters."""
    columns = {
        "reward": "reward", "twin": "twin", "path_kl": "KL", "below_front": "below\nfront",
        "excess_bits": "excess\nbits", "three_mer": "3-mer", "cpu_seconds": "CPU s",
    }  # fmt: skip
    title = "Reward against KL (nats); the twin is never trained on"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for title in columns.values():
        table.add_column(title, justify="right")
    for row in evaluation["rows"]:
        digits = {"cpu_seconds": 0, "excess_bits": 3, "three_mer": 3}
        values = [f"{row['metrics'][key]:.{digits.get(key, 2)}f}" for key in columns]
        table.add_row(row["name"], *values)
    return table
