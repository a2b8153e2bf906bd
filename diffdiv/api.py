"""Train and load from Python: what ``diffdiv.train`` and ``diffdiv.load`` are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from diffdiv.resources import find, resource
from diffdiv.runtime.config import Config, ConfigError, load_config, read_config
from diffdiv.runtime.explain import nearest
from diffdiv.runtime.launch import Recipe, load_recipe
from diffdiv.runtime.yaml_io import Plain, parse_yaml

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from diffdiv.models.architectures import Architecture
    from diffdiv.rehearsal import PlanSpec
    from diffdiv.rehearsal_video import VideoSpec


@dataclass(frozen=True)
class RunHandle:
    """A run folder and what is in it."""

    folder: Path

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, oldest first."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def samples(self) -> list[Path]:
        """The files of samples drawn during training, oldest first."""
        return sorted((self.folder / "samples").glob("step-*"))

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
        guess = nearest(name, {stem: stem for stem in known})
        raise ConfigError([f"recipe: {name!r} is not one of {', '.join(known)}{guess}"])
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

    Code that lies beside the weights runs only if it ships with diffdiv, byte for byte; where such
    a file is missing, as in ``assets/embedded_dna``, our own is taken.

    Raises:
        ValueError: ``path`` is none of these, or brings other code.
    """
    from diffdiv.generate import load_pipeline

    return load_pipeline(Path(path))


def written(config: str | Path, overrides: Sequence[str], key: str) -> Plain:
    """What file and overrides say of a key, as yet unchecked; None = nothing, or null.

    Args:
        config, overrides: as in :func:`prepare`.
        key: ``section.key``; of a section that overrides fill in, only that it is there counts.

    Raises:
        ConfigError: if file or value is no YAML that we accept.
    """
    found: Plain = read_config(config)[1]
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    for item in overrides:
        name, _, text = item.partition("=")
        if name.strip() == key:
            found = parse_yaml(text, f"the value of {key}")
        elif name.strip().startswith(f"{key}."):
            found = found if isinstance(found, dict) else {}
    return found


def folder_of(config: str | Path, overrides: Sequence[str], key: str) -> Path:
    """The folder that file and overrides name, here or bundled; perhaps it is not there."""
    path = Path(str(written(config, overrides, key)))
    return path if path.is_dir() else find(path) or path


def architecture_of(folder: Path, like: str | None) -> "Architecture":
    """The shapes of a teacher's folder, or those of ``like`` where it is not there.

    Raises:
        ConfigError: if neither says them.
    """
    from diffdiv.models.architectures import ARCHITECTURES, read_architecture

    if folder.is_dir():
        return read_architecture(folder)
    if like is not None and like in ARCHITECTURES:
        return ARCHITECTURES[like]
    known = ", ".join(ARCHITECTURES)
    raise ConfigError([f"teacher.path: there is no folder {folder}; name its kind: --like {known}"])


def plan_config(
    config: str | Path, overrides: Sequence[str], like: str | None, processes: int = 1
) -> "PlanSpec | VideoSpec":
    """What one GPU of an f-distill, Diff-Instruct* or TimeNoise run would have to hold.

    For `diffdiv plan`. Neither weights nor data need be there: where ``teacher.path``
    (``model.path``) is no folder, the shapes are those of ``like``.

    Args:
        config, overrides: as in :func:`train`, overrides as ``key=value``.
        like: "sd15", "sd21", "sdxl" or "svd"; None = a folder is wanted.
        processes: GPUs that share the batch.

    Raises:
        ConfigError: with every mistake; also if neither folder nor ``like`` says the shapes.
    """
    from diffdiv.rehearsal import PlanSpec

    name, _ = read_config(config)
    if name == "timenoise":
        from diffdiv.plan_timenoise import timenoise_spec

        return timenoise_spec(config, overrides, like, processes)
    if name == "di_star":
        from diffdiv.plan_di_star import di_star_spec

        return di_star_spec(config, overrides, like, processes)
    if name != "f_distill":
        known = "f_distill, timenoise and di_star"
        raise ConfigError([f"recipe: {name!r} cannot be planned, only {known}"])
    path = folder_of(config, overrides, "teacher.path")
    with TemporaryDirectory() as absent:  # stands for weights and data that are not there yet
        items = [*overrides, f"data.path={absent}"]
        items += [] if path.is_dir() else [f"teacher.path={absent}"]
        asked = prepare(config, items)[1].model_dump(mode="json")
    architecture = architecture_of(path, like)
    run, student, gan = asked["run"], asked["student"], asked["gan"]
    lora, fake_lora, is_cached = student["lora"], asked["fake_lora"], asked["data"]["cache"]
    needs_ratio = asked["divergence"]["name"] != "reverse_kl" or gan["weight"] is not None
    return PlanSpec(
        architecture,
        size=int(str(architecture.unet["sample_size"])) * architecture.pixels_per_latent,
        batch=run["batch_size"] // run["accumulation"] // processes,
        guidance_scale=asked["teacher"]["guidance_scale"],
        student_rank=lora and lora["rank"],
        fake_rank=fake_lora and fake_lora["rank"],
        checkpointing=asked["teacher"]["checkpointing"],
        base_dtype=asked["teacher"]["dtype"],
        precision=run["precision"],
        critic_updates=asked["critic_updates"],
        gan_blocks=tuple(gan["blocks"] or ("mid_block",)) if needs_ratio else None,
        gan_trunk=gan["trunk"],
        optimizer_bits=8 if asked["optimizer"]["eight_bit"] else 32,
        shards=processes if run["sharding"] == "fsdp2" else 1,
        num_ema=len(student["ema_half_lives"]),
        vae_images=None if is_cached else 1,
    )
