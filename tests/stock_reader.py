"""Exports against what was trained.

:func:`read_exports`: what stock diffusers makes of them, in a process that cannot import diffdiv.
It loads every pipeline in ROOT/exports and, on the teacher that ROOT/NAME.txt names, every adapter
in ROOT/adapters; makes the call of its export.json from the noise in ROOT/z.safetensors; and writes
down x0, all noise it took, the times it ran and the step counts it refused.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffdiv.models.adapters import SharedBase
from diffdiv.models.backbones import PromptEncoder, load_denoiser
from diffdiv.models.families import lora_targets
from diffdiv.models.generator import Generator, InputConvention

READER = """
import inspect, json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffdiv":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
import diffusers, torch
from safetensors.torch import load_file, save_file

root = Path(sys.argv[1])
found, facts = {}, {}

def pipelines():
    for folder in sorted((root / "exports").iterdir()):
        yield folder.name, diffusers.AutoPipelineForText2Image.from_pretrained(folder), folder
    for folder in sorted((root / "adapters").iterdir()):
        teacher = (root / f"{folder.name}.txt").read_text()
        base = diffusers.AutoPipelineForText2Image.from_pretrained(teacher)
        kind = json.loads((folder / "scheduler/scheduler_config.json").read_text())["_class_name"]
        base.scheduler = getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler")
        base.load_lora_weights(folder)
        yield f"{folder.name}/adapter", base, folder

for name, pipe, folder in pipelines():
    pipe.set_progress_bar_config(disable=True)
    z = load_file(root / "z.safetensors")["z"]
    call = json.loads((folder / "export.json").read_text())["call"]
    steps = call.pop("num_inference_steps")
    call |= {"prompt": sys.argv[2:], "output_type": "latent"}
    if "use_resolution_binning" in inspect.signature(type(pipe).__call__).parameters:
        call["use_resolution_binning"] = False
    flux = isinstance(pipe, diffusers.FluxPipeline)
    if flux:
        z = pipe._pack_latents(z, *z.shape)
        call |= {"height": 8 * pipe.vae_scale_factor, "width": 8 * pipe.vae_scale_factor}
    torch.manual_seed(5)
    call |= {"latents": z, "generator": torch.Generator().manual_seed(5)}
    x0 = pipe(num_inference_steps=steps, **call).images
    again = torch.Generator().manual_seed(5)
    draws = [x0, z] + [torch.randn(z.shape, generator=again) for _ in range(steps - 1)]
    if flux:
        size = 8 * pipe.vae_scale_factor
        draws = [pipe._unpack_latents(d, size, size, pipe.vae_scale_factor) for d in draws]
    found[f"{name}/x0"], found[f"{name}/z"] = draws[0], torch.cat(draws[1:], 1)
    facts[name] = {"times": pipe.scheduler.timesteps.tolist(), "refused": []}
    for other in {1, steps - 1, steps + 1} - {0, steps}:
        try:
            pipe(num_inference_steps=other, **call)
        except ValueError:
            facts[name]["refused"].append(other)
facts["modules"] = [name for name in sys.modules if name.partition(".")[0] == "diffdiv"]
save_file({k: v.contiguous() for k, v in found.items()}, root / "found.safetensors")
(root / "facts.json").write_text(json.dumps(facts))
"""


def read_exports(root: Path, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Tensors "NAME/x0" and "NAME/z", and by NAME "times" and "refused"; "modules" of diffdiv."""
    subprocess.run([sys.executable, "-I", "-c", READER, root, *prompts], check=True)
    return load_file(root / "found.safetensors"), json.loads((root / "facts.json").read_text())


def trained_student(
    teacher: Path,
    weights: Mapping[str, Tensor],
    t_init: float,
    convention: InputConvention,
    steps: int,
    lora: dict[str, int] | None,
) -> Generator:
    """The student as it was trained: an adapter is on its base, not merged into it."""
    denoiser = load_denoiser(teacher)
    net = denoiser.net
    if lora:
        options = {"rank": lora["rank"], "alpha": lora["alpha"], "seed": 0}
        net = SharedBase(net).add("student", targets=lora_targets(net), **options)
    net.load_state_dict(weights)
    return Generator(denoiser.with_net(net), t_init, convention, steps)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest |b|."""
    return float((a - b).abs().max() / b.abs().max())


def check_export(
    found: dict[str, Tensor], facts: dict, student: Generator, teacher: Path, prompts: Sequence[str]
) -> None:
    """One export ("x0", "z"; "times", "refused") against its student: x0, times, wrong counts."""
    cond, steps = PromptEncoder(teacher)(prompts), student.num_steps
    assert found["z"].shape[1] == steps * found["x0"].shape[1]
    with torch.no_grad():
        x0 = student(found["z"], cond)
        untrained = student.with_net(load_denoiser(teacher).net)(found["z"], cond)
    assert distance(found["x0"], x0) < 1e-4
    assert distance(untrained, x0) > 1e-2, "the test would not see the student's weights"
    schedule = student.denoiser.schedule
    times = schedule.net_time(torch.tensor(student.times, dtype=torch.float64)).tolist()
    assert facts["times"] == pytest.approx(times, rel=1e-6)
    if schedule.family == "flow":  # one step: Euler's scheduler runs any number
        refused = {1, steps - 1, steps + 1} if steps > 1 else set()
    else:  # fewer steps stay among the times that were trained
        refused = {steps + 1} if student.convention == "unit" else set()
    assert set(facts["refused"]) == refused
