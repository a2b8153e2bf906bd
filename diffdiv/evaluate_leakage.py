"""Does an image-to-video model leak? Seen against unseen clips, for real pipelines.

What is measured is in leakage_clips.py and leakage_judge.py, what follows from it in
leakage_verdict.py, the page in leakage_report.py. Here: which clips, which call, which card.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdiv.data.cache import fingerprint
from diffdiv.data.video import VideoFolder
from diffdiv.leakage_clips import Clips, Manner, generate_clips, one_step
from diffdiv.leakage_judge import Eyes, judge_clips, judge_student
from diffdiv.leakage_protocol import RATES, Asked, export_of
from diffdiv.leakage_report import write_leakage_page
from diffdiv.leakage_verdict import FRACTIONS, NOISY, curve_rows, times_at, verdict
from diffdiv.metrics.card import Evaluation, Row, file_sha256, metric_card, write_evaluation
from diffdiv.models.image_to_video import ImageToVideo, host_kind, open_host
from diffdiv.video_clips import default_size

_SHOWN = 3  # real clips or images a set in the report


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
        ValueError: in a sentence: another pipeline, a teacher of another kind, no or too few or too
            short videos, the same video in both folders, a size the model cannot take, or clips
            none of which moves. All but the last two before the model is opened.
    """
    path, asked = export_of(model, asked or Asked())
    kind, shape = host_kind(path), asked.shape or default_size(path)
    if asked.teacher is not None and host_kind(asked.teacher) != kind:
        raise ValueError(f"{asked.teacher}: {host_kind(asked.teacher)}, but the student is {kind}")
    sets = _sets(videos, unseen, shape, asked, fps=asked.fps or RATES[kind])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    host = _open(path, device, asked)
    if host.codec.space(*shape).frames < 2:
        raise ValueError(f"clips of {shape[0]} frames are a single latent frame: nothing can move")
    call = _call(path, host, asked)
    level = float(str(call.get("noise_aug_strength", 0)))
    manner = Manner(asked.seed, level, asked.batch, asked.bf16)
    done, total = 0, sum(clips.count for clips in sets.values()) + asked.num
    total += asked.num if asked.teacher else 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    rows, sentence = _meter(host, sets, manner, step)
    shown = {f"real, {name}": clips.read(range(min(_SHOWN, clips.count)))[0]
             for name, clips in sets.items()}  # fmt: skip
    if asked.num:
        name, clips = next(reversed(sets.items()))
        more, strips, said = _generated(host, clips, name, asked, manner, call, step)
        rows, shown, sentence = rows + more, shown | strips, f"{sentence} {said}".strip()
    card = _card(path, sets, shape, asked, call, device, _command(model, videos, unseen, asked))
    evaluation: Evaluation = {"rows": rows, "card": card | {"verdict": sentence}}
    is_run = path != model
    home = model / "evaluation" if is_run else Path("evaluation") / model.resolve().name
    _write(home, evaluation, shown, out)
    return evaluation


def _write(home: Path, found: Evaluation, shown: dict[str, Tensor], out: Path | None) -> None:
    """evaluation.json and report.html in ``home``, and copies at OUT and beside it."""
    home.mkdir(parents=True, exist_ok=True)
    file, page = write_evaluation(home, found["rows"], found["card"]), home / "report.html"
    write_leakage_page(page, found["rows"], shown, card=found["card"])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(file.read_bytes())
        out.with_suffix(".html").write_bytes(page.read_bytes())


def _open(path: Path, device: torch.device, asked: Asked) -> ImageToVideo:
    dtype = torch.bfloat16 if asked.bf16 else torch.float32
    return open_host(
        path, device, dtype=dtype, fps=asked.fps or RATES["StableVideoDiffusionPipeline"],
        motion_bucket=asked.motion_bucket,
    )  # fmt: skip


def _sets(
    videos: Path,
    unseen: Path | None,
    shape: tuple[int, int, int],
    asked: Asked,
    *,
    fps: float,
) -> dict[str, Clips]:
    """The sets of clips by name, seen ones first; only names and lengths are read."""
    sets = dict[str, Clips]()
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
    if asked.guidance is not None:
        names = ("min_guidance_scale", "max_guidance_scale")
        call |= dict.fromkeys(names if host.tells_level else ("guidance_scale",), asked.guidance)
    if not host.tells_level:
        return call
    call["fps"] = round(asked.fps or RATES["StableVideoDiffusionPipeline"])
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
) -> tuple[list[Row], dict[str, Tensor], str]:
    """Rows on clips made from the first frames of a set, clips to show, and a sentence.

    With a teacher, its clips of the same images and noise too; else the sentence is empty.
    """
    real, captions = clips.read(range(asked.num // asked.seeds_each))
    device = next(host.net.parameters()).device

    def make(own: ImageToVideo, told: dict[str, object]) -> tuple[Tensor, int]:
        return generate_clips(
            own, real, captions, asked.seeds_each, manner=manner, call=told, progress=progress
        )

    eyes, few = Eyes.of(asked.flow, asked.features, device), _SHOWN * asked.seeds_each
    made, evaluations = make(host, call)
    own, truth = judge_clips(made, real, asked.seeds_each, eyes)
    rows = [
        Row(name=f"made from {name}", network_evaluations=evaluations, metrics=own),
        Row(name=f"real, {name}", network_evaluations=0, metrics=truth),
    ]
    shown = {f"made from images: {name}": made[:few]}
    if asked.teacher is None:
        return rows, shown, ""
    _to_cpu(host)  # its memory is the teacher's now
    default = replace(asked, steps=None, guidance=None, teacher=None)
    teacher = _open(asked.teacher, device, default)
    taught, evaluations = make(teacher, _call(asked.teacher, teacher, default))
    figures, said = judge_student(made, taught, asked.seeds_each, eyes)
    beside = judge_clips(taught, real, asked.seeds_each, eyes)[0]
    rows += [
        Row(name=f"teacher, from {name}", network_evaluations=evaluations, metrics=beside),
        Row(name="student over teacher", network_evaluations=0, metrics=figures),
    ]
    return rows, shown | {"its teacher, same images and noise": taught[:few]}, said


def _to_cpu(host: ImageToVideo) -> None:
    for part in host.pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, "cpu")


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
        "teacher": None if asked.teacher is None else fingerprint(asked.teacher),
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
    folders = {"unseen": unseen, "teacher": asked.teacher}
    folders |= {"flow": asked.flow, "features": asked.features}
    options: dict[str, object] = {k: path.name for k, path in folders.items() if path is not None}
    options |= {"num": asked.num or None, "seed": asked.seed, "steps": asked.steps}
    options |= {"guidance": asked.guidance}
    options |= {"batch": asked.batch, "dtype": "bf16" if asked.bf16 else None}
    options |= {"shape": None if asked.shape is None else "x".join(map(str, asked.shape))}
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)
