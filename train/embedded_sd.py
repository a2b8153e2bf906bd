"""Builds the embedded text-to-image world: tokenizer, judge, autoencoder, text encoder and U-Net.

    python train/embedded_sd.py configs/pretrain/embedded_sd.yaml seed=0

All of it is learned from the digits of scikit-learn on one CPU thread in under twelve minutes and
saved as an ordinary StableDiffusionPipeline folder (fp16), with the judge that scores it; with
embedded_sdxl.yaml as an SDXL pipeline, on the autoencoder and text encoder of that folder; with
second_judge.yaml another judge alone, from digits that the first has never seen. A chain of small
trainings, each a plain loop; not resumable. x0: scaled latent; eps: noise;
v = alpha eps - sigma x0 (Salimans and Ho, arXiv 2202.00512v2, appendix D).
"""

import hashlib
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field
from rich.console import Console
from rich.progress import track
from rich.table import Table

from diffdiv.runtime.config import Config, ExistingFolder
from diffdiv.runtime.launch import run_recipe_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
    from torch import Tensor, nn
    from transformers import CLIPTextModel, CLIPTokenizer

    from diffdiv.data.digits import PromptedBatch
    from diffdiv.metrics.judge import Judge


class StartConfig(Config):
    """What an earlier run of this recipe has learned."""

    pipeline: ExistingFolder  # its autoencoder, tokenizer and text encoder are used as they are
    judge: ExistingFolder


class RecipeConfig(Config):
    """What to build, where, and for how long."""

    recipe: str = "embedded_sd"
    architecture: Literal["sd", "sdxl"] | None = "sd"  # None: a judge alone
    split: Literal["train", "test"] = "train"  # of the digits: 1500, or the 297 others
    start: StartConfig | None = None  # None: everything is trained here
    folder: Path  # receives the pipeline and evaluation.json
    judge_folder: Path | None = None  # receives the judge; None: it is not saved
    seed: int = Field(0, ge=0)
    threads: int = Field(1, ge=1)  # of the CPU; the weights depend on the number
    num_images: int = Field(16_000, ge=2000)  # composites to train on
    judge_steps: int = Field(1500, ge=20)
    autoencoder_steps: int = Field(1000, ge=20)
    text_steps: int = Field(400, ge=20)
    teacher_steps: int = Field(2000, ge=20)
    num_evaluated: int = Field(1000, ge=100)  # images per row of the table


PROMPT_LENGTH = 12  # the longest prompt is 7 words and two specials; the rest is headroom
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
Stage = Literal["judge", "autoencoder", "text encoder", "teacher"]
BATCH_AND_LR: dict[Stage, tuple[int, float]] = {
    "judge": (64, 2e-3), "autoencoder": (32, 4e-3), "text encoder": (128, 1e-3),
    "teacher": (64, 3e-3),
}  # fmt: skip
Rows = dict[str, dict[str, float]]  # name of the row -> name of the metric -> value


class Parts(NamedTuple):
    """What is learned before the U-Net."""

    judge: "Judge"
    vae: "AutoencoderKL"
    tokenizer: "CLIPTokenizer"
    text_encoder: "CLIPTextModel"


