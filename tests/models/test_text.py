"""Prompt encoding of every family against its stock pipeline, from folders built here."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffdiv.models.text import PromptEncoder
from diffdiv.resources import find

PROMPTS = ["a bold red seven on white", "one", "a bold red seven on white"]


def tokenizer() -> CLIPTokenizer:
    folder = find("assets/embedded_sd/tokenizer")
    assert folder is not None
    return CLIPTokenizer.from_pretrained(folder)


def clip(width: int, *, projected: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    letters = [(f"{mark}{c}", -1.0) for c in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "▁")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    words = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    config = T5Config(vocab_size=len(words), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config), words


def sdxl(folder: Path, **options: object) -> Path:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        norm_num_groups=4,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=clip(8, projected=False),
        text_encoder_2=clip(16, projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(),
        add_watermarker=False,
        **options,
    )
    pipe.save_pretrained(folder)
    return folder


def save_text(folder: Path, kind: type[DiffusionPipeline], **parts: object) -> Path:
    """A folder with the text components alone; the network and the VAE are never loaded."""
    kind(transformer=None, vae=None, scheduler=None, **parts).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {key: ["diffusers", "Something"] for key in ("transformer", "vae", "scheduler")}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def sd3(folder: Path) -> Path:
    encoder, words = t5()
    return save_text(
        folder,
        StableDiffusion3Pipeline,
        text_encoder=clip(8, projected=True),
        text_encoder_2=clip(16, projected=True),
        text_encoder_3=encoder,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=words,
    )


def flux(folder: Path) -> Path:
    encoder, words = t5()
    clips = {"text_encoder": clip(8, projected=False), "tokenizer": tokenizer()}
    return save_text(folder, FluxPipeline, **clips, text_encoder_2=encoder, tokenizer_2=words)


def pixart(folder: Path) -> Path:
    encoder, words = t5()
    return save_text(folder, PixArtAlphaPipeline, text_encoder=encoder, tokenizer=words)


def sana(folder: Path) -> Path:
    _, words = t5()
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return save_text(folder, SanaPipeline, text_encoder=Gemma2Model(config), tokenizer=words)


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
    folder = sdxl(tmp_path)
    encode = PromptEncoder(folder)
    cond = encode(PROMPTS)
    text, _, pooled, _ = stock(folder, PROMPTS[:2], do_classifier_free_guidance=False)
    assert cond.text is not None and cond.pooled is not None and cond.time_ids is not None
    assert cond.text.shape == (3, tokenizer().model_max_length, 24)
    assert torch.equal(cond.text, rows(text)[0]) and torch.equal(cond.pooled, rows(pooled)[0])
    assert cond.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 3  # 8 latents, a VAE of factor 2
    sized = PromptEncoder(folder, image_size=(24, 40))(["one"])
    assert sized.time_ids is not None
    assert sized.time_ids.tolist() == [[24, 40, 0, 0, 24, 40]]


def test_sdxl_without_a_prompt_is_zeros_or_the_empty_prompt(tmp_path: Path) -> None:
    zeros = PromptEncoder(sdxl(tmp_path / "zeros"))([""])
    folder = sdxl(tmp_path / "encoded", force_zeros_for_empty_prompt=False)
    encoded = PromptEncoder(folder)(["one", ""])[1:]
    text, _, pooled, _ = stock(folder, [""], do_classifier_free_guidance=False)
    assert not zeros.text.any() and not zeros.pooled.any()
    assert torch.equal(encoded.text, text) and torch.equal(encoded.pooled, pooled)
    for cond in (zeros, encoded):
        assert cond.time_ids is not None
        assert cond.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]


def test_sd3(tmp_path: Path) -> None:
    folder = sd3(tmp_path)
    options = {"prompt_2": None, "prompt_3": None}
    text, no_text, pooled, no_pooled = stock(folder, PROMPTS[:2], **options)
    encode = PromptEncoder(folder)
    cond, uncond = encode(PROMPTS), encode([""])
    assert torch.equal(cond.text, rows(text)[0]) and torch.equal(cond.pooled, rows(pooled)[0])
    assert torch.allclose(uncond.text, no_text[:1], atol=1e-6)
    assert torch.allclose(uncond.pooled, no_pooled[:1], atol=1e-6)


def test_flux(tmp_path: Path) -> None:
    folder = flux(tmp_path)
    text, pooled, ids = stock(folder, PROMPTS[:2], prompt_2=None)
    cond = PromptEncoder(folder)(PROMPTS)
    assert torch.equal(cond.text, rows(text)[0]) and torch.equal(cond.pooled, rows(pooled)[0])
    assert not ids.any()  # call_flux makes them itself


def test_pixart(tmp_path: Path) -> None:
    folder = pixart(tmp_path)
    text, mask, no_text, no_mask = stock(folder, PROMPTS[:2])
    encode = PromptEncoder(folder)
    cond, uncond = encode(PROMPTS), encode([""])
    assert torch.equal(cond.text, rows(text)[0]) and torch.equal(cond.text_mask, rows(mask)[0])
    assert torch.allclose(uncond.text, no_text[:1], atol=1e-6)
    assert torch.equal(uncond.text_mask, no_mask[:1])
    assert mask[0].sum() > mask[1].sum()


def test_sana_puts_its_instruction_before_prompts_only(tmp_path: Path) -> None:
    folder = sana(tmp_path)
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
    encode = PromptEncoder(sdxl(tmp_path), cache_size=3)
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
