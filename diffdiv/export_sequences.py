"""Exports of sequence models: a folder that diffusers loads without diffdiv.

denoiser/    weights, config, and the network's own file (it needs torch and diffusers only)
scheduler/   config and the scheduler's file
masked_sequences.py, model_index.json, README.md, export.json
"""

import copy
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn

from diffdiv.export_folder import staged
from diffdiv.metrics.card import versions
from diffdiv.models import token_networks
from diffdiv.models.token_networks import DilatedTokenNet, TransformerTokenNet
from diffdiv.models.tokens import TokenDenoiser, token_denoiser
from diffdiv.resources import resource

TokenNet = DilatedTokenNet | TransformerTokenNet
NETWORKS: Mapping[str, type[TokenNet]] = {
    "DilatedTokenNet": DilatedTokenNet,
    "TransformerTokenNet": TransformerTokenNet,
}
#: whose runs end with a pipeline in RUN/export
RECIPES = ("masked_pretrain", "inverse_folding", "drakes")
_README = """
# {title}

Masked diffusion over sequences of {length} letters ({alphabet}), trained with diffdiv.

## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
texts = pipe(batch_size=4).texts
texts = pipe("NNNNTTTACNNNN", batch_size=4).texts  # N: to be designed, the rest is kept
```

The three Python files in this folder are the whole sampler and network; they need torch and
diffusers only.

## What it is

| | |
|---|---|
{rows}

## Limits

Sequences are drawn from what the network learned of its training data; whether they do anything in
a cell has not been tested. The licence of the training data applies.
"""


def export_masked_sequences(
    net: TokenNet,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    length: int,
    num_steps: int,
    title: str,
    facts: Mapping[str, object],
    dtype: torch.dtype = torch.float32,
    alphabet: str = "ACGT",
) -> Path:
    """Write a MaskedSequencesPipeline; files of an earlier export are replaced.

    Args:
        net: of this architecture; unchanged.
        weights: by parameter name.
        folder: made if absent.
        length: of a sequence by default.
        num_steps: of the sampler by default.
        title, facts: for the model card (README.md).
        dtype: of the saved weights.
        alphabet: letter of each token.

    Returns ``folder``.
    """
    saved = copy.deepcopy(net)
    saved.load_state_dict(weights)
    nn.Module.to(saved, dtype)
    saved.save_pretrained(folder / "denoiser")
    shutil.copy(token_networks.__file__, folder / "denoiser" / "token_networks.py")
    scheduler = {"_class_name": "MaskedDiffusionScheduler", "mask_token_id": len(alphabet)}
    scheduler["_diffusers_version"] = version("diffusers")
    (folder / "scheduler").mkdir(exist_ok=True)
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    shutil.copy(resource("pipelines/scheduling_masked.py"), folder / "scheduler")
    shutil.copy(resource("pipelines/masked_sequences.py"), folder)
    index = {
        "_class_name": ["masked_sequences", "MaskedSequencesPipeline"],
        "_diffusers_version": version("diffusers"),
        "denoiser": ["token_networks", type(net).__name__],
        "scheduler": ["scheduling_masked", "MaskedDiffusionScheduler"],
        "alphabet": alphabet,
        "length": length,
        "num_inference_steps": num_steps,
    }
    _write(folder / "model_index.json", index)
    call = {"num_inference_steps": num_steps}
    _write(folder / "export.json", {"call": call, **facts})
    rows = {**facts, "steps of the sampler": num_steps, "dtype": str(dtype)[6:], **versions()}
    text = _README.format(
        title=title,
        length=length,
        alphabet=alphabet,
        rows="\n".join(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items()),
    )
    card = ModelCardData(library_name="diffusers", tags=["diffdiv", "masked-diffusion", "biology"])
    ModelCard(f"---\n{card}\n---\n{text}").save(folder / "README.md")
    return folder


def load_token_denoiser(path: Path) -> TokenDenoiser:
    """The denoiser of an export, or of a run's ``export/``, in float32; no file there is run.

    Raises:
        ValueError: if there is no network of models/token_networks.py.
    """
    folder = _export_of(path)
    config = folder / "denoiser" / "config.json"
    name = str(json.loads(config.read_text("utf-8")).get("_class_name"))
    if name not in NETWORKS:
        raise ValueError(f"{config}: {name} is not one of {', '.join(NETWORKS)}")
    net = NETWORKS[name].from_pretrained(
        folder / "denoiser", dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return token_denoiser(net.eval().requires_grad_(False))


def stored_length(path: Path) -> int:
    """Length of the sequences of an export, or of a run's ``export/``; ValueError without one."""
    return int(json.loads((_export_of(path) / "model_index.json").read_text("utf-8"))["length"])


def is_sequence_run(run: Path) -> bool:
    """Whether a folder holds a run of one of :data:`RECIPES`; False where there is nothing."""
    file = run / "config.yaml"
    return file.is_file() and yaml.safe_load(file.read_text("utf-8")).get("recipe") in RECIPES


def copy_export(run: Path, out: Path, *, ema: int | None = None, force: bool = False) -> Path:
    """Copy what a finished run of sequences exported, with its model card.

    Args:
        run: run folder.
        out: the new folder.
        ema: None, or the half-life of the run's average, in sequences.
        force: replace an earlier export.

    Returns ``out``.

    Raises:
        ValueError: if the run has not finished, ``ema`` is another average (the figures in the
            model card would be those of other weights), or ``out`` may not be overwritten.
    """
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    has = config["ema_half_life"]
    if ema not in (None, has):
        raise ValueError(f"ema: {ema}, but {run} measured and exports one average, that of {has}")
    if not (run / "export" / "export.json").is_file():
        raise ValueError(f"{run}: has not finished; 'diffdiv train' with its config goes on")
    with staged(out, force, run) as stage:
        shutil.copytree(run / "export", stage, dirs_exist_ok=True)
    return out


def _export_of(path: Path) -> Path:
    folder = path / "export" if (path / "config.yaml").is_file() else path
    for file in ("denoiser/config.json", "model_index.json"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: no {file}, so it is no export of sequences")
    return folder


def _write(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _cell(value: object) -> str:
    """One line without what Markdown would take for a cell, a tag or code."""
    return " ".join(str(value).translate(str.maketrans("|`<>[]", "      ")).split())
