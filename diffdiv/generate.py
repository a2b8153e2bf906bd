"""Samples as files, from anything that diffusers can load from a local folder."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from diffdiv.data.structures import read_backbone
from diffdiv.generate_designs import open_design_rewards, sample_designs
from diffdiv.generate_sequences import open_rewards, sample_sequences
from diffdiv.models import protein_networks, token_networks
from diffdiv.resources import find
from diffdiv.sample_options import SEQUENCES, check_options, pipeline_folder

_EXPORTED_NETWORKS = {  # beside their weights
    "token_networks": Path(token_networks.__file__),
    "protein_networks": Path(protein_networks.__file__),
}


def load_pipeline(path: Path) -> DiffusionPipeline:
    """The pipeline in a local diffusers folder or in the ``export/`` of a run folder.

    Only safetensors are read. Code in the folder runs only if it is, byte for byte, a file that
    ships with diffdiv; files of that kind which the folder lacks are taken from here.

    Raises:
        ValueError: if there is no pipeline, or it brings other code.
    """
    folder = pipeline_folder(path)
    code = _own_code(folder)
    if all((folder / place).is_file() for place in code):
        return _from_pretrained(folder, trust=bool(code))
    with TemporaryDirectory() as stage:
        whole = Path(stage) / "pipeline"
        shutil.copytree(folder, whole)
        for place, ours in code.items():
            shutil.copyfile(ours, whole / place)
        return _from_pretrained(whole, trust=True)


def _from_pretrained(folder: Path, *, trust: bool) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, trust_remote_code=trust
    )
    assert isinstance(pipe, DiffusionPipeline)
    return pipe


def _own_code(folder: Path) -> dict[Path, Path]:
    """The Python files that the pipeline runs from its folder, and those of ours they must equal.

    Raises:
        ValueError: if the folder wants, or holds, any other.
    """
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    modules = {
        Path(name) / f"{value[0]}.py": value[0]
        for name, value in index.items()
        if isinstance(value, list) and value[0] not in ("diffusers", "transformers", None)
        if not name.startswith("_")
    }
    if isinstance(index["_class_name"], list):
        modules[Path(f"{index['_class_name'][0]}.py")] = index["_class_name"][0]
    code = {}
    for place, module in modules.items():
        ours = _EXPORTED_NETWORKS.get(module) or find(f"pipelines/{module}.py")
        there, is_plain = folder / place, all(part.isidentifier() for part in place.parts[:-1])
        if (
            ours is None
            or not is_plain
            or (there.is_file() and there.read_bytes() != ours.read_bytes())
        ):
            raise ValueError(f"{folder}: brings code that does not ship with diffdiv; not loaded")
        code[place] = ours
    return code


def sample_path(
    path: Path,
    prompts: Sequence[str],
    num: int,
    seed: int,
    out: Path,
    reward: str | None = None,
    *,
    structure: Path | None = None,
    design: str | None = None,
) -> list[Path]:
    """Generate PNG files, or FASTA, from an export, a run or any local diffusers pipeline.

    An export is called as it was made for, another pipeline with its own defaults. The i-th sample
    drawn has a generator of its own, seeded with seed + i.

    Args:
        path: folder, see :func:`load_pipeline`.
        prompts: texts, or class numbers as texts for class-conditional networks, or templates for
            DNA (N: to be designed); empty for unconditional networks and for proteins.
        num: number of samples for each prompt, or for the structure.
        seed: of the first sample.
        out: folder for the files; made if absent.
        reward: what sequences are scored by, see :func:`diffdiv.generate_sequences.open_rewards`
            and, of proteins, :func:`diffdiv.generate_designs.open_design_rewards`.
        structure: proteins only: the PDB or mmCIF file to design for.
        design: positions of it, see :func:`diffdiv.data.backbones.parse_design`; None: all.

    Returns:
        The files written, in order: NAME.fa of a structure, sequences.fa of DNA.

    Raises:
        ValueError: if these are not what the pipeline needs, before it is loaded where possible.
    """
    check_options(path, prompts, reward, structure, design)
    if structure is not None:
        backbone = read_backbone(structure, design=design)
        rewards = open_design_rewards(reward, backbone)
        pipe = _quiet(path)
        out.mkdir(parents=True, exist_ok=True)
        return [sample_designs(pipe, backbone, num, seed, out / f"{backbone.name}.fa", rewards)]
    pipe = _quiet(path)
    if type(pipe).__name__ == SEQUENCES:
        rewards = open_rewards(reward)
        out.mkdir(parents=True, exist_ok=True)
        return [sample_sequences(pipe, prompts, num, seed, out / "sequences.fa", rewards)]
    return _sample_images(pipe, pipeline_folder(path) / "export.json", prompts, num, seed, out)


def _sample_images(
    pipe: DiffusionPipeline, record: Path, prompts: Sequence[str], num: int, seed: int, out: Path
) -> list[Path]:
    """PNG files; ``record`` holds how an export is called."""
    # the base class declares no __call__
    generate = cast(Callable[..., ImagePipelineOutput], pipe)
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


def _quiet(path: Path) -> DiffusionPipeline:
    pipe = load_pipeline(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe
