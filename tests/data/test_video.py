"""Clips from mp4, gif and folders of frames whose every pixel says which frame it is."""

from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from diffdiv.data.video import VideoFolder

LENGTH = 24


def shades(length: int = LENGTH) -> np.ndarray:
    """Grey frames; frame i is 10 i."""
    frames = np.zeros((length, 32, 48, 3), np.uint8)
    return frames + (10 * np.arange(length, dtype=np.uint8))[:, None, None, None]


def write_mp4(path: Path, frames: np.ndarray, fps: float = 24.0) -> Path:
    size = frames.shape[2], frames.shape[1]
    writer = imageio_ffmpeg.write_frames(str(path), size, fps=fps, quality=9, macro_block_size=1)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


def write_gif(path: Path, frames: np.ndarray, milliseconds: int = 100) -> Path:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, disposal=2)
    return path


def write_frames(path: Path, frames: np.ndarray) -> Path:
    path.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{number:04}.png")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    write_mp4(root / "a.mp4", shades())
    write_gif(root / "b.gif", shades())
    write_frames(root / "deep/c", shades())
    return root


def numbers(clip: torch.Tensor) -> list[float]:
    """Which frames a clip is made of."""
    return ((clip.mean((-3, -2, -1)) + 1) * 127.5 / 10).tolist()


@pytest.mark.parametrize("item", [0, 1, 2])
def test_clips_are_consecutive_frames_from_anywhere(folder: Path, item: int) -> None:
    videos = VideoFolder(folder, num_frames=5, size=(16, 16))
    assert [path.name for path in videos.usable] == ["a.mp4", "b.gif", "c"]
    firsts = set()
    for index in range(30):
        clips, paths = videos.batch([index], seed=1)
        if paths[0] != videos.paths[item]:
            continue
        assert clips.shape == (1, 5, 3, 16, 16) and clips.dtype == torch.float32
        found = numbers(clips[0])
        first = round(found[0])
        assert found == pytest.approx([first + i for i in range(5)], abs=0.25)
        firsts.add(first)
    assert len(firsts) > 4 and min(firsts) >= 0 and max(firsts) <= LENGTH - 5


@pytest.mark.parametrize(("fps", "strides"), [(8.0, (3, 1, 1)), (5.0, (5, 2, 1)), (60, (1, 1, 1))])
def test_rates_become_strides(folder: Path, fps: float, strides: tuple[int, ...]) -> None:
    """a.mp4 has 24 frames a second, b.gif 10, a folder none to speak of."""
    videos = VideoFolder(folder, num_frames=4, size=(16, 16), fps=fps)
    for position, stride in enumerate(strides):
        found = numbers(videos.middle(position)[0])
        steps = [b - a for a, b in pairwise(found)]
        assert steps == pytest.approx([stride] * 3, abs=0.4)


def test_the_last_clip_can_be_read_to_its_end(folder: Path) -> None:
    whole = VideoFolder(folder, num_frames=LENGTH, size=(16, 16))
    for position in range(3):
        found = numbers(whole.middle(position)[0])
        assert found == pytest.approx(list(range(LENGTH)), abs=0.25)


def test_samples_follow_from_seed_and_index(folder: Path) -> None:
    videos = VideoFolder(folder, num_frames=3, size=(16, 16), flip=True)
    whole, paths = videos.batch(range(6), seed=3)
    parts = [VideoFolder(folder, num_frames=3, size=(16, 16), flip=True).batch(part, seed=3)
             for part in ([4, 5], [0, 1, 2, 3])]  # fmt: skip
    assert torch.equal(whole, torch.cat([parts[1][0], parts[0][0]]))
    assert paths == parts[1][1] + parts[0][1]
    assert {path.name for path in paths[:3]} == {"a.mp4", "b.gif", "c"}, "an epoch has each once"
    assert not torch.equal(whole, videos.batch(range(6), seed=4)[0])


def test_frames_cover_the_size_and_are_cut_at_the_centre(tmp_path: Path) -> None:
    """48 columns of which the middle 32 are white, on 32 rows: the square sees white alone."""
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    frames[:, :, 8:40] = 255
    write_frames(tmp_path / "c", frames)
    clip, _ = VideoFolder(tmp_path, num_frames=3, size=(16, 16)).middle(0)
    assert float(clip[..., 1:-1].min()) > 0.98


def test_flips_mirror_half_of_the_samples(tmp_path: Path) -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[:, :, :8] = 255
    write_frames(tmp_path / "c", frames)
    clips, _ = VideoFolder(tmp_path, num_frames=2, size=(16, 16), flip=True).batch(range(100), 0)
    left = clips[:, 0, 0, :, 0].mean(1)
    assert set(left.tolist()) == {-1.0, 1.0}
    assert 25 < int((left < 0).sum()) < 75  # 5 standard errors


def test_a_corrupt_mp4_is_set_aside_and_too_many_stop(tmp_path: Path) -> None:
    for number in range(20):
        write_frames(tmp_path / f"f{number}", shades(3))
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    videos = VideoFolder(tmp_path, num_frames=3, size=(16, 16))
    [(path, reason)] = videos.quarantine
    assert path.name == "broken.mp4" and reason and "\n" not in reason
    assert len(videos) == 20 and videos.batch(range(40), seed=0)[0].shape[0] == 40
    (tmp_path / "short").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "short/0.png")
    with pytest.raises(ValueError, match=r"2 of 22 videos cannot be used \(more than 5%\); the fi"):
        VideoFolder(tmp_path, num_frames=3, size=(16, 16))


def test_a_video_cut_off_in_the_middle_is_set_aside_late(tmp_path: Path) -> None:
    """Its header promises frames that are not there any more."""
    for number in range(25):
        write_frames(tmp_path / f"f{number}", shades(8))
    noisy = np.random.default_rng(0).integers(0, 255, (LENGTH, 32, 48, 3), dtype=np.uint8)
    whole = write_mp4(tmp_path / "cut.avi", noisy)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    videos = VideoFolder(tmp_path, num_frames=8, size=(16, 16))
    assert videos.batch(range(52), seed=0)[0].isfinite().all()
    assert len(videos.quarantine) <= 1


def test_no_video_and_too_short_videos_are_told(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no video here"):
        VideoFolder(tmp_path, num_frames=2, size=(16, 16))
    with pytest.raises(ValueError, match=r"24 frames, fewer than the 25 that a clip spans"):
        VideoFolder(folder, num_frames=25, size=(16, 16))
