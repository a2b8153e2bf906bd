"""What a one-step student is distilled on: its conditions, real samples, and how to look at it.

A source answers for global sample indices, so every draw follows from (seed, index). Spaces: x0 is
in the teacher's space (pixels, or latents after the scaling factor), on the CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdiv.core.noise import normal, permuted
from diffdiv.data.digits import IMAGE_SIZE, PromptedDigits, load_digits
from diffdiv.data.images import ImageFolder
from diffdiv.data.prompts import PromptFile
from diffdiv.models.backbones import LatentCodec, PromptEncoder, num_labels, sample_shape
from diffdiv.models.denoiser import Condition, Denoiser, guided
from diffdiv.samplers import sample_ode, time_grid

Samples = tuple[Tensor, Condition]


@dataclass(frozen=True)
class Source:
    """Conditions and real samples of a distillation.

    Attributes:
        shape: of one sample in the teacher's space, (C, H, W).
        conditions: global indices -> conditions for student samples.
        captions: global indices -> what these conditions say, for people.
        real: global indices -> (x0, cond) for the discriminator; None = there is no data.
        uncond: condition of batch 1 without content, for guidance; None = the network has none.
        decode: x0 -> images in [-1, 1], [B, 1 or 3, H, W], on the CPU.
        num_labels: classes; 0 for sources without labels.
    """

    shape: tuple[int, int, int]
    conditions: Callable[[Sequence[int]], Condition]
    captions: Callable[[Sequence[int]], list[str]]
    real: Callable[[Sequence[int]], Samples] | None
    uncond: Condition | None
    decode: Callable[[Tensor], Tensor]
    num_labels: int = 0

    def real_on(self, device: torch.device, indices: Sequence[int]) -> Samples:
        """Real samples and conditions on ``device``; a source without data raises ValueError."""
        if self.real is None:
            raise ValueError("this source has no real samples; use the teacher's (data.real)")
        x0, cond = self.real(indices)
        return x0.to(device), cond.to(device)


def prompted_digits(teacher: Path, *, seed: int, device: torch.device) -> Source:
    """The embedded text-to-image world: prompts true by construction, latents of its own VAE.

    Student prompts and real samples come from independent streams of the same law.
    """
    encode, codec = PromptEncoder(teacher), LatentCodec(teacher, device)
    shape = codec.latent_shape(IMAGE_SIZE)
    asked = PromptedDigits("train", seed=2 * seed, drop_probability=0.25)
    shown = PromptedDigits("train", seed=2 * seed + 1, drop_probability=0.25)

    def real(indices: Sequence[int]) -> Samples:
        batch = shown.batch(indices)
        eps = normal(shape, seed=seed, purpose="posterior", indices=indices)
        return codec.encode(batch.images, eps), encode(batch.prompts)

    return Source(
        shape=shape,
        conditions=lambda indices: encode(asked.batch(indices).prompts),
        captions=lambda indices: asked.batch(indices).prompts,
        real=real,
        uncond=encode([""]),
        decode=codec.decode,
    )


def prompt_file(
    teacher: Path, prompts: Path, *, sample_size: int, seed: int, device: torch.device
) -> Source:
    """Prompts from a file for any Stable Diffusion teacher; no images, so no real samples."""
    encode, codec = PromptEncoder(teacher), LatentCodec(teacher, device)
    texts = PromptFile(prompts, seed=seed)

    def captions(indices: Sequence[int]) -> list[str]:
        return [texts.prompt(i) for i in indices]

    return Source(
        shape=codec.latent_shape(sample_size * codec.factor),
        conditions=lambda indices: encode(captions(indices)),
        captions=captions,
        real=None,
        uncond=encode([""]),
        decode=codec.decode,
    )


def digits(*, conditional: bool, null_label: int | None, seed: int) -> Source:
    """The 8x8 grey digits of scikit-learn, pixels in [-1, 1], with or without their labels."""
    x0, labels = load_digits("train")

    def real(indices: Sequence[int]) -> Samples:
        rows = [permuted(i, len(x0), seed=seed, purpose="digits") for i in indices]
        return x0[rows], Condition(label=labels[rows] if conditional else None)

    classes = [str(digit) for digit in range(10)] if conditional else []
    return _pixels((1, 8, 8), real, classes, null_label, seed)


def image_folder(
    path: Path, *, shape: tuple[int, int, int], conditional: bool, seed: int
) -> Source:
    """Images of a folder, resized to ``shape``; when conditional, its sub-folders are classes."""
    folder = ImageFolder(
        path, shape[1], channels=shape[0], class_from="folder" if conditional else None
    )

    def real(indices: Sequence[int]) -> Samples:
        x0, label = folder.batch(indices, seed)
        return x0, Condition(label=label)

    return _pixels(shape, real, folder.classes if conditional else [], None, seed)


def _pixels(
    shape: tuple[int, int, int],
    real: Callable[[Sequence[int]], Samples],
    classes: Sequence[str],
    null_label: int | None,
    seed: int,
) -> Source:
    """A pixel-space source: every class once in each block of consecutive indices, shuffled."""

    def labels(indices: Sequence[int]) -> list[int]:
        return [permuted(i, len(classes), seed=seed, purpose="asked_label") for i in indices]

    def captions(indices: Sequence[int]) -> list[str]:
        return [classes[i] for i in labels(indices)] if classes else [""] * len(indices)

    return Source(
        shape=shape,
        conditions=lambda i: Condition(label=torch.tensor(labels(i)) if classes else None),
        captions=captions,
        real=real,
        uncond=None if null_label is None else Condition(label=torch.tensor([null_label])),
        decode=lambda x0: x0.float().clamp(-1, 1).cpu(),
        num_labels=len(classes),
    )


def with_teacher_samples(
    source: Source,
    draw: Callable[[Tensor, Condition], Tensor],
    *,
    count: int,
    cache: Path,
    seed: int,
) -> Source:
    """The same source with the teacher's own samples in place of data (data-free mode).

    The density ratio is then teacher against student, guidance included, instead of data against
    student. Samples are drawn once and kept in ``cache``.

    Args:
        source: supplies conditions.
        draw: standard normal noise and conditions -> teacher samples.
        count: size of the pool.
        cache: safetensors file, read if it holds ``count`` samples.
        seed: of the noise.
    """
    if cache.is_file():
        pool = load_file(cache)["x0"]
    else:
        parts = []
        for start in range(0, count, 64):
            indices = range(start, min(start + 64, count))
            z = normal(source.shape, seed=seed, purpose="teacher_pool", indices=indices)
            parts.append(draw(z, source.conditions(indices)).float().cpu())
        pool = torch.cat(parts)
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x0": pool}, cache)

    def real(indices: Sequence[int], pool: Tensor) -> Samples:
        rows = [permuted(i, len(pool), seed=seed, purpose="teacher_pool") for i in indices]
        return pool[rows], source.conditions(rows)

    return replace(source, real=partial(real, pool=pool))


def open_source(
    kind: str,
    path: Path | None,
    *,
    teacher_path: Path,
    teacher: Denoiser,
    guidance_scale: float | None,
    teacher_pool: Path | None,
    seed: int,
    device: torch.device,
) -> Source:
    """The source named in a configuration, fitted to the teacher.

    Args:
        kind: "prompted_digits", "digits", "images" or "prompts".
        path: image folder or prompt file, where the kind needs one.
        teacher_path: its folder (text encoder, VAE).
        teacher: its denoiser, on ``device``.
        guidance_scale: at which a pool of teacher samples is drawn.
        teacher_pool: cache file of 1,024 teacher samples that replace the data; None = data.
        seed: of all draws.
        device: for the VAE.

    Raises:
        ValueError: if the teacher and the data do not fit, or guidance has no unconditional branch.
    """
    wanted, labels = sample_shape(teacher.net), num_labels(teacher.net)
    match kind:
        case "prompted_digits":
            source = prompted_digits(teacher_path, seed=seed, device=device)
        case "prompts":
            assert path is not None
            source = prompt_file(
                teacher_path, path, sample_size=wanted[1], seed=seed, device=device
            )
        case "digits":
            null = 10 if labels == 11 else None
            source = digits(conditional=labels > 0, null_label=null, seed=seed)
        case _:
            assert path is not None
            source = image_folder(path, shape=wanted, conditional=labels > 0, seed=seed)
            if labels - source.num_labels == 1:  # the class after the last one means "no class"
                source = replace(source, uncond=Condition(label=torch.tensor([labels - 1])))
    null_classes = 0 if source.uncond is None or labels == 0 else 1
    if labels != source.num_labels + null_classes:
        raise ValueError(
            f"{path or kind}: {source.num_labels} classes for a teacher with a class embedding of "
            f"size {labels} (equal, or one more for a null class)"
        )
    if source.shape != wanted:
        raise ValueError(f"data of shape {source.shape} for a teacher of {wanted} ({teacher_path})")
    if teacher_pool is None:
        return source
    guided_teacher = guided(teacher, guidance_scale, source.uncond)
    times = time_grid(teacher.schedule, 20)

    def draw(z: Tensor, cond: Condition) -> Tensor:
        return sample_ode(guided_teacher, z.to(device), cond.to(device), times)

    return with_teacher_samples(source, draw, count=1024, cache=teacher_pool, seed=seed)
