"""Configuration of the rewards of images: a reward's name -> what is said of it.

A name is one of :data:`IMAGE_REWARDS`; or one that an installed package offers, as an entry point
of the group :data:`ENTRY_POINTS`; or any other, with ``file``, the user's own code.
"""

from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from diffdiv.runtime.config import Config, ExistingFolder
from diffdiv.runtime.explain import nearest

IMAGE_REWARDS = (
    "aesthetic", "clip_score", "hpsv2", "hpsv2_1", "image_reward", "judge", "pickscore"
)  # fmt: skip
ENTRY_POINTS = "diffdiv.rewards"
Positive = Annotated[float, Field(gt=0)]


def _code(where: str) -> str:
    """FILE.py:FUNCTION with an absolute path, so that a run can be resumed from elsewhere."""
    file, _, function = where.rpartition(":")
    if not (file.endswith(".py") and function.isidentifier()):
        raise ValueError(f"{where!r} is not of the form FILE.py:FUNCTION")
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    return f"{path}:{function}"


class RewardConfig(Config):
    """One reward of images; see diffdiv/rewards/zoo.py and weighted.py."""

    path: ExistingFolder | None = None  # weights
    scale: float = Field(1.0, ge=0)  # alpha: weight against the regulariser
    ceiling: float | None = None  # in the reward's unit: above it nothing more is gained
    # (value - mean) / std as stated [mean, std], or of earlier samples (running); a black box's
    # advantages within the copies of one sample (group)
    normalise: Literal["running", "group"] | tuple[float, Positive] | None = None
    warmup_steps: int = Field(0, ge=0)  # student updates in which the scale rises from 0
    decay_steps: int | None = Field(None, gt=0)  # student updates in which it falls to 0
    differentiable: bool = True  # false: a black box, whose gradient is estimated
    copies: int = Field(8, ge=2, multiple_of=2)  # black box: perturbed copies of each sample
    smoothing: float = Field(0.1, gt=0)  # black box: standard deviation of perturbations of x0
    file: Annotated[str, AfterValidator(_code)] | None = None  # the user's own, FILE.py:FUNCTION
    allow_code: bool = False  # whether ``file`` may be run
    colour: str | None = None  # judge: the wanted one, where the prompt leaves it open

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.file is not None and not self.allow_code:
            raise ValueError(
                f"file {self.file!r} is code that would be run; if you trust it, set allow_code"
            )
        if self.normalise == "group" and self.differentiable:
            raise ValueError("normalise 'group' is for black boxes (differentiable: false)")
        return self


def _known(rewards: dict[str, RewardConfig | None]) -> dict[str, RewardConfig | None]:
    """Each name must mean something, and have what it needs."""
    wanted = {name: reward for name, reward in rewards.items() if reward is not None}
    offered = {point.name for point in entry_points(group=ENTRY_POINTS)}
    for name, reward in wanted.items():
        if reward.colour is not None and name != "judge":
            raise ValueError(f"{name}: only the judge takes a colour")
        if reward.file is not None or name in offered - {*IMAGE_REWARDS}:
            if reward.path is not None:
                raise ValueError(f"{name}: path is for diffdiv's own; read weights in your code")
            continue
        if name not in IMAGE_REWARDS:
            known = sorted({*IMAGE_REWARDS, *offered})
            hint = nearest(name, {word: word for word in known})
            raise ValueError(
                f"{name!r} is unknown{hint}, known are {', '.join(known)}; your own is "
                f"{name}.file=FILE.py:FUNCTION"
            )
        if reward.path is None:
            raise ValueError(f"path of {name} is missing: a folder with its weights")
        if name == "judge" and reward.colour is None:
            raise ValueError("judge: its colour is missing, such as red")
    return rewards


def _some(rewards: dict[str, RewardConfig | None]) -> dict[str, RewardConfig | None]:
    if not any(rewards.values()):
        raise ValueError(f"no reward is set: {', '.join(IMAGE_REWARDS)}, or your own by file")
    return rewards


# null switches a reward of the file off
OptionalRewardsConfig = Annotated[dict[str, RewardConfig | None], AfterValidator(_known)]
RewardsConfig = Annotated[OptionalRewardsConfig, AfterValidator(_some)]  # at least one
