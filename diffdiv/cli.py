"""The command line. Heavy libraries are imported inside the commands, so --help is instant."""

import ast
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from diffdiv import resources
from diffdiv.runtime import launch
from diffdiv.runtime.yaml_io import to_yaml

if TYPE_CHECKING:
    from diffdiv.leakage_protocol import Asked
    from diffdiv.metrics.card import Evaluation

# Before torch loads OpenMP. Threads that spin while they wait for each other cost a multiple of the
# time on a busy machine, and nothing is gained by it on a quiet one: docs/performance.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

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
    system: Annotated[
        str, typer.Argument(help="f-distill, digits, tiue, di-star, drakes, i2v.")
    ] = "f-distill",
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
    from diffdiv.runtime.config import RunConfig

    items = overrides or []
    recipe, resolved = prepare(config, items)
    if not dry_run:
        raise typer.Exit(launch.launch(recipe.path, [str(config), *items], processes))
    _out.print(to_yaml({"recipe": recipe.name, **resolved.model_dump(mode="json")}), end="")
    runs = [value for _, value in resolved if isinstance(value, RunConfig)]
    problems = [problem for run in runs for problem in run.problems(processes)]
    for problem in problems:
        _err.print(f"problem: {problem}")
    _out.print(f"# {len(problems)} problems found" if problems else "# ready to run")
    raise typer.Exit(1 if problems else 0)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of f_distill, timenoise or di_star.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. run.batch_size=4")
    ] = None,
    gpu: Annotated[str, typer.Option(help="A card (4090, A100-80) or its memory (24GB).")] = "24GB",
    like: Annotated[
        str | None, typer.Option(help="sd15, sd21, sdxl or svd, while the model is not there.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="GPUs that share the batch.")] = 1,
    knobs: Annotated[bool, typer.Option(help="Also what each change would save (slow).")] = False,
) -> None:
    """Say what a run will need on one GPU, without a GPU and without weights."""
    from diffdiv.api import plan_config
    from diffdiv.plan import knobs as turned
    from diffdiv.plan import parse_gpu, plan_cycle, render

    card, spec = parse_gpu(gpu), plan_config(config, overrides or [], like, processes)
    planned = plan_cycle(spec)
    _out.print(render(planned, card, turned=turned(planned) if knobs else ()))


@app.command()
def sample(
    path: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text, class number or template (NNTATANN: N is designed); repeatable."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Samples of each prompt or structure.")] = 4,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("samples"),
    reward: Annotated[
        str | None,
        typer.Option(help="Scores: dna_world, a motif file, energies (CSV), or an oracle export."),
    ] = None,
    structure: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Proteins: PDB or mmCIF to design for."),
    ] = None,
    design: Annotated[
        str | None, typer.Option(help="Proteins: positions, A:10-25,B. Default: all.")
    ] = None,
) -> None:
    """Generate images, or sequences and protein designs as FASTA."""
    from diffdiv.sample_options import check_options

    prompts = prompt or []
    check_options(path, prompts, reward, structure, design)  # generate imports torch
    from diffdiv.generate import sample_path

    files = sample_path(path, prompts, num, seed, out, reward, structure=structure, design=design)
    for file in files:
        _out.print(str(file))


