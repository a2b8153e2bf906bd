"""Rewards of images: how well they fit their prompts, or please, with gradient in the pixels.

    images    [B, 3, H, W] in [-1, 1]        prompts    one for each
    reward    [B], higher is better

Weights are local folders or safetensors files; nothing is downloaded. Every network's own resizing
and normalisation are done in torch, because the usual processors go through 8-bit pictures and cut
the gradient; values differ from theirs by the resizing alone (tests: under 1 %).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffdiv.data.digits import ATTRIBUTES, parse_prompt
from diffdiv.metrics.judge import load_judge
from diffdiv.rewards.sequences import RewardError

_AESTHETIC = (768, 1024, 128, 64, 16, 1)


class ImageRewardFunction(Protocol):
    """Scores images; see :class:`ImageReward` for what it is given."""

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        """Rewards [B]."""


@dataclass(frozen=True)
class ImageReward:
    """A reward function with its name.

    Attributes:
        name: in reports and errors.
        function: scores images in [-1, 1]; each score depends on its own image and prompt only.
    """

    name: str
    function: ImageRewardFunction

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        """Rewards [B], float32.

        Raises:
            RewardError: if the result is not a finite number for each image.
        """
        found = self.function(images, prompts)
        if not isinstance(found, Tensor) or found.shape != images.shape[:1]:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RewardError(f"reward {self.name}: returned {got}, not a tensor [{len(images)}]")
        if not torch.isfinite(found.detach()).all():
            bad = int((~torch.isfinite(found.detach())).sum())
            raise RewardError(f"reward {self.name}: {bad} of {len(images)} values are not finite")
        return found.float()


def check_image_reward(reward: ImageReward, size: int, prompt: str, device: torch.device) -> None:
    """Try a reward on random pictures, so that a faulty one is named before the first step.

    Args:
        reward: to try.
        size: of the pictures, in pixels.
        prompt: of both.
        device: to try on.

    Raises:
        RewardError: if it raises, returns another shape or a number that is not finite, depends on
            the other pictures of the batch, or has no usable gradient.
    """
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(2, 3, size, size, generator=generator) * 2 - 1).to(device)
    images.requires_grad_()
    try:
        together = reward(images, [prompt] * 2)
        alone = reward(images[:1].detach(), [prompt])
        gradient = torch.autograd.grad(together.sum(), images, allow_unused=True)[0]
    except RewardError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise RewardError(f"reward {reward.name}: raised {what}") from error
    if gradient is None or not torch.isfinite(gradient).all():
        raise RewardError(f"reward {reward.name}: no usable gradient in the pixels")
    if not torch.allclose(together[:1].detach(), alone.detach(), rtol=1e-2, atol=1e-3):
        raise RewardError(f"reward {reward.name}: depends on the other images of its batch")


def _straight_clamp(x: Tensor) -> Tensor:
    """x clamped to [0, 1] in value, with the gradient of x: saturated pixels can still move."""
    return x + (x.clamp(0, 1) - x).detach()


class _ClipScorer:
    """Cosine between the embeddings of images and prompts, by a local CLIP model."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no CLIP model there; wanted is a local folder as written by "
                "save_pretrained, with its tokenizer and image processor"
            )
        model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        nn.Module.to(model, device, torch.float32)
        self.model = model.eval().requires_grad_(False)
        self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        prepare = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (prepare.image_mean, prepare.image_std)
        )
        self._size = model.vision_model.embeddings.image_size

    def pixels(self, images: Tensor) -> Tensor:
        """What the vision network is given: shorter side to its size, centre, normalised."""
        x, size = _straight_clamp((images + 1) / 2), self._size
        height, width = x.shape[-2:]
        scale = size / min(height, width)
        shape = (round(height * scale), round(width * scale))
        x = interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        x = _straight_clamp(x[..., top : top + size, left : left + size])
        return (x - self._mean) / self._std

    def embed(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit embeddings [B, D] of images, with gradient, and of prompts."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True,
            return_tensors="pt",
        ).to(images.device)  # fmt: skip
        # normalised by the model itself
        out = self.model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=self.pixels(images),
        )
        return out.image_embeds, out.text_embeds


