"""Exports: a trained student as a folder that diffusers loads without diffdiv.

A text-to-image student becomes a stock pipeline whose scheduler holds the *truncated* noise
schedule, steps 0..t_init, so that one plain step starts at t_init: LCMScheduler for students whose
input is z ("unit"), EulerDiscreteScheduler for sigma z ("ve"). A UNet2DModel student travels with
its sampler, ``pipelines/one_step_unet.py``. ``export.json`` in the folder records what it is.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from torch import Tensor, nn

from diffdiv.core.schedule import from_diffusers
from diffdiv.generate import load_pipeline
from diffdiv.metrics.card import Evaluation
from diffdiv.model_card import Card, write_model_card
from diffdiv.models.backbones import load_denoiser
from diffdiv.models.generator import InputConvention
from diffdiv.resources import find, resource
from diffdiv.runtime.checkpoint import load_weights

_INPUTS = {"unit": "z ~ N(0, I)", "ve": "sigma z, z ~ N(0, I)"}
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow"}


def truncated_scheduler(
    scheduler: DDPMScheduler, t_init: int, convention: InputConvention
) -> LCMScheduler | EulerDiscreteScheduler:
    """The scheduler whose single step goes from ``t_init`` to x0.

    Args:
        scheduler: with the teacher's betas and prediction type, which are kept.
        t_init: the student's time, an index 1..num_train_timesteps-1; ValueError otherwise.
        convention: scale of the student's input, "unit" (z) or "ve" (sigma z).
    """
    config = dict(scheduler.config)
    last = config["num_train_timesteps"] - 1
    if not 1 <= t_init <= last or t_init != int(t_init):
        raise ValueError(f"t_init: {t_init} is not among the teacher's steps 1..{last}")
    settings = {
        "num_train_timesteps": int(t_init) + 1,
        "prediction_type": config["prediction_type"],
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # StableDiffusionPipeline deprecates any other
    }
    plain = not config.get("trained_betas") and not config.get("rescale_betas_zero_snr")
    if config["beta_schedule"] == "scaled_linear" and plain:
        low, high = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
        settings |= {"beta_schedule": "scaled_linear", "beta_start": config["beta_start"]}
        settings["beta_end"] = (low + t_init / last * (high - low)) ** 2
    else:
        settings["trained_betas"] = scheduler.betas[: int(t_init) + 1].tolist()
    if convention == "ve":
        return EulerDiscreteScheduler(**settings)
    # With original_inference_steps=1 a wrong number of steps raises instead of drawing badly.
    return LCMScheduler(**settings, original_inference_steps=1, clip_sample=False)


def export_stable_diffusion(
    teacher: Path,
    unet_weights: Mapping[str, Tensor],
    out: Path,
    *,
    t_init: int,
    input_convention: InputConvention,
    card: Card,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> Path:
    """Write a stock text-to-image pipeline with the student's network and schedule.

    Args:
        teacher: local diffusers pipeline folder; all but network and scheduler is kept.
        unet_weights: the student's network, by parameter name.
        out: the new folder.
        t_init: the student's time, an index of the teacher's schedule.
        input_convention: scale of the student's input, "unit" (z) or "ve" (sigma z).
        card: what the model card can say besides.
        dtype: of all weights written.
        force: replace an earlier export.

    Returns ``out``. ValueError for a t_init outside the schedule, another kind of schedule, or a
    folder that may not be overwritten.
    """
    with _staged(out, force, teacher) as stage:
        pipe = load_pipeline(teacher)
        if from_diffusers(pipe.scheduler).family != "vp":
            raise ValueError(f"{teacher}: truncation needs a variance-preserving schedule")
        full = DDPMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler = truncated_scheduler(full, t_init, input_convention)
        pipe.unet.load_state_dict(unet_weights)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, dtype)  # diffusers' own .to warns even when nothing changes
        pipe.save_pretrained(stage)
        facts = {"t_init": int(t_init), "prediction": pipe.scheduler.config.prediction_type}
        facts |= {"input": _INPUTS[input_convention], "dtype": str(dtype)[6:]}
        _finish(stage, teacher, {"num_inference_steps": 1, "guidance_scale": 0.0}, facts, card)
    return out


def export_unet2d(
    teacher: Path,
    unet_weights: Mapping[str, Tensor],
    out: Path,
    *,
    t_init: float,
    input_convention: InputConvention,
    card: Card,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> Path:
    """Write a UNet2DModel student together with its sampler file.

    All as in :func:`export_stable_diffusion`, except that ``teacher`` needs ``unet/`` and
    ``scheduler/`` only and ``t_init`` is in the unit of its schedule.
    """
    denoiser = load_denoiser(teacher)
    schedule, net = denoiser.schedule, denoiser.net
    assert isinstance(net, UNet2DModel)
    if not 0 < t_init <= schedule.t_max:
        raise ValueError(f"t_init: {t_init} is not in (0, {schedule.t_max:g}]")
    t = torch.tensor([t_init], dtype=torch.float64)
    sigma = float(schedule.sigma(t))
    settings: dict[str, object] = {
        "prediction": "edm" if denoiser.sigma_data else _PREDICTIONS[denoiser.prediction],
        "t_init": float(schedule.net_time(t)),
        "alpha_init": float(schedule.alpha(t)),
        "sigma_init": sigma,
        "input_scale": sigma if input_convention == "ve" else 1.0,
    }
    if denoiser.sigma_data:
        settings |= {"sigma_data": denoiser.sigma_data, "edm_time_scale": 1000.0}
    with _staged(out, force, teacher) as stage:
        net.load_state_dict(unet_weights)
        nn.Module.to(net, dtype)
        net.save_pretrained(stage / "unet")
        shutil.copytree(teacher / "scheduler", stage / "scheduler")
        shutil.copy(resource("pipelines/one_step_unet.py"), stage)
        scheduler = _read(stage / "scheduler/scheduler_config.json")
        index = {
            "_class_name": ["one_step_unet", "OneStepUNetPipeline"],
            "_diffusers_version": version("diffusers"),
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", scheduler["_class_name"]],
        }
        _write(stage / "model_index.json", index | settings)
        classes = _read(stage / "unet/config.json")["num_class_embeds"]
        facts = settings | {"t_init": t_init, "classes": classes}
        facts |= {"input": _INPUTS[input_convention], "dtype": str(dtype)[6:]}
        _finish(stage, teacher, {"num_inference_steps": 1}, facts, card)
    return out


def export_run(
    run: Path,
    out: Path,
    *,
    ema: int | None = None,
    force: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Export the student of a run's newest valid state.

    Args:
        run: run folder of a one-step distillation.
        out, force, dtype: as in :func:`export_stable_diffusion`.
        ema: half-life, in images, of the average to export; None = the run's first, which its
            sample grids and its evaluation show; 0 = the last weights.

    Raises:
        ValueError: if the folder is no such run, or ``ema`` is not one of its averages.
        CheckpointError: if it has no valid state.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: no config.yaml there, so it is not a run folder")
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    try:
        student, given = config["student"], Path(config["teacher"]["path"])
        t_init, convention = student["t_init"], student["input_convention"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run / 'config.yaml'}: no {error}; not a one-step student") from None
    teacher = given if given.is_dir() else find(given)
    if teacher is None:
        raise ValueError(f"{run / 'config.yaml'}: teacher.path: there is no folder {given}")
    half_life = next(iter(student.get("ema_half_lives", ())), 0) if ema is None else ema
    guidance = config["teacher"].get("guidance_scale")
    facts = {"guidance of the teacher": guidance, "EMA half-life in images": half_life or "no EMA"}
    card = Card(facts={"recipe": config.get("recipe"), **facts})
    if (run / "evaluation.json").is_file():
        evaluation: Evaluation = json.loads((run / "evaluation.json").read_text("utf-8"))
        if (evaluation["card"].get("ema_half_life") or 0) == half_life:  # of these very weights
            card["evaluation"] = evaluation
    if (run / "samples/captions.json").is_file():
        card["prompt"] = str(_read(run / "samples/captions.json")["prompts"][0])
    weights = load_weights(run, "student", half_life or None)
    options = {"t_init": t_init, "input_convention": convention, "dtype": dtype, "force": force}
    export = export_stable_diffusion if (teacher / "text_encoder").is_dir() else export_unet2d
    return export(teacher, weights, out, card=card, **options)


def _finish(
    stage: Path, teacher: Path, call: dict[str, object], facts: dict[str, object], card: Card
) -> None:
    """Add export.json and README.md, and drop the local paths that from_pretrained records."""
    for path in stage.rglob("*.json"):
        content = _read(path)
        if {"_name_or_path", "name_or_path"} & content.keys():
            _write(path, {k: v for k, v in content.items() if k.lstrip("_") != "name_or_path"})
    _write(stage / "export.json", {"call": call, **facts})
    write_model_card(stage, teacher, facts, card)


@contextmanager
def _staged(out: Path, force: bool, teacher: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well."""
    if teacher.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out}: the teacher lies there; choose another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not force or not (out / "export.json").is_file():
            raise ValueError(f"{out}: not empty; only an export is replaced, and only by force")
    out.parent.mkdir(parents=True, exist_ok=True)
    stage, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    stage.mkdir()
    try:
        yield stage
        if out.exists():
            os.replace(out, old)
        os.replace(stage, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def _write(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
