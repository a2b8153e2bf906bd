"""Exports: a trained student as a folder that diffusers loads without diffdiv.

A text-to-image student becomes a stock pipeline, or an adapter for one, with a scheduler that runs
the student's times from a plain call (see schedulers.py).
A UNet2DModel student travels with its sampler, ``pipelines/one_step_unet.py``. ``export.json`` in
the folder records what it is.
"""

import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, cast

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from diffdiv.export_folder import finish, read_json, staged, write_json
from diffdiv.export_sequences import copy_export, is_sequence_run
from diffdiv.generate import load_pipeline
from diffdiv.metrics.card import Evaluation
from diffdiv.model_card import Card
from diffdiv.models.backbones import load_denoiser, num_labels
from diffdiv.models.generator import Generator, InputConvention
from diffdiv.models.shared_encoder import parallel_generator
from diffdiv.resources import resource
from diffdiv.runtime.checkpoint import load_weights
from diffdiv.runtime.student import (
    Distillation,
    decoder_times,
    read_distillation,
    student_state_dict,
)
from diffdiv.schedulers import Scheduler, network_config, student_scheduler

_INPUTS = {"unit": "z ~ N(0, I)", "ve": "sigma z, z ~ N(0, I)"}
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow"}


def export_pipeline(
    teacher: Path,
    weights: Mapping[str, Tensor],
    out: Path,
    *,
    t_init: float,
    input_convention: InputConvention,
    num_steps: int = 1,
    card: Card,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> Path:
    """Write a stock text-to-image pipeline with the student's network and times.

    Args:
        teacher: local diffusers pipeline folder; all but network and scheduler is kept.
        weights: the student's network, by parameter name.
        out: the new folder.
        t_init: the student's first time, in the unit of the teacher's schedule.
        input_convention: scale of the student's input, "unit" (z) or "ve" (sigma z).
        num_steps: K.
        card: what the model card can say besides.
        dtype: of all weights written.
        force: replace an earlier export.

    Returns ``out``. ValueError for a student that no stock scheduler runs, or a folder that may
    not be overwritten.
    """
    with staged(out, force, teacher) as stage:
        scheduler = student_scheduler(teacher, t_init, input_convention, num_steps)
        pipe = load_pipeline(teacher)
        pipe.scheduler = scheduler
        pipe.components[network_config(teacher)[0]].load_state_dict(weights)
        _cast(pipe, dtype)
        pipe.save_pretrained(stage)
        facts = _facts(scheduler, t_init, input_convention, num_steps)
        facts["dtype"] = str(dtype)[6:]
        finish(stage, teacher, _call(teacher, num_steps), facts, card)
    return out


def export_unet2d(
    teacher: Path,
    weights: Mapping[str, Tensor],
    out: Path,
    *,
    t_init: float,
    input_convention: InputConvention,
    num_steps: int = 1,
    card: Card,
    force: bool = False,
) -> Path:
    """Write a UNet2DModel student together with its sampler file.

    All as in :func:`export_pipeline`, except that ``teacher`` needs ``unet/`` and ``scheduler/``
    only, weights are in float32, and there is one step.
    """
    if num_steps > 1:
        raise ValueError(f"num_steps: {num_steps}, but UNet2DModel students are exported with 1")
    denoiser = load_denoiser(teacher)
    schedule, net = denoiser.schedule, denoiser.net
    assert isinstance(net, UNet2DModel)
    Generator(denoiser, t_init, input_convention)  # refuses a time outside the schedule
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
    with staged(out, force, teacher) as stage:
        net.load_state_dict(weights)
        net.save_pretrained(stage / "unet")
        shutil.copytree(teacher / "scheduler", stage / "scheduler")
        shutil.copy(resource("pipelines/one_step_unet.py"), stage)
        scheduler = read_json(stage / "scheduler/scheduler_config.json")
        index = {
            "_class_name": ["one_step_unet", "OneStepUNetPipeline"],
            "_diffusers_version": version("diffusers"),
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", scheduler["_class_name"]],
        }
        write_json(stage / "model_index.json", index | settings)
        facts = settings | {"t_init": t_init, "input": _INPUTS[input_convention]}
        facts |= {"classes": num_labels(net) or None, "dtype": "float32"}
        finish(stage, teacher, {"num_inference_steps": 1}, facts, card)
    return out


def export_tiue(
    teacher: Path,
    weights: Mapping[str, Tensor],
    out: Path,
    *,
    decoder_times: Sequence[int],
    encoder_time: int | None,
    card: Card,
    force: bool = False,
) -> Path:
    """Write a TiUE student: a plain U-Net, float32, and the pipeline file that runs it in one pass.

    Args:
        teacher, weights, out, card, force: as in :func:`export_pipeline`; Stable Diffusion's
            safety checker does not come along.
        decoder_times, encoder_time: as in ``diffdiv.models.shared_encoder.parallel_generator``.
    """
    base = load_denoiser(teacher)
    generator = parallel_generator(base, base.net, decoder_times, encoder_time)
    index = read_json(teacher / "model_index.json")
    kind = "TiUEXLPipeline" if "text_encoder_2" in index else "TiUEPipeline"
    noise = read_json(teacher / "scheduler/scheduler_config.json")
    times: dict[str, object] = {
        "encoder_time": int(generator.encoder_time),
        "decoder_times": list(decoder_times),
        "noise_gain": generator.steps.noise_gain,
        "output_gains": generator.steps.output_gains.tolist(),
        "num_train_timesteps": int(base.schedule.t_max) + 1,
        "prediction_type": noise.get("prediction_type", "epsilon"),
    }
    with staged(out, force, teacher) as stage:
        pipe = load_pipeline(teacher)
        pipe.components["unet"].load_state_dict(weights)
        _cast(pipe, torch.float32)
        pipe.save_pretrained(stage)
        for part in ("scheduler", "safety_checker"):
            shutil.rmtree(stage / part, ignore_errors=True)
        for folder in (stage, stage / "scheduler"):
            folder.mkdir(exist_ok=True)
            shutil.copy(resource("pipelines/tiue_sd.py"), folder)
        of_scheduler = {"_class_name": "TiUEScheduler", "_diffusers_version": version("diffusers")}
        write_json(stage / "scheduler/scheduler_config.json", of_scheduler | times)
        index = read_json(stage / "model_index.json")
        index |= {"_class_name": ["tiue_sd", kind], "scheduler": ["tiue_sd", "TiUEScheduler"]}
        if "safety_checker" in index:
            index |= {"safety_checker": [None, None], "requires_safety_checker": False}
        write_json(stage / "model_index.json", index)
        facts = {**times, "input": _INPUTS["unit"], "dtype": "float32"}
        finish(stage, teacher, {"num_inference_steps": 1, "guidance_scale": 0.0}, facts, card)
    return out


def _cast(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # diffusers' own .to warns even when nothing changes


def export_run(run: Path, out: Path, *, ema: int | None = None, force: bool = False) -> Path:
    """Export the student of a run's newest valid state, in float32; an adapter is merged.

    Of a run of sequences (DNA, proteins): what it exported when it finished.

    Args:
        run: run folder.
        out, force: as in :func:`export_pipeline`.
        ema: half-life, in images, of the average to export; None = the run's first, which its
            sample grids and its evaluation show; 0 = the last weights.

    Raises:
        ValueError: if the folder is no such run, ``ema`` is not one of its averages, or nothing
            stock runs this student.
        CheckpointError: if it has no valid state.
    """
    if is_sequence_run(run):
        return copy_export(run, out, ema=ema, force=force)
    config, half_life, card = _read_run(run, ema)
    teacher, weights = (
        Path(config["teacher"]["path"]), student_state_dict(run, config, half_life)
    )  # fmt: skip
    if (times := decoder_times(config)) is not None:
        return export_tiue(
            teacher, weights, out,
            decoder_times=times[0], encoder_time=times[1], card=card, force=force,
        )  # fmt: skip
    student = config["student"]
    export = export_pipeline if (teacher / "text_encoder").is_dir() else export_unet2d
    return export(
        teacher,
        weights,
        out,
        t_init=student["t_init"],
        input_convention=student["input_convention"],
        num_steps=student.get("num_steps", 1),
        card=card,
        force=force,
    )


def export_lora(run: Path, out: Path, *, ema: int | None = None, force: bool = False) -> Path:
    """Export the student of a LoRA run as an adapter for its unchanged base model.

    ``out`` gets pytorch_lora_weights.safetensors (alpha in its metadata), ``scheduler/`` and the
    call in README.md. Arguments and errors as in :func:`export_run`.

    Raises:
        ValueError: also if the student is a full copy, or its pipeline loads no adapters.
    """
    config, half_life, card = _read_run(run, ema)
    if decoder_times(config) is not None:
        raise ValueError(f"{run}: a TiUE student is a whole network; export it without --lora")
    student, teacher = config["student"], Path(config["teacher"]["path"])
    lora, (part, _) = student.get("lora"), network_config(teacher)
    num_steps = student.get("num_steps", 1)
    if lora is None:
        raise ValueError(f"{run}: student.lora is null, so this student is a whole network")
    weights = load_weights(run, "student", half_life or None)
    settings = {
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "target_modules": sorted({name.partition(".lora_")[0] for name in weights}),
    }
    with staged(out, force, teacher) as stage:
        t_init, convention = student["t_init"], student["input_convention"]
        scheduler = student_scheduler(teacher, t_init, convention, num_steps)
        scheduler.save_pretrained(stage / "scheduler")
        options = {f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": settings}
        _adaptable_pipeline(teacher).save_lora_weights(stage, **options)
        facts = _facts(scheduler, t_init, convention, num_steps)
        facts |= {"rank": lora["rank"], "alpha": lora["alpha"], "dtype": "float32"}
        finish(stage, teacher, _call(teacher, num_steps), facts, card)
    return out


def _read_run(run: Path, ema: int | None) -> tuple[Distillation, int, Card]:
    """A run's configuration, the half-life to export, and what its model card can say."""
    config = read_distillation(run)
    half_life = next(iter(config["student"]["ema_half_lives"]), 0) if ema is None else ema
    facts: dict[str, object] = {
        "recipe": config["recipe"],
        "guidance of the teacher": config["teacher"].get("guidance_scale"),
        "EMA half-life in images": half_life or "no EMA",
    }
    card = Card(facts=facts)
    if (run / "evaluation.json").is_file():
        evaluation = cast(Evaluation, read_json(run / "evaluation.json"))
        if (evaluation["card"].get("ema_half_life") or 0) == half_life:  # of these very weights
            card["evaluation"] = evaluation
    if (run / "samples/captions.json").is_file():
        captions = cast("dict[str, list[str]]", read_json(run / "samples/captions.json"))
        card["prompt"] = captions["prompts"][0]
    return config, half_life, card


class _Adaptable(Protocol):
    def save_lora_weights(self, save_directory: Path, **parts: object) -> None: ...


def _adaptable_pipeline(teacher: Path) -> _Adaptable:
    """The teacher's pipeline without any of its components; ValueError if it takes no adapters."""
    index = read_json(teacher / "model_index.json")
    parts = [key for key, value in index.items() if isinstance(value, list) and key[0] != "_"]
    options = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    pipe = DiffusionPipeline.from_pretrained(
        teacher, local_files_only=True, **dict.fromkeys(parts), **options
    )
    if not isinstance(pipe, LoraBaseMixin):
        raise ValueError(f"{teacher}: a {type(pipe).__name__} loads no adapters; export it merged")
    return cast(_Adaptable, pipe)


def _facts(
    scheduler: Scheduler, t_init: float, convention: InputConvention, num_steps: int
) -> dict[str, object]:
    scheduler.set_timesteps(num_steps)
    return {
        "t_init": int(t_init),
        "times the network is told": [round(t, 3) for t in scheduler.timesteps.tolist()],
        "prediction": scheduler.config.get("prediction_type", "flow"),
        "input": _INPUTS[convention],
    }


def _call(teacher: Path, num_steps: int) -> dict[str, object]:
    """The exact call: guidance off; FLUX.1 dev is told the scale that it was trained with."""
    is_told = network_config(teacher)[1].get("guidance_embeds")
    return {"num_inference_steps": num_steps, "guidance_scale": 3.5 if is_told else 0.0}
