"""Train and load from Python: what ``diffdiv.train`` and ``diffdiv.load`` are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffdiv.resources import resource
from diffdiv.runtime.config import Config, ConfigError, load_config, read_config
from diffdiv.runtime.explain import nearest
from diffdiv.runtime.launch import Recipe, load_recipe

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@dataclass(frozen=True)
class RunHandle:
    """A run folder and what is in it."""

    folder: Path

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, oldest first."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def samples(self) -> list[Path]:
        """The sample grids, oldest first."""
        return sorted((self.folder / "samples").glob("step-*.png"))

    def export(self, out: str | Path, *, ema: int | None = None, force: bool = False) -> Path:
        """Write the student as a diffusers folder; see `diffdiv.export.export_run`."""
        from diffdiv.export import export_run

        return export_run(self.folder, Path(out), ema=ema, force=force)


def prepare(config: str | Path, overrides: Sequence[str]) -> tuple[Recipe, Config]:
    """The recipe that a configuration names, and the configuration itself, checked.

    A configuration can only name a bundled recipe: reading somebody's YAML runs nobody's code.

    Raises:
        ConfigError: with every mistake, before anything heavy is imported.
    """
    name, _ = read_config(config)
    known = sorted(path.stem for path in resource("train").glob("*.py"))
    if name not in known:
        hint = nearest(name, known).rstrip()
        raise ConfigError([f"recipe: {name!r} is not one of {', '.join(known)} {hint}".rstrip()])
    recipe = load_recipe(name)
    return recipe, load_config(config, overrides, recipe.config_class)


def train(
    config: str | Path, values: Mapping[str, object] | None = None, /, **overrides: object
) -> RunHandle:
    """Run the recipe that a configuration names, in this process; resumes by itself.

    Args:
        config: YAML file, here or bundled.
        values: overrides by dotted name, ``{"run.steps": 100}``.
        overrides: the same with a double underscore for the dot, ``run__steps=100``.

    Raises:
        ConfigError: with every mistake, before anything heavy is imported.
    """
    merged = {**(values or {}), **{key.replace("__", "."): v for key, v in overrides.items()}}
    items = [f"{key}={json.dumps(value, default=str)}" for key, value in merged.items()]
    recipe, resolved = prepare(config, items)
    recipe.main(resolved)
    mapping = resolved.model_dump(mode="json")
    return RunHandle(Path(mapping.get("run", mapping)["folder"]))


def load(path: str | Path) -> "DiffusionPipeline":
    """The pipeline in an export, a run folder or any local diffusers folder.

    Code that lies beside the weights runs only if it ships with diffdiv, byte for byte.

    Raises:
        ValueError: ``path`` is none of these, or brings other code.
    """
    from diffdiv.generate import load_pipeline

    return load_pipeline(Path(path))
