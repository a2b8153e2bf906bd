"""Two small worlds made from the digits of scikit-learn: 8x8 grey, and 32x32 with prompts.

The prompted world composes a digit, a stroke, a colour and a background into an image and says so
in a sentence, so a prompt is true by construction and a judge can check a generated image against
it. N: samples. Attributes are indices into ``DIGITS``, ``COLOURS``, ``BACKGROUNDS``, ``STROKES``;
-1 means "not mentioned in the prompt".

Source of the glyphs: UCI "Optical Recognition of Handwritten Digits" (CC BY 4.0), in scikit-learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor
from torch.nn import functional

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PAINT = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.68, 0.18),
    "blue": (0.16, 0.32, 0.95),
    "yellow": (0.95, 0.78, 0.05),
    "purple": (0.62, 0.18, 0.82),
    "cyan": (0.05, 0.75, 0.85),
}
COLOURS = tuple(_PAINT)
BACKGROUNDS = ("black", "white")
STROKES = ("thin", "bold")
ATTRIBUTES = {"digit": DIGITS, "colour": COLOURS, "background": BACKGROUNDS, "stroke": STROKES}
WORDS = ("a", *STROKES, *COLOURS, "handwritten", *DIGITS, "on", *BACKGROUNDS)
IMAGE_SIZE = 32
Split = Literal["train", "test"]

_NUM_TRAIN = 1500
_RGB = torch.tensor(list(_PAINT.values()))


def load_digits(split: Split) -> tuple[Tensor, Tensor]:
    """The 8x8 digits of scikit-learn, split by a fixed permutation into 1500 / 297.

    Returns:
        x0 [N, 1, 8, 8] float32 in [-1, 1] (ink is 1), labels [N] int64 in 0..9.

    Raises:
        ValueError: if ``split`` is not "train" or "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: {split!r} is not one of 'train', 'test'")
    bunch = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    chosen = order[:_NUM_TRAIN] if split == "train" else order[_NUM_TRAIN:]
    x0 = torch.from_numpy(bunch.images[chosen]).float()[:, None] / 8 - 1
    return x0, torch.from_numpy(bunch.target[chosen]).long()


@dataclass(frozen=True)
class Attributes:
    """What an image shows, or what its prompt mentions; each [N] int64, -1 = not mentioned."""

    digit: Tensor
    colour: Tensor
    background: Tensor
    stroke: Tensor

    def named(self) -> dict[str, Tensor]:
        """The four tensors by name, in the order digit, colour, background, stroke."""
        return dict(vars(self))


@dataclass(frozen=True)
class PromptedBatch:
    """Images [N, 3, 32, 32] in [-1, 1], their prompts, and the attributes shown and mentioned."""

    images: Tensor
    prompts: list[str]
    shown: Attributes
    mentioned: Attributes


def prompt_of(digit: int, colour: int = -1, background: int = -1, stroke: int = -1) -> str:
    """The sentence for attribute indices, e.g. "a bold red handwritten seven on white".

    Raises:
        ValueError: if no digit is given; a prompt always names one.
    """
    if digit < 0:
        raise ValueError(f"digit: {digit} is not in 0..9")
    words = ["a"]
    words += [STROKES[stroke]] if stroke >= 0 else []
    words += [COLOURS[colour]] if colour >= 0 else []
    words += ["handwritten", DIGITS[digit]]
    words += ["on", BACKGROUNDS[background]] if background >= 0 else []
    return " ".join(words)


def parse_prompt(text: str) -> dict[str, int]:
    """Attribute indices mentioned in a sentence (-1 where none is); the inverse of ``prompt_of``.

    Raises:
        ValueError: if a word is not in the vocabulary of this world.
    """
    found = dict.fromkeys(ATTRIBUTES, -1)
    for word in text.lower().split():
        if word not in WORDS:
            raise ValueError(f"prompt: {word!r} is not one of {', '.join(WORDS)}")
        for name, table in ATTRIBUTES.items():
            if word in table:
                found[name] = table.index(word)
    return found


def attributes_of(prompts: Sequence[str]) -> Attributes:
    """The attributes mentioned in each prompt, as tensors [N]."""
    parsed = [parse_prompt(prompt) for prompt in prompts]
    return Attributes(**{name: torch.tensor([p[name] for p in parsed]) for name in ATTRIBUTES})


def render_glyphs(x0: Tensor) -> Tensor:
    """Thin and bold ink masks [N, 2, 1, 32, 32] in (0, 1) of 8x8 digits [N, 1, 8, 8] in [-1, 1]."""
    ink = functional.interpolate((x0 + 1) / 2, size=28, mode="bicubic").clamp(0, 1)
    ink = functional.pad(ink, (2, 2, 2, 2))
    thick = functional.max_pool2d(ink, 3, stride=1, padding=1)
    # Far enough apart to tell the strokes (inked area x 1.4 or more), and holes stay open in bold.
    return torch.stack([ink - 0.60, thick - 0.50], 1).mul(12).sigmoid()


def paint_red(x0: Tensor) -> Tensor:
    """8x8 digits [N, 1, 8, 8] as thin red numerals on black, [N, 3, 32, 32], for the judge."""
    return render_glyphs(x0.clamp(-1, 1))[:, 0] * _RGB[0, :, None, None] * 2 - 1


class PromptedDigits:
    """Coloured 32x32 digits with true prompts, drawn by global sample index.

    Sample ``i`` depends only on (seed, split, i): the same on every rank and for every batch size.
    """

    def __init__(self, split: Split, *, seed: int = 0, drop_probability: float = 0.25) -> None:
        """Render the glyphs of ``split``.

        Args:
            split: digits of "train" or of "test" (unseen handwriting).
            seed: of the composition, not of the split.
            drop_probability: chance that an attribute (stroke, colour, background; each
                independently) is left out of the prompt; 0 gives full prompts only. The images
                are the same for every value.
        """
        if not 0 <= drop_probability <= 1:
            raise ValueError(f"drop_probability: {drop_probability} is not in [0, 1]")
        x0, self._labels = load_digits(split)
        self._glyphs = render_glyphs(x0)
        self._key = (seed, 0 if split == "train" else 1)
        self._drop_probability = drop_probability

    def batch(self, indices: Sequence[int]) -> PromptedBatch:
        """The samples with these global indices (non-negative), as images, prompts, attributes."""
        draws = torch.from_numpy(np.stack([_uniforms(self._key, index) for index in indices]))
        which, colour, background, stroke = (
            (draws[:, column] * count).long()
            for column, count in enumerate((len(self._labels), len(COLOURS), 2, 2))
        )
        mask = self._glyphs[which, stroke]
        paint = _RGB[colour, :, None, None]
        images = (background[:, None, None, None] * (1 - mask) + paint * mask) * 2 - 1
        shown = Attributes(self._labels[which], colour, background, stroke)
        kept = (draws[:, 4:] >= self._drop_probability).unbind(1)
        optional = zip((colour, background, stroke), kept, strict=True)
        mentioned = Attributes(shown.digit, *(value.where(keep, -1) for value, keep in optional))
        rows = zip(*(value.tolist() for value in mentioned.named().values()), strict=True)
        return PromptedBatch(images, [prompt_of(*row) for row in rows], shown, mentioned)


def _uniforms(key: tuple[int, int], index: int) -> np.ndarray:
    """Seven uniforms in [0, 1) from Philox with the sample index in its counter."""
    counter = np.array([0, index, 0, 0], np.uint64)
    philox = np.random.Philox(key=np.array(key, np.uint64), counter=counter)
    return np.random.Generator(philox).random(7)
