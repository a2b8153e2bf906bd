"""Frechet distance against closed forms and scipy; the shipped judge against true attributes."""

from pathlib import Path

import pytest
import torch
from scipy.linalg import sqrtm

from diffdiv.data.digits import Attributes, PromptedDigits
from diffdiv.metrics.frechet import frechet_distance
from diffdiv.metrics.judge import (
    Judge,
    attribute_accuracy,
    judge_features,
    judge_frechet,
    load_judge,
    log_obedience,
    save_judge,
)

JUDGE = Path(__file__).parents[2] / "assets" / "embedded_judge"


def test_frechet_of_shift_and_scale_is_the_closed_form() -> None:
    a = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(frechet_distance(a, a)) < 1e-9
    assert frechet_distance(a, a + 3) == pytest.approx(6 * 9, rel=1e-9)
    # N(m, S) against N(2m, 4S): |m|^2 + tr(S + 4S - 2*2S) = |m|^2 + tr S
    expected = a.mean(0).square().sum() + a.var(0).sum()
    assert frechet_distance(a, 2 * a) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_agrees_with_scipy_on_general_covariances() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (
        torch.randn(200, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
        for _ in range(2)
    )
    cov_a, cov_b = torch.cov(a.T.double()), torch.cov(b.T.double())
    root = torch.from_numpy(sqrtm((cov_a @ cov_b).numpy()).real)
    gap = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = gap + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_survives_fewer_samples_than_features_and_refuses_nonsense() -> None:
    a = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    assert frechet_distance(a, a + 1) == pytest.approx(8, rel=1e-6)
    with pytest.raises(ValueError, match="widths 8 and 4 differ"):
        frechet_distance(a, a[:, :4])
    with pytest.raises(ValueError, match="features_b: has a value"):
        frechet_distance(a, a / 0)
    with pytest.raises(ValueError, match="features_a: shape"):
        frechet_distance(a[:1], a)


def test_judge_frechet_ignores_the_scale_of_features() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.rand(100, 4, generator=generator), torch.rand(100, 4, generator=generator)
    scale = torch.tensor([1.0, 10.0, 0.1, 5.0])
    assert judge_frechet(a * scale, b * scale) == pytest.approx(judge_frechet(a, b), rel=1e-5)


def test_accuracy_counts_mentioned_attributes_only() -> None:
    judge = Judge().eval()
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    seen = {name: logits.argmax(1) for name, logits in judge(images).items()}
    none = torch.full((6,), -1)
    digit = torch.where(torch.arange(6) < 3, seen["digit"], (seen["digit"] + 1) % 10)
    result = attribute_accuracy(judge, images, Attributes(digit, seen["colour"], none, none))
    assert result["digit"] == 0.5
    assert result["colour"] == 1
    assert result["background"] != result["background"]  # NaN: nothing was mentioned
    assert result["all"] == 0.5


def test_judge_round_trip_and_errors(tmp_path: Path) -> None:
    judge = Judge()
    assert sum(p.numel() for p in judge.parameters()) == 113_572
    images = torch.zeros(2, 3, 32, 32)
    save_judge(judge, tmp_path)
    again = load_judge(tmp_path)
    assert judge_features(again, images).equal(judge_features(judge, images))
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\]"):
        judge_features(judge, torch.zeros(2, 3, 64, 64))
    with pytest.raises(FileNotFoundError, match="no judge weights"):
        load_judge(tmp_path / "absent")


def test_shipped_judge_reads_unseen_handwriting() -> None:
    judge = load_judge(JUDGE)
    batch = PromptedDigits("test").batch(range(1000))
    result = attribute_accuracy(judge, batch.images, batch.shown)
    assert result["digit"] > 0.96
    assert min(result[name] for name in ("colour", "background", "stroke")) > 0.99
    reference = judge_features(judge, PromptedDigits("train").batch(range(1000)).images)
    same = judge_frechet(judge_features(judge, batch.images), reference)
    wrong = judge_frechet(judge_features(judge, batch.images.flip(2)), reference)
    assert 0 < same < 3 < wrong


def test_log_obedience_is_the_sum_of_what_was_mentioned() -> None:
    torch.manual_seed(0)
    judge, images = Judge().eval(), torch.rand(3, 3, 32, 32) * 2 - 1
    asked = torch.tensor([[3, 0, -1, 1], [-1, -1, -1, -1], [9, 5, 1, 0]])
    found = log_obedience(judge, images, Attributes(*asked.unbind(1)))
    with torch.no_grad():
        logits = judge(images)
    for row, wanted in enumerate(asked.tolist()):
        expected = sum(
            float(logits[name][row].softmax(0)[word].log())
            for name, word in zip(logits, wanted, strict=True)
            if word >= 0
        )
        assert float(found[row]) == pytest.approx(expected, abs=1e-5)


def test_the_second_judge_has_not_seen_the_firsts_digits_and_agrees() -> None:
    """1,000 pictures of the first judge's own 1,500 digits; card: assets/README.md."""
    first, second = (load_judge(JUDGE.parent / n) for n in (JUDGE.name, "embedded_second_judge"))
    batch = PromptedDigits("train", seed=7).batch(range(1000))
    accuracy = attribute_accuracy(second, batch.images, batch.shown)
    assert accuracy["digit"] > 0.9 and min(accuracy[n] for n in ("colour", "background")) > 0.99
    with torch.no_grad():
        words = [judge(batch.images)["digit"].argmax(1) for judge in (first, second)]
    assert (words[0] == words[1]).double().mean() > 0.9
    assert not torch.equal(first.heads.weight, second.heads.weight)
