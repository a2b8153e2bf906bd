"""Latent statistics of a folder of videos, and the cache of clips."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_video_pipelines import saved, tiny_svd, tiny_wan

from diffdiv.core.latent_stats import LatentStats
from diffdiv.core.noise import normal
from diffdiv.data.cache import CacheError
from diffdiv.data.video import VideoFolder
from diffdiv.models.image_to_video import open_host
from diffdiv.models.video import VideoCodec
from diffdiv.video_clips import cached_rows, live_rows, measure_latent_stats
from diffdiv.video_start import prepare_start

CPU = torch.device("cpu")
SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    saved(tiny_svd(), root / "svd")
    draw = np.random.default_rng(0)
    for number in range(5):
        (root / f"videos/{number}").mkdir(parents=True)
        for frame in range(4):
            pixels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"videos/{number}/{frame}.png")
        (root / f"videos/{number}.txt").write_text(f"video {number}")
    return root


def test_statistics_are_those_of_the_latents(world: Path) -> None:
    """Against every latent at once: the same clips, encoded frame by frame by the stock VAE."""
    found = measure_latent_stats(world / "svd", world / "videos", size=SIZE, seed=3)
    vae = VideoCodec.load(world / "svd", CPU).vae
    clips, _ = VideoFolder(world / "videos", num_frames=3, size=(16, 16)).batch(range(5), 3)
    with torch.no_grad():
        dist = vae.encode(clips.flatten(0, 1)).latent_dist
    shape = (5, 3, 4, 8, 8)
    eps = normal(shape[1:], seed=3, purpose="posterior", indices=range(5))
    x0 = 0.18215 * (dist.mean.reshape(shape) + dist.std.reshape(shape) * eps)
    assert found.count == 5 and found.granularity == "channel"
    means = x0.double().mean((0, 1, 3, 4))
    torch.testing.assert_close(found.mean.flatten(), means, rtol=1e-5, atol=1e-6)
    spread = x0.double().var((0, 1, 3, 4), correction=0)
    torch.testing.assert_close(found.var.flatten(), spread, rtol=1e-5, atol=0)


def test_measured_statistics_start_the_pipeline(world: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    stats = measure_latent_stats(
        world / "svd", world / "videos", size=SIZE, granularity="shrunk", num_clips=8,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(i, 8) for i in range(1, 9)]
    stats.save(tmp_path / "stats.safetensors")
    start = prepare_start(tiny_svd(), tmp_path / "stats.safetensors", num_inference_steps=2)
    assert start["latents"].shape == (1, *stats.space.shape)
    again = LatentStats.load(tmp_path / "stats.safetensors")
    assert torch.equal(again.mean, stats.mean) and again.count == 8


def test_too_few_videos_and_wrong_sizes_are_told(world: Path) -> None:
    with pytest.raises(ValueError, match=r"5 videos give no statistics by 'pixel', 100 are needed"):
        measure_latent_stats(world / "svd", world / "videos", size=SIZE, granularity="pixel")
    with pytest.raises(ValueError, match=r"3 frames of 16x15 pixels do not fit"):
        measure_latent_stats(world / "svd", world / "videos", size=(3, 16, 15))
    with pytest.raises(ValueError, match=r"no vae/config.json there"):
        measure_latent_stats(world, world / "videos", size=SIZE)


def test_a_cache_holds_what_would_be_computed(world: Path, tmp_path: Path) -> None:
    """Middle clips; a video more makes another cache."""
    host = open_host(world / "svd", CPU)
    videos = VideoFolder(world / "videos", num_frames=4, size=(16, 16))  # one clip in each
    options = {"model": world / "svd", "facts": {"num_frames": 4}, "seed": 1, "device": CPU}
    rows = cached_rows(host, videos, tmp_path / "cache", **options)
    live = live_rows(host, videos, seed=1)([0, 3, 7])
    cached = rows([0, 3, 7])
    assert cached.keys() == {"mean", "std", "image", "tokens"} == live.keys() - {"first"}
    for name in cached:
        torch.testing.assert_close(cached[name], live[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(live["image"], live["mean"][:, :1], rtol=1e-4, atol=1e-5)
    fewer = VideoFolder(world / "videos/0", num_frames=4, size=(16, 16))
    with pytest.raises((ValueError, CacheError), match="cache"):
        cached_rows(host, fewer, tmp_path / "cache", **options)


PROGRAM = """
import resource, sys, torch
from pathlib import Path
from diffdiv.core.latent_stats import LatentMoments, LatentSpace
torch.set_num_threads(1)
space = LatentSpace("vae", 4, 14, 40, 64)
moments, clip = LatentMoments(space), torch.randn(1, *space.shape)
marks = []
for number in range(int(sys.argv[1])):
    moments.add(clip + number)
    if number in (9, int(sys.argv[1]) - 1):
        marks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
assert float(moments.stats().mean.mean() - clip.mean()) - (int(sys.argv[1]) - 1) / 2 < 1e-3
print(*marks)
"""


@pytest.mark.slow
def test_a_thousand_clips_need_the_memory_of_ten() -> None:
    """Peak resident memory after 10 and after 1,000 clips of 14x4x40x64."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "1000"], check=True, capture_output=True, text=True
    )
    ten, thousand = map(int, done.stdout.split())
    assert thousand < ten + 4 * 1024  # kilobytes; one clip in float64 has 1.1 MB


@pytest.mark.slow
def test_wan_is_measured_in_its_normalised_latents(world: Path, tmp_path: Path) -> None:
    folder = saved(tiny_wan(), tmp_path / "wan")
    for number in range(5):  # 4 frames are too few
        for frame in range(4, 6):
            source = world / f"videos/{number}/{frame - 4}.png"
            (world / f"videos/{number}/{frame}.png").write_bytes(source.read_bytes())
    stats = measure_latent_stats(folder, world / "videos", size=(5, 16, 16))
    codec = VideoCodec.load(folder, CPU)
    assert stats.space == codec.space(5, 16, 16) and stats.mean.shape == (1, 16, 1, 1)
