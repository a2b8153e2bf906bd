"""Evaluation of a distilled student beside its teacher, on the same conditions and noise."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffdiv.core.noise import normal
from diffdiv.data.digits import Attributes, PromptedDigits, load_digits, paint_red
from diffdiv.evaluate_alignment import HELD_OUT, evaluate_alignment, second_judge
from diffdiv.metrics.alignment import Score
from diffdiv.metrics.card import Evaluation, Row, metric_card, write_evaluation
from diffdiv.metrics.clip import clip_score, require_clip
from diffdiv.metrics.frechet import frechet_distance
from diffdiv.metrics.images import image_metrics, require_inception
from diffdiv.metrics.judge import (
    WEIGHTS_NAME,
    attribute_accuracy,
    judge_features,
    judge_frechet,
    load_judge,
)
from diffdiv.models.backbones import PromptEncoder
from diffdiv.models.denoiser import Condition, GuidedDenoiser
from diffdiv.resources import resource
from diffdiv.rewards.zoo import open_image_rewards, weights_sha256
from diffdiv.runtime.reward_config import RewardConfig
from diffdiv.runtime.student import OpenedRun, open_run, read_distillation
from diffdiv.samplers import sample_in_parts, sample_ode, time_grid
from diffdiv.sources import Sampler, Source

REFERENCE_SIZE = 6000
ALIGNMENT_IMAGES = 200  # each is scored a dozen times
_SOLVERS = {"vp": "DDIM", "edm": "Heun", "flow": "Euler"}


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


def digits_exam(source: Source, num: int) -> Exam:
    """Labels in turn; 8x8 samples are painted as red numerals and shown to the same judge."""
    folder = resource("assets/embedded_judge")
    judge = load_judge(folder)
    labels = torch.arange(num) % 10
    # scaled as in the prompted world: red on black alone leaves some features without spread
    world = PromptedDigits("train").batch(range(REFERENCE_SIZE)).images
    scale = judge_features(judge, world).std(0).clamp_min(1e-6)
    reference = judge_features(judge, paint_red(load_digits("train")[0])) / scale

    def mark(images: Tensor) -> dict[str, float]:
        painted = paint_red(images)
        features = judge_features(judge, painted) / scale
        metrics = {"frechet_judge": frechet_distance(features, reference)}
        if source.num_labels:
            asked = Attributes(labels, *[torch.full_like(labels, -1)] * 3)
            metrics["digit"] = attribute_accuracy(judge, painted, asked)["digit"]
        return metrics

    return Exam(
        lambda i: Condition(label=labels[list(i)]) if source.num_labels else Condition(),
        mark,
        "embedded judge on samples painted red on black; not Inception",
        folder / WEIGHTS_NAME,
    )


def images_exam(source: Source, num: int, inception: Path | None) -> Exam:
    """FID, KID, precision and recall against as many training images, by Inception features."""
    if inception is None:
        raise ValueError("image folders are marked by FID: give the weights with --inception FILE")
    require_inception(inception)

    def mark(images: Tensor) -> dict[str, float]:
        real = (source.real_on(torch.device("cpu"), [i])[0] for i in range(num))
        return image_metrics(real, images.split(50), inception=inception)

    return Exam(source.conditions, mark, "Inception (FID weights)", inception)


def prompts_exam(source: Source, num: int, clip: Path | None) -> Exam:
    """CLIP score of the prompts' images."""
    if clip is None:
        raise ValueError(
            "prompts are marked by CLIP score: give a model folder with --clip FOLDER (and FID is "
            "measured on captioned images: --data FOLDER)"
        )
    require_clip(clip)

    def mark(images: Tensor) -> dict[str, float]:
        return {"clip_score": clip_score(images, source.captions(range(num)), clip)}

    weights = clip / "model.safetensors"  # not there: in several shards
    hashed = weights if weights.is_file() else None
    return Exam(source.conditions, mark, f"CLIP ({clip.name})", hashed)


