"""The tiny SDXL: what its U-Net is told in training is what the stock pipeline will tell it."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffdiv.data.digits import PromptedDigits
from diffdiv.models.backbones import load_denoiser
from diffdiv.models.text import PromptEncoder
from diffdiv.runtime.config import load_config
from diffdiv.runtime.launch import load_recipe

RECIPE = load_recipe("embedded_sd")
MODULE = inspect.getmodule(RECIPE.main)
assert MODULE is not None
NUM = 2000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A pipeline folder with an untrained U-Net, and what training would have told that U-Net."""
    folder = tmp_path_factory.mktemp("sdxl")
    overrides = [f"folder={folder}", f"num_images={NUM}", "text_steps=20", "teacher_steps=20"]
    config = load_config("configs/pretrain/embedded_sdxl.yaml", overrides, RECIPE.config_class)
    data = PromptedDigits("train").batch(range(NUM))
    seen = SimpleNamespace(folder=folder, data=data)

    train_unet, fit = MODULE.train_unet, MODULE.fit

    def watched(config, vae, images, told, **shape):
        seen.images, seen.told = images, told
        return train_unet(config, vae, images, told, **shape)

    def all_but_the_unet(stage, *arguments, **options):
        if stage != "teacher":
            fit(stage, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "train_unet", watched)
        patch.setattr(MODULE, "fit", all_but_the_unet)
        seen.pipe = MODULE.train_sdxl(config, MODULE.load_parts(config.start), data)
    seen.pipe.save_pretrained(folder)
    return seen


@pytest.fixture(scope="module")
def stock(built: SimpleNamespace) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(built.folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_training_tells_what_the_stock_pipeline_tells(
    built: SimpleNamespace, stock: StableDiffusionXLPipeline
) -> None:
    rows = torch.arange(8)
    told = built.told(rows, rows.where(rows % 2 == 0, NUM))  # odd rows without their prompts
    text, no_text, pooled, no_pooled = stock.encode_prompt(built.data.prompts[:8])
    kept = (rows % 2 == 0)[:, None]
    added = told["added_cond_kwargs"]
    expected = text.where(kept[..., None], no_text)
    assert torch.allclose(told["encoder_hidden_states"], expected, atol=1e-6)
    assert torch.allclose(added["text_embeds"], pooled.where(kept, no_pooled), atol=1e-6)
    assert not no_text.any() and not no_pooled.any()  # zeros, not the encoded ""
    assert text.shape == (8, 12, 64 + 96) and pooled.shape == (8, 64)


def test_pictures_are_what_their_time_ids_say(
    built: SimpleNamespace, stock: StableDiffusionXLPipeline
) -> None:
    rows = torch.arange(NUM)
    time_ids = built.told(rows, rows)["added_cond_kwargs"]["time_ids"]
    num_cropped = num_small = 0
    for whole, shown, ids in zip(built.data.images, built.images, time_ids, strict=True):
        size, _, top, left, *_ = ids.int().tolist()
        expected = stock._get_add_time_ids((size, size), (top, left), (32, 32), ids.dtype, 64)
        assert torch.equal(ids[None], expected)
        kept, same = shown[:, : 32 - top, : 32 - left], whole[:, top:, left:]
        assert size in (16, 32)
        # of half the size: finer detail is lost, the rest stays where it was
        assert torch.equal(kept, same) == (size == 32)
        assert (kept - same).abs().mean() < 0.15
        assert torch.equal(shown[:, 31:], shown[:, 31 - top : 32 - top]) or size == 16
        num_cropped += (top, left) != (0, 0)
        num_small += size == 16
    # binomial(2000, 0.1) is outside 130..270 with probability below 1e-6
    assert 130 < num_small < 270 and 130 < num_cropped < 270


def test_stock_reload_is_exact_and_draws_at_the_default_size(
    built: SimpleNamespace, stock: StableDiffusionXLPipeline
) -> None:
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        mine, theirs = (pipe.components[name].state_dict() for pipe in (built.pipe, stock))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert stock.tokenizer_2.pad_token == "!" != stock.tokenizer.pad_token
    assert stock.text_encoder_2.config.eos_token_id == stock.tokenizer_2.eos_token_id
    assert stock.vae.config.force_upcast is False
    images = stock(["a red handwritten two"], num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()


def test_distillation_reads_the_same_conditions(built: SimpleNamespace) -> None:
    rows = torch.arange(3)
    told = built.told(rows, torch.tensor([0, 1, NUM]))
    cond = PromptEncoder(built.folder)([*built.data.prompts[:2], ""])
    assert cond.text is not None and cond.pooled is not None and cond.time_ids is not None
    assert torch.allclose(cond.text, told["encoder_hidden_states"], atol=1e-6)
    assert torch.allclose(cond.pooled, told["added_cond_kwargs"]["text_embeds"], atol=1e-6)
    assert cond.time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 3
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([200, 500, 999])
    denoiser = load_denoiser(built.folder)
    told["added_cond_kwargs"]["time_ids"] = cond.time_ids
    with torch.no_grad():
        mine = denoiser.predict(x_t, t.double(), cond, as_="v")
        theirs = built.pipe.unet(x_t, t, **told).sample
    assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.slow  # two builds of 20 to 40 s
def test_the_same_seed_builds_the_same_weights(tmp_path: Path) -> None:
    built = []
    for name in ("first", "second"):
        steps = [f"folder={tmp_path / name}", "text_steps=20", "teacher_steps=20"]
        sizes = [f"num_images={NUM}", "num_evaluated=100"]
        config = "configs/pretrain/embedded_sdxl.yaml"
        RECIPE.main(load_config(config, steps + sizes, RECIPE.config_class))
        weights = sorted((tmp_path / name).rglob("*.safetensors"))
        assert len(weights) == 4 and (tmp_path / name / "evaluation.json").is_file()
        built.append([path.read_bytes() for path in weights])
    assert built[0] == built[1]