def clip_score_reward(folder: Path, device: torch.device) -> ImageReward:
    """100 times the cosine of CLIP embeddings (arXiv 2104.08718, without its cut at 0)."""
    scorer = _ClipScorer(folder, device)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        shown, said = scorer.embed(images, prompts)
        return 100 * (shown * said).sum(1)

    return ImageReward("clip_score", score)


def pickscore_reward(folder: Path, device: torch.device) -> ImageReward:
    """PickScore (arXiv 2305.01569): the cosine times the model's own logit scale."""
    scorer = _ClipScorer(folder, device)
    scale = float(scorer.model.logit_scale.exp())

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        shown, said = scorer.embed(images, prompts)
        return scale * (shown * said).sum(1)

    return ImageReward("pickscore", score)


def aesthetic_reward(folder: Path, device: torch.device) -> ImageReward:
    """LAION's aesthetic predictor v2: a linear network on unit CLIP ViT-L/14 image embeddings.

    Args:
        folder: a CLIP model folder that also holds ``aesthetic.safetensors`` with the predictor's
            five layers ``layers.N.weight`` and ``layers.N.bias`` (the published file is a pickle;
            convert it once).
        device: to run on.

    Raises:
        FileNotFoundError, ValueError: if the predictor is not there, or has other layers.
    """
    file = folder / "aesthetic.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the predictor's weights are wanted there, as safetensors")
    scorer, weights = _ClipScorer(folder, device), load_file(file)
    names = sorted({key.rpartition(".")[0] for key in weights}, key=lambda n: int(n.split(".")[-1]))
    layers = [(weights[f"{n}.weight"].to(device), weights[f"{n}.bias"].to(device)) for n in names]
    sizes = [layers[0][0].shape[1], *(weight.shape[0] for weight, _ in layers)] if layers else []
    if tuple(sizes[1:]) != _AESTHETIC[1:]:
        raise ValueError(f"{file}: layers of sizes {sizes}, not {list(_AESTHETIC)}")

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        x, _ = scorer.embed(images, prompts)
        for weight, bias in layers:
            x = x @ weight.T + bias
        return x[:, 0]

    return ImageReward("aesthetic", score)


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


@dataclass(frozen=True)
class WeightedReward:
    """One of several rewards of a run.

    Attributes:
        reward: the reward.
        scale: alpha, its weight.
        ceiling: above this value nothing more is gained (a hinge); None = no ceiling.
    """

    reward: ImageReward
    scale: float
    ceiling: float | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Weighted reward with its ceiling [B], and the plain values [B], detached."""
        value = self.reward(images, prompts)
        held = value if self.ceiling is None else value.clamp_max(self.ceiling)
        return self.scale * held, value.detach()


class RewardSettings(Protocol):
    """What a configuration says of one reward."""

    @property
    def path(self) -> Path: ...
    @property
    def scale(self) -> float: ...


class JudgeSettings(RewardSettings, Protocol):
    """The same of the embedded world's."""

    @property
    def colour(self) -> str: ...


class AllRewardSettings(Protocol):
    """Every reward there is; None = not used."""

    @property
    def clip_score(self) -> RewardSettings | None: ...
    @property
    def pickscore(self) -> RewardSettings | None: ...
    @property
    def aesthetic(self) -> RewardSettings | None: ...
    @property
    def judge(self) -> JudgeSettings | None: ...


def open_image_rewards(settings: AllRewardSettings, device: torch.device) -> list[WeightedReward]:
    """The rewards of a configuration, on a device.

    Raises:
        FileNotFoundError, ValueError: naming weights that are missing or do not fit.
    """
    found: list[tuple[RewardSettings, ImageReward]] = []
    if (own := settings.clip_score) is not None:
        found.append((own, clip_score_reward(own.path, device)))
    if (own := settings.pickscore) is not None:
        found.append((own, pickscore_reward(own.path, device)))
    if (own := settings.aesthetic) is not None:
        found.append((own, aesthetic_reward(own.path, device)))
    if (judge := settings.judge) is not None:
        found.append((judge, judge_reward(judge.path, device, {"colour": judge.colour})))
    return [WeightedReward(reward, own.scale) for own, reward in found]
