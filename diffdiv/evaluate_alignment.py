"""What a Diff-Instruct* run did to its student besides raising the reward: alignment.json.

Every figure stands beside that of the generator the run started from, on the same prompts and
noise; none is a verdict by itself.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffdiv.core.noise import normal
from diffdiv.data.digits import PromptedDigits, attributes_of
from diffdiv.metrics.alignment import (
    Score,
    by_time,
    colour_and_texture,
    distance_within,
    prompt_dependence,
    under_perturbations,
)
from diffdiv.metrics.judge import judge_features, load_judge, log_obedience
from diffdiv.models.backbones import load_denoiser
from diffdiv.resources import resource
from diffdiv.rewards.weighted import WeightedReward
from diffdiv.rewards.zoo import judge_reward
from diffdiv.runtime.student import OpenedRun, fake_state_dict, read_distillation
from diffdiv.samplers import sample_in_parts
from diffdiv.sources import Sampler

HELD_OUT = 2 * 10**9  # far from every training index
ALIGNMENT_NAME = "alignment.json"
SECOND_JUDGE = "assets/embedded_second_judge"
_PROMPTS, _WITHIN, _AT_ONCE = 16, 8, 50
_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
_TRAINED = "rises: what the run was for"
_UNSEEN = "stays behind the trained reward, or falls, when that one is hacked"
_CHANGED = "well below the plain reward: the gain is fragile, and no eye would see it"
_ASKED = "falls towards 0 when prompts are ignored"
_VARIED = "falls when the samples of one prompt become alike"
_DRIFT = "moves away from the start without the reward's asking for it"


class Finding(TypedDict):
    """One figure of the student, and of the generator it started from, with a reading help."""

    name: str
    before: float
    after: float
    help: str


class AtTime(TypedDict):
    """Networks on the student's samples at one time; see :class:`alignment.TimeBin`.

    Attributes:
        regulariser: squared score difference to the guided reference, in units of eps.
        fake_loss, reference_loss: of both without guidance; a fake score that has followed the
            student has the lower one.
    """

    t: float
    regulariser: float
    fake_loss: float
    reference_loss: float


class Alignment(TypedDict):
    """Content of alignment.json."""

    findings: list[Finding]
    times: list[AtTime]
    card: dict[str, object]


def evaluate_alignment(
    run: Path, opened: OpenedRun, rewards: Sequence[WeightedReward], *, num: int, seed: int
) -> Alignment:
    """The diagnostics of a run, before and after; writes alignment.json into its folder.

    Args:
        run: its folder; ``opened``: the same, opened.
        rewards: of the run; those of scale 0 were held out.
        num: images, but for the variety of single prompts.
        seed: of the noise.
    """
    shown = [_Shown.of(opened, sampler, num, seed) for sampler in _samplers(opened)]
    findings: list[Finding] = []
    for help_, figures in _figures(run, opened, rewards):
        before, after = (figures(images) for images in shown)
        findings += [
            {"name": name, "before": before[name], "after": after[name], "help": help_}
            for name in before
        ]
    content: Alignment = {
        "findings": findings,
        "times": _by_time(run, opened, shown[1]),
        "card": {"n": num, "within a prompt": f"{_PROMPTS} prompts x {_WITHIN}", "seed": seed},
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    (run / ALIGNMENT_NAME).write_text(text + "\n", encoding="utf-8")
    return content


def _samplers(opened: OpenedRun) -> tuple[Sampler, Sampler]:
    return opened.untrained, opened.generator


@dataclass(frozen=True)
class _Shown:
    """Samples of one generator: of many prompts, and many of a few prompts."""

    x0: Tensor
    images: Tensor
    within: Tensor
    prompts: list[str]

    @classmethod
    def of(cls, opened: OpenedRun, sampler: Sampler, num: int, seed: int) -> "_Shown":
        many = [HELD_OUT + i for i in range(num)]
        few = [HELD_OUT + i // _WITHIN for i in range(_PROMPTS * _WITHIN)]
        x0 = _draw(opened, sampler, many, seed)
        within = _decode(opened, _draw(opened, sampler, few, seed))
        return cls(x0, _decode(opened, x0), within, opened.source.captions(many))


@torch.no_grad()
def _draw(opened: OpenedRun, sampler: Sampler, asked: Sequence[int], seed: int) -> Tensor:
    """x0 of some prompts, on the run's device."""
    shape, parts = opened.generator.noise_shape(opened.source.shape), []
    device = next(opened.base.net.parameters()).device
    for start in range(0, len(asked), _AT_ONCE):
        some = asked[start : start + _AT_ONCE]
        z = normal(shape, seed=seed, purpose="alignment", indices=range(start, start + len(some)))
        cond = opened.source.conditions(some).to(device)
        parts.append(sample_in_parts(sampler, z.to(device), cond))
    return torch.cat(parts)


