"""What a one-step student is distilled on: its conditions, real samples, and how to look at it.

A source answers for global sample indices, so every draw follows from (seed, index). Spaces: x0 is
in the teacher's space (pixels, or latents after the scaling factor), on the CPU.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdiv.core.noise import normal, permuted
from diffdiv.data.cache import Cache, build_cache, fingerprint
from diffdiv.data.captions import CaptionedImages
from diffdiv.data.digits import IMAGE_SIZE, PromptedDigits, load_digits
from diffdiv.data.images import ImageFolder
from diffdiv.data.prompts import PromptFile
from diffdiv.models.backbones import LatentCodec, PromptEncoder, num_labels, stored_shape
from diffdiv.models.denoiser import Condition, Denoiser
from diffdiv.samplers import sample_in_parts

Samples = tuple[Tensor, Condition]
Sampler = Callable[[Tensor, Condition], Tensor]  # standard normal noise, conditions -> x0
_POOL_SIZE = 1024
_OTHER_STREAM = 2**40  # far beyond every index of a run
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Source:
    """Conditions and real samples of a distillation.

    Attributes:
        shape: of one sample in the teacher's space, (C, H, W).
        conditions: global indices -> conditions for student samples.
        captions: global indices -> what these conditions say, for people.
        decode: x0 -> images in [-1, 1], [B, 1 or 3, H, W], on the CPU.
        real: global indices -> (x0, cond) for the discriminator; None = there is no data.
        uncond: condition of batch 1 without content, for guidance; None = the network has none.
        num_labels: classes; 0 for sources without labels.
    """

    shape: tuple[int, int, int]
    conditions: Callable[[Sequence[int]], Condition]
    captions: Callable[[Sequence[int]], list[str]]
    decode: Callable[[Tensor], Tensor]
    real: Callable[[Sequence[int]], Samples] | None = None
    uncond: Condition | None = None
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
    asked = PromptedDigits("train", seed=2 * seed, drop_probability=0.25)
    shown = PromptedDigits("train", seed=2 * seed + 1, drop_probability=0.25)
    encode, codec = PromptEncoder(teacher), LatentCodec(teacher, device)
    shape = codec.latent_shape(IMAGE_SIZE)

    def captions(indices: Sequence[int]) -> list[str]:
        return asked.batch(indices).prompts

    def real(indices: Sequence[int]) -> Samples:
        batch = shown.batch(indices)
        eps = normal(shape, seed=seed, purpose="posterior", indices=indices)
        return codec.encode(batch.images, eps), encode(batch.prompts)

    return Source(
        shape, lambda i: encode(captions(i)), captions, codec.decode, real, uncond=encode([""])
    )


def prompt_file(
    teacher: Path,
    prompts: Path,
    cache: Path | None,
    *,
    shape: tuple[int, int, int],
    seed: int,
    device: torch.device,
) -> Source:
    """Prompts from a file for any text-to-image teacher; no images, so no real samples."""
    texts = PromptFile(prompts, seed=seed)
    codec = LatentCodec(teacher, device if cache is None else _CPU)

    def say(indices: Sequence[int]) -> list[str]:
        return [texts.prompt(i) for i in indices]

    if cache is None:
        encode = PromptEncoder(teacher)
        return Source(shape, lambda i: encode(say(i)), say, codec.decode, uncond=encode([""]))
    encoder = _TextCache(teacher, cache)
    stored = encoder.store("text", texts.prompts)
    return Source(
        shape,
        lambda i: _condition(stored.rows([texts.row(j) for j in i])),
        say,
        codec.decode,
        uncond=_condition(encoder.store("uncond", [""]).rows([0])),
    )


def captions(
    teacher: Path,
    data: Path,
    cache: Path | None,
    *,
    shape: tuple[int, int, int],
    seed: int,
    device: torch.device,
) -> Source:
    """Captioned images for a text-to-image teacher; captions are also the student's prompts."""
    codec = LatentCodec(teacher, device if cache is None else _CPU)
    images = CaptionedImages(data, shape[1] * codec.factor, seed=seed)

    def others(indices: Sequence[int]) -> list[int]:  # real samples in an order of their own
        return [index + _OTHER_STREAM for index in indices]

    def noise(indices: Sequence[int]) -> Tensor:
        return normal(shape, seed=seed, purpose="posterior", indices=indices)

    if cache is None:
        encode = PromptEncoder(teacher)

        def real(indices: Sequence[int]) -> Samples:
            batch = images.batch(others(indices))
            return codec.encode(batch.images, noise(indices)), encode(batch.captions)

        def conditions(indices: Sequence[int]) -> Condition:
            return encode(images.captions(indices))

        return Source(shape, conditions, images.captions, codec.decode, real, encode([""]))

    encoder = _TextCache(teacher, cache)
    texts = encoder.store("text", images.captions_of(range(len(images))))
    key = {"vae": fingerprint(teacher / "vae"), "images": images.fingerprint(), "shape": str(shape)}

    def latents(rows: Sequence[int]) -> dict[str, Tensor]:
        mean, std = codec.posterior(images.read(rows).images)
        return {"mean": mean, "std": std}

    build_cache(cache / "latents", key=key, count=len(images), compute=latents, **_processes())
    stored = Cache(cache / "latents", key)

    def cached_real(indices: Sequence[int]) -> Samples:
        rows = images.rows(others(indices))
        found = stored.rows(rows)
        x0 = codec.draw(found["mean"], found["std"], noise(indices))
        return x0, _condition(texts.rows(rows))

    return Source(
        shape,
        lambda i: _condition(texts.rows(images.rows(i))),
        images.captions,
        codec.decode,
        cached_real,
        _condition(encoder.store("uncond", [""]).rows([0])),
    )