def evaluate_path(
    path: Path,
    *,
    num: int = 1000,
    seed: int = 0,
    out: Path | None = None,
    inception: Path | None = None,
    clip: Path | None = None,
) -> Evaluation:
    """Teacher and student of an f-distill run, marked alike; writes evaluation.json.

    Of a Diff-Instruct* run also what shows that its reward was hacked, in alignment.json.

    Args:
        path: run folder.
        num: images a row; row by row the same conditions and noise.
        seed: of the noise.
        out: JSON file to write besides the run's evaluation.json.
        inception: weights for FID on image folders.
        clip: folder of a CLIP model for runs on a prompt file.

    Raises:
        ValueError: if the folder holds no f-distill run, or its data cannot be marked.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_run(path, device)
    source, shape = opened.source, opened.generator.noise_shape(opened.source.shape)
    exam, settings = _exam(opened, num, inception, clip), _reward_settings(path)
    rewards = open_image_rewards(settings, device)
    is_aligned = bool(rewards) and read_distillation(path)["recipe"] == "di_star"
    scores: dict[str, Score] = {weighted.reward.name: weighted.reward for weighted in rewards}
    if is_aligned and opened.kind == "prompted_digits":
        scores |= second_judge(path, device)

    @torch.no_grad()
    def rewarded(sampler: Sampler) -> dict[str, float]:
        """Mean of each reward of a run, and by the second judge, on prompts as in training."""
        found: dict[str, list[Tensor]] = {}
        for start in range(0, num if rewards else 0, 50):
            indices = [HELD_OUT + i for i in range(start, min(start + 50, num))]
            z = normal(shape, seed=seed, purpose="rewarded", indices=indices)
            cond = source.conditions(indices).to(device)
            x0 = sample_in_parts(sampler, z.to(device), cond)
            pictures, prompts = source.decode(x0).to(device), source.captions(indices)
            for name, score in scores.items():
                values = score(pictures, prompts)
                found.setdefault(f"{name} reward", []).append(values)
        return {name: float(torch.cat(values).mean()) for name, values in found.items()}

    @torch.no_grad()
    def images(sampler: Sampler) -> Tensor:
        parts = []
        for start in range(0, num, 100):
            indices = range(start, min(start + 100, num))
            z = normal(shape, seed=seed, purpose="evaluation", indices=indices)
            x0 = sample_in_parts(sampler, z.to(device), exam.conditions(indices).to(device))
            parts.append(source.decode(x0))
        return torch.cat(parts)

    rows: list[Row] = [
        {
            "name": name,
            "network_evaluations": calls,
            "metrics": {**rewarded(sampler), **exam.mark(images(sampler))},
        }
        for name, calls, sampler in _samplers(opened)
    ]
    card = metric_card(
        n=num,
        seed=seed,
        features=exam.features,
        device=device,
        command=f"diffdiv evaluate {shlex.quote(path.name)} --num {num} --seed {seed}",
        weights=exam.weights,
        ema_half_life=opened.half_life,
        details={"rewards_sha256": weights_sha256(settings)} if settings else None,
    )
    written = write_evaluation(path, rows, card)
    if is_aligned:
        evaluate_alignment(path, opened, rewards, num=min(num, ALIGNMENT_IMAGES), seed=seed)
    if out is not None:
        out.write_bytes(written.read_bytes())
    return {"rows": rows, "card": card}


def _samplers(opened: OpenedRun) -> list[tuple[str, int, Sampler]]:
    """Name, network evaluations and sampler of every row; all take the noise of the student."""
    schedule, student, channels = opened.base.schedule, opened.generator, opened.source.shape[0]
    heun = schedule.family == "edm"
    steps = 18 if heun else 20
    calls = 2 * steps - 1 if heun else steps
    name = f"teacher, {steps} {_SOLVERS[schedule.family]} steps"
    if isinstance(opened.teacher, GuidedDenoiser):
        calls, name = 2 * calls, f"{name}, guidance {opened.teacher.scale:g}"
    ode = partial(sample_ode, opened.teacher, times=time_grid(schedule, steps), heun=heun)
    count, calls_of_student = student.description, student.num_steps
    return [
        (name, calls, lambda z, cond: ode(z[:, :channels], cond)),
        (f"{opened.start}, {count}", calls_of_student, opened.untrained),
        (f"student, {count}", calls_of_student, student),
    ]


def _reward_settings(run: Path) -> dict[str, RewardConfig]:
    """What a Diff-Instruct* run was rewarded for; of any other run nothing."""
    config = read_distillation(run)
    if config["recipe"] != "di_star":
        return {}
    return {
        name: RewardConfig.model_validate_json(json.dumps(own), strict=True)
        for name, own in config.get("rewards", {}).items()
        if own is not None and own.get("file") is None  # code of a run folder is not run
    }


def _exam(opened: OpenedRun, num: int, inception: Path | None, clip: Path | None) -> Exam:
    match opened.kind:
        case "prompted_digits":
            return prompted_digits_exam(opened.teacher_path, num)
        case "digits":
            return digits_exam(opened.source, num)
        case "images":
            return images_exam(opened.source, num, inception)
        case "prompts" | "captions":
            return prompts_exam(opened.source, num, clip)
    raise ValueError(f"data kind {opened.kind!r} has no exam")
