"""Proof that an export of sequences is right: stock diffusers, in a process without diffdiv.

A fresh interpreter loads the export, predicts tokens of partly masked sequences and generates; the
weights in the run's newest state must predict the same, and generate the same letters.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdiv.core.noise import uniform
from diffdiv.export_sequences import load_token_denoiser, stored_length
from diffdiv.generate import load_pipeline
from diffdiv.generate_sequences import Drawn
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.runtime.checkpoint import newest_valid, read_tensors

TOLERANCE = 1e-4  # largest difference of log-probabilities, nats
_ROWS = 8
_READER = """
import sys
sys.modules["diffdiv"] = None  # any import of it raises
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
x = load_file("x.safetensors")["x"]
with torch.no_grad():
    logits = pipe.denoiser(x).logits
drawn = pipe(batch_size=4, generator=torch.Generator().manual_seed(0)).sequences
save_file({"logits": logits.contiguous(), "drawn": drawn.contiguous()}, "found.safetensors")
"""


def verify_sequences(run: Path, export: Path) -> float:
    """Compare an export of sequences with the run it came from.

    Args:
        run: run folder of train/drakes.py.
        export: its export, float32.

    Returns:
        Largest difference of log-probabilities, nats.

    Raises:
        RuntimeError: if the export does not load, predicts otherwise (by more than ``TOLERANCE``),
            or generates other sequences than the same files in this process.
        ValueError: if the run holds no valid state.
    """
    state, trained = newest_valid(run), load_token_denoiser(export)
    if state is None:
        raise ValueError(f"{run}: no valid state there to compare the export with")
    half_life = json.loads((state / "state.json").read_bytes())["config"]["ema_half_life"]
    trained.net.load_state_dict(read_tensors(state, f"policy.ema-{half_life}"))
    x = _partly_masked(trained, stored_length(export))
    found = _in_a_fresh_process(export, x)
    with torch.no_grad():
        expected = trained.log_probs(x)
    masked = (x == trained.mask_id)[..., None]
    told = torch.log_softmax(found["logits"], -1)
    difference = float(torch.where(masked, told - expected, 0.0).abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{export}: predictions differ from the trainer's by {difference:.1e}")
    if not torch.equal(found["drawn"], _drawn_here(export)):
        raise RuntimeError(f"{export}: another process generates other sequences")
    return difference


def _partly_masked(denoiser: TokenDenoiser, length: int) -> Tensor:
    """Random sequences with the first none, then more and more, places masked [8, L]."""
    draws = [
        uniform(seed=row, purpose="verify", indices=range(2 * length)).view(2, length)
        for row in range(_ROWS)
    ]
    letters, order = torch.stack(draws).unbind(1)
    tokens = (letters * denoiser.num_tokens).long()
    share = torch.linspace(0.1, 1, _ROWS)[:, None]
    return torch.where(order < share, denoiser.mask_id, tokens)


def _drawn_here(export: Path) -> Tensor:
    pipe = load_pipeline(export)
    pipe.set_progress_bar_config(disable=True)
    generate = cast(Callable[..., Drawn], pipe)  # the base class declares no __call__
    return generate(batch_size=4, generator=torch.Generator().manual_seed(0)).sequences


def _in_a_fresh_process(export: Path, x: Tensor) -> dict[str, Tensor]:
    with TemporaryDirectory() as folder:
        save_file({"x": x}, Path(folder) / "x.safetensors")
        command = [sys.executable, "-c", _READER, str(export.resolve())]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            raise RuntimeError(f"{export}: stock diffusers could not run it: {' '.join(reason)}")
        return load_file(Path(folder) / "found.safetensors")