def build_tokenizer(words: tuple[str, ...]) -> "CLIPTokenizer":
    """A byte-level CLIP tokenizer in which every one of ``words`` is a single token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    order = list(words)
    symbols = sorted(ByteLevel.alphabet())
    for _ in range(len(words)):
        merges = []
        for word in order:
            left, *rest = [*word[:-1], word[-1] + "</w>"]
            for right in rest:
                merges.append((left, right))
                left += right
        merges = list(dict.fromkeys(merges))
        pieces = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), BOS, EOS]
        vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=PROMPT_LENGTH)
        broken = [word for word in order if len(tokenizer(word).input_ids) != 3]
        if not broken:
            return tokenizer
        # Merges apply by rank, not by word: "re" of "red" would split "green" for good.
        order = broken + [word for word in order if word not in broken]
    raise RuntimeError(f"tokenizer: no merge order keeps {', '.join(broken)} whole")


def fit(
    stage: Stage, net: "nn.Module", loss_of: "Callable[[Tensor], Tensor]", *,
    count: int, steps: int, seed: int, after_step: "Callable[[], None]" = lambda: None,
) -> None:  # fmt: skip
    """Minimises loss_of(rows) over shuffled epochs of ``count`` samples.

    AdamW(0.9, 0.99), gradient norm clipped at 1, one OneCycle with 10 % warm-up. A loss that is
    not finite raises FloatingPointError before the weights change.
    """
    import torch

    batch_size, lr = BATCH_AND_LR[stage]
    parameters = list(net.parameters())
    adam = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in track(range(steps), description=stage):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        rows, order = order[:batch_size], order[batch_size:]
        loss = loss_of(rows)
        if not loss.isfinite():
            raise FloatingPointError(f"{stage}: loss is {loss.item()} at step {step}")
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        after_step()


def train_judge(config: RecipeConfig, data: "PromptedBatch") -> "Judge":
    """A classifier of digit, colour, background and stroke."""
    import torch
    from torch.nn import functional

    from diffdiv.metrics.judge import Judge

    torch.manual_seed(config.seed)
    judge = Judge()
    shown = data.shown.named()

    def loss_of(rows: "Tensor") -> "Tensor":
        logits = judge(data.images[rows])
        losses = [functional.cross_entropy(logits[name], shown[name][rows]) for name in logits]
        return torch.stack(losses).sum()

    fit(
        "judge", judge, loss_of,
        count=len(data.images), steps=config.judge_steps, seed=config.seed,
    )  # fmt: skip
    return judge.eval().requires_grad_(False)


def train_autoencoder(config: RecipeConfig, images: "Tensor") -> "AutoencoderKL":
    """An AutoencoderKL, 3x32x32 -> 4x8x8, with latents of unit scale.

    A linear map from the latent to the picture at 8x8 is trained beside it and then dropped. It
    keeps colours apart in the latent space: without it one seed of two let a channel collapse and
    put blue and purple so close together that the U-Net learned to tell them last.
    """
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(config.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(12, 24, 24), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=32, mid_block_add_attention=False, force_upcast=False,
    )  # fmt: skip
    vae.to(memory_format=torch.channels_last)  # measured faster at so few channels
    to_rgb, small = torch.nn.Conv2d(4, 3, 1), torch.nn.functional.avg_pool2d(images, 4)

    def loss_of(rows: "Tensor") -> "Tensor":
        posterior = vae.encode(images[rows]).latent_dist
        latent = posterior.sample()
        error = vae.decode(latent).sample - images[rows]
        kl = posterior.kl().sum() / posterior.mean.numel()  # nats per latent dimension
        linear = (to_rgb(latent) - small[rows]).square().mean()
        return error.square().mean() + error.abs().mean() + linear + 1e-3 * kl

    fit(
        "autoencoder", torch.nn.ModuleList([vae, to_rgb]), loss_of,
        count=len(images), steps=config.autoencoder_steps, seed=config.seed,
    )  # fmt: skip
    vae.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    balance(vae, images[:2000])
    return vae


def balance(vae: "AutoencoderKL", images: "Tensor") -> None:
    """Gives every latent channel unit standard deviation, folded into the 1x1 convolutions.

    As trained, the channels of a seed can differ fourfold in scale, and one scaling factor cannot
    put them all at the noise levels of the schedule. The reconstruction is unchanged.
    """
    import torch

    mean, std = encode(vae, images)
    spread = (mean + std * torch.randn_like(std)).std((0, 2, 3))
    with torch.no_grad():
        vae.quant_conv.weight[:4] /= spread[:, None, None, None]
        vae.quant_conv.bias[:4] /= spread
        vae.quant_conv.bias[4:] -= 2 * spread.log()  # the log-variances
        vae.post_quant_conv.weight *= spread[:, None, None]
    vae.register_to_config(scaling_factor=1.0)


def encode(vae: "AutoencoderKL", images: "Tensor") -> "tuple[Tensor, Tensor]":
    """Mean and standard deviation of the unscaled latents, each [N, 4, 8, 8]."""
    import torch

    with torch.no_grad():
        dists = [vae.encode(chunk).latent_dist for chunk in images.split(250)]
    return torch.cat([d.mean for d in dists]), torch.cat([d.std for d in dists])


def tokenize(tokenizer: "CLIPTokenizer", prompts: list[str]) -> "Tensor":
    """Token ids [B, PROMPT_LENGTH]."""
    return tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids


def train_text_encoder(
    config: RecipeConfig, judge: "Judge", tokenizer: "CLIPTokenizer", data: "PromptedBatch", *,
    width: int, seed: int,
) -> "tuple[CLIPTextModel, nn.Linear]":  # fmt: skip
    """Contrastive training against the judge's features, as CLIP's against its image tower.

    Trained on the loss of the U-Net instead, its output followed the colour first and lost the
    digit: after 2000 steps one seed of two still drew digits at chance. Returned with the
    projection of its pooled output.
    """
    import torch
    from torch.nn import functional
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffdiv.metrics.judge import judge_features

    torch.manual_seed(seed)
    tokens = tokenize(tokenizer, data.prompts)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=PROMPT_LENGTH, hidden_size=width,
        intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, projection_dim=64,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text_encoder = CLIPTextModel(text_config)
    with torch.no_grad():  # by CLIP's own init a word is a tenth of the output's power
        text_encoder.get_input_embeddings().weight.mul_(4)
    towers = torch.nn.ModuleList(torch.nn.Linear(size, 64, bias=False) for size in (width, 64))
    features = judge_features(judge, data.images)
    features = (features - features.mean(0)) / features.std(0)

    def loss_of(rows: "Tensor") -> "Tensor":
        text = functional.normalize(towers[0](text_encoder(tokens[rows]).pooler_output), dim=1)
        image = functional.normalize(towers[1](features[rows]), dim=1)
        logits, pairs = text @ image.T / 0.07, torch.arange(len(rows))
        loss = functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)
        return loss / 2

    fit(
        "text encoder", torch.nn.ModuleList([text_encoder, towers]), loss_of,
        count=len(features), steps=config.text_steps, seed=seed,
    )  # fmt: skip
    return text_encoder.eval().requires_grad_(False), towers[0].requires_grad_(False)


def train_unet(
    config: RecipeConfig, vae: "AutoencoderKL", images: "Tensor",
    told: "Callable[[Tensor, Tensor], dict[str, object]]",  # image, text [B] -> keywords
    **shape: object,
) -> "tuple[UNet2DConditionModel, DDIMScheduler]":  # fmt: skip
    """A U-Net of this shape, trained on v and averaged, and its schedule; the last text is ""."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(config.seed)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 48, 64), layers_per_block=1, norm_num_groups=8,
        attention_head_dim=2, sample_size=8, **shape,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    mean, std = (part * vae.config.scaling_factor for part in encode(vae, images))
    generator = torch.Generator().manual_seed(config.seed)

    def loss_of(rows: "Tensor") -> "Tensor":
        noise = torch.randn(2, *mean[rows].shape, generator=generator)
        x0, eps = mean[rows] + std[rows] * noise[0], noise[1]
        t = torch.randint(1000, (len(rows),), generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < 0.1
        cond = told(rows, rows.where(~dropped, len(mean)))
        v = unet(scheduler.add_noise(x0, eps, t), t, **cond).sample
        return (v - scheduler.get_velocity(x0, eps, t)).square().mean()

    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    fit(
        "teacher", unet, loss_of, count=len(mean), steps=config.teacher_steps, seed=config.seed,
        after_step=lambda: average.update_parameters(unet),
    )  # fmt: skip
    return average.module.eval(), scheduler


def train_sd(config: RecipeConfig, parts: Parts, data: "PromptedBatch") -> "DiffusionPipeline":
    """A StableDiffusionPipeline; its U-Net has 1,209,332 parameters."""
    import torch
    from diffusers import StableDiffusionPipeline

    with torch.no_grad():
        tokens = tokenize(parts.tokenizer, [*data.prompts, ""])
        context = parts.text_encoder(tokens).last_hidden_state
    unet, scheduler = train_unet(
        config, parts.vae, data.images,
        lambda rows, texts: {"encoder_hidden_states": context[texts]},
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def shrink_and_crop(images: "Tensor", seed: int) -> "tuple[Tensor, Tensor]":
    """The images as a collection would hold them, and SDXL's time ids [N, 6], in pixels.

    One in ten was of half the size and has been enlarged, one in ten has lost up to 8 rows and
    columns at the top and left (arXiv 2307.01952v1, section 2.2).
    """
    import torch
    from torch.nn import functional

    size = images.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    is_small, is_cropped = torch.rand(2, len(images), 1, generator=generator) < 0.1
    small = functional.interpolate(functional.avg_pool2d(images, 2), size=size, mode="bilinear")
    images = small.where(is_small[..., None, None], images)
    corners = torch.randint(9, (len(images), 2), generator=generator) * is_cropped
    rows = zip(functional.pad(images, (0, 8, 0, 8), "replicate"), corners.tolist(), strict=True)
    crops = torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in rows])
    target = torch.full_like(corners, size)
    return crops, torch.cat([target // (1 + is_small.int()), corners, target], 1).float()


def train_sdxl(config: RecipeConfig, parts: Parts, data: "PromptedBatch") -> "DiffusionPipeline":
    """A StableDiffusionXLPipeline: two text encoders, the wider one pooled, and time ids."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    from diffdiv.data.digits import WORDS

    tokenizer = build_tokenizer(WORDS)
    tokenizer.pad_token = "!"  # as SDXL's second one
    encoder, projection = train_text_encoder(
        config, parts.judge, tokenizer, data, width=96, seed=config.seed + 1
    )
    second = CLIPTextModelWithProjection(encoder.config).eval()
    second.text_model, second.text_projection = encoder, projection
    pairs = ((parts.text_encoder, parts.tokenizer), (second, tokenizer))
    prompts = [*data.prompts, ""]
    with torch.no_grad():
        found = [net(tokenize(words, prompts), output_hidden_states=True) for net, words in pairs]
    context = torch.cat([output.hidden_states[-2] for output in found], 2)
    pooled = found[1].text_embeds
    context[-1] = pooled[-1] = 0  # what the pipeline's force_zeros_for_empty_prompt makes of ""
    images, time_ids = shrink_and_crop(data.images, config.seed)

    def told(rows: "Tensor", texts: "Tensor") -> dict[str, object]:
        added = {"text_embeds": pooled[texts], "time_ids": time_ids[rows]}
        return {"encoder_hidden_states": context[texts], "added_cond_kwargs": added}

    unet, scheduler = train_unet(
        config, parts.vae, images, told,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
        cross_attention_dim=64 + 96, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 64,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, text_encoder_2=second, unet=unet,
        tokenizer=parts.tokenizer, tokenizer_2=tokenizer, scheduler=scheduler,
        add_watermarker=False,
    )  # fmt: skip


def train_parts(config: RecipeConfig, data: "PromptedBatch") -> Parts:
    """Trains judge, autoencoder and text encoder, one after the other."""
    from diffdiv.data.digits import WORDS

    judge = train_judge(config, data)
    vae, tokenizer = train_autoencoder(config, data.images), build_tokenizer(WORDS)
    encoder, _ = train_text_encoder(config, judge, tokenizer, data, width=64, seed=config.seed)
    return Parts(judge, vae, tokenizer, encoder)


def load_parts(start: StartConfig) -> Parts:
    """The parts of an earlier run, in fp32."""
    import torch
    from diffusers import AutoPipelineForText2Image

    from diffdiv.metrics.judge import load_judge

    pipe = AutoPipelineForText2Image.from_pretrained(start.pipeline).to(dtype=torch.float32)
    return Parts(load_judge(start.judge), pipe.vae, pipe.tokenizer, pipe.text_encoder)


def evaluate(config: RecipeConfig, judge: "Judge") -> Rows:
    """Metrics of the saved pipeline and of its floors; every row has the same prompts and n."""
    import torch
    from diffusers import AutoPipelineForText2Image

    from diffdiv.data.digits import PromptedDigits
    from diffdiv.metrics.judge import attribute_accuracy, judge_features, judge_frechet

    real = PromptedDigits("train", seed=config.seed).batch(range(6000)).images
    reference = judge_features(judge, real)
    unseen = PromptedDigits("test", seed=config.seed, drop_probability=0)
    wanted = unseen.batch(range(config.num_evaluated))
    # The saved weights are fp16 numbers, run here in fp32.
    pipe = AutoPipelineForText2Image.from_pretrained(config.folder)
    pipe.to(dtype=torch.float32).set_progress_bar_config(disable=True)

    def metrics(images: "Tensor") -> dict[str, float]:
        distance = judge_frechet(judge_features(judge, images), reference)
        return {"frechet_judge": distance, **attribute_accuracy(judge, images, wanted.mentioned)}

    mean, _ = encode(pipe.vae, wanted.images)
    with torch.no_grad():
        rebuilt = torch.cat([pipe.vae.decode(chunk).sample for chunk in mean.split(250)])
    options = {"num_inference_steps": 20, "output_type": "pt"}
    table = {"held-out images": metrics(wanted.images), "autoencoder": metrics(rebuilt)}
    for scale in (1.0, 1.5):
        images = []
        for start in track(range(0, len(mean), 100), description=f"guidance {scale}"):
            prompts = wanted.prompts[start : start + 100]
            generator = torch.Generator().manual_seed(config.seed + start)
            drawn = pipe(prompts, generator=generator, guidance_scale=scale, **options).images
            images.append(drawn * 2 - 1)
        table[f"teacher, 20 steps, guidance {scale}"] = metrics(torch.cat(images))
    return table


def evaluate_judge(config: RecipeConfig, judge: "Judge") -> Rows:
    """Accuracy on digits it has not seen, and how often the shipped judge says the same."""
    import torch

    from diffdiv.data.digits import PromptedDigits
    from diffdiv.metrics.judge import attribute_accuracy, load_judge
    from diffdiv.resources import resource

    other = "test" if config.split == "train" else "train"
    unseen = PromptedDigits(other, seed=config.seed).batch(range(config.num_evaluated))
    shipped = load_judge(resource("assets/embedded_judge"))
    with torch.no_grad():
        ours, theirs = judge(unseen.images), shipped(unseen.images)
    same = {name: ours[name].argmax(1) == theirs[name].argmax(1) for name in ours}
    same["all"] = torch.stack(list(same.values())).all(0)
    return {
        "this judge": attribute_accuracy(judge, unseen.images, unseen.shown),
        "the shipped judge": attribute_accuracy(shipped, unseen.images, unseen.shown),
        "agreement": {name: hits.double().mean().item() for name, hits in same.items()},
    }


def write_evaluation(config: RecipeConfig, rows: Rows, seconds: float) -> None:
    """Prints the table and saves it with its card as evaluation.json."""
    table = Table(
        "", *next(iter(rows.values())), title=f"{config.folder}, {seconds:.0f} CPU seconds"
    )
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.3f}" for value in values.values()))
    Console(width=110).print(table)  # a log file has no width of its own
    unet, judge = "unet/diffusion_pytorch_model.safetensors", "judge.safetensors"
    weights = (config.folder / (unet if config.architecture else judge)).read_bytes()
    compared = {
        "features": "embedded judge divided by the reference's std, not Inception",
        "reference": "6000 training composites",
    }
    card = {
        "n": config.num_evaluated,
        "seed": config.seed,
        **(compared if config.architecture else {"trained on": f"digits of {config.split!r}"}),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "cpu_seconds": round(seconds),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    named = [{"name": name, "metrics": values} for name, values in rows.items()]
    text = json.dumps({"rows": named, "card": card}, indent=1)
    (config.folder / "evaluation.json").write_text(text + "\n")


def main(config: RecipeConfig) -> None:
    """Judge, autoencoder, text encoders, U-Net, evaluation; writes the folders."""
    import torch

    from diffdiv.data.digits import PromptedDigits
    from diffdiv.metrics.judge import save_judge

    began = time.process_time()
    torch.set_num_threads(config.threads)
    data = PromptedDigits(config.split, seed=config.seed).batch(range(config.num_images))
    if config.architecture is None:
        judge = train_judge(config, data)
        save_judge(judge, config.folder)
        rows = evaluate_judge(config, judge)
        return write_evaluation(config, rows, time.process_time() - began)
    parts = load_parts(config.start) if config.start else train_parts(config, data)
    if config.judge_folder is not None:
        save_judge(parts.judge, config.judge_folder)
    train = train_sd if config.architecture == "sd" else train_sdxl
    train(config, parts, data).to(dtype=torch.float16).save_pretrained(config.folder)
    write_evaluation(config, evaluate(config, parts.judge), time.process_time() - began)


if __name__ == "__main__":
    run_recipe_file(__file__)
