"""What `diffdiv evaluate --leakage` is asked: clips, sizes and rates, of a pipeline or of a run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, cast

from diffdiv.runtime.yaml_io import read_yaml

#: frames a second, by the pipeline's class name
RATES = {
    "StableVideoDiffusionPipeline": 7.0,
    "WanImageToVideoPipeline": 16.0,
    "CogVideoXImageToVideoPipeline": 8.0,
}


@dataclass(frozen=True)
class Asked:
    """What is measured, and how.

    Attributes:
        num: clips to generate, a multiple of ``seeds_each``; 0 = none. All are in memory.
        seeds_each: generated clips an image.
        most: real clips taken of each folder, one a video.
        seed: of the choice of videos and of all noise.
        shape: frames, height and width; None = a run's, or what the pipeline makes by default.
        fps: frames a second; None = a run's, or the host's in RATES.
        motion_bucket: what Stable Video Diffusion is told, 0..255; of a run, its own.
        flow: RAFT weights for the motion of generated clips.
        features: R3D-18 weights for their Frechet distance.
        steps: of generation; None = the pipeline's.
        guidance: of generation; None = the pipeline's.
        teacher: pipeline of the same kind that the model was distilled from, whose clips from the
            same images and noise its own are compared with; sampled as it is by default.
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
    guidance: float | None = None
    teacher: Path | None = None
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
        made = self.flow, self.features, self.steps, self.guidance, self.teacher
        if self.num == 0 and any(option is not None for option in made):
            raise ValueError(
                "flow, features, steps, guidance and teacher are for generated clips: give num too"
            )
        if self.teacher is not None and self.num < 2 * self.seeds_each:
            raise ValueError(f"teacher: {self.num} clips are of one image; a comparison takes two")
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


def export_of(model: Path, asked: Asked) -> tuple[Path, Asked]:
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
