"""Proof that an export is right: stock diffusers, in a process that cannot import diffdiv.

A fresh interpreter loads the export, makes the plain call a user would make, and writes down x0,
the noise it took and the times it ran; the trainer's own generator must agree with them.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdiv.core.noise import normal
from diffdiv.models.generator import Generator
from diffdiv.runtime.student import open_run

TOLERANCE = 1e-4  # largest difference over largest |x0|, both in float32
_INDICES = range(4)
_READER = """
import inspect, json, sys
sys.modules["diffdiv"] = None  # any import of it raises
import diffusers, torch
from safetensors.torch import load_file, save_file

folder, base, scheduler, call = sys.argv[1], *map(json.loads, sys.argv[2:])
pipe = diffusers.DiffusionPipeline.from_pretrained(base or folder, trust_remote_code=not base)
if base:
    kind = getattr(diffusers, scheduler)
    pipe.scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    pipe.load_lora_weights(folder)
if "use_resolution_binning" in inspect.signature(type(pipe).__call__).parameters:
    call["use_resolution_binning"] = False  # it refuses all but the sizes of big models
z = load_file("z.safetensors")["z"]
packed, (height, width) = type(pipe).__name__ == "FluxPipeline", z.shape[2:]
if packed:
    size = [pipe.vae_scale_factor * side for side in (height, width)]
    z = pipe._pack_latents(z, *z.shape)
    call |= {"height": size[0], "width": size[1]}
torch.manual_seed(0)  # for the pipelines that keep the generator from their scheduler
x0 = pipe(latents=z, generator=torch.Generator().manual_seed(0), **call).images
again = torch.Generator().manual_seed(0)
steps = range(1, call["num_inference_steps"])
draws = [x0, z, *(torch.randn(z.shape, generator=again) for _ in steps)]
if packed:
    draws = [pipe._unpack_latents(draw, *size, pipe.vae_scale_factor) for draw in draws]
x0, *draws = draws
found = {"x0": x0, "z": torch.cat(draws, 1), "times": pipe.scheduler.timesteps.double()}
save_file({name: value.contiguous() for name, value in found.items()}, "found.safetensors")
"""


def verify_export(run: Path, export: Path) -> float:
    """Compare an export, whole or an adapter, with the run it came from.

    Args:
        run: run folder.
        export: its export (averaged weights of the first half-life, float32).

    Returns:
        Largest difference of x0, relative to the largest |x0|.

    Raises:
        RuntimeError: if the export does not load, runs other times, or differs by more than
            ``TOLERANCE``.
    """
    opened = open_run(run, torch.device("cpu"))
    generator, cond = opened.generator, opened.source.conditions(_INDICES)
    call = json.loads((export / "export.json").read_text("utf-8"))["call"]
    if cond.text is not None:
        call |= {"prompt": opened.source.captions(_INDICES), "output_type": "latent"}
    else:
        call |= {"output_type": "x0"}
    if cond.label is not None:
        call["class_labels"] = cond.label.tolist()
    z = normal(opened.source.shape, seed=0, purpose="verify", indices=_INDICES)
    found = _in_a_fresh_process(export, opened.teacher_path, call, z)
    if cond.text is not None and isinstance(generator, Generator):
        _compare_times(export, found["times"], generator)
    with torch.no_grad():
        expected = generator(found["z"], cond)
    difference = float((found["x0"] - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{export}: x0 differs from the trainer's by {difference:.1e} of it")
    return difference


def _in_a_fresh_process(
    export: Path, teacher: Path, call: dict[str, object], z: Tensor
) -> dict[str, Tensor]:
    """What stock diffusers makes of ``export`` and z: x0, all noise it took, scheduler times."""
    base = scheduler = None
    if (export / "pytorch_lora_weights.safetensors").is_file():
        config = json.loads((export / "scheduler/scheduler_config.json").read_text("utf-8"))
        base, scheduler = str(teacher.resolve()), config["_class_name"]
    arguments = [str(export.resolve()), *map(json.dumps, (base, scheduler, call))]
    with TemporaryDirectory() as folder:
        save_file({"z": z}, Path(folder) / "z.safetensors")
        command = [sys.executable, "-c", _READER, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            raise RuntimeError(f"{export}: stock diffusers could not run it: {' '.join(reason)}")
        return load_file(Path(folder) / "found.safetensors")


def _compare_times(export: Path, times: Tensor, generator: Generator) -> None:
    t = torch.tensor(generator.times, dtype=torch.float64)
    expected = generator.denoiser.schedule.net_time(t)
    if times.shape != expected.shape or not torch.allclose(times, expected, rtol=1e-5):
        told = f"{times.tolist()}, the student's are {expected.tolist()}"
        raise RuntimeError(f"{export}: the pipeline runs the times {told}")
