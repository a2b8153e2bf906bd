"""Reward against path KL of every way to fine-tune or guide the embedded DNA denoiser.

    python benchmarks/drakes_fronts.py run --out fronts.jsonl --seconds 25
    python benchmarks/drakes_fronts.py draw --out fronts.jsonl \
        --json docs/drakes_fronts.json --png docs/drakes_fronts.png

"run" appends one line per finished run and skips those that are there, so it can be killed at any
time; equal seconds of CPU for every training (process time, one thread). Methods and what they
train on: benchmarks/fronts_methods.py. Every figure is of ``--n`` fresh sequences (best of N and
particles: see there). KLs are of trajectories:
    kl         from the reference, what training pays for; sums of exact KLs of steps
    world_kl   from the world: the mean of log P(path) - log world(sequence), exact as the reveal
               times of both are alike, so that no sampler can pass the exact front at its world_kl
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import log
from pathlib import Path

import torch
from fronts_methods import LENGTH, STEPS, TRAINED, Problem, of_a_class, train
from torch import Tensor

from diffdiv.data.dna_world import dna_world
from diffdiv.export_sequences import load_token_denoiser
from diffdiv.metrics.sequences import diversity
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives import sequence_guidance as guidance
from diffdiv.objectives.particles import best_of_n, best_of_n_kl, sequential_monte_carlo
from diffdiv.objectives.rollout import roll_out
from diffdiv.resources import resource

Row = dict[str, float | int | str | dict[str, list[float]] | None]
#: what each method is run at, the most informative first: alpha, reward units per nat (one-step:
#: per nat and position; soft policy: of one refresh), the guidance scale, or N
ALPHAS: dict[str, tuple[float, ...]] = {
    "DRAKES, path KL": (0.2, 0.1, 0.4),
    "policy gradient": (0.5, 0.25, 1.0),
    "weighted denoising": (0.3, 0.5, 0.2),
    "posterior alignment": (0.1, 0.25, 0.05),
    "soft policy": (2.0, 1.0, 4.0),
    "DRAKES, legacy KL": (0.01, 0.1, 1.0),
    "DRAKES, no KL": (0.0,),
    "policy gradient, surrogate": (0.25, 0.5, 1.0),
    "one-step likelihood": (0.3, 0.03, 1.0),
    "classifier guidance": (0.25, 0.15, 0.5),
    "logit correction": (0.25, 0.15, 0.5),
    "logit correction, no gradient": (1.0, 0.5, 2.0),
    "sequential Monte Carlo": (0.5, 0.35, 1.0),
    "twisted": (0.5, 0.35, 1.0),
    "classifier-free": (2.0, 1.0, 4.0),
    "best of N": (4.0, 16.0, 64.0),
}
TOGETHER = ("classifier-free", "best of N")  # one training, or pool of samples, for all rows
LEARNING_RATE = 1e-3
POOL, PARTICLES, CHUNK = 4096, 32, 64
FRONT_ALPHAS = (0.35, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0)


def mean_error(name: str, values: Tensor) -> dict[str, float]:
    """A mean over independent values and its standard error."""
    values = values.double()
    return {
        name: round(float(values.mean()), 5),
        f"{name}_error": round(float(values.std()) / len(values) ** 0.5, 5),
    }


def scored(problem: Problem, tokens: Tensor) -> Row:
    """Rewards and variety."""
    varied = {k: round(v, 4) for k, v in diversity(tokens).items()}
    rewards = mean_error("reward", problem.target(tokens))
    return {"n": len(tokens), **rewards, **mean_error("twin", problem.twin(tokens)), **varied}


def guided(problem: Problem, guide_of: Callable[[range], guidance.Guide], n: int) -> Row:
    """Figures of a guided sampler; a trained policy is a guide that ignores the reference."""
    tokens, log_p, kls, spent = [], [], [], 0.0
    for first in range(0, n, CHUNK):
        rows = range(first, min(first + CHUNK, n))
        guide, noise = guide_of(rows), problem.noise("figures", rows)
        began = time.process_time()
        paths, kl = guidance.guided_roll_out(
            guide, problem.reference, problem.chain, noise, problem.start(len(rows))
        )
        spent += time.process_time() - began
        tokens.append(paths.tokens)
        log_p.append(paths.log_p.sum(0).double())
        kls.append(kl)
    drawn = torch.cat(tokens)
    over_world = torch.cat(log_p) - dna_world(LENGTH).log_prob(drawn)
    row = scored(problem, drawn)
    row |= mean_error("kl", torch.cat(kls)) | mean_error("world_kl", over_world)
    return row | {"sampling_ms": round(1000 * spent / n, 1)}


def of_policy(policy: TokenDenoiser) -> Callable[[range], guidance.Guide]:
    return lambda rows: lambda x, log_p, step: policy.log_probs(x)


def classifier(problem: Problem, alpha: float, n: int) -> Row:
    """Gradient of the surrogate at the expected sequence."""

    def guide(x: Tensor, log_p: Tensor, step: int) -> Tensor:
        return guidance.reward_guidance(log_p, problem.surrogate, alpha)

    return guided(problem, lambda rows: guide, n)


def correction(problem: Problem, alpha: float, n: int, *, smooth: bool) -> Row:
    """Three updates of the logits, eight samples each, half-way every time."""

    def guide(rows: range, x: Tensor, log_p: Tensor, step: int) -> Tensor:
        def gumbel(update: int) -> Tensor:
            names = [f"correction/{step}/{update}/{j}" for j in range(8)]
            return torch.stack([problem.noise(name, rows)(0)[..., :-1] for name in names])

        slope = (
            guidance.gradient_slope(problem.surrogate, gumbel)
            if smooth
            else guidance.score_slope(problem.target, gumbel)
        )
        return guidance.corrected_log_probs(log_p, slope, alpha=alpha, num_updates=3, rate=0.5)

    return guided(problem, lambda rows: partial(guide, rows), n)


def particles(problem: Problem, alpha: float, n: int, *, twisted: bool) -> Row:
    """n / 32 independent runs of 32 particles; means over runs.

    "kl" is the upper bound E[r] / alpha - E[log normaliser] for one particle drawn by weight.
    """
    proposal = None
    if twisted:
        proposal = guidance.guided_log_probs(problem.reference, problem.surrogate, 2 * alpha)
    runs, began = [], time.process_time()
    for run in range(n // PARTICLES):
        rows = range(run * PARTICLES, (run + 1) * PARTICLES)
        u = problem.uniform(f"resampling/{run}", 1, STEPS)[0]
        found = sequential_monte_carlo(
            problem.reference, problem.target, alpha, problem.chain,
            problem.noise("particles", rows), u.__getitem__, problem.start(PARTICLES),
            proposal=proposal,
        )  # fmt: skip
        w = found.log_weights.exp()
        reward, twin = (w @ f(found.tokens).double() for f in (problem.target, problem.twin))
        picked = found.tokens[int((w.cumsum(0) < u[-1] * w.sum()).sum().clamp_max(PARTICLES - 1))]
        runs.append((reward, twin, reward / alpha - found.log_normaliser, picked))
    spent = (time.process_time() - began) / len(runs)
    means = {
        key: torch.stack([run[i] for run in runs]) for i, key in enumerate(("reward", "twin", "kl"))
    }
    row: Row = {"n": n, "runs": len(runs), "sampling_ms": round(1000 * spent, 1)}
    for key, values in means.items():
        row |= mean_error(key, values)
    return row | {k: round(v, 4) for k, v in diversity(torch.stack([r[3] for r in runs])).items()}


class Pool:
    """Samples of the reference, drawn once per seed: what best of N chooses from."""

    def __init__(self, problem: Problem, size: int) -> None:
        began = time.process_time()
        parts = [
            roll_out(
                problem.reference,
                problem.chain,
                problem.noise(f"pool/{c}", range(CHUNK)),
                problem.start(CHUNK),
            )
            for c in range(size // CHUNK)
        ]
        self.tokens = torch.cat([part.tokens for part in parts])
        self.log_p = torch.cat([part.log_p.sum(0) for part in parts]).double()
        self.reward = problem.target(self.tokens).double()
        self.over_world = self.log_p - dna_world(LENGTH).log_prob(self.tokens)
        self.ms = 1000 * (time.process_time() - began) / size

    def best_of(self, problem: Problem, group: int) -> Row:
        """Best of N over disjoint groups; KL log N - (N - 1) / N."""
        best = best_of_n(self.reward, group)
        kl = best_of_n_kl(group)
        row = scored(problem, self.tokens[best]) | {"kl": round(kl, 5), "kl_error": 0.0}
        row |= mean_error("world_kl", kl + self.over_world[best])
        return row | {"sampling_ms": round(self.ms * group, 1)}

    def front(self) -> dict[str, list[float]]:
        """alpha -> alpha log Z of the reference, its standard error, effective sample size."""
        found = {}
        for alpha in FRONT_ALPHAS:
            terms = (self.reward / alpha).exp()
            error = alpha * float(terms.std() / terms.mean()) / len(terms) ** 0.5
            size = float(terms.sum() ** 2 / terms.square().sum())
            value = alpha * float((self.reward / alpha).logsumexp(0)) - alpha * log(len(terms))
            found[str(alpha)] = [round(value, 5), round(error, 5), round(size, 1)]
        return found


def classifier_free(problem: Problem, seconds: float, n: int) -> Iterator[Row]:
    """One training for all scales: a denoiser of the best tenth of the reference's samples."""
    policy, updates = train(problem, of_a_class, 0.1, lr=LEARNING_RATE, seconds=seconds)

    def guide(scale: float, x: Tensor, log_p: Tensor, step: int) -> Tensor:
        return guidance.classifier_free_guidance(policy.log_probs(x), log_p, scale)

    for scale in ALPHAS["classifier-free"]:
        row = guided(problem, lambda rows, w=scale: partial(guide, w), n)
        yield {"alpha": scale, "updates": updates, **row}


