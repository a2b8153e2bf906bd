"""Sampling image-to-video pipelines from a start time M, with or without Analytic-Init.

    pipe(image, **prepare_start(pipe, "stats.safetensors", start=0.94))

    host                            how it starts at M                fraction M means
    StableVideoDiffusion            ``sigmas=`` of its call           ln sigma, as it is told time
    HunyuanVideo, 1.5, SkyReels-V1  ``sigmas=``, shift undone         sigma = M
    Wan 2.1, 2.2, SkyReels-V2, LTX  scheduler that leaves steps out   sigma = M
    CogVideoX, I2VGen-XL            scheduler that leaves steps out   index M * 1000

LTX takes tokens that hold the clean first frame, so with statistics the image is needed here too.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor

from diffdiv import start_schedulers
from diffdiv.core.latent_stats import LatentStats, StartLaw, Variance, analytic_init
from diffdiv.core.schedule import Schedule, edm, rectified_flow
from diffdiv.ltx_start import ltx_times, ltx_tokens
from diffdiv.models.video import VideoCodec, vp_from_table
from diffdiv.start_schedulers import START_SCHEDULERS, StartScheduler

Scheduler = StartScheduler | EulerDiscreteScheduler | FlowMatchEulerDiscreteScheduler
Steps = Callable[[ConfigMixin, float, int], tuple[Scheduler, list[float]]]


def start_sigma(scheduler: ConfigMixin, start: float) -> float:
    """Sigma at a fraction of ln sigma between sigma_min and sigma_max; SVD: 0.85 gives 100.

    Raises:
        ValueError: if the scheduler does not say both, or does not space its steps by them.
    """
    config = scheduler.config
    low, high = config.get("sigma_min"), config.get("sigma_max")
    if not config.get("use_karras_sigmas") or low is None or high is None:
        raise ValueError(
            f"{type(scheduler).__name__}: start {start:g} needs use_karras_sigmas, sigma_min and "
            "sigma_max, as Stable Video Diffusion's scheduler has them"
        )
    return exp(log(low) + start * (log(high) - log(low)))


def start_scheduler(scheduler: ConfigMixin, start: float) -> Scheduler:
    """A scheduler that begins sampling at M, for pipelines whose call cannot be told to.

    An Euler scheduler with Karras' steps gets another ``sigma_max`` and spaces as many steps below
    it; it is a stock scheduler and is saved as one. Others keep their grid and leave steps out.

    Args:
        scheduler: of the pipeline; unchanged.
        start: M in (0, 1]; what it means is told above.

    Raises:
        ValueError: naming the scheduler that cannot start at M.
    """
    _require_fraction(start)
    config, kind = scheduler.config, type(scheduler).__name__.removeprefix("Start")
    if kind == "EulerDiscreteScheduler":
        return EulerDiscreteScheduler.from_config(config, sigma_max=start_sigma(scheduler, start))
    is_flow = kind != "UniPCMultistepScheduler" or config.get("use_flow_sigmas")
    if kind not in START_SCHEDULERS or not is_flow:
        known = ", ".join(("EulerDiscreteScheduler", *START_SCHEDULERS))
        note = "" if is_flow else " without use_flow_sigmas"
        raise ValueError(f"{kind}{note} cannot start at M; {known} can")
    begun = START_SCHEDULERS[kind].from_config({**config, "_start": start})
    assert not isinstance(begun, tuple)
    return begun


def start_level(scheduler: Scheduler) -> tuple[Schedule, float]:
    """The schedule behind a scheduler and its first time, after ``set_timesteps``."""
    if isinstance(scheduler, EulerDiscreteScheduler):
        return edm(), float(scheduler.sigmas[0])
    if "shift" in scheduler.config or "flow_shift" in scheduler.config:
        return rectified_flow(), float(scheduler.sigmas[0])
    table = cast(Tensor, vars(scheduler)["alphas_cumprod"])
    return vp_from_table(table), float(scheduler.timesteps[0])


def _euler_sigmas(
    scheduler: ConfigMixin, start: float, steps: int
) -> tuple[Scheduler, list[float]]:
    """Karras' steps from M, 0 included, as an Euler pipeline wants them."""
    begun = start_scheduler(scheduler, start)
    assert isinstance(begun, EulerDiscreteScheduler)
    begun.set_timesteps(steps)
    return begun, begun.sigmas.tolist()


