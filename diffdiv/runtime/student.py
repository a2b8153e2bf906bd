"""A finished (or running) distillation, opened for use: teacher, source and student."""

from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdiv.models.adapters import SharedBase, merged_state_dict
from diffdiv.models.backbones import load_denoiser
from diffdiv.models.denoiser import Denoiser, GuidedDenoiser, guided
from diffdiv.models.families import lora_targets
from diffdiv.models.generator import Generator, InputConvention
from diffdiv.models.shared_encoder import ParallelGenerator, parallel_generator
from diffdiv.runtime.checkpoint import load_weights
from diffdiv.sources import Source, open_source

StudentGenerator = Generator | ParallelGenerator


class Lora(TypedDict):
    """An adapter's settings."""

    rank: int
    alpha: int


class Student(TypedDict):
    """What a run's configuration says of its student; ``lora`` None = a full copy."""

    t_init: float
    input_convention: InputConvention
    num_steps: NotRequired[int]
    ema_half_lives: list[int]
    lora: NotRequired[Lora | None]
    path: NotRequired[str]  # Diff-Instruct*: what it started from


class ParallelStudent(TypedDict):
    """The same of a TiUE student, which is always a full copy."""

    decoder_times: list[int]
    encoder_time: int | None
    ema_half_lives: list[int]


class Teacher(TypedDict):
    """What it says of the teacher."""

    path: str
    guidance_scale: float | None


class Data(TypedDict):
    """What it says of the data."""

    kind: str
    path: str | None
    cache: str | None


class Distillation(TypedDict):
    """The part of a run's config.yaml that is needed to use what it made."""

    recipe: str
    run: dict[str, object]
    teacher: Teacher
    student: Student
    data: Data
    fake_lora: NotRequired[Lora | None]
    rewards: NotRequired[dict[str, dict[str, object] | None]]  # Diff-Instruct*: RewardConfig


def decoder_times(config: Distillation) -> tuple[list[int], int | None] | None:
    """Times of the decoder and of the encoder of a TiUE student; None for any other."""
    if config["recipe"] != "tiue":
        return None
    student = cast(ParallelStudent, config["student"])
    return student["decoder_times"], student["encoder_time"]


def read_distillation(run: Path) -> Distillation:
    """The configuration of a distillation, from its run folder.

    Raises:
        ValueError: if the folder holds no such run.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{run}: no config.yaml there, so it is not a run folder")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("student"), dict):
        raise ValueError(f"{file}: no 'student' there, so it is not a distillation")
    return cast(Distillation, config)


def student_state_dict(run: Path, config: Distillation, half_life: int) -> dict[str, Tensor]:
    """Weights of the student as a plain network, from the newest valid state, on the CPU.

    An adapter is merged into the teacher's weights as they lie in its folder, in float32.

    Args:
        run: run folder; ``config``: what :func:`read_distillation` says of it.
        half_life: of the average to take, in images; 0 = the last weights.

    Raises:
        ValueError: if there is no such average.
        CheckpointError: if there is no valid state.
    """
    weights = load_weights(run, "student", half_life or None)
    if decoder_times(config) is not None:
        return {name.removeprefix("unet."): value for name, value in weights.items()}
    return _plain(config, "student", weights, config["student"].get("lora"))


def read_adapter(folder: Path, rank: int) -> dict[str, Tensor]:
    """An adapter's weights by their names in a plain network, from `diffdiv export --lora`.

    Raises:
        FileNotFoundError: if the folder holds none.
        ValueError: if its rank is another one.
    """
    file = folder / "pytorch_lora_weights.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no adapter there; diffdiv export --lora writes one")
    weights = {key.partition(".")[2]: value for key, value in load_file(file).items()}
    found = {value.shape[0] for key, value in weights.items() if ".lora_A." in key}
    if found != {rank}:
        raise ValueError(f"{file}: adapter of rank {sorted(found)}, not {rank}")
    return weights


def fake_state_dict(run: Path, config: Distillation) -> dict[str, Tensor]:
    """The same of the fake score, as last trained.

    Raises:
        CheckpointError: if there is no valid state.
    """
    return _plain(config, "fake", load_weights(run, "fake"), config.get("fake_lora"))


def _start(config: Distillation, path: Path) -> nn.Module:
    """The network that a Diff-Instruct* student was at first."""
    lora = config["student"].get("lora")
    if lora is None:
        return load_denoiser(path).net
    net = load_denoiser(Path(config["teacher"]["path"])).net
    net.load_state_dict(_plain(config, "student", read_adapter(path, lora["rank"]), lora))
    return net


def _plain(
    config: Distillation, role: str, weights: dict[str, Tensor], lora: Lora | None
) -> dict[str, Tensor]:
    """Weights of a plain network: those of a full copy, or an adapter's merged."""
    if lora is None:
        return weights
    net = load_denoiser(Path(config["teacher"]["path"])).net
    view = SharedBase(net).add(
        role,
        rank=lora["rank"],
        alpha=lora["alpha"],
        targets=lora_targets(net),
        seed=0,  # what is drawn from it is replaced at once
    )
    view.load_state_dict(weights)
    return merged_state_dict(view)


def _generator(config: Distillation, base: Denoiser, net: nn.Module) -> StudentGenerator:
    """How the student of a run samples, around a network of the teacher's shape."""
    if (times := decoder_times(config)) is not None:
        return parallel_generator(base, net, *times)
    student = config["student"]
    return Generator(
        base.with_net(net),
        student["t_init"],
        student["input_convention"],
        student.get("num_steps", 1),
    )


@dataclass(frozen=True)
class OpenedRun:
    """What a run folder holds, ready to sample.

    Attributes:
        kind: of the data source.
        teacher_path: folder of the teacher.
        base: the unguided teacher; ``teacher``: with the run's guidance.
        source: conditions, captions, decoding.
        generator: the student with averaged weights, adapters merged.
        untrained: the same with the weights it started from.
        start: whose these are, "teacher's weights" or "before".
        half_life: of that average, in images.
    """

    kind: str
    teacher_path: Path
    base: Denoiser
    teacher: Denoiser | GuidedDenoiser
    source: Source
    generator: StudentGenerator
    untrained: StudentGenerator
    start: str
    half_life: int


def open_run(path: Path, device: torch.device) -> OpenedRun:
    """Open the newest valid state of a distillation.

    Raises:
        ValueError: if the folder holds no such run.
        CheckpointError: if it has no valid state.
    """
    config = read_distillation(path)
    student, data, guidance = config["student"], config["data"], config["teacher"]["guidance_scale"]
    teacher_path, half_life = Path(config["teacher"]["path"]), student["ema_half_lives"][0]
    base, student_net = load_denoiser(teacher_path), load_denoiser(teacher_path).net
    student_net.load_state_dict(student_state_dict(path, config, half_life))
    base.net.to(device)
    first = student.get("path")
    start = base.net if first is None else _start(config, Path(first))
    source = open_source(
        data["kind"],
        None if data["path"] is None else Path(data["path"]),
        teacher_path=teacher_path,
        teacher=base,
        cache=None if data["cache"] is None else Path(data["cache"]),
        seed=int(str(config["run"]["seed"])),
        device=device,
    )
    return OpenedRun(
        kind=data["kind"],
        teacher_path=teacher_path,
        base=base,
        teacher=guided(base, guidance, source.uncond),
        source=source,
        generator=_generator(config, base, student_net.to(device)),
        untrained=_generator(config, base, start.to(device)),
        start="teacher's weights" if first is None else "before",
        half_life=half_life,
    )
