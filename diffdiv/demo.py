"""`diffdiv demo`: one system end to end on a CPU, offline: train, evaluate, export, report."""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffdiv import api
from diffdiv.evaluate import evaluate_path
from diffdiv.export import export_run
from diffdiv.metrics.card import Evaluation
from diffdiv.report import write_report
from diffdiv.verify import verify_export

_USE_SD = """from diffusers import AutoPipelineForText2Image
pipe = AutoPipelineForText2Image.from_pretrained("{export}")
prompt = "a bold red handwritten seven on white"
image = pipe(prompt, num_inference_steps=1, guidance_scale=0).images[0]"""
_USE_UNET = """from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{export}", trust_remote_code=True)
image = pipe(class_labels=7).images[0]"""


def _f_distill(out: Path) -> tuple[Path, str]:
    run = api.train("configs/demo/f_distill.yaml", {"run.folder": out})
    return run.folder, _USE_SD


def _digits(out: Path) -> tuple[Path, str]:
    teacher = api.train("configs/pretrain/digits.yaml", {"run.folder": out / "teacher"})
    values = {"run.folder": out, "teacher.path": teacher.folder / "export"}
    return api.train("configs/demo/digits.yaml", values).folder, _USE_UNET


SYSTEMS = {"f-distill": _f_distill, "digits": _digits}


def run_demo(system: str, out: Path | None) -> Path:
    """Run one demo; started again it resumes, finished it only reports.

    Args:
        system: "f-distill" (text to image, the main job) or "digits" (pixel-space EDM).
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
    run, usage = SYSTEMS[system](out or Path("runs") / f"demo-{system}")
    say("evaluating teacher and student on the same conditions and noise")
    evaluation = evaluate_path(run, num=500)
    say("exporting, and checking the export in a process that cannot import diffdiv")
    half_life = int(str(evaluation["card"]["ema_half_life"]))
    export = export_run(run, run / "export", ema=half_life, force=True)
    difference = verify_export(run, export)
    report = write_report([run], run / "report.html")
    say("done")
    console.print(results_table(evaluation))
    console.print(f"report   {report}")
    console.print(f"export   {export}  (x0 as in training to {difference:.0e})\n")
    console.print(usage.replace("{export}", str(export)), highlight=False, markup=False)
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
