"""The digits worlds: split, prompts, draws by index, and that a picture is what its prompt says."""

import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from diffdiv.data.digits import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    STROKES,
    PromptedDigits,
    attributes_of,
    load_digits,
    parse_prompt,
    prompt_of,
)


def test_split_is_a_partition_of_the_digits() -> None:
    parts = [load_digits("train"), load_digits("test")]
    assert [len(x0) for x0, _ in parts] == [1500, 297]
    x0 = torch.cat([x0 for x0, _ in parts])
    labels = torch.cat([labels for _, labels in parts])
    assert x0.dtype == torch.float32
    assert (x0.min(), x0.max()) == (-1, 1)
    rows = {
        (*row, int(label))
        for row, label in zip(((x0 + 1) * 8).flatten(1).tolist(), labels, strict=True)
    }
    bunch = sklearn_digits()
    assert rows == {
        (*row, label) for row, label in zip(bunch.data.tolist(), bunch.target.tolist(), strict=True)
    }
    with pytest.raises(ValueError, match="'validation' is not one of"):
        load_digits("validation")


def test_prompts_round_trip_and_number_630() -> None:
    seen = set()
    for digit in range(len(DIGITS)):
        for colour in range(-1, len(COLOURS)):
            for background in range(-1, len(BACKGROUNDS)):
                for stroke in range(-1, len(STROKES)):
                    text = prompt_of(digit, colour, background, stroke)
                    assert list(parse_prompt(text).values()) == [digit, colour, background, stroke]
                    seen.add(text)
    assert len(seen) == 10 * 7 * 3 * 3
    assert prompt_of(7, 0, 1, 1) == "a bold red handwritten seven on white"
    with pytest.raises(ValueError, match="'zebra' is not one of"):
        parse_prompt("a zebra")
    with pytest.raises(ValueError, match="digit"):
        prompt_of(-1)


def test_samples_depend_on_their_index_only() -> None:
    world = PromptedDigits("train", seed=3)
    whole = world.batch(range(8))
    part = world.batch([5, 2])
    assert part.images.equal(whole.images[[5, 2]])
    assert part.prompts == [whole.prompts[5], whole.prompts[2]]
    other = PromptedDigits("train", seed=4).batch(range(8))
    assert not other.images.equal(whole.images)


def test_dropping_attributes_changes_the_prompt_only() -> None:
    n = 4000
    dropped = PromptedDigits("train").batch(range(n))
    full = PromptedDigits("train", drop_probability=0).batch(range(n))
    assert dropped.images.equal(full.images)
    for name, shown in full.shown.named().items():
        assert full.mentioned.named()[name].equal(shown)
        mentioned = dropped.mentioned.named()[name]
        assert ((mentioned == shown) | (mentioned == -1)).all()
        # 5 standard deviations: a false alarm has probability 6e-7
        rate = 0.0 if name == "digit" else 0.25
        assert abs((mentioned == -1).float().mean() - rate) <= 5 * (rate * (1 - rate) / n) ** 0.5
    parsed = attributes_of(dropped.prompts).named()
    assert all(parsed[name].equal(value) for name, value in dropped.mentioned.named().items())
    with pytest.raises(ValueError, match="drop_probability"):
        PromptedDigits("train", drop_probability=1.5)


def test_a_picture_shows_what_its_attributes_say() -> None:
    batch = PromptedDigits("test").batch(range(600))
    images, shown = batch.images, batch.shown
    assert images.shape == (600, 3, 32, 32)
    assert (images >= -1).all() and (images <= 1).all()
    corner = images[:, :, 0, 0]
    assert torch.allclose(corner, (shown.background * 2.0 - 1)[:, None].expand(-1, 3), atol=0.01)
    ink = (images - corner[:, :, None, None]).abs().amax(1)
    darkest = ink.flatten(1).argmax(1)
    paint = images.flatten(2)[torch.arange(600), :, darkest]
    means = torch.stack([paint[shown.colour == c].mean(0) for c in range(len(COLOURS))])
    assert torch.cdist(paint, means).argmin(1).equal(shown.colour)
    area = (ink / ink.amax((1, 2), keepdim=True)).mean((1, 2))
    assert area[shown.stroke == 1].mean() > 1.4 * area[shown.stroke == 0].mean()