class _TextCache:
    """Text embeddings of a teacher kept in files; its encoders are loaded only to fill them."""

    def __init__(self, teacher: Path, folder: Path) -> None:
        self._teacher, self._folder = teacher, folder
        parts = sorted(p for p in teacher.iterdir() if p.name.startswith(("text_enc", "tokenizer")))
        self._key = {part.name: fingerprint(part) for part in parts}

    @cached_property
    def _encode(self) -> PromptEncoder:
        return PromptEncoder(self._teacher)

    def store(self, name: str, texts: Sequence[str]) -> Cache:
        """The conditions of ``texts``, row by row, computed now where they are missing."""

        def compute(rows: Sequence[int]) -> dict[str, Tensor]:
            return self._encode([texts[row] for row in rows]).tensors()

        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        key = {**self._key, "texts": digest}
        build_cache(self._folder / name, key=key, count=len(texts), compute=compute, **_processes())
        return Cache(self._folder / name, key)


class _Processes(TypedDict):
    rank: int
    world: int
    barrier: Callable[[], object]


def _processes() -> _Processes:
    """How the processes of a run share the making of a cache."""
    if not (dist.is_available() and dist.is_initialized()):
        return {"rank": 0, "world": 1, "barrier": lambda: None}
    return {
        "rank": dist.get_rank(), "world": dist.get_world_size(), "barrier": lambda: dist.barrier()
    }  # fmt: skip


def _condition(tensors: Mapping[str, Tensor]) -> Condition:
    return Condition(**tensors)


def digits(*, conditional: bool, null_label: int | None, seed: int) -> Source:
    """The 8x8 grey digits of scikit-learn, pixels in [-1, 1], with or without their labels."""
    x0, labels = load_digits("train")

    def real(indices: Sequence[int]) -> Samples:
        rows = [permuted(i, len(x0), seed=seed, purpose="digits") for i in indices]
        return x0[rows], Condition(label=labels[rows] if conditional else None)

    classes = [str(digit) for digit in range(10)] if conditional else []
    source = _pixels((1, 8, 8), real, classes, seed)
    return source if null_label is None else _with_null_label(source, null_label)


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

    return _pixels(shape, real, folder.classes if conditional else [], seed)


def _pixels(
    shape: tuple[int, int, int],
    real: Callable[[Sequence[int]], Samples],
    classes: Sequence[str],
    seed: int,
) -> Source:
    """A pixel-space source: every class once in each block of consecutive indices, shuffled."""

    def labels(indices: Sequence[int]) -> list[int]:
        return [permuted(i, len(classes), seed=seed, purpose="asked_label") for i in indices]

    def captions(indices: Sequence[int]) -> list[str]:
        return [classes[i] for i in labels(indices)] if classes else [""] * len(indices)

    def conditions(indices: Sequence[int]) -> Condition:
        return Condition(label=torch.tensor(labels(indices)) if classes else None)

    def decode(x0: Tensor) -> Tensor:
        return x0.float().clamp(-1, 1).cpu()

    return Source(shape, conditions, captions, decode, real, num_labels=len(classes))


