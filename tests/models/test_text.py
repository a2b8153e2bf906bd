"""Prompt encoding of every family against its stock pipeline."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import TEXT_LENGTH
from diffusers import (
    DiffusionPipeline,
    SanaPipeline,
)
from tiny_pipelines import write_pipeline
from torch import Tensor

from diffdiv.models.text import PromptEncoder

PROMPTS = ["a bold red seven on white", "one", "a bold red seven on white"]


def stock(folder: Path, prompts: list[str], **options: object) -> tuple[Tensor, ...]:
    index = json.loads((folder / "model_index.json").read_text())
    absent = ("unet", "transformer", "vae", "scheduler")
    parts = {key: None for key in absent if key in index}
    pipe = DiffusionPipeline.from_pretrained(folder, **parts)
    with torch.no_grad():
        return pipe.encode_prompt(prompts, device=torch.device("cpu"), **options)


def rows(*tensors: Tensor) -> list[Tensor]:
    """Every prompt of PROMPTS from the encoding of the two distinct ones."""
    return [t[[0, 1, 0]] for t in tensors]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_sdxl_hears_both_encoders_and_its_size(tmp_path: Path) -> None:
    folder = write_pipeline("sdxl", tmp_path)
    encode = PromptEncoder(folder)
    cond = encode(PROMPTS)
    text, _, pooled, _ = stock(folder, PROMPTS[:2], do_classifier_free_guidance=False)
    assert cond.text is not None and cond.pooled is not None and cond.time_ids is not None
    assert cond.text.shape == (3, TEXT_LENGTH, 32)
    assert torch.equal(cond.text, rows(text)[0]) and torch.equal(cond.pooled, rows(pooled)[0])
    assert cond.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 3  # 8 latents, a VAE of factor 2
    sized = PromptEncoder(folder, image_size=(24, 40))(["one"])
    assert sized.time_ids is not None
    assert sized.time_ids.tolist() == [[24, 40, 0, 0, 24, 40]]


def test_sdxl_without_a_prompt_is_zeros_or_the_empty_prompt(tmp_path: Path) -> None:
    zeros = PromptEncoder(write_pipeline("sdxl", tmp_path / "zeros"))([""])
    folder = write_pipeline("sdxl", tmp_path / "encoded", force_zeros_for_empty_prompt=False)
    encoded = PromptEncoder(folder)(["one", ""])[1:]
    text, _, pooled, _ = stock(folder, [""], do_classifier_free_guidance=False)
    assert not zeros.text.any() and not zeros.pooled.any()
    assert torch.equal(encoded.text, text) and torch.equal(encoded.pooled, pooled)
    for cond in (zeros, encoded):
        assert cond.time_ids is not None
        assert cond.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]


def test_sd3(tmp_path: Path) -> None:
    folder = write_pipeline("sd3", tmp_path)
    options = {"prompt_2": None, "prompt_3": None}
    text, no_text, pooled, no_pooled = stock(folder, PROMPTS[:2], **options)
    encode = PromptEncoder(folder)
    cond, uncond = encode(PROMPTS), encode([""])
    assert torch.equal(cond.text, rows(text)[0]) and torch.equal(cond.pooled, rows(pooled)[0])
    assert torch.allclose(uncond.text, no_text[:1], atol=1e-6)
    assert torch.allclose(uncond.pooled, no_pooled[:1], atol=1e-6)


def test_flux(tmp_path: Path) -> None:
    folder = write_pipeline("flux", tmp_path)
    text, pooled, ids = stock(folder, PROMPTS[:2], prompt_2=None)
    cond = PromptEncoder(folder)(PROMPTS)
    assert torch.equal(cond.text, rows(text)[0]) and torch.equal(cond.pooled, rows(pooled)[0])
    assert not ids.any()  # call_flux makes them itself


def test_pixart(tmp_path: Path) -> None:
    folder = write_pipeline("pixart", tmp_path)
    text, mask, no_text, no_mask = stock(folder, PROMPTS[:2])
    encode = PromptEncoder(folder)
    cond, uncond = encode(PROMPTS), encode([""])
    assert torch.equal(cond.text, rows(text)[0]) and torch.equal(cond.text_mask, rows(mask)[0])
    assert torch.allclose(uncond.text, no_text[:1], atol=1e-6)
    assert torch.equal(uncond.text_mask, no_mask[:1])
    assert mask[0].sum() > mask[1].sum()


def test_sana_puts_its_instruction_before_prompts_only(tmp_path: Path) -> None:
    folder = write_pipeline("sana", tmp_path)
    called = inspect.signature(SanaPipeline.__call__).parameters
    instruction = called["complex_human_instruction"].default
    encode = PromptEncoder(folder)
    cond, uncond = encode(PROMPTS), encode([""])
    bare, _, no_text, no_mask = stock(folder, PROMPTS[:2])
    told, told_mask, *_ = stock(folder, PROMPTS[:2], complex_human_instruction=instruction)
    assert torch.equal(cond.text, rows(told)[0])
    assert torch.equal(cond.text_mask, rows(told_mask)[0])
    assert not torch.allclose(told, bare, atol=1e-3)
    assert torch.allclose(uncond.text, no_text[:1], atol=1e-6)
    assert torch.equal(uncond.text_mask, no_mask[:1])


def test_each_prompt_is_encoded_once_and_the_cache_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = PromptEncoder(write_pipeline("sdxl", tmp_path), cache_size=3)
    asked: list[list[str]] = []
    inner: Callable[..., object] = encode._encode

    def counted(pipe: object, prompts: list[str], is_uncond: bool) -> object:
        asked.append(prompts)
        return inner(pipe, prompts, is_uncond)

    monkeypatch.setattr(encode, "_encode", counted)
    first = encode(["one", "two", "", "one", "three"])
    assert asked == [["one", "two", "three"], [""]]
    again = encode(["two", "three"])
    assert len(asked) == 2
    assert torch.equal(first.text[[1, 4]], again.text)
    encode(["four", "three"])  # forgets "", the one not used for the longest time
    encode(["", "three"])
    assert asked[2:] == [["four"], [""]]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_index\.json: cannot be read"):
        PromptEncoder(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DanceDiffusionPipeline"}')
    with pytest.raises(ValueError, match="DanceDiffusionPipeline is not one of StableDiffusion"):
        PromptEncoder(tmp_path)
