"""What one GPU of a TimeNoise run has to hold: from its configuration to shapes."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from diffdiv.api import folder_of, prepare
from diffdiv.rehearsal_video import SVD, VideoSpec, read_video_architecture
from diffdiv.runtime.config import ConfigError


def timenoise_spec(
    config: str | Path, overrides: Sequence[str], like: str | None = None, processes: int = 1
) -> VideoSpec:
    """One GPU's share of a run of train/timenoise.py, for :func:`diffdiv.plan.plan_cycle`.

    Neither weights nor videos need be there: where ``model.path`` is no folder, the shapes are
    those of ``like``.

    Args:
        config, overrides: as for training, overrides as ``key=value``.
        like: "svd"; None = a folder at ``model.path`` is wanted.
        processes: GPUs that share the batch.

    Raises:
        ConfigError: with every mistake; also if neither folder nor ``like`` says the shapes.
        ValueError: if the folder is another pipeline than Stable Video Diffusion.
    """
    path = folder_of(config, overrides, "model.path")
    with TemporaryDirectory() as absent:  # stands for weights and videos that are not there yet
        items = [*overrides, f"videos.path={absent}"]
        items += [] if path.is_dir() else [f"model.path={absent}"]
        asked = prepare(config, items)[1].model_dump(mode="json")
    if not path.is_dir() and like != "svd":
        raise ConfigError([f"model.path: there is no folder {path}; name its kind: --like svd"])
    run, model, videos = asked["run"], asked["model"], asked["videos"]
    return VideoSpec(
        read_video_architecture(path) if path.is_dir() else SVD,
        frames=videos["num_frames"],
        height=videos["height"],
        width=videos["width"],
        batch=run["batch_size"] // run["accumulation"] // processes,
        rank=model["lora"] and model["lora"]["rank"],
        checkpointing=model["checkpointing"],
        base_dtype=model["dtype"],
        precision=run["precision"],
        optimizer_bits=8 if asked["optimizer"]["eight_bit"] else 32,
        shards=processes if run["sharding"] == "fsdp2" else 1,
        live=videos["cache"] is None,
    )
