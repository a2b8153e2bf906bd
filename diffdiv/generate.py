"""Images as files, from anything that diffusers can load from a local folder."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from diffdiv.resources import find


def load_pipeline(path: Path) -> DiffusionPipeline:
    """The pipeline in a local diffusers folder or in the ``export/`` of a run folder.

    Only safetensors are read. Code in the folder runs only if it is, byte for byte, a pipeline
    file that ships with diffdiv.

    Raises:
        ValueError: if there is no pipeline, or it brings other code.
    """
    folder = _pipeline_folder(path)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: no model_index.json there, so it is not a diffusers pipeline")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    custom = isinstance(index["_class_name"], list)
    if custom:
        name = f"{index['_class_name'][0]}.py"
        ours = find(f"pipelines/{name}")
        parts = [v for k, v in index.items() if isinstance(v, list) and not k.startswith("_")]
        is_ours = ours is not None and ours.read_bytes() == (folder / name).read_bytes()
        if not is_ours or {part[0] for part in parts} - {"diffusers", "transformers", None}:
            raise ValueError(f"{folder}: brings code that does not ship with diffdiv; not loaded")
    pipe = DiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, trust_remote_code=custom
    )
    assert isinstance(pipe, DiffusionPipeline)
    return pipe


def sample_path(path: Path, prompts: Sequence[str], num: int, seed: int, out: Path) -> list[Path]:
    """Generate PNG files from an export, a run or any local diffusers pipeline.

    An export is called as it was made for, another pipeline with its own defaults. The i-th image
    drawn has a generator of its own, seeded with seed + i.

    Args:
        path: folder, see :func:`load_pipeline`.
        prompts: texts, or class numbers as texts for class-conditional networks; empty for
            unconditional ones.
        num: number of images for each prompt.
        seed: of the first image.
        out: folder for the images; made if absent.

    Returns:
        The files written, in order.

    Raises:
        ValueError: if the prompts are not what the pipeline needs.
    """
    pipe = load_pipeline(path)
    pipe.set_progress_bar_config(disable=True)
    # the base class declares no __call__
    generate = cast(Callable[..., ImagePipelineOutput], pipe)
    record = _pipeline_folder(path) / "export.json"
    call = json.loads(record.read_text("utf-8"))["call"] if record.is_file() else {}
    text = "tokenizer" in pipe.components
    if text and not prompts:
        raise ValueError("prompts: none given, but this pipeline makes images from text")
    if not text and not all(prompt.isdecimal() for prompt in prompts):
        raise ValueError("prompts: this pipeline knows no text, only class numbers")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for i, prompt in enumerate(prompt for prompt in prompts or [""] for _ in range(num)):
        if prompt:
            call |= {"prompt": prompt} if text else {"class_labels": int(prompt)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + i)  # SD3 and FLUX keep the generator from their scheduler
            noise = torch.Generator().manual_seed(seed + i)
            image = generate(generator=noise, **call).images[0]
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40]
        files.append(out / f"{f'{i:05d}-{slug}'.strip('-')}.png")
        image.save(files[-1])
    return files


def _pipeline_folder(path: Path) -> Path:
    return path / "export" if (path / "config.yaml").is_file() else path
