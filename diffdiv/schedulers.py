"""Stock schedulers that run a student's times from a plain call.

vp, input z             LCMScheduler        the *truncated* schedule, steps 0..t_init
vp, input sigma z       EulerDiscrete       the same; one step only
flow, one step          FlowMatchEuler      from t = 1
flow, several steps     FlowMatchLCM        unshifted, 1 down to 1/K
"""

import json
from collections.abc import Mapping
from pathlib import Path

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler

from diffdiv.models.families import latent_shape, schedule_for
from diffdiv.models.generator import InputConvention

Scheduler = (
    LCMScheduler | EulerDiscreteScheduler | FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler
)


def truncated_scheduler(
    scheduler: DDPMScheduler, t_init: float, convention: InputConvention, num_steps: int = 1
) -> LCMScheduler | EulerDiscreteScheduler:
    """The scheduler that goes from ``t_init`` to x0, in ``num_steps`` equal steps.

    Args:
        scheduler: with the teacher's betas and prediction type, which are kept.
        t_init: the student's first time, an index 1..num_train_timesteps-1.
        convention: scale of the student's input, "unit" (z) or "ve" (sigma z).
        num_steps: K, a divisor of t_init + 1.

    Raises:
        ValueError: for another t_init or K, or several steps with "ve".
    """
    config = dict(scheduler.config)
    last = config["num_train_timesteps"] - 1
    if not 1 <= t_init <= last or t_init != int(t_init):
        raise ValueError(f"t_init: {t_init} is not among the teacher's steps 1..{last}")
    if (int(t_init) + 1) % num_steps:
        raise ValueError(f"num_steps: {num_steps} does not divide t_init + 1 = {int(t_init) + 1}")
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
    if convention == "unit":
        # more than original_inference_steps raise instead of drawing badly
        return LCMScheduler(**settings, original_inference_steps=num_steps, clip_sample=False)
    if num_steps > 1:
        raise ValueError("no stock scheduler renoises students whose input is sigma z ('ve')")
    return EulerDiscreteScheduler(**settings)


def flow_scheduler(
    num_train_timesteps: int, t_init: float, num_steps: int = 1
) -> FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler:
    """The scheduler that goes from t = 1 to x0, in ``num_steps`` equal steps.

    Args:
        num_train_timesteps: the network is told t times this number.
        t_init: the student's first time; only 1, where stock flow pipelines start.
        num_steps: K; several steps raise for any other number than K.
    """
    if t_init != 1:
        raise ValueError(f"t_init: {t_init:g}, but stock flow pipelines start at 1")
    if num_steps == 1:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps)
    return FlowMatchLCMScheduler(
        num_train_timesteps=num_train_timesteps,
        shift_terminal=1 / num_steps,  # pipelines that leave the grid to it would end near 0
        scale_factors=[1.0] * (num_steps - 1),  # changes no size, but refuses other step counts
        upscale_mode="nearest",
    )


def student_scheduler(
    teacher: Path, t_init: float, convention: InputConvention, num_steps: int
) -> Scheduler:
    """The scheduler of a student's export, from the teacher's folder.

    Raises:
        ValueError: if no stock scheduler runs this student.
    """
    config = json.loads((teacher / "scheduler/scheduler_config.json").read_text("utf-8"))
    _, net = network_config(teacher)
    schedule, _ = schedule_for(config["_class_name"], config, latent_shape(net))
    match schedule.family:
        case "vp":
            full = DDPMScheduler.from_config(config)
            return truncated_scheduler(full, t_init, convention, num_steps)
        case "flow":
            return flow_scheduler(config.get("num_train_timesteps", 1000), t_init, num_steps)
    raise ValueError(f"{teacher}: no stock text-to-image pipeline for a {schedule.family} schedule")


def network_config(teacher: Path) -> tuple[str, Mapping[str, object]]:
    """Name of the network among the components of a pipeline folder, and its configuration."""
    part = "transformer" if (teacher / "transformer").is_dir() else "unet"
    return part, json.loads((teacher / part / "config.json").read_text("utf-8"))
