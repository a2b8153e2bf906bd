"""Exports of fine-tuned image-to-video models: the stock pipeline with the new network.

Its call stays the stock one, on the clean image: for Stable Video Diffusion with
``noise_aug_strength=0``, since the level of the image is what the network was told in training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from diffdiv.models.adapters import Lora, SharedBase, merged_state_dict
from diffdiv.models.image_to_video import open_host

_README = """---
library_name: diffusers
pipeline_tag: image-to-video
tags: [diffdiv, image-to-video]
---

# Image-to-video model fine-tuned against conditional image leakage

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
frames = pipe(image{call}).frames[0]
```

Trained with diffdiv (TimeNoise, arXiv 2406.15735, or one of its controls). The image was degraded
in training as told below; in use it stays clean. The licence of the base model applies.

| | |
|---|---|
{rows}
"""


def export_video(
    base: Path,
    weights: Mapping[str, Tensor],
    out: Path,
    *,
    lora: Lora | None,
    facts: Mapping[str, object],
) -> Path:
    """Write the base pipeline with these weights in its network, in float32.

    Args:
        base: folder of the pipeline that was fine-tuned.
        weights: of the network, or of the adapter on it, by parameter name.
        out: the new folder; an earlier export there is replaced.
        lora: the adapter's settings; it is merged. None: ``weights`` are the whole network.
        facts: for export.json and README.md.

    Returns ``out``. ValueError for a folder that is not empty and no export.
    """
    if out.exists() and any(out.iterdir()) and not (out / "export.json").is_file():
        raise ValueError(f"{out}: not empty, and no export; choose another folder")
    host = open_host(base, torch.device("cpu"))
    if lora is not None:
        shared = SharedBase(host.net)
        view = shared.add(
            "model", rank=lora.rank, alpha=lora.alpha, targets=host.lora_targets, seed=0
        )
        view.load_state_dict(weights)
        weights = merged_state_dict(view)
        host = open_host(base, torch.device("cpu"))
    host.net.load_state_dict(weights)
    call = {"noise_aug_strength": 0.0} if host.tells_level else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        stage = Path(folder) / "new"
        host.pipe.save_pretrained(stage)
        for path in stage.rglob("*.json"):
            _forget_paths(path)
        (stage / "export.json").write_text(
            json.dumps({"call": call, **facts}, indent=2) + "\n", encoding="utf-8"
        )
        told = ", ".join(["", *(f"{key}={value}" for key, value in call.items())])
        rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
        (stage / "README.md").write_text(_README.format(call=told, rows=rows), encoding="utf-8")
        if out.exists():
            out.rename(Path(folder) / "old")
        stage.rename(out)
    return out


def _forget_paths(path: Path) -> None:
    """Drop the local paths that from_pretrained records."""
    content = json.loads(path.read_text("utf-8"))
    if isinstance(content, dict) and {"_name_or_path", "name_or_path"} & content.keys():
        kept = {k: v for k, v in content.items() if k not in ("_name_or_path", "name_or_path")}
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
