"""Exports of protein models: a folder that diffusers loads without diffdiv.

denoiser/    weights, config, and the network's own file (it needs torch and diffusers only)
scheduler/   config and the scheduler's file
protein_inverse_folding.py, model_index.json, README.md, export.json
"""

import copy
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn

from diffdiv.data.backbones import LETTERS, MASK_ID
from diffdiv.metrics.card import versions
from diffdiv.models import protein_networks
from diffdiv.models.protein_networks import ProteinTokenNet
from diffdiv.resources import resource

_README = """
# {title}

Designs protein sequences for a backbone (masked diffusion, ProteinMPNN-shaped network), trained
with diffdiv.

## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
print(pipe("structure.pdb", design="A:10-25,B", num_designs=8).fasta)  # PDB or mmCIF
texts = pipe(coordinates, num_designs=8).texts  # N, CA, C, O, [length, 4, 3], angstrom
```

The three Python files in this folder are the whole sampler and network; they need torch and
diffusers, and gemmi to read structure files. Chains are separated by a slash in texts.

## What it is

| | |
|---|---|
{rows}

## Limits

Sequences are drawn from what the network learned of its training data; whether they fold, or are
stable, has not been tested. The licence of the training data applies.
"""


def export_protein_design(
    net: ProteinTokenNet,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    num_steps: int,
    title: str,
    facts: Mapping[str, object],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a ProteinInverseFoldingPipeline; files of an earlier export are replaced.

    Args:
        net: of this architecture; unchanged.
        weights: by parameter name.
        folder: made if absent.
        num_steps: of the sampler by default.
        title, facts: for the model card (README.md).
        dtype: of the saved weights.

    Returns ``folder``.
    """
    saved = copy.deepcopy(net)
    saved.load_state_dict(weights)
    nn.Module.to(saved, dtype)
    saved.save_pretrained(folder / "denoiser")
    shutil.copy(protein_networks.__file__, folder / "denoiser" / "protein_networks.py")
    scheduler = {"_class_name": "MaskedDiffusionScheduler", "mask_token_id": MASK_ID}
    scheduler["_diffusers_version"] = version("diffusers")
    (folder / "scheduler").mkdir(exist_ok=True)
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    shutil.copy(resource("pipelines/scheduling_masked.py"), folder / "scheduler")
    shutil.copy(resource("pipelines/protein_inverse_folding.py"), folder)
    index = {
        "_class_name": ["protein_inverse_folding", "ProteinInverseFoldingPipeline"],
        "_diffusers_version": version("diffusers"),
        "denoiser": ["protein_networks", type(net).__name__],
        "scheduler": ["scheduling_masked", "MaskedDiffusionScheduler"],
        "alphabet": LETTERS,
        "num_inference_steps": num_steps,
    }
    _write(folder / "model_index.json", index)
    _write(folder / "export.json", {"call": {"num_inference_steps": num_steps}, **facts})
    rows = {**facts, "steps of the sampler": num_steps, "dtype": str(dtype)[6:], **versions()}
    lines = "\n".join(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items())
    card = ModelCardData(library_name="diffusers", tags=["diffdiv", "masked-diffusion", "biology"])
    text = _README.format(title=_cell(title), rows=lines)
    ModelCard(f"---\n{card}\n---\n{text}").save(folder / "README.md")
    return folder


def is_protein_design(path: Path) -> bool:
    """Whether a run or export holds such a network; False where there is nothing."""
    config = _export_of(path) / "denoiser" / "config.json"
    if not config.is_file():
        return False
    return bool(json.loads(config.read_text("utf-8")).get("_class_name") == "ProteinTokenNet")


def load_protein_net(path: Path) -> ProteinTokenNet:
    """The frozen network of an export, or of a run's ``export/``, in float32; no file is run.

    Raises:
        ValueError: if there is none.
    """
    if not is_protein_design(path):
        raise ValueError(f"{path}: no ProteinTokenNet there (see train/inverse_folding.py)")
    net = ProteinTokenNet.from_pretrained(
        _export_of(path) / "denoiser",
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
    )
    return net.eval().requires_grad_(False)


def _export_of(path: Path) -> Path:
    return path / "export" if (path / "config.yaml").is_file() else path


def _write(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _cell(value: object) -> str:
    """One line without what Markdown would take for a cell, a tag or code."""
    return " ".join(str(value).translate(str.maketrans("|`<>[]", "      ")).split())