def _flow_sigmas(scheduler: ConfigMixin, start: float, steps: int) -> tuple[Scheduler, list[float]]:
    """Equal steps from M before the shift, which the scheduler applies to what it is given."""
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(f"{type(scheduler).__name__}: this pipeline starts at M by FlowMatchEuler")
    shift = scheduler.config["shift"]
    first = start / (shift - (shift - 1) * start)
    sigmas = [first * (1 - step / steps) for step in range(steps)]
    begun = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    begun.set_timesteps(sigmas=sigmas)
    return begun, sigmas


@dataclass(frozen=True)
class _Host:
    """What a pipeline wants.

    ``sigmas``: how its call is told M, None = by its scheduler; ``num_steps``: its default;
    ``kept``: share of given latents that it keeps, the rest is the image's; ``told_size``: its call
    takes height and width, else they follow from the image; ``packed``: latents are tokens.
    """

    num_steps: int
    frames_first: bool = False
    sigmas: Steps | None = None
    kept: float = 1.0
    told_size: bool = True
    packed: bool = False


HOSTS: Mapping[str, _Host] = {
    "StableVideoDiffusionPipeline": _Host(25, frames_first=True, sigmas=_euler_sigmas),
    "HunyuanVideoImageToVideoPipeline": _Host(50, sigmas=_flow_sigmas, kept=0.999),
    "HunyuanVideo15ImageToVideoPipeline": _Host(50, sigmas=_flow_sigmas, told_size=False),
    "HunyuanSkyreelsImageToVideoPipeline": _Host(50, sigmas=_flow_sigmas),
    "WanImageToVideoPipeline": _Host(50),
    "SkyReelsV2ImageToVideoPipeline": _Host(50),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _Host(50),
    "LTXImageToVideoPipeline": _Host(50, packed=True),
    "CogVideoXImageToVideoPipeline": _Host(50, frames_first=True),
    "I2VGenXLPipeline": _Host(50),
}


def prepare_start(
    pipe: DiffusionPipeline,
    stats: LatentStats | Path | str | None,
    start: float = 0.94,
    *,
    sigma: float | None = None,
    num_inference_steps: int | None = None,
    size: tuple[int, int, int] | None = None,
    num_videos: int = 1,
    generator: torch.Generator | None = None,
    variance: Variance = "channel",
    condition: Tensor | None = None,
    image: Image.Image | None = None,
) -> dict[str, object]:
    """Arguments that make a pipeline's call start at M from the Gaussian closest to q(x_M).

    Where its call takes no ``sigmas``, ``pipe.scheduler`` is replaced by one that starts at M (to
    be undone by another call with ``start=1``). M = 0.94 skips the times at which a model leans
    on its image the most (arXiv 2406.15735v3); below 0.8 samples fall apart.

    Args:
        pipe: an image-to-video pipeline, see the module.
        stats: of clean latents, or their file; None: N(0, s^2 I) as without Analytic-Init.
        start: M as a fraction in (0, 1].
        sigma: M as a noise level instead, for Stable Video Diffusion ("100").
        num_inference_steps: None: the pipeline's default.
        size: frames, height and width of the video; None: as the statistics were measured.
        num_videos: images in the call.
        generator: of the initial noise; None: torch's own.
        variance, condition: as for :func:`analytic_init`.
        image: the first frame, which only LTX needs here.

    Raises:
        ValueError: in a sentence, if the pipeline cannot start at M, the statistics are of other
            latents, or LTX's image is missing.
    """
    host = _host(pipe)
    if sigma is not None:
        start = _fraction(cast(ConfigMixin, pipe.components["scheduler"]), sigma)
    _require_fraction(start)
    if host.packed and stats is not None and image is None:
        raise ValueError("LTX's initial latents hold the clean first frame: give image= too")
    steps = host.num_steps if num_inference_steps is None else num_inference_steps
    begun, call = _begin(pipe, host, start, steps)
    if stats is None:
        return call
    found = stats if isinstance(stats, LatentStats) else LatentStats.load(Path(stats))
    codec = VideoCodec(pipe.components["vae"])
    space = found.space
    num_frames, height, width = size or codec.pixels(space.frames, space.height, space.width)
    space = codec.space(num_frames, height, width)
    found.require(space)
    call["num_frames"] = num_frames
    if host.told_size:
        call |= {"height": height, "width": width}
    if host.packed:
        ltx_times(begun, steps, space)
    law = analytic_init(found, *start_level(begun), variance=variance, condition=condition)
    latents = _draw(law, (num_videos, *space.shape), _padding(pipe, space.frames), generator)
    if not host.frames_first:
        latents = latents.transpose(1, 2)
    # what the pipeline will do to given latents, undone beforehand
    gain = host.kept * float(cast(float, begun.init_noise_sigma) if host.frames_first else 1.0)
    latents = latents / gain
    if host.packed and image is not None:
        latents = ltx_tokens(pipe, latents, image, (height, width))
    return call | {"latents": latents.contiguous()}


