"""TiUE students on the embedded Stable Diffusion, beside a one-step student and the teacher.

    python benchmarks/tiue_ablation.py run --out runs/tiue.jsonl --seeds 0 1 2 --steps 150
    python benchmarks/tiue_ablation.py show runs/tiue.jsonl --out docs/tiue.json

One JSON line for each finished student; what a file holds is not made again. The one-step student
is the same recipe with one decoder time, so objective, rates and batches are equal. Marks:
Frechet distance, density and coverage in the embedded judge's features (not FID), accuracy of
the prompts' attributes, and the mean distance of eight samples of one prompt in these features.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffdiv import api
from diffdiv.core.noise import normal
from diffdiv.data.digits import PromptedDigits
from diffdiv.evaluate import REFERENCE_SIZE
from diffdiv.metrics.diversity import density_and_coverage
from diffdiv.metrics.judge import attribute_accuracy, judge_features, judge_frechet, load_judge
from diffdiv.models.backbones import LatentCodec, PromptEncoder, load_denoiser
from diffdiv.models.denoiser import Condition, guided
from diffdiv.resources import resource
from diffdiv.runtime.student import open_run
from diffdiv.samplers import sample_ode, time_grid
from diffdiv.sources import Sampler

CPU = torch.device("cpu")
TEACHER = resource("assets/embedded_sd")
FOUR, PAPER = [999, 749, 499, 249], [751, 501, 251, 1]
STUDENTS: dict[str, dict[str, object]] = {
    "TiUE": {"student.decoder_times": FOUR, "objective.kl_weight": 0.8},
    "TiUE, paper's times": {"student.decoder_times": PAPER, "objective.kl_weight": 0.8},
    "TiUE without KL": {"student.decoder_times": FOUR, "objective.kl_weight": 0.0},
    "one step": {"student.decoder_times": [999], "objective.kl_weight": 0.8},
}
PROMPTS, PER_PROMPT = 32, 8


def marks(sampler: Sampler, num: int) -> dict[str, float]:
    """All figures of a sampler; the noise and the prompts are the same for every one."""
    judge, encode = load_judge(resource("assets/embedded_judge")), PromptEncoder(TEACHER)
    codec, shape = LatentCodec(TEACHER, CPU), (4, 8, 8)

    def images(cond: Condition, first: int, count: int) -> Tensor:
        z = normal(shape, seed=0, purpose="evaluation", indices=range(first, first + count))
        parts = range(0, count, 100)
        x0 = [sampler(z[i : i + 100], cond[slice(i, i + 100)]) for i in parts]
        return codec.decode(torch.cat(x0))

    batch = PromptedDigits("test", seed=0, drop_probability=0).batch(range(num))
    reference = judge_features(judge, PromptedDigits("train").batch(range(REFERENCE_SIZE)).images)
    scale = reference.double().std(0).clamp_min(1e-6)
    with torch.no_grad():
        shown = images(encode(batch.prompts), 0, num)
        prompts = [p for p in batch.prompts[:PROMPTS] for _ in range(PER_PROMPT)]
        again = images(encode(prompts), num, len(prompts))
    features = judge_features(judge, shown)
    density, coverage = density_and_coverage(features / scale, reference[:2000] / scale)
    groups = (judge_features(judge, again) / scale).view(PROMPTS, PER_PROMPT, -1)
    pairs = torch.cdist(groups, groups).sum((1, 2)) / (PER_PROMPT * (PER_PROMPT - 1))
    return {
        "frechet": judge_frechet(features, reference),
        **attribute_accuracy(judge, shown, batch.mentioned),
        "density": density,
        "coverage": coverage,
        "distance within a prompt": float(pairs.mean()),
    }


def latency(sampler: Sampler, batch: int, repeats: int = 5) -> float:
    """Best of some calls at a batch size, CPU seconds of one thread for an image."""
    z = normal((4, 8, 8), seed=0, purpose="latency", indices=range(batch))
    cond = PromptEncoder(TEACHER)(["a red seven"] * batch)
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        sampler(z, cond)
        best = min(best, time.process_time() - began)
    return best / batch


def figures(sampler: Sampler, num: int) -> dict[str, float]:
    with torch.no_grad():
        times = {f"ms an image, batch {b}": 1e3 * latency(sampler, b) for b in (1, 64)}
    return {**marks(sampler, num), **times}


def teachers() -> dict[str, Callable[[], Sampler]]:
    """The teacher in some numbers of guided steps; noise is that of the students."""
    base = load_denoiser(TEACHER)
    teacher = guided(base, 1.5, PromptEncoder(TEACHER)([""]))

    def sampler(steps: int) -> Sampler:
        times = time_grid(base.schedule, steps)
        return lambda z, cond: sample_ode(teacher, z, cond, times)

    return {f"teacher, {n} steps": lambda n=n: sampler(n) for n in (1, 4, 20)}


def run(options: argparse.Namespace) -> None:
    """Make what is missing in the file."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.touch()
    done = {(row["name"], row["seed"]) for row in map(json.loads, options.out.open())}

    def keep(name: str, seed: int | None, sampler: Sampler, **more: object) -> None:
        row = {"name": name, "seed": seed, **more, "metrics": figures(sampler, options.num)}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    for name, make in teachers().items():
        if (name, None) not in done:
            keep(name, None, make())
    for seed in options.seeds:
        for name, values in STUDENTS.items():
            if (name, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                common = {
                    "run.folder": folder, "run.seed": seed, "run.steps": options.steps,
                    "run.save_every": None, "run.sample_every": None, "run.trackers": [],
                }  # fmt: skip
                began = time.process_time()
                trained = api.train("configs/demo/tiue.yaml", common | values)
                seconds = round(time.process_time() - began)
                student = open_run(trained.folder, CPU).generator
                keep(name, seed, student, steps=options.steps, cpu_seconds=seconds)


def show(options: argparse.Namespace) -> None:
    """Print mean and spread over seeds, and write the rows as one JSON file."""
    rows = [json.loads(line) for line in options.file.open()]
    names = list(dict.fromkeys(row["name"] for row in rows))
    metrics = list(rows[0]["metrics"])
    print(f"| | {' | '.join(metrics)} | CPU s |\n|{'---|' * (len(metrics) + 2)}")
    for name in names:
        found = [row for row in rows if row["name"] == name]
        cells = []
        for metric in metrics:
            values = [row["metrics"][metric] for row in found]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        cost = [row["cpu_seconds"] for row in found if "cpu_seconds" in row]
        print(f"| {name} | {' | '.join(cells)} | {round(statistics.mean(cost)) if cost else ''} |")
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--steps", type=int, default=150)
    command.add_argument("--num", type=int, default=500)
    command.set_defaults(do=run)
    command = commands.add_parser("show")
    command.add_argument("file", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(do=show)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.do(options)


if __name__ == "__main__":
    main()
