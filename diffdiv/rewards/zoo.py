"""Opening the rewards of a configuration: by name, by entry point, or from the user's own file."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffdiv.data.digits import ATTRIBUTES, parse_prompt
from diffdiv.metrics.card import file_sha256
from diffdiv.metrics.judge import load_judge
from diffdiv.rewards.clip import (
    aesthetic_reward,
    clip_score_reward,
    hpsv2_reward,
    pickscore_reward,
)
from diffdiv.rewards.image_reward import image_reward
from diffdiv.rewards.images import ImageReward, ImageRewardFunction
from diffdiv.rewards.weighted import Normalisation, WeightedReward


def judge_reward(folder: Path, device: torch.device, wanted: Mapping[str, str]) -> ImageReward:
    """The embedded world's reward: log-probability of attributes that the prompt leaves open.

    Args:
        folder: of a judge, see ``diffdiv.metrics.judge``.
        device: to run on.
        wanted: attribute -> word, such as colour -> red.

    Raises:
        ValueError: for an attribute or a word that is not of this world.
    """
    judge, aims = load_judge(folder).to(device), {}
    for name, word in wanted.items():
        if word not in ATTRIBUTES.get(name, ()):
            known = {key: list(words) for key, words in ATTRIBUTES.items()}
            raise ValueError(f"rewards.judge: {name} {word!r} is not among {known}")
        aims[name] = ATTRIBUTES[name].index(word)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        logits, said = judge(images), [parse_prompt(prompt) for prompt in prompts]
        total = images.new_zeros(len(images))
        for name, index in aims.items():
            is_open = torch.tensor([prompt[name] < 0 for prompt in said], device=images.device)
            log_p = torch.log_softmax(logits[name], 1)[:, index]
            total = total + torch.where(is_open, log_p, 0.0)
        return total

    return ImageReward("judge", score)


class RewardSettings(Protocol):
    """What a configuration says of one reward; see :class:`WeightedReward`."""

    @property
    def path(self) -> Path | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def ceiling(self) -> float | None: ...
    @property
    def normalise(self) -> Normalisation: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay_steps(self) -> int | None: ...
    @property
    def differentiable(self) -> bool: ...
    @property
    def copies(self) -> int: ...
    @property
    def smoothing(self) -> float: ...
    @property
    def file(self) -> str | None: ...
    @property
    def colour(self) -> str | None: ...


_BY_PATH: dict[str, Callable[[Path, torch.device], ImageReward]] = {
    "aesthetic": aesthetic_reward,
    "clip_score": clip_score_reward,
    "hpsv2": hpsv2_reward,
    "hpsv2_1": partial(hpsv2_reward, name="hpsv2_1"),
    "image_reward": image_reward,
    "pickscore": pickscore_reward,
}


def weights_sha256(settings: Mapping[str, RewardSettings | None]) -> dict[str, str]:
    """Of every safetensors file in the folders of rewards: NAME/FILE -> hash."""
    return {
        f"{name}/{file.name}": file_sha256(file)
        for name, own in settings.items()
        if own is not None and own.path is not None
        for file in sorted(own.path.glob("*.safetensors"))
    }


def open_image_rewards(
    settings: Mapping[str, RewardSettings | None], device: torch.device
) -> list[WeightedReward]:
    """The rewards of a configuration, by name, on a device; None = switched off.

    Raises:
        FileNotFoundError, ValueError: naming weights or code that are missing or do not fit.
    """
    return [
        WeightedReward(
            open_image_reward(name, own, device),
            scale=own.scale,
            ceiling=own.ceiling,
            normalise=own.normalise,
            warmup_steps=own.warmup_steps,
            decay_steps=own.decay_steps,
            differentiable=own.differentiable,
            copies=own.copies,
            smoothing=own.smoothing,
        )
        for name, own in settings.items()
        if own is not None
    ]


def open_image_reward(name: str, own: RewardSettings, device: torch.device) -> ImageReward:
    """One reward: of the user's file, of the zoo, or of an installed package, in this order.

    Raises:
        FileNotFoundError, ValueError: as :func:`open_image_rewards`.
    """
    if own.file is not None:
        return ImageReward(name, _function_of_file(own.file))
    if name not in (*_BY_PATH, "judge"):
        for point in entry_points(group="diffdiv.rewards", name=name):
            return ImageReward(name, point.load())
        raise ValueError(f"rewards: {name!r} is not among {', '.join([*_BY_PATH, 'judge'])}")
    if own.path is None:
        raise ValueError(f"rewards.{name}: path is missing: a folder with its weights")
    if name == "judge":
        return judge_reward(own.path, device, {"colour": own.colour or ""})
    return _BY_PATH[name](own.path, device)


def _function_of_file(where: str) -> ImageRewardFunction:
    """FILE.py:FUNCTION, imported; whether that is allowed has been asked before."""
    file, _, name = where.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file for a reward")
    spec = importlib.util.spec_from_file_location(f"diffdiv_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = vars(module).get(name)
    if not callable(function):
        raise ValueError(f"{path}: has no function {name!r}")
    return function