def _host(pipe: DiffusionPipeline) -> _Host:
    found = next((HOSTS[c.__name__] for c in type(pipe).__mro__ if c.__name__ in HOSTS), None)
    if found is None:
        raise ValueError(f"{type(pipe).__name__} cannot start at M; {', '.join(HOSTS)} can")
    return found


def _begin(
    pipe: DiffusionPipeline, host: _Host, start: float, steps: int
) -> tuple[Scheduler, dict[str, object]]:
    """A scheduler at M, set in the pipeline where its call cannot be told, and what it is told."""
    scheduler = cast(ConfigMixin, pipe.components["scheduler"])
    if host.sigmas is not None:
        begun, sigmas = host.sigmas(scheduler, start, steps)
        return begun, {"sigmas": sigmas}
    begun = start_scheduler(scheduler, start)
    if not host.packed:  # LTX's times depend on the size too
        begun.set_timesteps(steps)
    pipe.register_modules(scheduler=begun)
    return begun, {"num_inference_steps": steps}


def _draw(
    law: StartLaw, shape: tuple[int, ...], padding: int, generator: torch.Generator | None
) -> Tensor:
    """x_M [B, padding + F, C, H, W]; padded frames, in front, have the first one's law."""
    eps = torch.randn(shape[0], shape[1] + padding, *shape[2:], generator=generator)
    mean, std = (
        torch.cat([x.narrow(-4, 0, 1)] * padding + [x], -4) if x.shape[-4] > 1 else x
        for x in (law.mean, law.std)
    )
    return StartLaw(mean, std).draw(eps)


def _padding(pipe: DiffusionPipeline, frames: int) -> int:
    """Frames that CogVideoX 1.5 adds in front to fill its patches; 0 elsewhere."""
    net = pipe.components.get("transformer")
    patch = net.config.get("patch_size_t") if isinstance(net, ConfigMixin) else None
    return -frames % patch if patch else 0


def _fraction(scheduler: ConfigMixin, sigma: float) -> float:
    """The fraction at which an Euler scheduler has this sigma."""
    bottom, top = log(start_sigma(scheduler, 0.0)), log(start_sigma(scheduler, 1.0))
    if sigma <= 0:
        raise ValueError(f"sigma must be positive, not {sigma:g}")
    return (log(sigma) - bottom) / (top - bottom)


def _require_fraction(start: float) -> None:
    if not 0 < start <= 1 + 1e-12:
        raise ValueError(f"start must lie in (0, 1], not {start:g}")


def save_started(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline that starts at M; stock diffusers loads it.

    Where the scheduler is not a stock one, its file is put beside it, and loading takes
    ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``. Analytic-Init is no part
    of it: that is an argument of each call.
    """
    pipe.save_pretrained(folder)
    kind = type(pipe.components["scheduler"])
    if kind in START_SCHEDULERS.values():
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        source = Path(start_schedulers.__file__)
        index["scheduler"] = [source.stem, kind.__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        shutil.copy(source, folder / "scheduler")
