"""Reward against everything else: Diff-Instruct* and its rivals on the embedded one-step student.

    diffdiv train configs/demo/f_distill.yaml run.folder=runs/one-step run.steps=200
    diffdiv export runs/one-step runs/one-step/export
    python benchmarks/di_star_fronts.py run --out fronts.jsonl --start runs/one-step/export
    python benchmarks/di_star_fronts.py draw --out fronts.jsonl \
        --json docs/di_star_fronts.json --png docs/di_star_fronts.png

"run" appends one line per finished training and skips those that are there, so it can be killed at
any time. Equal for all: the student they start from, the reward (log probability of red where the
prompt names no colour, by the first embedded judge), updates, batch, learning rates, updates of the
fake score, guidance; all noise and prompts of a seed. Not equal: CPU seconds (a score divergence
differentiates both frozen networks) and what a scale means. So look at the fronts, not at scales.

Marked on noise and prompts that are the same for every student, by the judge that rewards and by
the second one, from other digits and another seed, that nothing was trained on:
    reward              on prompts that name no colour; red: share of them that is red
    frechet             on full prompts, where the reward has no say: collateral damage
    frechet, tilted     on prompts that name no colour, to the world's red pictures
    all four            share of full prompts obeyed in everything
    diversity           mean distance of eight samples of one full prompt, in standard deviations
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from diffdiv import api
from diffdiv.core.noise import normal
from diffdiv.data.digits import COLOURS, PromptedBatch, PromptedDigits, prompt_of
from diffdiv.metrics.alignment import distance_within
from diffdiv.metrics.frechet import frechet_distance
from diffdiv.metrics.judge import (
    Judge,
    attribute_accuracy,
    judge_features,
    judge_frechet,
    load_judge,
)
from diffdiv.models.backbones import LatentCodec, PromptEncoder, load_denoiser
from diffdiv.models.denoiser import guided
from diffdiv.models.generator import Generator
from diffdiv.resources import resource
from diffdiv.runtime.student import open_run
from diffdiv.samplers import sample_ode, time_grid
from diffdiv.sources import Sampler

CPU = torch.device("cpu")
TEACHER = resource("assets/embedded_sd")
JUDGES = {"": "assets/embedded_judge", ", second judge": "assets/embedded_second_judge"}
UNHELD = 100.0  # a scale at which the regulariser has no say
SCALES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
#: method -> reward scales; DIDR's is 1 / beta, nats per unit of reward
METHODS: dict[str, tuple[float, ...]] = {
    "ikl": (*SCALES, UNHELD),
    "squared": SCALES,
    "pseudo_huber": SCALES,
    "didr": (0.25, 0.5, 1.0, 2.0, 4.0),
}
TITLES = {
    "ikl": "integral KL", "squared": "Diff-Instruct*, squared",
    "pseudo_huber": "Diff-Instruct*, pseudo-Huber", "didr": "DIDR", "start": "start",
    "reference": "reference, 20 steps",
}  # fmt: skip
NUM, OPEN, GROUPS, WITHIN = 240, 180, 16, 8
UPDATES, BATCH = 30, 16
RED = COLOURS.index("red")
# Frechet distances in the first judge's features: a few pictures far outside what the second has
# seen can dominate its own
SHOWN = ("frechet", "frechet, tilted", "all four, second judge", "diversity, second judge")
READING = dict(
    zip(SHOWN, ("lower is better",) * 2 + ("higher is better", "errors raise it too"), strict=True)
)
RED_SHARE = "red, second judge"


def full_prompts() -> PromptedBatch:
    """What is asked for where nothing is left open; unseen compositions."""
    return PromptedDigits("test", seed=0, drop_probability=0).batch(range(NUM))


def open_prompts() -> list[str]:
    """Every digit, with and without stroke and background, never a colour."""
    indices = range(OPEN)
    return [
        prompt_of(i % 10, -1, i // 10 % 3 - 1, i // 30 % 3 - 1) for i in indices
    ]  # fmt: skip


class Marks:
    """All figures of a sampler, on fixed noise and prompts."""

    def __init__(self) -> None:
        self.full, encode = full_prompts(), PromptEncoder(TEACHER)
        again = [prompt for prompt in self.full.prompts[:GROUPS] for _ in range(WITHIN)]
        self.asked = encode([*self.full.prompts, *again, *open_prompts()])
        self.codec = LatentCodec(TEACHER, CPU)
        world = PromptedDigits("train").batch(range(6000))
        red = world.images[world.shown.colour == RED]
        self.judges: dict[str, tuple[Judge, Tensor, Tensor]] = {}
        for name, path in JUDGES.items():
            judge = load_judge(resource(path))
            real, target = judge_features(judge, world.images), judge_features(judge, red)
            self.judges[name] = judge, real, target

    @torch.no_grad()
    def __call__(self, sampler: Sampler) -> dict[str, float]:
        count = NUM + GROUPS * WITHIN + OPEN
        z = normal((4, 8, 8), seed=0, purpose="evaluation", indices=range(count))
        x0 = [sampler(z[i : i + 100], self.asked[slice(i, i + 100)]) for i in range(0, count, 100)]
        images = self.codec.decode(torch.cat(x0))
        found = {}
        for name, marked in self.judges.items():
            for key, value in self._marks(images, *marked).items():
                found[key + name] = round(value, 5)
        return found

    def _marks(self, images: Tensor, judge: Judge, real: Tensor, red: Tensor) -> dict[str, float]:
        full, again, opened = images.split([NUM, GROUPS * WITHIN, OPEN])
        scale = real.double().std(0).clamp_min(1e-6)
        shown, log_p = judge_features(judge, opened), judge(opened)["colour"].log_softmax(1)
        return {
            "reward": float(log_p[:, RED].mean()),
            "red": float((log_p.argmax(1) == RED).double().mean()),
            "frechet": judge_frechet(judge_features(judge, full), real),
            "frechet, tilted": frechet_distance(shown / scale, red / scale),
            "all four": attribute_accuracy(judge, full, self.full.mentioned)["all"],
            "diversity": distance_within(judge_features(judge, again) / scale, GROUPS),
        }


def wanted(seeds: Sequence[int]) -> Iterator[tuple[str, float, int]]:
    """Method, scale and seed of every training; a whole front of one seed before the next."""
    for seed in seeds:
        for method, scales in METHODS.items():
            for scale in scales:
                yield method, scale, seed


def train(method: str, scale: float, seed: int, start: Path) -> tuple[Sampler, float]:
    """The trained student and its CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        samples = Path(folder, "samples")
        samples.mkdir()
        (samples / "teacher.png").touch()  # is not looked at, so it need not be drawn
        regulariser = {"regulariser.beta": 1 / scale} if method == "didr" else {}
        values = {
            "run.folder": folder, "run.seed": seed, "run.steps": UPDATES, "run.batch_size": BATCH,
            "run.save_every": None, "run.sample_every": None, "run.trackers": [],
            "student.path": start, "student.lr": 5e-4, "student.ema_half_lives": [160],
            "optimizer.warmup_steps": 5, "regulariser.name": method,
            "rewards.judge.scale": 1.0 if regulariser else scale,
        }  # fmt: skip
        run = api.train("configs/demo/di_star.yaml", {**values, **regulariser})
        return open_run(run.folder, CPU).generator, time.process_time() - began


