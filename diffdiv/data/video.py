"""Clips from a folder of videos: global sample index -> frames, the same in every process.

A video is a file (.mp4, .gif, ...) or a folder whose images, in the order of their names, are its
frames. As with images, broken videos never stop a run: they are set aside with their path and the
reason, unless they are too many.
"""

import subprocess
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from diffdiv.core.noise import permuted, uniform
from diffdiv.data.images import MAX_BROKEN

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif"})
FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


class VideoFolder:
    """The videos below a folder, in sorted order, as clips of one size.

    Attributes:
        paths: of all videos, broken ones included; ``clip`` counts in it.

    Args:
        path: searched recursively.
        num_frames: of a clip.
        size: height and width in pixels; frames are scaled to cover it and cut at the centre.
        fps: frames a second of a clip: every k-th frame is taken, k = the file's rate / fps
            rounded. None, and folders of frames: every frame.
        flip: mirror half of the samples.

    Raises:
        ValueError: if there is no video, or more than 5 % are broken or too short.
        ImportError: if there are video files and imageio-ffmpeg is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_frames: int,
        size: tuple[int, int],
        fps: float | None = None,
        flip: bool = False,
    ) -> None:
        self.paths = sorted(_find(path))
        if not self.paths:
            kinds = ", ".join(sorted(VIDEO_SUFFIXES))
            raise ValueError(f"{path}: there is no video here ({kinds}, or folders of frames)")
        self._name, self._fps, self._flip = path, fps, flip
        self._num_frames, self._size = num_frames, size
        self._broken: dict[int, str] = {}  # item -> reason
        self._facts: dict[int, _Facts] = {}
        for item, video in enumerate(self.paths):
            try:
                self._facts[item] = _look_at(video)
                self._starts(item)
            except ImportError:
                raise
            except Exception as error:  # decoders raise whatever broken bytes lead them to
                self._set_aside(item, error)
        self._refuse_too_many()
        self._usable = [item for item in range(len(self.paths)) if item not in self._broken]

    def __len__(self) -> int:
        """Number of videos that could be used at construction."""
        return len(self._usable)

    @property
    def usable(self) -> list[Path]:
        """Their paths, in order."""
        return [self.paths[item] for item in self._usable]

    @property
    def quarantine(self) -> list[tuple[Path, str]]:
        """Videos that cannot be used, as (path, reason); grows when one fails late."""
        return [(self.paths[item], reason) for item, reason in self._broken.items()]

    def batch(self, indices: Sequence[int], seed: int) -> tuple[Tensor, list[Path]]:
        """Clips of global sample indices.

        Each epoch of ``len(self)`` indices visits every video once, in an order drawn from the seed
        and the epoch; where a clip starts, and whether it is mirrored, follow from (seed, index).

        Returns:
            Frames [B, N, 3, H, W] in [-1, 1], float32, and the videos they come from.

        Raises:
            ValueError: if by now more than 5 % of the videos turned out to be broken.
        """
        starts = uniform(seed=seed, purpose="videos.start", indices=indices).tolist()
        flips = uniform(seed=seed, purpose="videos.flip", indices=indices) < 0.5
        clips, paths = [], []
        for index, start, flip in zip(indices, starts, flips.tolist(), strict=True):
            first = permuted(index, len(self), seed=seed, purpose="videos")
            clip, path = self._first_readable(first, start)
            clips.append(clip.flip(-1) if flip and self._flip else clip)
            paths.append(path)
        return torch.stack(clips), paths

    def middle(self, position: int) -> tuple[Tensor, Path]:
        """The middle clip [N, 3, H, W] of the usable video at ``position``, or of the next one."""
        return self._first_readable(position, 0.5)

    def _first_readable(self, position: int, start: float) -> tuple[Tensor, Path]:
        while True:  # ends: too many broken items are refused
            item = self._usable[position % len(self)]
            if item not in self._broken:
                try:
                    return self._read(item, start), self.paths[item]
                except Exception as error:
                    self._set_aside(item, error)
                    self._refuse_too_many()
            position += 1

    def _set_aside(self, item: int, error: Exception) -> None:
        self._broken[item] = str(error).partition("\n")[0] or type(error).__name__

    def _refuse_too_many(self) -> None:
        if len(self._broken) > MAX_BROKEN * len(self.paths):
            path, reason = self.quarantine[0]
            raise ValueError(
                f"{self._name}: {len(self._broken)} of {len(self.paths)} videos cannot be used "
                f"(more than {MAX_BROKEN:.0%}); the first is {path}: {reason}"
            )

    def _stride(self, item: int) -> int:
        rate = self._facts[item].rate
        return 1 if rate is None or self._fps is None else max(1, round(rate / self._fps))

    def _starts(self, item: int) -> int:
        """How many frames a clip can start at."""
        available = self._facts[item].num_frames
        needed = self._stride(item) * (self._num_frames - 1) + 1
        if available < needed:
            raise ValueError(f"{available} frames, fewer than the {needed} that a clip spans")
        return available - needed + 1

    def _read(self, item: int, start: float) -> Tensor:
        first, stride = int(start * self._starts(item)), self._stride(item)
        with closing(_frames(self.paths[item], first, self._facts[item].rate)) as frames:
            picked = islice(frames, 0, stride * (self._num_frames - 1) + 1, stride)
            clip = [_as_tensor(frame, self._size) for frame in picked]
        if len(clip) < self._num_frames:
            raise ValueError(f"only {len(clip)} of {self._num_frames} frames can be decoded")
        return torch.stack(clip)


def _find(path: Path) -> Iterator[Path]:
    """Video files, and folders that directly hold frames."""
    for file in path.rglob("*"):
        if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file():
            yield file
    yield from {p.parent for p in path.rglob("*") if _is_frame(p)}


def _is_frame(path: Path) -> bool:
    return path.suffix.lower() in FRAME_SUFFIXES and path.is_file()


class _Facts(NamedTuple):
    """Frames a second (None: unknown) and number of frames."""

    rate: float | None
    num_frames: int


def _look_at(path: Path) -> _Facts:
    """Rate and length, without decoding a video file."""
    if path.is_dir():
        return _Facts(None, sum(map(_is_frame, path.iterdir())))
    if path.suffix.lower() == ".gif":
        with Image.open(path) as image:
            shown = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(image)]
        seconds = sum(shown) / 1000
        return _Facts(len(shown) / seconds if seconds else None, len(shown))
    count, seconds = _ffmpeg(path).count_frames_and_secs(str(path))
    return _Facts(count / seconds if seconds else None, count)


def _frames(path: Path, first: int, rate: float | None) -> Generator[Image.Image, None, None]:
    """RGB frames from number ``first`` on."""
    if path.is_dir():
        for file in sorted(filter(_is_frame, path.iterdir()))[first:]:
            with Image.open(file) as image:
                yield image.convert("RGB")
    elif path.suffix.lower() == ".gif":
        with Image.open(path) as image:
            for frame in islice(ImageSequence.Iterator(image), first, None):
                yield frame.convert("RGB")
    else:
        # half a frame early: ffmpeg drops what lies before the time it is given
        yield from _decode(path, max(0.0, (first - 0.5) / rate) if rate else 0.0)


def _decode(path: Path, seconds: float) -> Generator[Image.Image, None, None]:
    """RGB frames of a video file from that time on, which ffmpeg writes as PPM images.

    Not imageio-ffmpeg's own reader, which leaves the pipes of a reader that stops early open.
    """
    command = [_ffmpeg(path).get_ffmpeg_exe(), "-v", "error", "-ss", f"{seconds:.6f}"]
    command += ["-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-"]
    none = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=none, stdout=subprocess.PIPE, stderr=none) as process:
        assert process.stdout is not None
        try:
            while process.stdout.readline():  # P6
                width, height = map(int, process.stdout.readline().split())
                process.stdout.readline()  # the largest value, 255
                data = process.stdout.read(3 * width * height)
                yield Image.frombytes("RGB", (width, height), data)
        finally:
            process.kill()


def _ffmpeg(path: Path) -> ModuleType:
    try:
        import imageio_ffmpeg
    except ImportError:
        message = f"{path}: imageio-ffmpeg is not installed: pip install 'diffdiv[video]'"
        raise ImportError(message) from None
    return imageio_ffmpeg


def _as_tensor(frame: Image.Image, size: tuple[int, int]) -> Tensor:
    height, width = size
    fitted = ImageOps.fit(frame, (width, height), Image.Resampling.LANCZOS)
    values = np.asarray(fitted, np.float32)
    return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1).contiguous()
