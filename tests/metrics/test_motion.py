"""Motion figures on clips whose motion is known, by hand or by another library."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import linalg
from torch import Tensor
from torchvision.models.optical_flow import raft_small
from torchvision.models.video import r3d_18

from diffdiv.metrics.motion import (
    FlowSpeeds,
    circular_displacements,
    circular_speed,
    clip_frechet,
    compare_clips,
    dynamic_degree,
    first_frame_error,
    flow_speeds,
    motion_error,
    motion_law_distance,
    r3d_features,
    raft_flow,
    seed_diversity,
    static_fraction,
)


def shifted(image: Tensor, shifts: list[tuple[int, ...]]) -> Tensor:
    """[1, F, *space]: the image rolled by each shift."""
    axes = tuple(range(image.ndim))
    return torch.stack([image.roll(shift, axes) for shift in shifts])[None]


def test_displacements_on_a_torus_are_found_exactly() -> None:
    image = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    clip = shifted(image, [(0, 0), (1, -2), (1, -2), (-3, 3)])
    found = circular_displacements(clip)
    assert found.tolist() == [[[1, -2], [0, 0], [-4, 5]]]
    assert circular_speed(clip).item() == pytest.approx((5**0.5 + 0 + 41**0.5) / 3)
    strip = shifted(image[0], [(0,), (2,), (4,)])
    assert circular_displacements(strip).tolist() == [[[2], [2]]]
    # neither brightness nor contrast of a frame is motion
    strip[:, 1] = 3 * strip[:, 1] + 7
    assert circular_displacements(strip).tolist() == [[[2], [2]]]


def constant_flow(frames: Tensor, following: Tensor) -> Tensor:
    """(3, 4) pixels wherever the next frame differs, else 0."""
    moves = (frames != following).any(1, keepdim=True).float()
    return moves * torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)


def test_flow_speeds_of_a_known_flow() -> None:
    videos = torch.zeros(2, 3, 3, 20, 20)
    videos[0, 1, :, :, :5] = 1  # a quarter of the pixels changes, there and back
    videos[1, 2, :, 0, 0] = 1  # one pixel of 400 in the last frame
    speeds = flow_speeds(videos, constant_flow)
    assert speeds.mean.tolist() == [[1.25, 1.25], [0, pytest.approx(5 / 400)]]
    assert speeds.fastest.tolist() == [[5, 5], [0, pytest.approx(5 / 20)]]
    assert speeds.score.tolist() == [1.25, pytest.approx(2.5 / 400)]
    assert speeds.side == 20
    with pytest.raises(ValueError, match="F >= 2"):
        flow_speeds(videos[:, :1], constant_flow)


def test_dynamic_degree_by_hand() -> None:
    """256 pixels: more than 6 in a quarter of 16 frames, so in 4 of 15 pairs."""
    fastest = torch.zeros(3, 15)
    fastest[0, :4] = 6.01
    fastest[1, :3] = 100.0
    fastest[2] = 6.0
    assert dynamic_degree(FlowSpeeds(fastest, fastest, 256)) == pytest.approx(1 / 3)
    assert dynamic_degree(FlowSpeeds(fastest, fastest, 255)) == pytest.approx(2 / 3)
    assert dynamic_degree(FlowSpeeds(fastest, fastest, 256), fps=4) == 0
    assert dynamic_degree(FlowSpeeds(fastest, fastest, 256), fps=24) == pytest.approx(1 / 3)


def test_raft_with_weights_by_path(tmp_path) -> None:
    """Plumbing with random weights: torchvision's own output on frames that need no padding."""
    torch.manual_seed(0)
    network = raft_small(weights=None).eval()
    save_file(network.state_dict(), tmp_path / "raft.safetensors")
    flow = raft_flow(tmp_path / "raft.safetensors", small=True, num_updates=2)
    frames, following = torch.rand(2, 1, 3, 128, 136) * 2 - 1
    with torch.no_grad():
        wanted = network(frames, following, num_flow_updates=2)[-1]
    torch.testing.assert_close(flow(frames, following), wanted)
    tiny = flow(frames[..., :24, :21], following[..., :24, :21])
    assert tiny.shape == (1, 2, 24, 21) and tiny.isfinite().all()
    assert flow_speeds(torch.stack([frames, following], 1), flow).mean.shape == (1, 1)


