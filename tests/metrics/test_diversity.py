"""Similarity against all pairs by hand; mode figures against samples made to have them."""

import pytest
import torch

from diffdiv.data.toy import gaussian_ring
from diffdiv.metrics.diversity import density_and_coverage, in_batch_similarity, mode_metrics


def test_similarity_is_the_mean_over_all_pairs():
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    by_hand = []
    for group in range(3):
        rows = [f for f, g in zip(features, groups, strict=True) if g == group]
        pairs = [
            torch.cosine_similarity(a, b, dim=0) for i, a in enumerate(rows) for b in rows[i + 1 :]
        ]
        by_hand.append(torch.stack(pairs).mean())
    expected = float(torch.stack(by_hand).mean())
    assert in_batch_similarity(features, groups) == pytest.approx(expected, rel=1e-5)


def test_similarity_of_equal_and_opposite_samples():
    same = torch.ones(4, 3)
    assert in_batch_similarity(same * torch.rand(4, 1), torch.zeros(4)) == pytest.approx(1)
    assert in_batch_similarity(torch.tensor([[1.0], [-2.0]]), torch.zeros(2)) == pytest.approx(-1)
    with pytest.raises(ValueError, match="two samples"):
        in_batch_similarity(same, torch.arange(4))


def test_samples_of_the_mixture_look_right():
    ring = gaussian_ring(std=0.05)
    x0, _ = ring.sample(range(4000), seed=0)
    found = mode_metrics(x0, ring)
    assert found["mode_coverage"] == 1
    # 4,000 draws: the mass error is about 0.02, the spread's standard error 0.008
    assert found["mode_mass_error"] < 0.06 and abs(found["mode_spread"] - 1) < 0.05
    assert abs(found["mode_distance"] - 1) < 0.05


def test_dropped_modes_narrow_modes_and_shifted_modes_are_told_apart():
    ring = gaussian_ring(std=0.05)
    x0, mode = ring.sample(range(4000), seed=1)
    x0 = x0.double()
    kept = mode_metrics(x0[mode < 6], ring)
    assert kept["mode_coverage"] == pytest.approx(6 / 8)
    assert kept["mode_mass_error"] == pytest.approx(float(ring.weights[6:].sum()), abs=0.05)
    centre = ring.means[mode]
    narrow = mode_metrics(centre + 0.3 * (x0 - centre), ring)
    full = mode_metrics(x0, ring)
    assert narrow["mode_spread"] == pytest.approx(0.3 * full["mode_spread"], rel=1e-9)
    shifted = mode_metrics(x0 + torch.tensor([0.1, 0.0]), ring)
    assert shifted["mode_spread"] == pytest.approx(full["mode_spread"], rel=1e-9)
    assert shifted["mode_distance"] == pytest.approx((1 + (0.1 / 0.05) ** 2 / 2) ** 0.5, rel=0.05)


def test_share_sets_what_counts_as_covered():
    ring = gaussian_ring(2, std=0.01)  # weights 1/3 and 2/3
    x0 = ring.means[torch.tensor([0] * 10 + [1] * 90)]
    assert mode_metrics(x0, ring, share=0.5)["mode_coverage"] == 0.5
    assert mode_metrics(x0, ring, share=0.25)["mode_coverage"] == 1
    assert mode_metrics(x0, ring)["mode_mass_error"] == pytest.approx(1 / 3 - 0.1)


def test_density_and_coverage_are_those_of_the_definition() -> None:
    """Counted pair by pair, as arXiv 2002.09797 defines them."""
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, 3, generator=generator) for n in (40, 30))
    inside, covered, k = 0, 0, 5
    for i, centre in enumerate(real):
        others = sorted(float((centre - other).norm()) for j, other in enumerate(real) if j != i)
        near = [float((centre - sample).norm()) <= others[k - 1] for sample in fake]
        inside += sum(near)
        covered += any(near)
    density, coverage = density_and_coverage(fake, real, neighbours=k)
    assert density == pytest.approx(inside / (k * len(fake)))
    assert coverage == pytest.approx(covered / len(real))


def test_density_and_coverage_tell_apart_what_they_should() -> None:
    generator = torch.Generator().manual_seed(0)
    real, same = (torch.randn(1000, 2, generator=generator) for _ in range(2))
    density, coverage = density_and_coverage(same, real)
    assert density == pytest.approx(1, abs=0.1) and coverage > 0.95
    dense, collapsed = density_and_coverage(0.05 * same, real)  # one lump in the middle
    assert dense > 1 and collapsed < 0.2
    assert density_and_coverage(same + 50, real) == (0, 0)
    with pytest.raises(ValueError, match="more than 5"):
        density_and_coverage(same, real[:5])
