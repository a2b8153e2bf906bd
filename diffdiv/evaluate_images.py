"""Images of captions, made by a run's student or any pipeline, and kept one by one as files.

Image n follows from its prompt and (seed, n) alone, whatever the batch: only the rounding of a
network differs between batches, which can move a pixel by a level. So generation may stop anywhere
and go on later.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from diffdiv.core.noise import normal, uniform
from diffdiv.data.cache import fingerprint
from diffdiv.generate import load_pipeline
from diffdiv.metrics.card import file_sha256
from diffdiv.models.backbones import PromptEncoder
from diffdiv.runtime.checkpoint import newest_valid
from diffdiv.runtime.student import open_run

Dtype = Literal["fp32", "bf16"]
_PURPOSE = "evaluation"
_RECORD = "images.json"


@dataclass(frozen=True)
class Maker:
    """What makes images of captions.

    Attributes:
        name: of its row in evaluation.json.
        network_evaluations: for one image.
        facts: all that decides its images besides prompts and their numbers.
        draw: prompts and numbers of images -> images.
        half_life: of the averaged weights, in images; None = not a run's.
    """

    name: str
    network_evaluations: int
    facts: Mapping[str, object]
    draw: Callable[[Sequence[str], Sequence[int]], list[Image.Image]]
    half_life: int | None = None


def run_maker(path: Path, *, seed: int, device: torch.device, dtype: Dtype) -> Maker:
    """The student of a text-to-image run, with its first averaged weights.

    Args:
        path: run folder.
        seed: of the noise.
        device: to run on.
        dtype: "bf16" = autocast.

    Raises:
        ValueError: if the folder holds no such run.
        CheckpointError: if it has no valid state.
    """
    opened = open_run(path, device)
    encode = PromptEncoder(opened.teacher_path, device=device)
    student, shape = opened.generator, opened.generator.noise_shape(opened.source.shape)

    @torch.no_grad()
    def draw(prompts: Sequence[str], numbers: Sequence[int]) -> list[Image.Image]:
        z = normal(shape, seed=seed, purpose=_PURPOSE, indices=numbers).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            x0 = student(z, encode(prompts).to(device))
        images = ((opened.source.decode(x0) + 1) * 127.5).round().to(torch.uint8)
        return [to_pil_image(image) for image in images]

    state = newest_valid(path)
    assert state is not None  # open_run has read it
    stem = f"student.ema-{opened.half_life}"
    facts = {
        "weights": file_sha256(state / f"{stem}.safetensors"),
        "times": list(student.times),
        "input": student.convention,
        "seed": seed,
        "dtype": dtype,
    }
    return Maker(
        f"student, {student.description}", student.num_steps, facts, draw, opened.half_life
    )


def pipeline_maker(
    path: Path,
    *,
    seed: int,
    device: torch.device,
    dtype: Dtype,
    steps: int | None = None,
    guidance: float | None = None,
) -> Maker:
    """An export, called as it was made for, or another local text-to-image pipeline.

    The check that blackens unsafe images is left out: it would be measured as part of the model.

    Args:
        path: pipeline folder.
        seed, device: as in :func:`run_maker`.
        dtype: of the weights.
        steps, guidance: of another pipeline; None = its own defaults.

    Raises:
        ValueError: if there is no such pipeline, or an export is to be called otherwise.
    """
    pipe, record = load_pipeline(path), path / "export.json"
    if "tokenizer" not in pipe.components:
        raise ValueError(f"{path}: this pipeline makes no images from text")
    if "safety_checker" in pipe.components:
        pipe.register_modules(safety_checker=None)
    pipe.to(device, torch.bfloat16 if dtype == "bf16" else torch.float32)
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    call = {key: value for key, value in given.items() if value is not None}
    if record.is_file():
        if call:
            raise ValueError(f"{path}: an export has its own steps and guidance; leave them out")
        call = json.loads(record.read_text("utf-8"))["call"]

    def draw(prompts: Sequence[str], numbers: Sequence[int]) -> list[Image.Image]:
        # the steps of FlowMatchLCM take the global generator, which a batch would share
        alone = isinstance(pipe.components["scheduler"], FlowMatchLCMScheduler)
        size = 1 if alone else len(prompts)
        parts = range(0, len(prompts), size)
        rows = [(prompts[i : i + size], numbers[i : i + size]) for i in parts]
        return [image for part in rows for image in _call(pipe, *part, seed, call)]

    facts = {"weights": fingerprint(path), "call": call, "seed": seed, "dtype": dtype}
    return Maker(path.resolve().name, _network_evaluations(pipe, draw), facts, draw)


def _call(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    numbers: Sequence[int],
    seed: int,
    call: Mapping[str, object],
) -> list[Image.Image]:
    seeds = (uniform(seed=seed, purpose=_PURPOSE, indices=numbers) * 2**53).long().tolist()
    noise = [torch.Generator().manual_seed(number) for number in seeds]
    generate = cast(Callable[..., ImagePipelineOutput], pipe)  # the base class has no __call__
    with torch.random.fork_rng():
        torch.manual_seed(seeds[0])
        images = generate(prompt=list(prompts), generator=noise, **call).images
    return cast("list[Image.Image]", images)


def _network_evaluations(
    pipe: DiffusionPipeline, draw: Callable[[Sequence[str], Sequence[int]], object]
) -> int:
    """Rows that go through the network for one image, both branches of guidance counted."""
    rows = 0

    def count(_net: nn.Module, _args: object, output: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(output[0])

    net = pipe.components["transformer" if "transformer" in pipe.components else "unet"]
    hook = cast(nn.Module, net).register_forward_hook(count)
    draw(["a picture"], [0])
    hook.remove()
    return rows


def image_file(folder: Path, number: int) -> Path:
    """Where image ``number`` is kept."""
    return folder / f"{number:08d}.png"


def keep_images(
    folder: Path,
    maker: Maker,
    captions: Mapping[int, str],
    *,
    batch: int,
    data: Mapping[str, object],
) -> None:
    """Make the images that are not in ``folder`` yet; what lies there under its name is whole.

    Args:
        folder: made if absent.
        maker: of the images.
        captions: numbers of images -> their prompts.
        batch: images at once.
        data: what the captions follow from.

    Raises:
        ValueError: if the folder holds images of another maker, seed or data.
    """
    facts = json.loads(json.dumps({**maker.facts, **data}))
    record = folder / _RECORD
    folder.mkdir(parents=True, exist_ok=True)
    if record.is_file():
        old = json.loads(record.read_text("utf-8"))
        if changed := sorted(k for k in old.keys() | facts.keys() if old.get(k) != facts.get(k)):
            raise ValueError(
                f"{folder}: holds images made with other {', '.join(changed)}; name another folder "
                "with --images, or delete this one"
            )
    elif any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty, and not images of an evaluation; use --images")
    _replace(record, lambda staged: staged.write_text(json.dumps(facts, indent=1), "utf-8"))
    missing = [n for n in captions if not image_file(folder, n).is_file()]
    parts = [missing[i : i + batch] for i in range(0, len(missing), batch)]
    console = Console(stderr=True)
    for numbers in track(parts, "making images", console=console, disable=not parts):
        images = maker.draw([captions[n] for n in numbers], numbers)
        for number, image in zip(numbers, images, strict=True):
            _replace(image_file(folder, number), partial(image.save, format="PNG"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    staged = path.with_name(f".{path.name}")
    write(staged)
    os.replace(staged, path)


def read_images(folder: Path, numbers: Sequence[int], size: int | None = None) -> Iterator[Tensor]:
    """Kept images [3, H, W] in [-1, 1], one by one.

    Args:
        folder, numbers: see :func:`keep_images`.
        size: scaled (Lanczos) to cover a square of so many pixels and cut to it at the centre,
            as real images are; None = as they were made.
    """
    for number in numbers:
        with Image.open(image_file(folder, number)) as file:
            image = file.convert("RGB")
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        yield torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)
