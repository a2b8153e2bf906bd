"""`diffdiv demo`: one system end to end on a CPU, offline: train, evaluate, export, report."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from diffdiv import api
from diffdiv.demo_drakes import fine_tune_dna
from diffdiv.demo_drakes_laws import front_table
from diffdiv.demo_i2v import cure_leakage, leakage_table
from diffdiv.evaluate import evaluate_path
from diffdiv.export import export_run
from diffdiv.metrics.card import Evaluation
from diffdiv.report import write_report
from diffdiv.verify import verify_export
from diffdiv.verify_sequences import verify_sequences

_USE_SD = """from diffusers import AutoPipelineForText2Image
pipe = AutoPipelineForText2Image.from_pretrained("{export}")
prompt = "a bold red handwritten seven on white"
image = pipe(prompt, num_inference_steps=1, guidance_scale=0).images[0]"""
_USE_UNET = """from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{export}", trust_remote_code=True)
image = pipe(class_labels=7).images[0]"""
_USE_TIUE = """from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{export}", trust_remote_code=True)
image = pipe("a bold red handwritten seven on white").images[0]"""
_USE_SEQUENCES = """from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{export}", trust_remote_code=True)
pipe("NNNNTTTACNNNN", batch_size=4).texts  # N is designed, the rest is kept"""

_USE_I2V = """from pathlib import Path
from diffdiv.models.clip_net import load_clip_net
net, schedule = load_clip_net(Path("{export}"))"""

Say = Callable[[str], None]


class Shown(NamedTuple):
    """What a demo has to show: ``proof`` says how the export was found to be right."""

    table: Table
    export: Path
    proof: str
    usage: str
    report: Path | None = None  # where it is written already


def _f_distill(out: Path, say: Say) -> Shown:
    api.train("configs/demo/f_distill.yaml", {"run.folder": out})
    return _student(out, say, _USE_SD)


def _digits(out: Path, say: Say) -> Shown:
    teacher = api.train("configs/pretrain/digits.yaml", {"run.folder": out / "teacher"})
    values = {"run.folder": out, "teacher.path": teacher.folder / "export"}
    api.train("configs/demo/digits.yaml", values)
    return _student(out, say, _USE_UNET)


def _tiue(out: Path, say: Say) -> Shown:
    api.train("configs/demo/tiue.yaml", {"run.folder": out})
    return _student(out, say, _USE_TIUE)


def _di_star(out: Path, say: Say) -> Shown:
    values = {"run.folder": out / "one-step", "run.steps": 200}
    start = api.train("configs/demo/f_distill.yaml", values)
    path = export_run(start.folder, start.folder / "export", force=True)
    say("raising the reward of the one-step student: where a prompt names no colour, red")
    api.train("configs/demo/di_star.yaml", {"run.folder": out, "student.path": path})
    return _student(out, say, _USE_SD)


def _student(run: Path, say: Say, usage: str) -> Shown:
    say("evaluating teacher and student on the same conditions and noise")
    evaluation = evaluate_path(run, num=500)
    say("exporting, and checking the export in a process that cannot import diffdiv")
    half_life = int(str(evaluation["card"]["ema_half_life"]))
    export = export_run(run, run / "export", ema=half_life, force=True)
    proof = f"x0 as in training to {verify_export(run, export):.0e}"
    return Shown(results_table(evaluation), export, proof, usage)


def _drakes(out: Path, say: Say) -> Shown:
    evaluation = fine_tune_dna(out, say)
    say("checking the export in a process that cannot import diffdiv")
    proof = f"predictions as in training to {verify_sequences(out, out / 'export'):.0e} nats"
    return Shown(front_table(evaluation), out / "export", proof, _USE_SEQUENCES)


def _i2v(out: Path, say: Say) -> Shown:
    evaluation = cure_leakage(out, say)
    table, proof = leakage_table(evaluation), "reloaded for these figures"
    return Shown(table, out / "export", proof, _USE_I2V, out / "report.html")


SYSTEMS: dict[str, Callable[[Path, Say], Shown]] = {
    "f-distill": _f_distill,
    "digits": _digits,
    "tiue": _tiue,
    "di-star": _di_star,
    "drakes": _drakes,
    "i2v": _i2v,
}


def run_demo(system: str, out: Path | None) -> Path:
    """Run one demo; started again it resumes, finished it only reports.

    Args:
        system: "f-distill" (text to image, the main job), "digits" (pixel-space EDM), "tiue" (one
            encoder pass, four decoder times), "di-star" (one step, rewarded for red), "drakes"
            (DNA fine-tuned for a reward) or "i2v" (moving digits without leakage).
        out: run folder; default ``runs/demo-SYSTEM``.

    Returns:
        The run folder.

    Raises:
        ValueError: if there is no such system.
        RuntimeError: if the export does not reproduce the trainer's samples.
    """
    if system not in SYSTEMS:
        raise ValueError(f"demo {system!r} is not one of {', '.join(SYSTEMS)}")
    console, start = Console(), time.monotonic()

    def say(text: str) -> None:
        console.print(f"[bold]{time.monotonic() - start:5.0f} s[/bold]  {text}")

    say(f"training ({system})")
    run = out or Path("runs") / f"demo-{system}"
    shown = SYSTEMS[system](run, say)
    report = shown.report or write_report([run], run / "report.html")
    say("done")
    console.print(shown.table)
    console.print(f"report   {report}")
    console.print(f"export   {shown.export}  ({shown.proof})\n")
    console.print(shown.usage.replace("{export}", str(shown.export)), highlight=False, markup=False)
    return run


def results_table(evaluation: Evaluation) -> Table:
    """evaluation.json as a table for the terminal, a column a sampler: fits 80 characters."""
    rows = evaluation["rows"]
    count = evaluation["card"]["n"]
    table = Table(title=f"{count} images each, same prompts and noise (↓ lower is better)")
    table.add_column("")
    for row in rows:
        table.add_column(row["name"], justify="right")
    table.add_row("network evaluations", *(str(row["network_evaluations"]) for row in rows))
    for name in rows[0]["metrics"]:
        arrow = "↓" if "frechet" in name else "↑"  # the better direction
        table.add_row(f"{name} {arrow}", *(f"{row['metrics'][name]:.3f}" for row in rows))
    return table
