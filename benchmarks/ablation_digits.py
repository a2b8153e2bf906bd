"""Every divergence with and without the GAN loss on the embedded 8x8 digits, several seeds.

    diffdiv train configs/pretrain/digits.yaml
    python benchmarks/ablation_digits.py runs/digits-teacher/export --out docs/ablation.json

The recipe is train/f_distill.py with configs/demo/digits.yaml, shortened to ``--steps`` student
updates and one critic update each. Marks: Frechet distance in the embedded judge's features (not
FID), label accuracy, and the similarity of samples within a class (lower = more varied).
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from diffdiv import api
from diffdiv.core.divergence import DIVERGENCES
from diffdiv.core.noise import normal
from diffdiv.data.digits import paint_red
from diffdiv.evaluate import digits_exam
from diffdiv.metrics.diversity import in_batch_similarity
from diffdiv.metrics.judge import judge_features, load_judge
from diffdiv.resources import resource
from diffdiv.runtime.student import open_run

CPU = torch.device("cpu")


def mark(folder: Path, num: int, seed: int) -> dict[str, float]:
    """Metrics of the averaged student in a run folder."""
    opened = open_run(folder, CPU)
    exam = digits_exam(opened.source, num)
    z = normal(opened.source.shape, seed=seed, purpose="evaluation", indices=range(num))
    with torch.no_grad():
        images = opened.source.decode(opened.generator(z, exam.conditions(range(num))))
    features = judge_features(load_judge(resource("assets/embedded_judge")), paint_red(images))
    return {
        **exam.mark(images),
        "similarity": in_batch_similarity(features, torch.arange(num) % 10),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for divergence in DIVERGENCES:
            for gan in (None, 0.1):
                began = time.process_time()
                with tempfile.TemporaryDirectory() as folder:
                    values = {
                        "run.folder": folder, "run.seed": seed, "run.steps": options.steps,
                        "run.save_every": None, "run.sample_every": None, "run.trackers": [],
                        "teacher.path": options.teacher, "divergence.name": divergence.name,
                        "gan.weight": gan, "gan.balance": gan is not None, "critic_updates": 1,
                    }  # fmt: skip
                    with contextlib.redirect_stderr(io.StringIO()):
                        run = api.train("configs/demo/digits.yaml", values)
                    metrics = mark(run.folder, options.num, seed)
                name = f"{divergence.name}{' + GAN' if gan else ''}"
                table.setdefault(name, []).append(metrics)
                shown = "  ".join(f"{k} {v:.3f}" for k, v in metrics.items())
                seconds = time.process_time() - began
                print(f"{name:28s} seed {seed}  {shown}  {seconds:.0f} CPU s", flush=True)
    print(f"\n| objective | {' | '.join(next(iter(table.values()))[0])} |")
    for name, runs in table.items():
        cells = []
        for key in runs[0]:
            values = [run[key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")
    if options.out:
        facts = {"steps": options.steps, "num": options.num, "seeds": options.seeds}
        options.out.write_text(json.dumps({**facts, "runs": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
