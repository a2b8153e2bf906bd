"""A finished (or running) one-step distillation, opened for use: teacher, source and student."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from diffdiv.models.backbones import load_denoiser
from diffdiv.models.denoiser import Denoiser, GuidedDenoiser, guided
from diffdiv.models.generator import Generator
from diffdiv.runtime.checkpoint import load_weights
from diffdiv.sources import Source, open_source


@dataclass(frozen=True)
class OpenedRun:
    """What a run folder holds, ready to sample.

    Attributes:
        kind: of the data source.
        teacher_path: folder of the teacher.
        base: the unguided teacher; ``teacher``: with the run's guidance.
        source: conditions, captions, decoding.
        generator: the student with averaged weights.
        half_life: of that average, in images.
    """

    kind: str
    teacher_path: Path
    base: Denoiser
    teacher: Denoiser | GuidedDenoiser
    source: Source
    generator: Generator
    half_life: int


def open_run(path: Path, device: torch.device) -> OpenedRun:
    """Open the newest valid state of a one-step distillation.

    Raises:
        ValueError: if the folder holds no such run.
        CheckpointError: if it has no valid state.
    """
    file = path / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{path}: no config.yaml there, so it is not a run folder")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "student" not in config:
        raise ValueError(f"{path}: a run without a student; a one-step distillation is wanted")
    student, data = config["student"], config["data"]
    teacher_path, scale = Path(config["teacher"]["path"]), config["teacher"]["guidance_scale"]
    half_life = student["ema_half_lives"][0]
    base, student_net = load_denoiser(teacher_path), load_denoiser(teacher_path).net
    base.net.to(device)
    student_net.load_state_dict(load_weights(path, "student", half_life))
    source = open_source(
        data["kind"],
        None if data["path"] is None else Path(data["path"]),
        teacher_path=teacher_path,
        teacher=base,
        guidance_scale=scale,
        teacher_pool=None,
        seed=config["run"]["seed"],
        device=device,
    )
    return OpenedRun(
        kind=data["kind"],
        teacher_path=teacher_path,
        base=base,
        teacher=guided(base, scale, source.uncond),
        source=source,
        generator=Generator(
            base.with_net(student_net.to(device)), student["t_init"], student["input_convention"]
        ),
        half_life=half_life,
    )