@app.command()
def stats(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Video pipeline.")],
    videos: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Their folder.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("latent_stats.safetensors"),
    granularity: Annotated[
        Literal["channel", "shrunk", "pixel"], typer.Option(help="pixel needs 100 clips.")
    ] = "channel",
    frames: Annotated[int | None, typer.Option(min=1, help="Default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels; the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels; the model's.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="Of the clips; the files'.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Clips; all.")] = None,
    seed: Seed = 0,
) -> None:
    """Measure a video model's clean latents once, to start its sampling later."""
    from rich.progress import Progress

    from diffdiv.video_clips import measure_latent_stats

    given = [side for side in (frames, height, width) if side is not None]
    if len(given) not in (0, 3):
        raise ValueError("--frames, --height and --width belong together")
    with Progress(console=_err, transient=True) as bar:
        task = bar.add_task("measuring")
        found = measure_latent_stats(
            model,
            videos,
            size=(given[0], given[1], given[2]) if given else None,
            fps=fps,
            granularity=granularity,
            num_clips=num,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    found.save(out)
    _out.print(f"wrote {out}: {found.count} clips, {found.space.describe()}, by {granularity}")


@app.command()
def evaluate(
    path: Model,
    num: Annotated[
        int | None, typer.Option(min=2, help="To generate: 1000 images; with --leakage 0 clips.")
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="A second copy of evaluation.json.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Weights for FID.")] = None,
    clip: Annotated[Path | None, typer.Option(help="CLIP model folder.")] = None,
    data: Annotated[
        Path | None, typer.Option(exists=True, help="Captioned images, as COCO's; for any model.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="With --data: where generated images are kept.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="With --data: pixels before FID; 256.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="With --data: images at once; 16. --leakage: 1.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="With --data, --leakage; fp32.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="With --data, --leakage: a pipeline's; its own.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="With --data, --leakage: a pipeline's; its own.")
    ] = None,
    leakage: Annotated[
        Path | None,
        typer.Option(exists=True, help="Videos an image-to-video model has seen: does it leak?"),
    ] = None,
    unseen: Annotated[
        Path | None, typer.Option(exists=True, help="With --leakage: videos it has not seen.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="With --leakage: FRAMESxHEIGHTxWIDTH; the model's.")
    ] = None,
    flow: Annotated[
        Path | None, typer.Option(help="With --leakage, --num: RAFT weights for motion.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="With --leakage, --num: R3D-18 weights for distances.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(exists=True, help="With --leakage, --num: what the model was distilled from."),
    ] = None,
) -> None:
    """Measure a run, any model on captioned images, or an image-to-video model: a metric card."""
    how = {"size": size, "batch": batch, "dtype": dtype, "steps": steps, "guidance": guidance}
    given = [name for name, value in {**how, "images": images}.items() if value is not None]
    others = {"data": data, "images": images, "size": size}
    others |= {"inception": inception, "clip": clip}
    own = {"unseen": unseen, "shape": shape, "flow": flow, "features": features, "teacher": teacher}
    wrong = [k for k, v in (own if leakage is None else others).items() if v is not None]
    if wrong:
        said = "only with --leakage FOLDER" if leakage is None else "not with --leakage"
        raise ValueError(f"--{', --'.join(wrong)}: {said}")
    if leakage is not None:
        from diffdiv.leakage_protocol import Asked, parse_shape

        asked = Asked(
            num=num or 0, seed=seed, shape=parse_shape(shape), flow=flow, features=features,
            steps=steps, bf16=dtype == "bf16", batch=batch or 1, guidance=guidance, teacher=teacher,
        )  # fmt: skip
        result = _leakage(path, leakage, unseen, asked, out)
    elif data is not None:
        from diffdiv.evaluate_captions import Protocol, evaluate_captions

        result = evaluate_captions(
            path,
            Protocol(data, num or 1000, seed, size or 256, batch or 16, inception, clip),
            dtype=dtype or "fp32",
            steps=steps,
            guidance=guidance,
            images=images,
            out=out,
        )
    elif given:
        raise ValueError(f"--{', --'.join(given)}: only with --data FOLDER")
    else:
        from diffdiv.evaluate import evaluate_path

        result = evaluate_path(
            path, num=num or 1000, seed=seed, out=out, inception=inception, clip=clip
        )
    _out.print(to_yaml(result), end="")


def _leakage(
    path: Path, videos: Path, unseen: Path | None, asked: "Asked", out: Path | None
) -> "Evaluation":
    from rich.progress import Progress

    from diffdiv.evaluate_leakage import evaluate_leakage

    with Progress(console=_err, transient=True) as bar:
        task = bar.add_task("measuring")
        result = evaluate_leakage(
            path,
            videos,
            unseen=unseen,
            asked=asked,
            out=out,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _out.print(f"# {result['card']['verdict']}")
    return result


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    ema: Annotated[
        int | None, typer.Option(help="EMA half-life in images; 0: no EMA. Default: the first.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    lora: Annotated[bool, typer.Option("--lora", help="An adapter alone, not merged.")] = False,
) -> None:
    """Write the student as a folder that stock diffusers loads."""
    from diffdiv.export import export_lora, export_run

    write = export_lora if lora else export_run
    _out.print(f"wrote {write(run, out, ema=ema, force=force)}")


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
    source = launch.load_recipe(recipe).path
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

    recipes, configs = resources.resource("train"), resources.resource("configs")
    _table("Recipes", ((path.stem, _first_line(path)) for path in sorted(recipes.glob("*.py"))))
    yamls = [(path.relative_to(configs.parent), path) for path in sorted(configs.rglob("*.yaml"))]
    _table("Configurations", ((str(name), _first_line(path)) for name, path in yamls))
    _table("Divergences", ((n, ", ".join(short)) for n, short in DIVERGENCE_ALIASES.items()))
    assets = sorted(resources.resource("assets").glob("embedded_*"))
    _table("Embedded models", ((f"assets/{path.name}",) for path in assets))


def _first_line(path: Path) -> str:
    """The first comment line of a YAML file, the first docstring line of a Python file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    return text.partition("\n")[0].removeprefix("# ")


def _table(title: str, rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    _out.print(table)
    _out.print()


@app.command()
def doctor() -> None:
    """Check this environment: versions, device, disk, the bundled models."""
    from diffdiv.doctor import examine

    words, rows = {True: "ok", None: "note", False: "FAILED"}, list(examine())
    _table("diffdiv doctor", ((what, words[fine], detail) for what, fine, detail in rows))
    raise typer.Exit(1 if any(fine is False for _, fine, _ in rows) else 0)


def main() -> None:
    """Entry point: expected failures become one sentence, not a traceback.

    Exit status 2 for a mistake in the configuration or the arguments, 1 for a failure at work,
    75 when a signal stopped a run after saving its state (run the same command to resume).
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is a local path
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a bar per loaded file is noise
    with launch.failures_as_sentences():
        app()


if __name__ == "__main__":
    main()
