"""Clips as the rows that training needs: global sample index -> latents, image, tokens, text.

With a cache the middle clip of every video is encoded once, and its encoders stay idle; without,
every sample starts where (seed, index) says and is encoded when it is needed. A caption is the
text file beside a video (clip.mp4, clip.txt); without one it is empty.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffdiv.core.latent_stats import Granularity, LatentMoments, LatentStats
from diffdiv.core.noise import normal, permuted
from diffdiv.data.cache import Cache, Key, build_cache, fingerprint
from diffdiv.data.video import VideoFolder
from diffdiv.models.image_to_video import ImageToVideo
from diffdiv.models.video import VideoCodec, codec_kind

Rows = Mapping[str, Tensor]


def captions_of(paths: Sequence[Path]) -> list[str]:
    """The text beside each video, or an empty one."""
    texts = [path.with_suffix(".txt") for path in paths]
    return [text.read_text("utf-8").strip() if text.is_file() else "" for text in texts]


def encode(host: ImageToVideo, clips: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Rows of clips [B, N, 3, height, width] in [-1, 1]: mean, std, image, and what it embeds."""
    mean, std = host.codec.posterior(clips)
    first = clips[:, 0].to(mean.device)
    rows = {"mean": mean, "std": std, "image": host.image(first, clips.shape[1])}
    return rows | host.embed(first, captions)


def live_rows(
    host: ImageToVideo, videos: VideoFolder, *, seed: int
) -> Callable[[Sequence[int]], Rows]:
    """Rows by global sample index, encoded when asked for; "first" holds the frames behind y."""

    def rows(indices: Sequence[int]) -> Rows:
        clips, paths = videos.batch(indices, seed)
        found = encode(host, clips, captions_of(paths))
        return found | {"first": clips[:, 0].to(found["mean"].device)}

    return rows


def cached_rows(
    host: ImageToVideo,
    videos: VideoFolder,
    folder: Path,
    *,
    model: Path,
    facts: Mapping[str, int | float | None],
    seed: int,
    device: torch.device,
) -> Callable[[Sequence[int]], Rows]:
    """Rows by global sample index, from a cache that is built first where it is not there.

    Args:
        host, videos: what encodes, and what.
        folder: of the cache; shared by all processes, which share the work too.
        model: folder of the pipeline.
        facts: sizes and rates the clips follow from.
        seed: of the order of videos.
        device: of the rows.
    """

    def compute(positions: Sequence[int]) -> dict[str, Tensor]:
        clips, paths = zip(*(videos.middle(position) for position in positions), strict=True)
        return encode(host, torch.stack(clips), captions_of(paths))

    count = len(videos)
    key: Key = {"model": fingerprint(model), "videos": _listing(videos.usable), **facts}
    together = dist.is_available() and dist.is_initialized()
    build_cache(
        folder,
        key=key,
        count=count,
        compute=compute,
        shard_size=16,
        batch_size=1,
        rank=dist.get_rank() if together else 0,
        world=dist.get_world_size() if together else 1,
        barrier=dist.barrier if together else lambda: None,
    )
    cache = Cache(folder, key)
    for part in host.pipe.components.values():
        if isinstance(part, nn.Module) and part is not host.net:
            nn.Module.to(part, "cpu")  # encoders have done their work: the memory is the network's

    def rows(indices: Sequence[int]) -> Rows:
        places = [permuted(i, count, seed=seed, purpose="videos") for i in indices]
        return {name: value.to(device) for name, value in cache.rows(places).items()}

    return rows


def _listing(paths: Sequence[Path]) -> str:
    """A digest of names, sizes and captions of videos."""
    sizes = [
        sum(file.stat().st_size for file in path.iterdir())
        if path.is_dir()
        else path.stat().st_size
        for path in paths
    ]
    names = [path.name for path in paths]
    listing = json.dumps([names, sizes, captions_of(paths)])
    return hashlib.sha256(listing.encode()).hexdigest()


def measure_latent_stats(
    model: Path,
    videos: Path,
    *,
    size: tuple[int, int, int] | None = None,
    fps: float | None = None,
    granularity: Granularity = "channel",
    num_clips: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> LatentStats:
    """Statistics of the latents of clips, for :func:`diffdiv.video_start.prepare_start`.

    One clip is in memory at a time. Under ``torch.distributed`` every process measures its share,
    and all return the same.

    Args:
        model: pipeline folder, of which only the autoencoder is read.
        videos: folder of videos, see :class:`VideoFolder`.
        size: frames, height and width of a clip; None: what the pipeline makes by default.
        fps: frames a second of a clip; None: every frame of a video.
        granularity: "channel" serves every size; "shrunk" and "pixel" (of at least 100 clips)
            this one alone.
        num_clips: None: one of each video.
        seed: of where clips start, and of the posterior's noise.
        device: of the autoencoder; None: the CPU.
        progress: told (clips done, clips in all).

    Raises:
        ValueError: for a model without a video autoencoder, a size it cannot encode, unusable
            videos, or too few for the granularity.
    """
    device = device or torch.device("cpu")
    codec = VideoCodec.load(model, device)
    num_frames, height, width = size or default_size(model)
    space = codec.space(num_frames, height, width)
    folder = VideoFolder(videos, num_frames=num_frames, size=(height, width), fps=fps)
    total = len(folder) if num_clips is None else num_clips
    moments, together = LatentMoments(space), dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    for index in range(rank, total, world):
        clip, _ = folder.batch([index], seed)
        mean, std = codec.posterior(clip)
        eps = normal(space.shape, seed=seed, purpose="posterior", indices=[index])
        moments.add(codec.draw(mean, std, eps))
        progress(index + 1, total)
    moments.over_ranks()
    return moments.stats(granularity)


def default_size(model: Path) -> tuple[int, int, int]:
    """Frames, height and width of the clips a pipeline makes when it is not told.

    Raises:
        ValueError: if it has no autoencoder of videos that we know.
    """
    sizes = {
        "AutoencoderKLTemporalDecoder": (14, 576, 1024),
        "AutoencoderKLWan": (81, 480, 832),
        "AutoencoderKLCogVideoX": (49, 480, 720),
        "AutoencoderKLHunyuanVideo": (129, 720, 1280),
        "AutoencoderKLHunyuanVideo15": (121, 480, 832),
        "AutoencoderKLLTXVideo": (161, 512, 704),
        "AutoencoderKL": (16, 704, 1280),
    }
    num_frames, height, width = sizes[codec_kind(model)]
    net = model / "unet/config.json"
    if net.is_file():  # Stable Video Diffusion was trained for 14 frames, or 25
        config = json.loads(net.read_text("utf-8"))
        num_frames = config.get("num_frames", num_frames)
    return num_frames, height, width