def trained(problem: Problem, method: str, alpha: float, seconds: float, n: int) -> Row:
    """Figures of a policy after its share of CPU."""
    policy, updates = train(problem, TRAINED[method], alpha, lr=LEARNING_RATE, seconds=seconds)
    return {"alpha": alpha, "updates": updates, **guided(problem, of_policy(policy), n)}


SAMPLED: dict[str, Callable[[Problem, float, int], Row]] = {
    "classifier guidance": classifier,
    "logit correction": partial(correction, smooth=True),
    "logit correction, no gradient": partial(correction, smooth=False),
    "sequential Monte Carlo": partial(particles, twisted=False),
    "twisted": partial(particles, twisted=True),
}


def pooled(problem: Problem, n: int) -> Iterator[Row]:
    """The reference and best of N."""
    pool = Pool(problem, POOL)
    row = guided(problem, of_policy(problem.reference), n)
    yield {"method": "reference", "alpha": None, **row, "front": pool.front()}
    for group in ALPHAS["best of N"]:
        yield {"alpha": group, **pool.best_of(problem, int(group))}


def rows_of(problem: Problem, method: str, rank: int, seconds: float, n: int) -> Iterator[Row]:
    """Rows of a method at its alpha of that rank; all of them at rank 0 where they go together."""
    if method == "best of N":
        yield from pooled(problem, n)
    elif method == "classifier-free":
        yield from classifier_free(problem, seconds, n)
    elif method in SAMPLED:
        alpha = ALPHAS[method][rank]
        yield {"alpha": alpha, **SAMPLED[method](problem, alpha, n)}
    else:
        yield trained(problem, method, ALPHAS[method][rank], seconds, n)


