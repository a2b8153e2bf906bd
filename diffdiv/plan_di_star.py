"""What one GPU of a Diff-Instruct* run has to hold: from its configuration to shapes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from diffdiv.api import architecture_of, folder_of, prepare, written
from diffdiv.rehearsal_reward import CLIP_H, RewardShape, RewardSpec
from diffdiv.runtime.config import ConfigError, read_config

_BY_CLIP = ("aesthetic", "clip_score", "hpsv2", "hpsv2_1", "pickscore")


def di_star_spec(
    config: str | Path, overrides: Sequence[str], like: str | None = None, processes: int = 1
) -> RewardSpec:
    """One GPU's share of a run of train/di_star.py, for :func:`diffdiv.plan.plan_cycle`.

    Nothing that the configuration names need be there: where ``teacher.path`` is no folder, the
    shapes are those of ``like``; a reward whose folder is not there, or is no CLIP's, counts as one
    by CLIP ViT-H/14.

    Args:
        config, overrides: as for training, overrides as ``key=value``.
        like: "sd15", "sd21" or "sdxl"; None = a folder at ``teacher.path`` is wanted.
        processes: GPUs that share the batch.

    Raises:
        ConfigError: with every mistake; also if neither folder nor ``like`` says the shapes.
        ValueError: if the folder's network cannot be planned, or a reward's is no CLIP.
    """
    with TemporaryDirectory() as absent:
        items = [*overrides, *_stand_ins(config, overrides, Path(absent))]
        asked = prepare(config, items)[1].model_dump(mode="json")
    architecture = architecture_of(folder_of(config, overrides, "teacher.path"), like)
    run, teacher, student = asked["run"], asked["teacher"], asked["student"]
    fake_lora, data = asked["fake_lora"], asked["data"]
    rewards = {name: own for name, own in asked["rewards"].items() if own is not None}
    return RewardSpec(
        architecture,
        size=int(str(architecture.unet["sample_size"])) * architecture.pixels_per_latent,
        batch=run["batch_size"] // run["accumulation"] // processes,
        guidance_scale=teacher["guidance_scale"],
        student_rank=student["lora"] and student["lora"]["rank"],
        fake_rank=fake_lora and fake_lora["rank"],
        checkpointing=teacher["checkpointing"],
        base_dtype=teacher["dtype"],
        precision=run["precision"],
        critic_updates=asked["critic_updates"],
        optimizer_bits=8 if asked["optimizer"]["eight_bit"] else 32,
        num_ema=len(student["ema_half_lives"]),
        rewards=tuple(_shape(name, own) for name, own in rewards.items()),
        regulariser=asked["regulariser"]["name"],
        has_guidance_reward=asked["regulariser"]["guidance_reward"] > 0,
        accumulates=run["accumulation"] > 1,
        num_vaes=2 if data["cache"] is None else 1,
    )


def _stand_ins(config: str | Path, overrides: Sequence[str], absent: Path) -> list[str]:
    """Overrides that name something under ``absent`` for what the configuration names in vain."""
    (absent / "adapter").mkdir()
    for name in ("prompts.txt", "adapter/pytorch_lora_weights.safetensors"):
        (absent / name).touch()
    has_lora = written(config, overrides, "student.lora") is not None
    found = [f"data.path={absent / 'prompts.txt'}"]
    stands = {"teacher.path": absent, "student.path": absent / "adapter" if has_lora else absent}
    stands |= {f"rewards.{name}.path": absent for name in _reward_names(config, overrides)}
    for key, path in stands.items():
        given = written(config, overrides, key)
        if given is not None and not folder_of(config, overrides, key).is_dir():
            found.append(f"{key}={path}")
    return found


def _reward_names(config: str | Path, overrides: Sequence[str]) -> list[str]:
    """Of those that are not switched off."""
    rewards = read_config(config)[1].get("rewards")
    names = list(rewards) if isinstance(rewards, dict) else []
    keys = [item.partition("=")[0].strip().split(".") for item in overrides]
    names += [key[1] for key in keys if key[0] == "rewards" and len(key) > 1]
    return [
        n for n in dict.fromkeys(names) if written(config, overrides, f"rewards.{n}") is not None
    ]


def _shape(name: str, own: Mapping[str, object]) -> RewardShape:
    """What is known of a reward's size."""
    clip = None
    if name in _BY_CLIP:
        clip = _read_clip(Path(str(own["path"])) / "config.json")
    is_judge = name == "judge" and own["file"] is None
    return RewardShape(
        name,
        clip=None if is_judge else clip or CLIP_H,
        is_assumed=clip is None and not is_judge,
        scale=float(str(own["scale"])),
        differentiable=bool(own["differentiable"]),
        copies=int(str(own["copies"])),
    )


def _read_clip(file: Path) -> dict[str, object] | None:
    """A CLIP's configuration, or None where there is none."""
    if not file.is_file():
        return None
    try:
        config: dict[str, object] = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError([f"{file}: cannot be read ({error})"]) from None
    if config.get("model_type") != "clip":
        raise ConfigError([f"{file}: {config.get('model_type')!r} is no CLIP"])
    return config
