"""Random image-to-video pipelines, built from configurations alone: 16x16 pixels and more."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from tiny_pipelines import tiny_t5
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
)


def vision_config(width: int = 16) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=width,
        projection_dim=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
    )


def svd_scheduler(**changes: object) -> EulerDiscreteScheduler:
    """Stable Video Diffusion's own."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "interpolation_type": "linear",
        "prediction_type": "v_prediction",
        "sigma_max": 700.0,
        "sigma_min": 0.002,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    }
    return EulerDiscreteScheduler(**{**settings, **changes})


def tiny_svd() -> StableVideoDiffusionPipeline:
    """3 frames; 16x16 pixels are 8x8 latents of 4 channels."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=(2, 2),
        layers_per_block=1,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
        num_frames=3,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )
    return StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=CLIPVisionModelWithProjection(vision_config()),
        unet=unet,
        scheduler=svd_scheduler(),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
    )


def tiny_wan(scheduler: object = None) -> WanImageToVideoPipeline:
    """5 frames of 16x16 pixels are 2 latent frames of 2x2, 16 channels."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    net = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        image_dim=16,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    )
    words = tiny_t5(16)[1]
    text = UMT5Config(vocab_size=len(words), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return WanImageToVideoPipeline(
        tokenizer=words,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae,
        transformer=net,
        scheduler=scheduler
        or UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
        image_encoder=CLIPVisionModel(vision_config()),
        image_processor=CLIPImageProcessor(crop_size=224, size=224),
    )


def tiny_cogvideox(patch_size_t: int | None = None) -> CogVideoXImageToVideoPipeline:
    """5 frames of 16x16 pixels are 2 latent frames of 8x8, 4 channels."""
    torch.manual_seed(0)
    net = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        patch_size_t=patch_size_t,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=patch_size_t is None,
        patch_bias=patch_size_t is None,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    encoder, words = tiny_t5(16)
    return CogVideoXImageToVideoPipeline(
        tokenizer=words,
        text_encoder=encoder.eval(),
        vae=vae,
        transformer=net,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        ),
    )


def saved(pipe: DiffusionPipeline, folder: Path) -> Path:
    """The pipeline as a folder."""
    pipe.save_pretrained(folder)
    return folder
