"""Random image-to-video pipelines that are started at M but not trained; text encoders left out."""

from collections.abc import Callable, Mapping

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
    I2VGenXLPipeline,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet
from tiny_video_pipelines import vision_config
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

WAN_NET = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "out_channels": 16,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 16, "num_layers": 1, "rope_max_seq_len": 32,
}  # fmt: skip


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip


def wan_22() -> WanImageToVideoPipeline:
    """Two experts: one above 0.9 of the time, one below; the image by channels alone."""
    nets = [WanTransformer3DModel(in_channels=36, **WAN_NET) for _ in range(2)]
    return WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=wan_vae(), scheduler=unipc(), transformer=nets[0],
        transformer_2=nets[1], boundary_ratio=0.9,
    )  # fmt: skip


def wan_22_5b() -> WanImageToVideoPipeline:
    """The image as a clean first latent, its tokens told time 0."""
    return WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=wan_vae(), scheduler=unipc(),
        transformer=WanTransformer3DModel(in_channels=16, **WAN_NET), expand_timesteps=True,
    )  # fmt: skip


def skyreels_v2() -> SkyReelsV2ImageToVideoPipeline:
    net = SkyReelsV2Transformer3DModel(
        in_channels=36, image_dim=16, added_kv_proj_dim=24, **WAN_NET
    )
    return SkyReelsV2ImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=wan_vae(), scheduler=unipc(), transformer=net,
        image_encoder=CLIPVisionModelWithProjection(vision_config()),
        image_processor=CLIPImageProcessor(crop_size=224, size=224),
    )  # fmt: skip


def skyreels_v2_forcing() -> SkyReelsV2DiffusionForcingImageToVideoPipeline:
    """A time for every frame, the first one clean."""
    net = SkyReelsV2Transformer3DModel(in_channels=16, inject_sample_info=True, **WAN_NET)
    return SkyReelsV2DiffusionForcingImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=wan_vae(), scheduler=unipc(), transformer=net
    )


def ltx() -> LTXImageToVideoPipeline:
    """17 frames of 32x32 pixels are 3 latent frames of 4x4."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-0.1, 0.1, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8))
    net = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=16,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.1, base_shift=0.95, max_shift=2.05,
        base_image_seq_len=1024, max_image_seq_len=4096,
    )  # fmt: skip
    return LTXImageToVideoPipeline(
        scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=net
    )


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
        scaling_factor=0.476986,
    )  # fmt: skip


def hunyuan_net(**options: object) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16,
        rope_axes_dim=(2, 2, 4), patch_size=1, guidance_embeds=False, **options,
    )  # fmt: skip


def hunyuan(kind: str = "token_replace") -> HunyuanVideoImageToVideoPipeline:
    channels = 4 if kind == "token_replace" else 9
    return HunyuanVideoImageToVideoPipeline(
        text_encoder=None, tokenizer=None, vae=hunyuan_vae(), text_encoder_2=None, tokenizer_2=None,
        transformer=hunyuan_net(in_channels=channels, image_condition_type=kind),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), image_processor=None,
    )  # fmt: skip


def skyreels_v1() -> HunyuanSkyreelsImageToVideoPipeline:
    return HunyuanSkyreelsImageToVideoPipeline(
        text_encoder=None, tokenizer=None, vae=hunyuan_vae(), text_encoder_2=None, tokenizer_2=None,
        transformer=hunyuan_net(in_channels=8), scheduler=FlowMatchEulerDiscreteScheduler(shift=7),
    )  # fmt: skip


def hunyuan_15() -> HunyuanVideo15ImageToVideoPipeline:
    """A square image becomes 16x16 pixels, whatever its size."""
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    net = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16, image_embed_dim=16,
        rope_axes_dim=(2, 2, 4), target_size=16,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    return HunyuanVideo15ImageToVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=net, vae=vae, text_encoder_2=None,
        tokenizer_2=None, guider=ClassifierFreeGuidance(guidance_scale=1.0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_encoder=SiglipVisionModel(vision),
        feature_extractor=SiglipImageProcessor(size={"height": 28, "width": 28}),
    )  # fmt: skip


def i2vgen_xl() -> I2VGenXLPipeline:
    """3 frames of 16x16 pixels, 8x8 latents; a noise schedule as the released one's."""
    unet = I2VGenXLUNet(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=8, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=16,
        attention_head_dim=4, num_attention_heads=None,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=2,
    )  # fmt: skip
    return I2VGenXLPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet,
        image_encoder=CLIPVisionModelWithProjection(vision_config()),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
        scheduler=DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, clip_sample=False,
            prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1,
        ),
    )  # fmt: skip


STARTED: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "wan-2.2": wan_22, "wan-2.2-5b": wan_22_5b, "skyreels-v2": skyreels_v2,
    "skyreels-v2-forcing": skyreels_v2_forcing, "ltx": ltx, "hunyuan": hunyuan,
    "hunyuan-concat": lambda: hunyuan("latent_concat"), "skyreels-v1": skyreels_v1,
    "hunyuan-1.5": hunyuan_15, "i2vgen-xl": i2vgen_xl,
}  # fmt: skip


def tiny_started(name: str) -> DiffusionPipeline:
    """One of STARTED, always with the same weights."""
    torch.manual_seed(0)
    pipe = STARTED[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe
