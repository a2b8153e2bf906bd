"""Does an image-to-video model leak? Seen against unseen clips, for real pipelines.

What is measured is in leakage_clips.py, what follows from it in leakage_verdict.py, the page in
leakage_report.py. Here: which clips, which call, which card.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import Tensor

from diffdiv.data.cache import fingerprint
from diffdiv.data.video import VideoFolder
from diffdiv.leakage_clips import Clips, Manner, generate_clips, judge_clips, one_step
from diffdiv.leakage_report import write_leakage_page
from diffdiv.leakage_verdict import FRACTIONS, NOISY, curve_rows, times_at, verdict
from diffdiv.metrics.card import Evaluation, Row, file_sha256, metric_card, write_evaluation
from diffdiv.models.image_to_video import ImageToVideo, open_host
from diffdiv.runtime.yaml_io import read_yaml
from diffdiv.video_clips import default_size

_RATES = {"StableVideoDiffusion": 7.0, "Wan": 16.0, "CogVideoX": 8.0}  # frames a second
_SHOWN = 3  # real clips or images a set in the report


@dataclass(frozen=True)
class Asked:
    """What is measured, and how.

    Attributes:
        num: clips to generate, a multiple of ``seeds_each``; 0 = none. All are in memory.
        seeds_each: generated clips an image.
        most: real clips taken of each folder, one a video.
        seed: of the choice of videos and of all noise.
        shape: frames, height and width; None = a run's, or what the pipeline makes by default.
        fps: frames a second; None = a run's, or 7 for Stable Video Diffusion, 16 for Wan, 8 for CogVideoX.
        motion_bucket: what Stable Video Diffusion is told, 0..255; of a run, its own.
        flow: RAFT weights for the motion of generated clips.
        features: R3D-18 weights for their Frechet distance.
        steps: of generation; None = the pipeline's.
        bf16: network in bfloat16.
        batch: real clips at once.

    Raises:
        ValueError: if the numbers do not fit each other.
        FileNotFoundError: if weights are not there.
    """

    num: int = 0
    seeds_each: int = 4
    most: int = 64
    seed: int = 0
    shape: tuple[int, int, int] | None = None
    fps: float | None = None
    motion_bucket: int = 127
    flow: Path | None = None
    features: Path | None = None
    steps: int | None = None
    bf16: bool = False
    batch: int = 1

    def __post_init__(self) -> None:
        if self.most < 2 or self.seeds_each < 2:
            raise ValueError("most and seeds_each must be 2 at least")
        if self.num < 0 or self.num % self.seeds_each:
            raise ValueError(
                f"num: {self.num} generated clips are no multiple of the {self.seeds_each} seeds "
                "of an image"
            )
        if self.num == 0 and (self.flow or self.features or self.steps):
            raise ValueError("flow, features and steps are for generated clips: give num too")
        for weights in (self.flow, self.features):
            if weights is not None and not weights.is_file():
                raise FileNotFoundError(f"{weights}: no such file")


def parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """Frames, height and width of "14x576x1024"; ValueError for another text."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"shape: {text!r} is not FRAMESxHEIGHTxWIDTH, as 14x576x1024 is")
    return int(parts[0]), int(parts[1]), int(parts[2])