def _decode(opened: OpenedRun, x0: Tensor) -> Tensor:
    return torch.cat([opened.source.decode(part) for part in x0.split(_AT_ONCE)])


def _figures(
    run: Path, opened: OpenedRun, rewards: Sequence[WeightedReward]
) -> list[tuple[str, Callable[[_Shown], dict[str, float]]]]:
    """All figures, each with its reading help."""
    scored = {w.reward.name: _in_parts(w.reward, opened) for w in rewards if w.scale > 0}
    unseen = {w.reward.name: _in_parts(w.reward, opened) for w in rewards if w.scale == 0}
    readers, features = {**scored, **unseen}, _pixels
    if opened.kind == "prompted_digits":
        judge = load_judge(resource(SECOND_JUDGE))
        world = judge_features(judge, PromptedDigits("train").batch(range(1000)).images)
        spread = world.std(0).clamp_min(1e-6)
        unseen |= second_judge(run, torch.device("cpu"))
        readers = {"prompt": lambda x, said: log_obedience(judge, x, attributes_of(said))}

        def features(images: Tensor) -> Tensor:
            return judge_features(judge, images) / spread

    return [
        (_TRAINED, lambda s: {n: _mean(score, s) for n, score in scored.items()}),
        (_UNSEEN, lambda s: {f"{n}, held out": _mean(score, s) for n, score in unseen.items()}),
        (_CHANGED, lambda s: _perturbed(scored, s)),
        (
            _ASKED,
            lambda s: {
                f"{n}: own less exchanged prompts": prompt_dependence(score, s.images, s.prompts)
                for n, score in readers.items()
                if len(set(s.prompts)) > 1
            },
        ),
        (
            _VARIED,
            lambda s: {"distance within a prompt": distance_within(features(s.within), _PROMPTS)},
        ),
        (_DRIFT, lambda s: colour_and_texture(s.images)),
    ]


def _in_parts(score: Score, opened: OpenedRun) -> Score:
    """The score in bounded memory, on the run's device; values on the CPU."""
    device = next(opened.base.net.parameters()).device

    @torch.no_grad()
    def scored(images: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = [
            score(part.to(device), prompts[i * _AT_ONCE : (i + 1) * _AT_ONCE]).cpu()
            for i, part in enumerate(images.split(_AT_ONCE))
        ]
        return torch.cat(parts)

    return scored


def _mean(score: Score, shown: _Shown) -> float:
    return float(score(shown.images, shown.prompts).double().mean())


def _perturbed(scored: dict[str, Score], shown: _Shown) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, score in scored.items():
        values = under_perturbations(score, shown.images, shown.prompts)
        found |= {f"{name} under {c}": v for c, v in values.items() if c != "plain"}
    return found


def second_judge(run: Path, device: torch.device) -> dict[str, Score]:
    """The wish of a run on the embedded world, by the judge that nothing was trained on; by name.

    Empty if it wishes for nothing that a judge could see.
    """
    wished = (read_distillation(run).get("rewards") or {}).get("judge")
    if wished is None:
        return {}
    aim = {"colour": str(wished["colour"])}
    return {"second judge": judge_reward(resource(SECOND_JUDGE), device, aim)}


def _pixels(images: Tensor) -> Tensor:
    """Small pictures as features where no network is at hand."""
    return interpolate(images, (32, 32), mode="bilinear", antialias=True).flatten(1)


def _by_time(run: Path, opened: OpenedRun, shown: _Shown) -> list[AtTime]:
    """The student's samples seen by the last fake score and the reference."""
    net = load_denoiser(opened.teacher_path).net
    net.load_state_dict(fake_state_dict(run, read_distillation(run)))
    x0, source = shown.x0[:_AT_ONCE], opened.source
    cond = source.conditions([HELD_OUT + i for i in range(len(x0))]).to(x0.device)
    schedule = opened.base.schedule
    times = schedule.sample_t(torch.tensor(_QUANTILES)).tolist()
    fake = opened.base.with_net(net.to(x0.device))
    look = partial(by_time, x0, cond, times, fake=fake, schedule=schedule, seed=0)
    held, plain = look(reference=opened.teacher), look(reference=opened.base)
    return [
        {
            "t": a.t,
            "regulariser": a.gap,
            "fake_loss": b.fake_loss,
            "reference_loss": b.reference_loss,
        }
        for a, b in zip(held, plain, strict=True)
    ]
