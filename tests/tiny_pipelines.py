"""Random pipelines of every text-to-image family but Stable Diffusion (see builders.py).

All make 16x16 images from 8x8 latents of 4 channels; FLUX is told so by its VAE.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from builders import (
    stable_diffusion_scheduler,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)
from diffusers import (
    AutoencoderDC,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def projected_encoder() -> CLIPTextModelWithProjection:
    """The tiny text encoder with a projection, as SDXL and SD3 have."""
    config = tiny_text_encoder().config.to_dict() | {"projection_dim": 16}
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))


def tiny_t5(width: int = 8) -> tuple[T5EncoderModel, T5Tokenizer]:
    """One layer, and a tokenizer of lower-case letters."""
    letters = [(f"{mark}{c}", -1.0) for c in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "▁")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    words = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(words), **sizes)
    return T5EncoderModel(config), words


def tiny_gemma(vocabulary: int) -> Gemma2Model:
    """One layer of width 8."""
    config = Gemma2Config(
        vocab_size=vocabulary,
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
    return Gemma2Model(config)


def tiny_sdxl(folder: Path, **options: object) -> StableDiffusionXLPipeline:
    unet = tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        text_encoder_2=projected_encoder(),
        tokenizer=tiny_tokenizer(folder / "1"),
        tokenizer_2=tiny_tokenizer(folder / "2"),
        unet=unet,
        scheduler=stable_diffusion_scheduler(),
        add_watermarker=False,
        **options,
    )


def tiny_sd3(folder: Path) -> StableDiffusion3Pipeline:
    encoder, words = tiny_t5(32)
    net = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=8,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=net,
        vae=tiny_vae(0.1),
        text_encoder=projected_encoder(),
        text_encoder_2=projected_encoder(),
        text_encoder_3=encoder,
        tokenizer=tiny_tokenizer(folder / "1"),
        tokenizer_2=tiny_tokenizer(folder / "2"),
        tokenizer_3=words,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def tiny_flux(folder: Path) -> FluxPipeline:
    encoder, words = tiny_t5()
    net = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=True,
    )
    return FluxPipeline(
        transformer=net,
        vae=tiny_vae(0.1),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(folder / "1"),
        text_encoder_2=encoder,
        tokenizer_2=words,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def tiny_pixart(folder: Path) -> PixArtAlphaPipeline:
    encoder, words = tiny_t5()
    net = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=12,
        caption_channels=8,
        sample_size=8,
        norm_num_groups=4,
    )
    parts = {"transformer": net, "vae": tiny_vae(), "scheduler": DDPMScheduler(clip_sample=False)}
    return PixArtAlphaPipeline(text_encoder=encoder, tokenizer=words, **parts)


def tiny_sana(folder: Path) -> SanaPipeline:
    _, words = tiny_t5()
    net = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        patch_size=1,
        timestep_scale=2.0,
    )
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    codec = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        scaling_factor=0.4,
        upsample_block_type="interpolate",
    )
    parts = {"transformer": net, "vae": codec, "scheduler": scheduler}
    return SanaPipeline(text_encoder=tiny_gemma(len(words)), tokenizer=words, **parts)


PIPELINES: Mapping[str, Callable[..., DiffusionPipeline]] = {
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "pixart": tiny_pixart,
    "sana": tiny_sana,
}


def write_pipeline(kind: str, root: Path, **options: object) -> Path:
    """Write a random pipeline of this kind into ``root``/teacher and return that folder."""
    torch.manual_seed(0)
    PIPELINES[kind](root / "scratch", **options).save_pretrained(root / "teacher")
    return root / "teacher"