def finished(path: Path) -> set[tuple[str, float, int]]:
    """(method, alpha, seed) of the rows in the file."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {(row["method"], row["alpha"], row["seed"]) for row in map(json.loads, lines)}


def run(args: argparse.Namespace) -> None:
    """Whatever is not in the file yet: every method and seed at its first alpha, then the rest."""
    torch.set_num_threads(1)
    reference = load_token_denoiser(resource("assets/embedded_dna"))
    for rank, seed, method in product(range(3), args.seeds, args.methods or ALPHAS):
        alphas = ALPHAS[method]
        wanted = rank < (1 if method in TOGETHER else len(alphas))
        # read again every time: another process may add to the file
        if not wanted or (method, alphas[rank], seed) in finished(args.out):
            continue
        began = time.process_time()
        rows = list(rows_of(Problem(reference, seed), method, rank, args.seconds, args.n))
        spent = round((time.process_time() - began) / len(rows), 1)
        head = {"method": method, "seed": seed, "seconds": args.seconds, "cpu_seconds": spent}
        with args.out.open("a") as out:
            out.writelines(json.dumps(head | row) + "\n" for row in rows)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["run", "draw"])
    parser.add_argument("--out", type=Path, required=True, help="one JSON line per row")
    parser.add_argument("--methods", nargs="*", choices=list(ALPHAS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=25.0, help="of CPU for each training")
    parser.add_argument("--n", type=int, default=512, help="sequences behind each figure")
    parser.add_argument("--json", type=Path, help="draw: table to write")
    parser.add_argument("--png", type=Path, help="draw: picture to write")
    args = parser.parse_args()
    if args.mode == "run":
        run(args)
    else:
        from fronts_report import draw

        sys.stdout.write(draw(args.out, args.json, args.png) + "\n")


if __name__ == "__main__":
    main()
