"""What one GPU of a TimeNoise run has to hold: from its configuration to shapes."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from diffdiv.api import prepare
from diffdiv.rehearsal_video import SVD, VideoSpec, read_video_architecture
from diffdiv.resources import find
from diffdiv.runtime.config import ConfigError, read_config


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
    path = _model_path(config, overrides)
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


def _model_path(config: str | Path, overrides: Sequence[str]) -> Path:
    """Where the configuration says the pipeline is; perhaps not there."""
    model = read_config(config)[1].get("model")
    written = model.get("path") if isinstance(model, dict) else None
    given = [item.partition("=")[2] for item in overrides if item.startswith("model.path=")]
    path = Path(str(given[-1] if given else written))
    return path if path.is_dir() else find(path) or path
