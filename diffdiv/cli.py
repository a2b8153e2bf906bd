"""The command line. Heavy libraries are imported inside the commands, so --help is instant."""

import ast
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffdiv import resources
from diffdiv.runtime.yaml_io import ConfigError, redact, to_yaml

if TYPE_CHECKING:
    from diffdiv.runtime.config import Config

app = typer.Typer(
    help="Distil and fine-tune diffusion models by divergence minimisation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# No markup: what is printed holds prompts, paths and messages that users and files supply.
_out = Console(markup=False, highlight=False, soft_wrap=True)
_err = Console(markup=False, highlight=False, soft_wrap=True, stderr=True)

Model = Annotated[Path, typer.Argument(exists=True, help="A run, an export or a diffusers folder.")]
Run = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Run folder.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise; sample i depends on i alone.")]


@app.command()
def demo(
    system: Annotated[str, typer.Argument(help="f-distill or digits.")] = "f-distill",
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
) -> None:
    """Train, evaluate, export and report on an embedded teacher: minutes, offline, on a CPU."""
    from diffdiv.demo import run_demo

    run_demo(system, out)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, here or bundled (see list).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. run.steps=100")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print, and stop.")] = False,
) -> None:
    """Run the recipe a configuration names; the same command again resumes."""
    from diffdiv.api import prepare
    from diffdiv.runtime.launch import launch

    items = overrides or []
    recipe, resolved = prepare(config, items)
    if not dry_run:
        raise typer.Exit(launch(recipe.path, [str(config), *items], processes))
    _out.print(to_yaml({"recipe": recipe.name, **resolved.model_dump(mode="json")}), end="")
    problems = list(_problems(resolved, processes))
    for problem in problems:
        _err.print(f"problem: {problem}")
    _out.print(f"# {len(problems)} problems found" if problems else "# ready to run")
    raise typer.Exit(1 if problems else 0)


def _problems(config: "Config", processes: int) -> Iterator[str]:
    """What would stop the run, as far as can be told without importing torch."""
    from diffdiv.runtime.config import RunConfig

    for run in (value for _, value in config if isinstance(value, RunConfig)):
        if run.batch_size % (processes * run.accumulation):
            yield (
                f"run.batch_size {run.batch_size} is not a multiple of "
                f"processes {processes} x accumulation {run.accumulation}"
            )
        for tracker in run.trackers:
            if importlib.util.find_spec(tracker) is None:
                yield f"run.trackers: {tracker} is not installed (pip install 'diffdiv[{tracker}]')"
        existing = next(p for p in (run.folder, *run.folder.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            yield f"run.folder: {run.folder} cannot be written"


@app.command()
def sample(
    path: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Images in all; prompts take turns.")] = 4,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("samples"),
) -> None:
    """Generate images."""
    from diffdiv.generate import sample_path

    for file in sample_path(path, prompt or [], num, seed, out):
        _out.print(str(file))


@app.command()
def evaluate(
    run: Run,
    num: Annotated[int, typer.Option(min=2, help="Images to generate.")] = 1000,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="A second copy of evaluation.json.")] = None,
    inception: Annotated[Path | None, typer.Option(exists=True, help="Weights for FID.")] = None,
    clip: Annotated[Path | None, typer.Option(exists=True, help="CLIP model folder.")] = None,
) -> None:
    """Measure teacher and student, and say exactly how (a metric card)."""
    from diffdiv.evaluate import evaluate_path

    result = evaluate_path(run, num=num, seed=seed, out=out, inception=inception, clip=clip)
    _out.print(to_yaml(result), end="")


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    ema: Annotated[
        int | None,
        typer.Option(help="EMA half-life in images; 0: no EMA. Default: the run's first."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
) -> None:
    """Write the student as a folder that stock diffusers loads."""
    from diffdiv.export import export_run

    _out.print(f"wrote {export_run(run, out, ema=ema, force=force)}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(exists=True, file_okay=False, help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the first.")] = None,
) -> None:
    """Write one self-contained HTML page on one run, or comparing several."""
    from diffdiv.report import write_report

    _out.print(f"wrote {write_report(runs, out or runs[0] / 'report.html')}")


@app.command()
def copy(
    recipe: Annotated[str, typer.Argument(help="Name, as in list.")],
    folder: Annotated[Path, typer.Argument(help="Where to put it.")],
) -> None:
    """Take a recipe away, to edit: one file, which runs where it lies."""
    from diffdiv.runtime.launch import load_recipe

    source = load_recipe(recipe).path
    target = folder / source.name
    if target.exists():
        raise FileExistsError(f"{target} exists; it is left as it is")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    _out.print(f"wrote {target}; run it by: python {target} CONFIG [KEY=VALUE ...]")


@app.command(name="list")
def list_() -> None:
    """Show the recipes, configurations, divergences and embedded models there are."""
    from diffdiv.core.names import DIVERGENCE_ALIASES

    names = resources.resource("train").glob("*.py")
    _table("Recipes", [(path.stem, _first_line(path)) for path in sorted(names)])
    configs = resources.resource("configs")
    files = [(path, path.relative_to(configs.parent)) for path in sorted(configs.rglob("*.yaml"))]
    _table("Configurations", [(str(name), _first_line(path)) for path, name in files])
    _table("Divergences", [(n, ", ".join(short)) for n, short in DIVERGENCE_ALIASES.items()])
    assets = [path for path in sorted(resources.resource("assets").iterdir()) if path.is_dir()]
    _table("Embedded models", [(f"assets/{path.name}", _size(path)) for path in assets])


def _size(folder: Path) -> str:
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{num_bytes / 1e6:.1f} MB"


def _first_line(path: Path) -> str:
    """The first comment line of a YAML file, the first docstring line of a Python file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    first = text.partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _table(title: str, rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _out.print(table)
    _out.print()


@app.command()
def doctor() -> None:
    """Check this environment: versions, device, disk, the bundled models."""
    from diffdiv.doctor import examine

    words = {True: "ok", None: "note", False: "FAILED"}
    rows = list(examine())
    _table("diffdiv doctor", [(what, words[fine], detail) for what, fine, detail in rows])
    raise typer.Exit(1 if any(fine is False for _, fine, _ in rows) else 0)


def main() -> None:
    """Entry point: expected failures become one sentence, not a traceback.

    Exit codes: 2 for a mistake in the configuration or the arguments, 1 for a failure at work,
    75 when a signal stopped a run after saving its state (run the same command to resume).
    Set DIFFDIV_TRACEBACK=1 to see where a failure came from.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is a local path
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a bar per loaded file is noise
    try:
        app()
    except ConfigError as error:
        for message in error.messages:
            _err.print(f"error: {message}")
        sys.exit(2)
    except Exception as error:
        if os.environ.get("DIFFDIV_TRACEBACK") or not _is_expected(error):
            raise
        _err.print(f"error: {redact(str(error)) or type(error).__name__}")
        sys.exit(1)


def _is_expected(error: Exception) -> bool:
    if isinstance(error, OSError | ValueError | FloatingPointError):
        return True
    from diffdiv.runtime.checkpoint import CheckpointError

    return isinstance(error, CheckpointError)


if __name__ == "__main__":
    main()
