"""Evaluation of a distilled student beside its teacher, on the same conditions and noise."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import Tensor

from diffdiv.core.noise import normal
from diffdiv.data.digits import PromptedDigits, load_digits, paint_red
from diffdiv.metrics.card import Evaluation, Row, metric_card, write_evaluation
from diffdiv.metrics.judge import (
    WEIGHTS_NAME,
    attribute_accuracy,
    judge_features,
    judge_frechet,
    load_judge,
)
from diffdiv.models.backbones import PromptEncoder, load_denoiser
from diffdiv.models.denoiser import Condition, guided
from diffdiv.models.generator import Generator
from diffdiv.resources import resource
from diffdiv.runtime.checkpoint import load_weights
from diffdiv.samplers import sample_ode, time_grid
from diffdiv.sources import Source, open_source

if TYPE_CHECKING:
    from collections.abc import Mapping

Sampler = Callable[[Tensor, Condition], Tensor]
REFERENCE_SIZE = 6000


@dataclass(frozen=True)
class Exam:
    """What samples are asked for and how they are marked.

    Attributes:
        conditions: global indices -> conditions.
        mark: images [N, C, H, W] in [-1, 1] -> metrics by name.
        features: what the metrics look at, for the metric card.
        weights: file of the feature network.
    """

    conditions: Callable[[Sequence[int]], Condition]
    mark: Callable[[Tensor], dict[str, float]]
    features: str
    weights: Path | None


def prompted_digits_exam(teacher: Path, num: int) -> Exam:
    """Full prompts of unseen compositions, marked by the embedded judge."""
    folder = resource("assets/embedded_judge")
    judge, encode = load_judge(folder), PromptEncoder(teacher)
    batch = PromptedDigits("test", seed=0, drop_probability=0).batch(range(num))
    reference = judge_features(judge, PromptedDigits("train").batch(range(REFERENCE_SIZE)).images)

    def mark(images: Tensor) -> dict[str, float]:
        distance = judge_frechet(judge_features(judge, images), reference)
        return {"frechet_judge": distance, **attribute_accuracy(judge, images, batch.mentioned)}

    return Exam(
        lambda indices: encode([batch.prompts[i] for i in indices]),
        mark,
        "embedded judge, features over their reference standard deviation; not Inception",
        folder / WEIGHTS_NAME,
    )


def digits_exam(num: int) -> Exam:
    """Ten labels in turn; 8x8 samples are painted as red numerals and shown to the same judge."""
    folder = resource("assets/embedded_judge")
    judge = load_judge(folder)
    labels = torch.arange(num) % 10
    reference = judge_features(judge, paint_red(load_digits("train")[0]))

    def mark(images: Tensor) -> dict[str, float]:
        painted = paint_red(images)
        seen = judge(painted)["digit"].argmax(1)
        return {
            "frechet_judge": judge_frechet(judge_features(judge, painted), reference),
            "digit": (seen == labels).float().mean().item(),
        }

    return Exam(
        lambda indices: Condition(label=labels[list(indices)]),
        mark,
        "embedded judge on samples painted red on black; not Inception",
        folder / WEIGHTS_NAME,
    )


def draw_images(
    sampler: Sampler, source: Source, exam: Exam, *, num: int, seed: int, device: torch.device
) -> Tensor:
    """Images [num, C, H, W] in [-1, 1]: sample i from conditions i and noise (seed, i)."""
    parts = []
    for start in range(0, num, 100):
        indices = range(start, min(start + 100, num))
        z = normal(source.shape, seed=seed, purpose="evaluation", indices=indices).to(device)
        with torch.no_grad():
            parts.append(source.decode(sampler(z, exam.conditions(indices).to(device))))
    return torch.cat(parts)


def evaluate_path(
    path: Path,
    *,
    num: int = 1000,
    seed: int = 0,
    out: Path | None = None,
    inception: Path | None = None,
) -> Evaluation:
    """Teacher and student of an f-distill run, marked alike; writes evaluation.json.

    Args:
        path: run folder.
        num: images a row.
        seed: of the noise.
        out: JSON file besides the run's evaluation.json.
        inception: Inception weights for FID, KID, precision and recall on image folders.

    Raises:
        ValueError: if the folder holds no f-distill run, or its data cannot be marked.
    """
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise ValueError(f"{path}: no config.yaml here; evaluate takes a run folder")
    config: Mapping[str, dict] = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    if "student" not in config:
        raise ValueError(f"{path}: a run without a student ({config.get('recipe')})")
    teacher_path = Path(config["teacher"]["path"])
    half_life = config["student"]["ema_half_lives"][0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_denoiser(teacher_path)
    base.net.to(device)
    scale, data = config["teacher"]["guidance_scale"], config["data"]
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
    exam = _exam(data["kind"], source, teacher_path, num, inception)
    teacher = guided(base, scale, source.uncond)
    branches = 1 if scale in (None, 1.0) else 2
    student = config["student"]
    generator = Generator(base, student["t_init"], student["input_convention"])
    heun = base.schedule.family == "edm"
    steps = 18 if heun else 20

    def sample_teacher(z: Tensor, cond: Condition) -> Tensor:
        return sample_ode(teacher, z, cond, time_grid(base.schedule, steps), heun=heun)

    evaluations = (2 * steps - 1 if heun else steps) * branches
    guidance = f", guidance {scale:g}" if branches == 2 else ""
    rows = [
        (
            f"teacher, {steps} {'Heun' if heun else 'DDIM'} steps{guidance}",
            evaluations,
            sample_teacher,
        ),
        ("teacher's weights, 1 step (the student before training)", 1, generator),
    ]
    marks: list[Row] = []
    common = {"num": num, "seed": seed, "device": device}
    for name, count, sampler in rows:
        metrics = exam.mark(draw_images(sampler, source, exam, **common))
        marks.append({"name": name, "network_evaluations": count, "metrics": metrics})
    base.net.load_state_dict(load_weights(path, "student", half_life))
    metrics = exam.mark(draw_images(generator, source, exam, **common))
    marks.append({"name": "student, 1 step", "network_evaluations": 1, "metrics": metrics})
    card = metric_card(
        n=num,
        seed=seed,
        features=exam.features,
        device=device,
        command=shlex.join(
            ["diffdiv", "evaluate", path.name, "--num", str(num), "--seed", str(seed)]
        ),
        weights=exam.weights,
        ema_half_life=half_life,
    )
    written = write_evaluation(path, marks, card)
    if out is not None:
        out.write_bytes(written.read_bytes())
    return {"rows": marks, "card": card}


def _exam(kind: str, source: Source, teacher: Path, num: int, inception: Path | None) -> Exam:
    match kind:
        case "prompted_digits":
            return prompted_digits_exam(teacher, num)
        case "digits":
            return digits_exam(num)
    if source.real is None:
        raise ValueError("prompts without images cannot be marked; evaluate on an image folder")
    raise ValueError(f"data kind {kind!r} has no exam yet")