def anchors(start: Path) -> dict[str, Sampler]:
    """What all started from, and the reference."""
    base = load_denoiser(TEACHER)
    reference = guided(base, 1.5, PromptEncoder(TEACHER)([""]))
    times = time_grid(base.schedule, 20)
    return {
        "start": Generator(base.with_net(load_denoiser(start).net), 799, "unit"),
        "reference": lambda z, cond: sample_ode(reference, z, cond, times),
    }


def run(options: argparse.Namespace) -> None:
    """Make what is missing in the file."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.touch()
    rows = [json.loads(line) for line in options.out.open()]
    done, marks = {(row["method"], row["scale"], row["seed"]) for row in rows}, Marks()

    def keep(method: str, scale: float | None, seed: int | None, **more: object) -> None:
        row = json.dumps({"method": method, "scale": scale, "seed": seed, **more})
        with options.out.open("a") as file:
            file.write(row + "\n")
        print(row, flush=True)

    for name, sampler in anchors(options.start).items():
        if (name, None, None) not in done:
            keep(name, None, None, metrics=marks(sampler))
    for method, scale, seed in wanted(options.seeds):
        if (method, scale, seed) in done or (
            options.only and f"{method}:{scale:g}" not in options.only
        ):
            continue
        student, seconds = train(method, scale, seed, options.start)
        keep(method, scale, seed, cpu_seconds=round(seconds), metrics=marks(student))


Point = dict[str, float]


def points(rows: Sequence[dict]) -> dict[tuple[str, float | None], tuple[Point, Point, int]]:
    """Mean and standard deviation over seeds of every figure, and the number of seeds."""
    found: dict[tuple[str, float | None], list[Point]] = {}
    for row in rows:
        found.setdefault((row["method"], row["scale"]), []).append(row["metrics"])
    joined = {}
    for key, metrics in found.items():
        columns = {name: [m[name] for m in metrics] for name in metrics[0]}
        means = {name: statistics.mean(values) for name, values in columns.items()}
        spread = {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in columns.items()}
        joined[key] = means, spread, len(metrics)
    return joined


def table(found: dict[tuple[str, float | None], tuple[Point, Point, int]]) -> str:
    """Markdown, scale by scale."""
    names = ("reward", "reward, second judge", RED_SHARE, *SHOWN)
    lines = [f"| method | scale | seeds | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for method, scale in sorted(found, key=lambda key: (list(TITLES).index(key[0]), key[1] or 0)):
        means, spread, count = found[method, scale]
        cells = [f"{means[n]:.2f}" + (f" ± {spread[n]:.2f}" if count > 1 else "") for n in names]
        scaled = "" if scale is None else f"{scale:g}"
        lines.append(f"| {TITLES[method]} | {scaled} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_share(rows: Sequence[dict], share: float) -> str:
    """Every method's figures where so many open prompts come out red, by the second judge.

    Seed by seed, linear between neighbouring points of its front, from the start on; mean, standard
    deviation and number of the seeds that get there.
    """
    start = next(row["metrics"] for row in rows if row["method"] == "start")
    lines = [
        f"| at {share:.0%} red | seeds | {' | '.join(SHOWN)} |",
        "|---" * (len(SHOWN) + 2) + "|",
    ]
    for method in METHODS:
        found = []
        for seed in sorted({row["seed"] for row in rows if row["method"] == method}):
            own = [r["metrics"] for r in rows if (r["method"], r["seed"]) == (method, seed)]
            front = sorted([start, *own], key=lambda means: means[RED_SHARE])
            for low, high in pairwise(front):
                if low[RED_SHARE] <= share < high[RED_SHARE]:
                    part = (share - low[RED_SHARE]) / (high[RED_SHARE] - low[RED_SHARE])
                    found.append([low[n] + part * (high[n] - low[n]) for n in SHOWN])
        cells = [
            f"{statistics.mean(v):.2f}" + (f" ± {statistics.stdev(v):.2f}" if len(v) > 1 else "")
            for v in zip(*found, strict=True)
        ] or ["-"] * len(SHOWN)
        lines.append(f"| {TITLES[method]} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(
    found: dict[tuple[str, float | None], tuple[Point, Point, int]], png: Path, note: str
) -> None:
    """Held-out figures against the held-out share of red, one line a method."""
    figure, panels = plt.subplots(1, len(SHOWN), figsize=(15, 4.2), constrained_layout=True)
    for axes, name in zip(panels, SHOWN, strict=True):
        for method, marker in zip(METHODS, "osD^", strict=True):
            line = sorted((k[1] or 0, v) for k, v in found.items() if k[0] == method)
            x, y, x_error, y_error = (
                [part[i][n] for _, part in line]
                for i, n in ((0, RED_SHARE), (0, name), (1, RED_SHARE), (1, name))
            )
            axes.errorbar(
                x, y, xerr=x_error, yerr=y_error, marker=marker, label=TITLES[method],
                linewidth=1, elinewidth=0.6,
            )  # fmt: skip
        for anchor, mark in (("start", "*"), ("reference", "P")):
            means = found[anchor, None][0]
            axes.scatter(means[RED_SHARE], means[name], marker=mark, s=110, color="black",
                         label=TITLES[anchor], zorder=3)  # fmt: skip
        axes.set(xlabel="share red, second judge", title=f"{name} ({READING[name]})")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(note, fontsize=9)
    figure.savefig(png, dpi=110)


def draw(options: argparse.Namespace) -> None:
    """Table, picture and the rows as one JSON file."""
    rows = [json.loads(line) for file in options.out for line in file.open()]
    found = points(rows)
    print(table(found), "\n", sep="\n")
    for share in options.shares:
        print(at_share(rows, share), "\n", sep="\n")
    seeds = sorted({row["seed"] for row in rows} - {None})
    note = (
        f"Embedded one-step student, {UPDATES} updates of {BATCH}, seeds {seeds}, {NUM} full and "
        f"{OPEN} open prompts; bars: standard deviation over seeds; CPU"
    )
    picture(found, options.png, note)
    options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--start", type=Path, required=True)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--only", nargs="*", help="method:scale")
    command.set_defaults(do=run)
    command = commands.add_parser("draw")
    command.add_argument("--out", type=Path, nargs="+", required=True)
    command.add_argument("--json", type=Path, required=True)
    command.add_argument("--png", type=Path, required=True)
    command.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.7, 0.8], help="of red")
    command.set_defaults(do=draw)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.do(options)


if __name__ == "__main__":
    main()
