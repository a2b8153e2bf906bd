"""Prompts to conditions, by the stock pipeline's own text encoding.

text       embeddings [B, L, D]           text_mask  1 = token, 0 = padding [B, L]
pooled     one vector a prompt [B, D]     time_ids   original size, crop, target size [B, 6]
"""

import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from diffdiv.models.denoiser import Condition, concatenate

Embeddings = tuple[Tensor | None, ...]


class _TextPipeline(Protocol):
    """What every text-to-image pipeline has; arguments and results differ."""

    device: torch.device

    def encode_prompt(self, *args: object, **kwargs: object) -> Embeddings: ...


#: (pipeline, prompts, whether to return "no prompt" in place of them) -> condition of their batch
Encode = Callable[[_TextPipeline, list[str], bool], Condition]


def _encode_sd(pipe: _TextPipeline, prompts: list[str], is_uncond: bool) -> Condition:
    return Condition(text=pipe.encode_prompt(prompts, pipe.device, 1, False)[0])


def _encode_sdxl(pipe: _TextPipeline, prompts: list[str], is_uncond: bool) -> Condition:
    # the pipeline itself decides between zeros and the encoded "" (force_zeros_for_empty_prompt)
    text, no_text, pooled, no_pooled = pipe.encode_prompt(
        prompts, device=pipe.device, do_classifier_free_guidance=is_uncond
    )
    return Condition(text=no_text if is_uncond else text, pooled=no_pooled if is_uncond else pooled)


def _encode_sd3(pipe: _TextPipeline, prompts: list[str], is_uncond: bool) -> Condition:
    text, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, device=pipe.device, do_classifier_free_guidance=False
    )
    return Condition(text=text, pooled=pooled)


def _encode_flux(pipe: _TextPipeline, prompts: list[str], is_uncond: bool) -> Condition:
    text, pooled, _ = pipe.encode_prompt(prompts, None, device=pipe.device)
    return Condition(text=text, pooled=pooled)


def _encode_pixart(pipe: _TextPipeline, prompts: list[str], is_uncond: bool) -> Condition:
    # as given: the pipeline's cleaning of web captions needs two more packages
    text, mask, *_ = pipe.encode_prompt(prompts, False, device=pipe.device, clean_caption=False)
    return Condition(text=text, text_mask=mask)


def _encode_sana(pipe: _TextPipeline, prompts: list[str], is_uncond: bool) -> Condition:
    # prompts follow a long instruction, the default of the pipeline's call; "no prompt" does not
    call = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"]
    text, mask, no_text, no_mask = pipe.encode_prompt(
        prompts,
        is_uncond,
        device=pipe.device,
        clean_caption=False,
        complex_human_instruction=call.default,
    )
    if is_uncond:
        return Condition(text=no_text, text_mask=no_mask)
    return Condition(text=text, text_mask=mask)


_ENCODERS: Mapping[str, Encode] = {
    "StableDiffusionPipeline": _encode_sd,
    "StableDiffusionXLPipeline": _encode_sdxl,
    "StableDiffusion3Pipeline": _encode_sd3,
    "FluxPipeline": _encode_flux,
    "PixArtAlphaPipeline": _encode_pixart,
    "PixArtSigmaPipeline": _encode_pixart,
    "SanaPipeline": _encode_sana,
}


def _read(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    return cast("dict[str, object]", content)


def _image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels that the U-Net of a pipeline folder was built for."""
    size = cast("int | list[int]", _read(path / "unet" / "config.json")["sample_size"])
    height, width = (size, size) if isinstance(size, int) else size
    levels = cast("list[int]", _read(path / "vae" / "config.json")["block_out_channels"])
    factor = 2 ** (len(levels) - 1)
    return height * factor, width * factor


class PromptEncoder:
    """Text encoders of a pipeline folder; each distinct prompt is encoded once.

    Conditions are those of the stock pipeline's call (PixArt and SANA without their cleaning of
    captions), float32 on the CPU; prompts are padded to a fixed length, so a row does not depend
    on its batch. The empty prompt means "no prompt", the unconditional branch of guidance, as the
    family trained it: the encoded "", for SDXL zeros when its pipeline says so.

    Args:
        path: local pipeline folder: Stable Diffusion, SDXL, SD3, FLUX, PixArt or SANA.
        device: of the text encoders.
        dtype: of the text encoders.
        image_size: height and width in pixels that SDXL is told (no crop); None = of its U-Net.
        cache_size: prompts remembered, the last used ones.

    Raises:
        ValueError: if the folder is no such pipeline.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        image_size: tuple[int, int] | None = None,
        cache_size: int = 1024,
    ) -> None:
        index = _read(path / "model_index.json")
        name = str(index.get("_class_name"))
        if name not in _ENCODERS:
            raise ValueError(f"{path}: {name} is not one of {', '.join(_ENCODERS)}")
        parts = [key for key, value in index.items() if isinstance(value, list) and key[0] != "_"]
        absent = {k: None for k in parts if not k.startswith(("text_encoder", "tokenizer"))}
        # without its checker Stable Diffusion warns on every start; nothing is generated here
        options = {"requires_safety_checker": False} if "safety_checker" in parts else {}
        self._pipe = DiffusionPipeline.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **absent,
            **options,
        )
        self._pipe.to(device or torch.device("cpu"))
        for part in self._pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        self._encode, self._cache_size = _ENCODERS[name], cache_size
        self._cache: OrderedDict[str, Condition] = OrderedDict()
        self._time_ids: Tensor | None = None
        if name == "StableDiffusionXLPipeline":
            size = image_size or _image_size(path)
            self._time_ids = torch.tensor([[*size, 0.0, 0.0, *size]])

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """Condition of the prompts, batch B, float32 on the CPU."""
        known = {p: self._cache[p] for p in prompts if p in self._cache}
        if new := [p for p in dict.fromkeys(prompts) if p and p not in known]:
            encoded = self._run(new, False)
            known |= {p: encoded[i : i + 1].map(Tensor.clone) for i, p in enumerate(new)}
        if "" in prompts and "" not in known:
            known[""] = self._run([""], True)
        for prompt, cond in known.items():
            self._cache[prompt] = cond
            self._cache.move_to_end(prompt)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return concatenate([known[p] for p in prompts])

    @torch.no_grad()
    def _run(self, prompts: list[str], is_uncond: bool) -> Condition:
        cond = self._encode(cast(_TextPipeline, self._pipe), prompts, is_uncond).to(
            torch.device("cpu"), torch.float32
        )
        if self._time_ids is None:
            return cond
        time_ids = self._time_ids.expand(len(prompts), 6)
        return Condition(text=cond.text, pooled=cond.pooled, time_ids=time_ids)