def evaluate_leakage(
    model: Path,
    videos: Path,
    *,
    unseen: Path | None = None,
    asked: Asked | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """Measure what a model knows of clips it was trained on and of others; evaluation.json.

    Written are evaluation.json and report.html, into evaluation/ of a run, else evaluation/NAME
    here. Its rows: one for each set and noise level, the gap, and the generated clips, which are
    made from unseen images where there are some.

    Args:
        model: folder of a Stable Video Diffusion, Wan 2.1 or CogVideoX image-to-video pipeline, or
            of a run of TimeNoise, whose export is taken.
        videos: clips the model was trained on.
        unseen: clips it was not; None: nothing can be said about a leak, and the report says so.
        asked: see :class:`Asked`; None = its defaults.
        out: a second copy of evaluation.json; the report lies beside it, as OUT.html.
        progress: told (clips done, clips in all).

    Raises:
        ValueError: in a sentence: another pipeline, no or too few or too short videos, the same
            video in both folders, a size the model cannot take, or clips none of which moves.
    """
    path, asked = _export_of(model, asked or Asked())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    host = _open(path, device, asked)
    shape = asked.shape or default_size(path, host.codec)
    sets = _sets(host, videos, unseen, shape, asked)
    call = _call(path, host, asked)
    level = float(str(call.get("noise_aug_strength", 0)))
    manner = Manner(asked.seed, level, asked.batch, asked.bf16)
    done, total = 0, sum(clips.count for clips in sets.values()) + asked.num

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    rows, sentence = _meter(host, sets, manner, step)
    shown = {f"real, {name}": clips.read(range(min(_SHOWN, clips.count)))[0]
             for name, clips in sets.items()}  # fmt: skip
    if asked.num:
        name = next(reversed(sets))
        made, more = _generated(host, sets[name], name, asked, manner, call, step)
        rows, shown[f"made from images: {name}"] = rows + more, made[: _SHOWN * asked.seeds_each]
    card = _card(path, sets, shape, asked, call, device, _command(model, videos, unseen, asked))
    evaluation: Evaluation = {"rows": rows, "card": card | {"verdict": sentence}}
    is_run = path != model
    home = model / "evaluation" if is_run else Path("evaluation") / model.resolve().name
    _write(home, evaluation, shown, out)
    return evaluation


class _Videos(TypedDict):
    num_frames: int
    height: int
    width: int
    fps: float


class _Model(TypedDict):
    motion_bucket: int


class _Run(TypedDict):
    """The part of a run's config.yaml that says what it was trained on."""

    videos: _Videos
    model: _Model


def _write(home: Path, found: Evaluation, shown: dict[str, Tensor], out: Path | None) -> None:
    """evaluation.json and report.html in ``home``, and copies at OUT and beside it."""
    home.mkdir(parents=True, exist_ok=True)
    file, page = write_evaluation(home, found["rows"], found["card"]), home / "report.html"
    write_leakage_page(page, found["rows"], shown, card=found["card"])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(file.read_bytes())
        out.with_suffix(".html").write_bytes(page.read_bytes())


def _export_of(model: Path, asked: Asked) -> tuple[Path, Asked]:
    """The pipeline's folder; of a run its export, and its clips where nothing else is asked."""
    if not (model / "config.yaml").is_file():
        return model, asked
    read = read_yaml(model / "config.yaml")
    if read.get("recipe") != "timenoise":
        raise ValueError(f"{model}: a run of {read.get('recipe')}, not of timenoise")
    config = cast(_Run, read)
    clips = config["videos"]
    size = (clips["num_frames"], clips["height"], clips["width"])
    bucket = config["model"]["motion_bucket"]
    kept = replace(asked, shape=asked.shape or size, fps=asked.fps or clips["fps"])
    return model / "export", replace(kept, motion_bucket=bucket)


def _open(path: Path, device: torch.device, asked: Asked) -> ImageToVideo:
    dtype = torch.bfloat16 if asked.bf16 else torch.float32
    return open_host(
        path, device, dtype=dtype, fps=asked.fps or _RATES["StableVideoDiffusion"],
        motion_bucket=asked.motion_bucket,
    )  # fmt: skip


def _sets(
    host: ImageToVideo,
    videos: Path,
    unseen: Path | None,
    shape: tuple[int, int, int],
    asked: Asked,
) -> dict[str, Clips]:
    """The sets of clips by name, seen ones first."""
    frames = host.codec.space(*shape).frames
    if frames < 2:
        raise ValueError(f"clips of {shape[0]} frames are a single latent frame: nothing can move")
    fps, sets = asked.fps or _RATES[type(host).__name__], dict[str, Clips]()
    for name, path in (("seen", videos), ("unseen", unseen)):
        if path is None:
            continue
        folder = VideoFolder(path, num_frames=shape[0], size=shape[1:], fps=fps)
        if len(folder) < 2:
            raise ValueError(f"{path}: one video; a standard error takes two at least")
        sets[name] = Clips(folder, min(len(folder), asked.most), asked.seed)
    name, last = next(reversed(sets.items()))
    images = asked.num // asked.seeds_each
    if images > last.count:
        raise ValueError(f"num: {asked.num} clips take {images} images, {name} has {last.count}")
    known = {file.resolve() for file in sets["seen"].videos.paths}
    shared = [file for file in last.videos.paths if file.resolve() in known]
    if name == "unseen" and shared:
        raise ValueError(f"{shared[0]} is among the seen videos too, so it is not unseen")
    return sets


def _call(path: Path, host: ImageToVideo, asked: Asked) -> dict[str, object]:
    """What the pipeline's call is told besides image, size, text and seed."""
    call: dict[str, object] = {}
    if asked.steps is not None:
        call["num_inference_steps"] = asked.steps
    if not host.tells_level:
        return call
    call["fps"] = round(asked.fps or _RATES["StableVideoDiffusion"])
    call["motion_bucket_id"] = asked.motion_bucket
    call["noise_aug_strength"] = 0.02  # the stock pipeline's; an export says what it wants
    export = path / "export.json"
    own = json.loads(export.read_text("utf-8"))["call"] if export.is_file() else {}
    return call | own


def _meter(
    host: ImageToVideo,
    sets: dict[str, Clips],
    manner: Manner,
    progress: Callable[[int], object],
) -> tuple[list[Row], str]:
    """Rows of the curves and of the gap, and the verdict."""
    times = times_at(host.schedule, FRACTIONS)
    found = {
        name: one_step(host, clips, times, manner=manner, progress=progress)
        for name, clips in sets.items()
    }
    rows = [row for name, one in found.items() for row in curve_rows(name, one, times)]
    figures, sentence = verdict(found["seen"], found.get("unseen"))
    gap = Row(name=f"M >= {NOISY:g}, over the copier", network_evaluations=1, metrics=figures)
    return [*rows, gap], sentence


def _generated(
    host: ImageToVideo,
    clips: Clips,
    name: str,
    asked: Asked,
    manner: Manner,
    call: dict[str, object],
    progress: Callable[[int], object],
) -> tuple[Tensor, list[Row]]:
    """Clips made from the first frames of a set, and rows on them and on the real ones."""
    real, captions = clips.read(range(asked.num // asked.seeds_each))
    made, evaluations = generate_clips(
        host, real, captions, asked.seeds_each, manner=manner, call=call, progress=progress
    )
    device = next(host.net.parameters()).device
    own, truth = judge_clips(
        made, real, asked.seeds_each, flow=asked.flow, features=asked.features, device=device
    )
    return made, [
        Row(name=f"made from {name}", network_evaluations=evaluations, metrics=own),
        Row(name=f"real, {name}", network_evaluations=0, metrics=truth),
    ]


def _card(
    path: Path,
    sets: dict[str, Clips],
    shape: tuple[int, int, int],
    asked: Asked,
    call: dict[str, object],
    device: torch.device,
    command: str,
) -> dict[str, object]:
    features = ["one-step error and motion: latents, mode of the autoencoder"]
    if asked.num:
        motion = "difference between frames" if asked.flow is None else "RAFT"
        seen_by = "thumbnails" if asked.features is None else "R3D-18"
        features.append(f"generated clips: motion by {motion}, diversity by {seen_by}")
    details: dict[str, object] = {
        "real_clips": {name: clips.count for name, clips in sets.items()},
        "videos": {name: len(clips.videos.paths) for name, clips in sets.items()},
        "set_aside": {name: len(clips.videos.quarantine) for name, clips in sets.items()},
        "clip": "x".join(map(str, shape)),
        "seeds_of_an_image": asked.seeds_each if asked.num else None,
        "call": call,
        "bf16": asked.bf16,
        "model": fingerprint(path),
        "flow_sha256": None if asked.flow is None else file_sha256(asked.flow),
    }
    return metric_card(
        n=asked.num, seed=asked.seed, features="; ".join(features), device=device,
        command=command, weights=asked.features,
        resize="to cover the clip (Lanczos), centre cut", details=details,
    )  # fmt: skip


def _command(model: Path, videos: Path, unseen: Path | None, asked: Asked) -> str:
    """What repeats the evaluation, without the folders of this machine."""
    words = ["diffdiv", "evaluate", model.resolve().name, "--leakage", videos.resolve().name]
    folders = {"unseen": unseen, "flow": asked.flow, "features": asked.features}
    options: dict[str, object] = {k: path.name for k, path in folders.items() if path is not None}
    options |= {"num": asked.num or None, "seed": asked.seed, "steps": asked.steps}
    options |= {"batch": asked.batch, "dtype": "bf16" if asked.bf16 else None}
    options |= {"shape": None if asked.shape is None else "x".join(map(str, asked.shape))}
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)