@pytest.mark.slow
def test_video_features_with_weights_by_path(tmp_path) -> None:
    torch.manual_seed(0)
    network = r3d_18(weights=None).eval()
    save_file(network.state_dict(), tmp_path / "r3d.safetensors")
    features = r3d_features(tmp_path / "r3d.safetensors")
    videos = torch.rand(1, 4, 3, 112, 112) * 2 - 1
    mean = torch.tensor([0.43216, 0.394666, 0.37645]).view(3, 1, 1, 1)
    std = torch.tensor([0.22803, 0.22145, 0.216989]).view(3, 1, 1, 1)
    x = ((videos.transpose(1, 2) + 1) / 2 - mean) / std
    with torch.no_grad():
        pooled = torch.nn.Sequential(*list(network.children())[:-1])(x).flatten(1)
    torch.testing.assert_close(features(videos), pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("load", [raft_flow, r3d_features])
def test_missing_weights_are_named(load, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"save_file\(torchvision\.models\..*DEFAULT"):
        load(tmp_path / "none.safetensors")


def test_motion_error_and_static_fraction_by_hand() -> None:
    speed = torch.tensor([0.0, 1.0, 2.0, 0.4])
    assert motion_error(speed, torch.tensor([1.0, 1.0, 0.0, 0.4])) == pytest.approx(0.75)
    assert static_fraction(speed, 0.5) == 0.5


def test_distance_to_the_law_of_motion() -> None:
    prior = torch.tensor([0.6, 0.2, 0.2])
    motion = torch.tensor([0, 0, 0, 1, 2, 1, 1, 1, 1, 1])
    groups = torch.tensor([0] * 5 + [1] * 5)
    assert motion_law_distance(motion[:5], groups[:5], prior) == pytest.approx(0)
    assert motion_law_distance(motion, groups, prior) == pytest.approx((0 + 0.8) / 2)


def test_seed_diversity_is_the_rms_of_all_pairs() -> None:
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = torch.arange(12) % 3
    squares = [
        float((features[i] - features[j]).square().sum())
        for i in range(12)
        for j in range(i)
        if groups[i] == groups[j]
    ]
    assert seed_diversity(features, groups) == pytest.approx(np.mean(squares) ** 0.5, rel=1e-12)
    assert seed_diversity(features[:1].expand(4, 5), torch.zeros(4)) == 0
    with pytest.raises(ValueError, match="one sample"):
        seed_diversity(features[:2], torch.tensor([0, 1]))


def test_first_frame_error_and_frechet_against_scipy() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 300, 3, 4, generator=generator)
    b = 1.5 * b + 0.2
    assert first_frame_error(a, a[:, 0]) == 0
    wanted = float((a[:, 0] - b[:, 0]).square().mean())
    assert first_frame_error(a, b[:, 0]) == pytest.approx(wanted, rel=1e-5)
    x, y = (part.flatten(1).double().numpy() for part in (a, b))
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    cross = linalg.sqrtm(cov_x @ cov_y).real
    scipy = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * cross)
    found = clip_frechet(a, b, lambda clips: clips.flatten(1), batch=70)
    assert found == pytest.approx(scipy, rel=1e-6)


def test_comparison_of_a_student_that_moves_half_as_often() -> None:
    """Teacher: 200 rows of 50 images at speed 1; student: every second of them stands still."""
    image = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    image = image.repeat_interleave(4, 0)
    teacher = torch.stack([image.roll(shift, 1) for shift in range(3)], 1)
    student = teacher.clone()
    student[::2] = image[::2, None]
    result = compare_clips(
        student, teacher, images=image, groups=torch.arange(200) // 4, speed=circular_speed,
        features=lambda clips: clips.flatten(1), still_below=0.5,
    )  # fmt: skip
    assert result["reference"]["motion"] == 1 and result["reference"]["static_fraction"] == 0
    assert result["clips"]["motion"] == 0.5 and result["clips"]["static_fraction"] == 0.5
    assert result["between"]["motion_ratio"] == 0.5
    assert result["between"]["motion_change"] == 0.5
    assert result["between"]["frechet_distance"] > 1
    assert result["clips"]["first_frame_error"] == 0
    assert result["reference"]["seed_diversity"] == 0 < result["clips"]["seed_diversity"]