def _with_null_label(source: Source, label: int) -> Source:
    return replace(source, uncond=Condition(label=torch.tensor([label])))


class TeacherSamples:
    """1,024 samples x0 of the teacher with the noise and conditions they came from.

    They stand for data (data-free mode: the density ratio is then teacher against student,
    guidance included, instead of data against student), and are the ODE pairs of a warm-up by
    regression. Drawn when they are first asked for, and kept in a file.

    Args:
        source: of conditions and shape.
        sampler: the teacher's.
        file: safetensors file that keeps x0.
        seed: of the noise.
        device: to draw on.
    """

    def __init__(
        self, source: Source, sampler: Sampler, file: Path, *, seed: int, device: torch.device
    ) -> None:
        self._source, self._sampler, self._file = source, sampler, file
        self._seed, self._device = seed, device

    @cached_property
    def _x0(self) -> Tensor:
        if self._file.is_file():
            return load_file(self._file)["x0"]
        parts = []
        for start in range(0, _POOL_SIZE, 64):
            rows = range(start, start + 64)
            cond = self._source.conditions(rows).to(self._device)
            z = self._noise(rows).to(self._device)
            parts.append(sample_in_parts(self._sampler, z, cond).float().cpu())
        x0 = torch.cat(parts)
        # ranks draw the same samples; each replaces the file as a whole
        staged = self._file.with_name(f".{self._file.name}-{os.getpid()}")
        save_file({"x0": x0}, staged)
        staged.replace(self._file)
        return x0

    def _noise(self, rows: Sequence[int]) -> Tensor:
        shape = self._source.shape
        return normal(shape, seed=self._seed, purpose="teacher_pool", indices=rows)

    def _rows(self, indices: Sequence[int]) -> list[int]:
        return [permuted(i, _POOL_SIZE, seed=self._seed, purpose="teacher_pool") for i in indices]

    def pairs(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Condition]:
        """Noise z, the teacher's x0 from it, and their conditions, on the CPU."""
        rows = self._rows(indices)
        return self._noise(rows), self._x0[rows], self._source.conditions(rows)

    def as_data(self) -> Source:
        """The source with these samples in place of its real ones."""

        def real(indices: Sequence[int]) -> Samples:
            rows = self._rows(indices)
            return self._x0[rows], self._source.conditions(rows)

        return replace(self._source, real=real)


def open_source(
    kind: str,
    path: Path | None,
    *,
    teacher_path: Path,
    teacher: Denoiser,
    cache: Path | None = None,
    seed: int,
    device: torch.device,
) -> Source:
    """The source named in a configuration, fitted to the teacher.

    Args:
        kind: "prompted_digits", "digits", "images", "prompts" or "captions".
        path: image folder, prompt file or captioned images, where the kind needs one.
        teacher_path: its folder (text encoder, VAE).
        teacher: its denoiser, on ``device``.
        cache: folder for text embeddings and latents of "prompts" and "captions", computed once;
            None = computed when needed.
        seed: of all draws.
        device: for the VAE.

    Raises:
        ValueError: if the teacher and the data do not fit.
    """
    wanted, labels = stored_shape(teacher_path), num_labels(teacher.net)
    match kind:
        case "prompted_digits":
            source = prompted_digits(teacher_path, seed=seed, device=device)
        case "prompts":
            assert path is not None
            source = prompt_file(teacher_path, path, cache, shape=wanted, seed=seed, device=device)
        case "captions":
            assert path is not None
            source = captions(teacher_path, path, cache, shape=wanted, seed=seed, device=device)
        case "digits":
            source = digits(conditional=labels > 0, null_label=None, seed=seed)
        case _:
            assert path is not None
            source = image_folder(path, shape=wanted, conditional=labels > 0, seed=seed)
    extra = labels - source.num_labels
    if extra not in (0, 1) or (labels > 0) != (source.num_labels > 0):
        raise ValueError(
            f"{path or kind}: {source.num_labels} classes for a teacher with a class embedding of "
            f"size {labels} (equal, or one more for a null class)"
        )
    if extra:
        source = _with_null_label(source, labels - 1)
    if source.shape != wanted:
        raise ValueError(f"data of shape {source.shape} for a teacher of {wanted} ({teacher_path})")
    return source
