"""The shipped teacher: a stock pipeline of the stated size whose pictures obey their prompts."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image, StableDiffusionPipeline
from transformers import CLIPTokenizer

from diffdiv.data.digits import WORDS, PromptedDigits, attributes_of, prompt_of
from diffdiv.metrics.judge import attribute_accuracy, load_judge
from diffdiv.runtime.launch import load_recipe

ASSETS = Path(__file__).parents[2] / "assets"
TEACHER = ASSETS / "embedded_sd"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = AutoPipelineForText2Image.from_pretrained(TEACHER).to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_sizes() -> None:
    files = [path for path in TEACHER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    judge = sum(path.stat().st_size for path in (ASSETS / "embedded_judge").iterdir())
    assert judge <= 500_000


def test_every_word_is_one_token_and_nothing_is_unknown() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(TEACHER / "tokenizer")
    assert all(len(tokenizer(word).input_ids) == 3 for word in WORDS)
    ids = tokenizer("a bold red handwritten seven on white").input_ids
    assert len(ids) == 9
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.eos_token_id not in tokenizer("zebra é").input_ids[1:-1]


def test_structure(pipe: StableDiffusionPipeline) -> None:
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert sum(p.numel() for p in pipe.unet.parameters()) == 1_209_332
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings
    assert pipe.text_encoder.config.eos_token_id == pipe.tokenizer.eos_token_id


def test_latents_have_unit_scale_in_every_channel(pipe: StableDiffusionPipeline) -> None:
    images = PromptedDigits("test").batch(range(300)).images
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
    x0 = posterior.sample(torch.Generator().manual_seed(0)) * pipe.vae.config.scaling_factor
    assert torch.allclose(x0.std((0, 2, 3)), torch.ones(4), atol=0.1)


def test_stock_call_draws_what_is_asked(pipe: StableDiffusionPipeline) -> None:
    prompts = [prompt_of(i % 10, i % 6, i % 2, (i // 2) % 2) for i in range(20)]
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        prompts,
        num_inference_steps=10,
        guidance_scale=1.5,
        generator=generator,
        output_type="pt",
    ).images
    judge = load_judge(ASSETS / "embedded_judge")
    accuracy = attribute_accuracy(judge, images * 2 - 1, attributes_of(prompts))
    assert accuracy["digit"] >= 0.8
    assert min(accuracy[name] for name in ("colour", "background", "stroke")) >= 0.9


def test_evaluation_beside_the_weights_passes_the_gate() -> None:
    evaluation = json.loads((TEACHER / "evaluation.json").read_text())
    rows = {row["name"]: row["metrics"] for row in evaluation["rows"]}
    metrics = rows["teacher, 20 steps, guidance 1.5"]
    assert metrics["digit"] >= 0.93
    assert min(metrics[name] for name in ("colour", "background", "stroke")) >= 0.98
    assert evaluation["card"]["cpu_seconds"] <= 720


@pytest.mark.slow  # two builds of 15 to 30 s
def test_the_same_seed_builds_the_same_weights(tmp_path: Path) -> None:
    recipe = load_recipe("embedded_sd")
    steps = {"judge_steps": 20, "autoencoder_steps": 20}
    steps |= {"text_steps": 20, "teacher_steps": 20}
    built = []
    for name in ("first", "second"):
        folder, judge = tmp_path / name, tmp_path / f"{name}_judge"
        sizes = {"num_images": 2000, "num_evaluated": 100}
        recipe.main(recipe.config_class(folder=folder, judge_folder=judge, **steps, **sizes))
        weights = sorted([*folder.rglob("*.safetensors"), *judge.rglob("*.safetensors")])
        assert len(weights) == 4
        built.append([path.read_bytes() for path in weights])
    assert built[0] == built[1]
