"""Configuration: YAML file + dotted overrides -> one frozen, validated object.

All mistakes are reported at once, one line each, with the key, what is allowed and the nearest
name. Nothing heavy is imported here, so a typo costs no waiting.
"""

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffdiv import resources
from diffdiv.runtime.explain import explain, leaves
from diffdiv.runtime.yaml_io import ConfigError, Plain, dump_yaml, parse_yaml, read_yaml, redact

__all__ = ["Config", "ConfigError", "ExistingFolder", "OptimizerConfig"]
__all__ += ["RunConfig", "dump_yaml", "leaves", "load_config", "read_config", "redact"]


class Config(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunConfig(Config):
    """What every training run needs, whatever the method."""

    folder: Path  # the run folder; a valid state in it is resumed
    seed: int = Field(0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = Field(gt=0)  # images per update, over all processes and micro-batches
    accumulation: int = Field(1, gt=0)  # micro-batches per update
    sharding: Literal["none", "fsdp2"] = "none"  # full networks: a copy a process, or a share each
    steps: int = Field(gt=0)  # updates of the main network
    save_every: int | None = Field(None, gt=0)  # steps between states; None: only the last
    keep_states: int = Field(2, gt=0)
    log_every: int = Field(10, gt=0)
    sample_every: int | None = Field(None, gt=0)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    non_finite: Literal["stop", "skip"] = "stop"  # what a NaN loss or gradient does

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch_size % self.accumulation:
            parts = f"accumulation {self.accumulation}"
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of {parts}")
        return self

    def problems(self, processes: int) -> Iterator[str]:
        """What would stop a run in so many processes, as far as can be told without torch."""
        if self.batch_size % (processes * self.accumulation):
            parts = f"{processes} processes x run.accumulation {self.accumulation}"
            yield f"run.batch_size {self.batch_size} is not a multiple of {parts}"
        for name in self.trackers:
            if importlib.util.find_spec(name) is None:
                yield f"run.trackers: {name} is not installed (pip install 'diffdiv[{name}]')"
        existing = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            yield f"run.folder: {self.folder} cannot be written"


class ReplicatedRunConfig(RunConfig):
    """For recipes that read or write a whole network on one process."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.sharding != "none":
            raise ValueError("sharding: this recipe keeps whole networks; set it to 'none'")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW and the shape of its learning rate, shared by the networks of a run."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    clip: float | None = Field(1.0, gt=0)  # global gradient norm; None: no clipping
    warmup_steps: int = Field(0, ge=0)
    decay_fraction: float = Field(0.0, ge=0, le=1)  # last part of the run, lr falls linearly to 0
    eight_bit: bool = False  # moments in 8 bits (arXiv 2110.02861), by torchao


def _locate(path: Path, kind: Literal["file", "folder"]) -> Path:
    """``path`` itself, else the bundled copy, as an absolute path; ConfigError when neither is."""
    is_there = os.path.isfile if kind == "file" else os.path.isdir
    for candidate in (path.expanduser(), resources.find(path)):
        if candidate is not None and is_there(candidate):
            return candidate.resolve()
    where = "it does not exist" if path.is_absolute() else f"looked in {Path.cwd()} and in diffdiv"
    raise ConfigError([f"there is no {kind} {str(path)!r} ({where})"])


# A folder that must exist: a relative path is looked up here, then among the bundled files.
ExistingFolder = Annotated[Path, AfterValidator(lambda path: _locate(path, "folder"))]

AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_config(
    path: str | Path, overrides: Sequence[str], config_class: type[AnyConfig]
) -> AnyConfig:
    """Read, override and validate a configuration.

    Args:
        path: YAML file, here or bundled (``configs/demo/f_distill.yaml`` works from any folder).
        overrides: ``section.key=value``; the value is read as a YAML scalar or list, the last
            one wins. The key ``recipe`` belongs to the file alone.
        config_class: the recipe's class. Its field ``recipe``, if it has one, receives the name
            (of the file, when the YAML gives a path).

    Raises:
        ConfigError: with every mistake found, one line each.
    """
    recipe, values = read_config(path)
    if "recipe" in config_class.model_fields:
        values["recipe"] = Path(recipe).stem
    mistakes: list[str] = []
    for item in overrides:
        try:
            _override(values, item)
        except ConfigError as error:
            mistakes.extend(error.messages)
    try:
        # JSON mode: a list is a tuple and text is a path, yet "3" is no number and 1.5 no integer.
        config = config_class.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        mistakes.extend(explain(error, config_class))
    if mistakes:
        raise ConfigError(mistakes)
    return config


def read_config(path: str | Path) -> tuple[str, dict[str, Plain]]:
    """The recipe named by a configuration file, and its other values, not yet validated.

    Raises:
        ConfigError: no such file, not the plain YAML we accept, or no ``recipe``.
    """
    values = read_yaml(_locate(Path(path), "file"))
    name = values.pop("recipe", None)
    if not isinstance(name, str) or not name:
        given = "is missing" if name is None else f"wants a name, got {name!r}"
        raise ConfigError([f"recipe: {given} (write e.g. 'recipe: f_distill' in {path})"])
    return name, values


def _override(values: dict[str, Plain], item: str) -> None:
    """Put one ``key=value`` into ``values``; ConfigError if it cannot be."""
    key, equals, text = item.partition("=")
    key = key.strip()
    *sections, last = key.split(".")
    if not (equals and last and all(sections)):
        raise ConfigError([f"{item!r}: an override is written section.key=value"])
    if key == "recipe":
        raise ConfigError(["recipe: cannot be overridden; copy the config and edit it"])
    value = parse_yaml(text, f"the value of {key}")
    if isinstance(value, dict):
        raise ConfigError([f"{key}: override one value at a time"])
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError([f"{key}: {section!r} is a value, not a section"])
        values = inner
    values[last] = value
