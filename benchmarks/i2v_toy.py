"""Conditional image leakage on moving digits: naive, TimeNoise, constant noise, low-pass, start M.

    python benchmarks/i2v_toy.py --seeds 0 1 2 --out docs/i2v_toy.json --figure docs/i2v_toy.png

Every training is an ordinary run of train/moving_digits.py. The ideal denoiser takes part as the
control: it cannot leak, so motion it gains by an earlier start from N(0, I) is false. Results are
lines of JSON, written as they come; started again, the program goes on where it stopped.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import diffdiv
from diffdiv.core.leakage import ConditionNoise, ConstantNoise, LowPass, TimeNoise, time_map
from diffdiv.core.schedule import from_diffusers
from diffdiv.data.moving_digits import MovingDigits, strip_world
from diffdiv.metrics.leakage import ImageDenoiser
from diffdiv.metrics.moving_digits import Trial, noised_through, shown_through, told_through
from diffdiv.models.clip_net import (
    Degrade,
    clip_denoiser,
    clip_scheduler,
    load_clip_net,
    show_clean,
)

TIMES = (999.0, 950.0, 900.0, 850.0, 800.0, 700.0, 600.0, 500.0)
STARTS = (1.0, 0.94, 0.9, 0.8)
INITS = {"N(0, I)": None, "channel": "channel", "shrunk": "shrunk"}
BLUR = 0.5  # cells at t = 999; ALG's strength
NOISE: dict[str, dict[str, object]] = {
    "naive": {"condition.kind": "clean"},
    "timenoise": {"condition.kind": "timenoise"},
    "timenoise, a tenth clean": {"condition.kind": "timenoise", "condition.clean_probability": 0.1},
    "constant": {"condition.kind": "constant", "condition.beta_m": 0.75},  # mean level of timenoise
}
Line = dict[str, object]


def train(method: str, seed: int, pairs: int | None, folder: Path, steps: int) -> Path:
    """The run of one method; finished ones are only loaded."""
    values = {"run.folder": folder, "run.seed": seed, "run.steps": steps, "run.trackers": []}
    values |= {"world.num_pairs": pairs, "run.log_every": 500, **NOISE[method]}
    return diffdiv.train("configs/demo/i2v.yaml", values).folder


def trial_of(seed: int, pairs: int | None) -> Trial:
    data = MovingDigits(strip_world(), num_pairs=pairs, seed=seed)
    return Trial.of(data, from_diffusers(clip_scheduler()))


def network(folder: Path, degrade: Degrade = show_clean) -> ImageDenoiser:
    net, schedule = load_clip_net(folder / "export")
    return lambda image: clip_denoiser(net, schedule, image, degrade)


def ways_of_showing(method: str) -> dict[str, Degrade]:
    """What a network is shown when it samples, by the name of the row.

    A network trained on noised images is shown the clean image and told the median level of its
    training; "told 0" is told that it is clean, "noised too" is shown it as in training.
    """
    tau = time_map(from_diffusers(clip_scheduler()))
    if method == "naive":
        blur = LowPass(tau, BLUR, axes=1, clean_probability=0.0)  # ALG's idea, no training
        return {"naive": show_clean, "naive, low-pass": shown_through(blur)}
    noise: ConditionNoise = TimeNoise(tau, 5.0, clean_probability=0.0)  # as configs/demo/i2v.yaml
    if method == "constant":
        noise = ConstantNoise(0.75, clean_probability=0.0)
    return {
        method: told_through(noise),
        f"{method}; told 0": show_clean,
        f"{method}; noised too": noised_through(noise, seed=0),
    }


def sampled(
    trial: Trial, name: str, model: ImageDenoiser, seed: int, *, sweep: bool
) -> Iterator[Line]:
    """Figures of samples, by start and initial noise."""
    for start in STARTS if sweep else (1.0,):
        for init, granularity in INITS.items() if sweep else (("N(0, I)", None),):
            if name != "bayes" and granularity == "channel":
                continue  # a shift of all cells alike: nothing in this world turns on it
            clips = trial.samples(model, seed=seed, start=start, init=granularity)
            figures = trial.judge.measure(clips)
            yield {"kind": "samples", "model": name, "start": start, "init": init, **figures}


def measured(
    trial: Trial, name: str, model: ImageDenoiser, seed: int, *, sweep: bool
) -> Iterator[Line]:
    for row in trial.leakage({name: model}, TIMES):
        if row["model"] == name:
            yield {"kind": "leakage", **row}
    yield from sampled(trial, name, model, seed, sweep=sweep)


def oracle(seed: int, pairs: int | None) -> Iterator[Line]:
    trial = trial_of(seed, pairs)
    yield {"kind": "samples", "model": "real", **trial.judge.measure(trial.judge.real(seed=seed))}
    yield from measured(trial, "bayes", trial.bayes, seed, sweep=True)


def experiment(
    method: str, seed: int, pairs: int | None, folder: Path, steps: int
) -> Iterator[Line]:
    began = time.process_time()
    run = train(method, seed, pairs, folder, steps)
    yield {"kind": "cost", "model": method, "steps": steps, "cpu_s": time.process_time() - began}
    trial = trial_of(seed, pairs)
    for name, degrade in ways_of_showing(method).items():
        sweep = name in ("naive", "timenoise") and pairs is not None
        if name == method or pairs is not None:
            yield from measured(trial, name, network(run, degrade), seed, sweep=sweep)


def units(options: argparse.Namespace) -> Iterator[tuple[str, Line, Iterator[Line]]]:
    """Every piece of work: its key, what its lines share, and the lines, made when asked for."""
    for seed in options.seeds:
        for pairs in options.pairs if seed == 0 else options.pairs[:1]:
            label = {"seed": seed, "pairs": pairs}
            yield f"bayes/{pairs}/{seed}", label, oracle(seed, pairs)
            for method in NOISE if pairs else ("naive", "timenoise"):
                folder = (
                    options.runs / f"{method.replace(', ', '-').replace(' ', '-')}-{pairs}-{seed}"
                )
                lines = experiment(method, seed, pairs, folder, options.steps)
                yield f"{method}/{pairs}/{seed}", label, lines


def rounded(line: Line) -> Line:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in line.items()}


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[Line]) -> str:
    """Means over seeds (and their standard deviation), one row a model, as Markdown."""
    names = ["motion", "static_fraction", "image_law_distance", "frechet_distance", "fit_error"]
    names += ["first_frame_error"]
    rows = [f"| pairs | model | M | start | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    groups: dict[tuple[object, ...], list[Line]] = {}
    for line in lines:
        if line["kind"] == "samples":
            key = (line["pairs"], line["model"], line.get("start"), line.get("init"))
            groups.setdefault(key, []).append(line)
    for key, found in groups.items():
        cells = []
        for name in names:
            values = [float(str(line[name])) for line in found]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        rows.append("| " + " | ".join(["" if k is None else str(k) for k in key] + cells) + " |")
    return "\n".join(rows)


def figure(lines: list[Line], path: Path) -> None:
    """Errors and motion of one-step predictions over t; motion against distance over M."""
    from matplotlib.figure import Figure

    styles = {"bayes": ("#444444", "o"), "naive": ("#d55e00", "s"), "timenoise": ("#0072b2", "^")}
    plot = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = plot.subplots(1, 3)
    few = [line for line in lines if line["pairs"] == 64]
    for model, (colour, marker) in styles.items():
        for where, dash in (("unseen", "-"), ("seen", ":")):
            points = [r for r in few if r["kind"] == "leakage" and r["model"] == model]
            points = [r for r in points if r["set"] == where]
            curves = {
                name: [
                    statistics.mean(float(str(r[name])) for r in points if r["t"] == t)
                    for t in TIMES
                ]
                for name in ("error", "motion")
            }
            label = f"{'ideal (Bayes)' if model == 'bayes' else model}, {where} images"
            left.plot(TIMES, curves["error"], dash, color=colour, marker=marker, ms=4, label=label)
            if where == "unseen":
                middle.plot(TIMES, curves["motion"], dash, color=colour, marker=marker, ms=4)
        for init, dash in (("N(0, I)", "-"), ("shrunk", ":")):
            points = [r for r in few if r["kind"] == "samples" and r["model"] == model]
            path_of = [[r for r in points if r["start"] == m and r["init"] == init] for m in STARTS]
            xs, ys = (
                [statistics.mean(float(str(r[name])) for r in group) for group in path_of]
                for name in ("motion", "frechet_distance")
            )
            start = "from N(0, I)" if dash == "-" else "Analytic-Init"
            right.plot(xs, ys, dash, color=colour, marker=marker, ms=4, label=f"{model}, {start}")
            right.annotate("M = 0.8", (xs[-1], ys[-1]), fontsize=7, color=colour)
    real = [r for r in few if r["model"] == "real"]
    true_motion = statistics.mean(float(str(r["motion"])) for r in real)
    right.axvline(true_motion, color="#888888", lw=0.8, label="motion of real clips")
    left.set(title="One-step error of x0", xlabel="t", ylabel="mean squared error")
    middle.set(
        title="Motion of the one-step x0, unseen images", xlabel="t", ylabel="relative to real"
    )
    right.set(title="Starting earlier", xlabel="motion score (cells per frame)",
              ylabel="Frechet distance", yscale="log")  # fmt: skip
    left.set_ylim(0, 0.58)
    left.legend(fontsize=6, loc="upper left", ncols=2, columnspacing=1)
    right.set_ylim(0.01, 4)
    right.legend(fontsize=7, loc="lower right")
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    plot.savefig(path, dpi=110)


def pairs_of(text: str) -> int | None:
    return None if text == "all" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--pairs",
        type=pairs_of,
        nargs="+",
        default=[64, None],
        help="images with one clip each, or 'all'; further ones for seed 0 only",
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--runs", type=Path, default=Path("runs/i2v_toy"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {line["unit"] for line in read(options.out)}
    for key, label, lines in units(options):
        if key not in done:
            text = [json.dumps({"unit": key, **label, **rounded(line)}) for line in lines]
            with options.out.open("a") as file:
                file.write("\n".join(text) + "\n")
    lines = read(options.out)
    print(table(lines))
    if options.figure:
        figure(lines, options.figure)


if __name__ == "__main__":
    main()
