"""Proof that an export is right: stock diffusers, in a process that cannot import diffdiv.

The trainer's own x0 for fixed noise and conditions is written down; a fresh interpreter loads the
export and makes the plain call a user would make; the two must agree.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from diffdiv.core.noise import normal
from diffdiv.runtime.student import open_run

TOLERANCE = 1e-4  # largest difference over largest |x0|, both in float32
_INDICES = range(4)
_READER = """
import json, sys
sys.modules["diffdiv"] = None  # any import of it raises
from pathlib import Path
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from safetensors.torch import load_file, save_file

export, work = Path(sys.argv[1]), Path(sys.argv[2])
asked = json.loads((work / "asked.json").read_text())
z = load_file(work / "z.safetensors")["z"]
if asked["prompts"] is not None:
    pipe = AutoPipelineForText2Image.from_pretrained(export)
    pipe.set_progress_bar_config(disable=True)
    x0 = pipe(asked["prompts"], latents=z, num_inference_steps=1, guidance_scale=0,
              output_type="latent").images
    timesteps = [int(t) for t in pipe.scheduler.timesteps]
else:
    pipe = DiffusionPipeline.from_pretrained(export, trust_remote_code=True)
    x0 = pipe(class_labels=asked["labels"], latents=z, output_type="x0").images
    timesteps = None
save_file({"x0": x0.contiguous()}, work / "x0.safetensors")
(work / "told.json").write_text(json.dumps({"timesteps": timesteps}))
"""


def verify_export(run: Path, export: Path) -> float:
    """Compare an export with the run it came from.

    Args:
        run: run folder.
        export: its export (averaged weights of the first half-life, float32).

    Returns:
        Largest difference of x0, relative to the largest |x0|.

    Raises:
        RuntimeError: if the export does not load, runs at another time, or differs by more than
            ``TOLERANCE``.
    """
    opened = open_run(run, torch.device("cpu"))
    source, generator = opened.source, opened.generator
    z = normal(source.shape, seed=0, purpose="verify", indices=_INDICES)
    cond = source.conditions(_INDICES)
    with torch.no_grad():
        expected = generator(z, cond)
    prompts = source.captions(_INDICES) if cond.text is not None else None
    labels = None if cond.label is None else cond.label.tolist()
    with TemporaryDirectory() as folder:
        work = Path(folder)
        save_file({"z": z}, work / "z.safetensors")
        (work / "asked.json").write_text(json.dumps({"prompts": prompts, "labels": labels}))
        command = [sys.executable, "-c", _READER, str(export.resolve()), folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            raise RuntimeError(f"{export}: stock diffusers could not run it: {' '.join(reason)}")
        got = load_file(work / "x0.safetensors")["x0"]
        timesteps = json.loads((work / "told.json").read_text())["timesteps"]
    if timesteps is not None and timesteps != [int(generator.t_init)]:
        raise RuntimeError(f"{export}: ran at timesteps {timesteps}, not [{generator.t_init:g}]")
    difference = float((got - expected).abs().max() / expected.abs().max())
    if difference > TOLERANCE:
        raise RuntimeError(
            f"{export}: x0 differs from the trainer's by {difference:.1e} (relative)"
        )
    return difference
