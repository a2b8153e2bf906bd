"""How each diffusers backbone is called: all of them are one ``call(net, x_in, time, cond)``.

    x_in     network input [B, C, H, W]: pixels or latents, never packed
    time     [B], what the schedule says the network is told: an index 0..999, 250 ln sigma, or
             1000 t for flows, as each family's own pipeline does
    raw      network output, shape of x_in; a learned variance is dropped

Calls see the network alone, which may be wrapped (DDP) and then has no configuration: what depends
on the configuration is bound by :meth:`Family.bind`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import exp
from typing import Literal, cast

import torch

# concrete modules: mypy sees the placeholders of the lazy top level
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from diffdiv.core.prediction import PredictionKind
from diffdiv.core.schedule import Schedule, rectified_flow, schedule_from_config
from diffdiv.models.denoiser import Call, Condition

Config = Mapping[str, object]
_PIXELS_PER_LATENT = 8  # of the VAE of every family that is told its image size


def call_unet2d(net: nn.Module, x_in: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """UNet2DModel, class-conditional when the condition holds a label."""
    return net(x_in, time.to(x_in.dtype), class_labels=cond.label, return_dict=False)[0]


def call_sd_unet(net: nn.Module, x_in: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """UNet2DConditionModel with text embeddings (Stable Diffusion 1.x, 2.x)."""
    return net(x_in, time, encoder_hidden_states=cond.text, return_dict=False)[0]


def call_sdxl_unet(net: nn.Module, x_in: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """UNet2DConditionModel with pooled text and time ids (Stable Diffusion XL)."""
    return net(
        x_in,
        time,
        encoder_hidden_states=cond.text,
        added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.time_ids},
        return_dict=False,
    )[0]


def call_sd3(net: nn.Module, x_in: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """SD3Transformer2DModel (Stable Diffusion 3, 3.5)."""
    return net(
        hidden_states=x_in,
        timestep=time,
        encoder_hidden_states=cond.text,
        pooled_projections=cond.pooled,
        return_dict=False,
    )[0]


def call_pixart(
    net: nn.Module, x_in: Tensor, time: Tensor, cond: Condition, *, is_told_size: bool = False
) -> Tensor:
    """PixArtTransformer2DModel; PixArt-alpha at 1024 is also told the image size in pixels."""
    resolution = aspect_ratio = None
    if is_told_size:
        batch, _, height, width = x_in.shape
        sizes = (x_in.new_full((batch,), _PIXELS_PER_LATENT * size) for size in (height, width))
        resolution = torch.stack(list(sizes), 1)
        aspect_ratio = x_in.new_full((batch, 1), height / width)
    output = net(
        x_in,
        encoder_hidden_states=cond.text,
        encoder_attention_mask=cond.text_mask,
        timestep=time,
        added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
        return_dict=False,
    )[0]
    return output[:, : x_in.shape[1]]


def call_sana(
    net: nn.Module, x_in: Tensor, time: Tensor, cond: Condition, *, time_scale: float = 1.0
) -> Tensor:
    """SanaTransformer2DModel; SANA-1.5 is told a scaled time."""
    output = net(
        x_in,
        encoder_hidden_states=cond.text,
        encoder_attention_mask=cond.text_mask,
        timestep=time * time_scale,
        return_dict=False,
    )[0]
    return output[:, : x_in.shape[1]]


def call_flux(
    net: nn.Module,
    x_in: Tensor,
    time: Tensor,
    cond: Condition,
    *,
    embedded_guidance: float | None = None,
) -> Tensor:
    """FluxTransformer2DModel on 2x2 patches of latents, told its time in 0..1.

    Args:
        net, x_in, time, cond: as everywhere here; height and width of x_in are even.
        embedded_guidance: the scale a guidance-distilled network (FLUX.1 dev) is told; None for
            one without that input.
    """
    assert cond.text is not None
    batch, channels, height, width = x_in.shape
    rows, columns = height // 2, width // 2
    patches = x_in.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    image_ids = x_in.new_zeros(rows, columns, 3)
    image_ids[..., 1] += torch.arange(rows, device=x_in.device)[:, None]
    image_ids[..., 2] += torch.arange(columns, device=x_in.device)
    guidance = None if embedded_guidance is None else time.new_full((batch,), embedded_guidance)
    output = net(
        hidden_states=patches.reshape(batch, rows * columns, channels * 4),
        timestep=time / 1000,
        guidance=guidance,
        pooled_projections=cond.pooled,
        encoder_hidden_states=cond.text,
        txt_ids=x_in.new_zeros(cond.text.shape[1], 3),
        img_ids=image_ids.reshape(rows * columns, 3),
        return_dict=False,
    )[0]
    patches = output.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(x_in.shape)


@dataclass(frozen=True)
class Family:
    """What differs between backbones.

    Attributes:
        folder: of the network inside a diffusers pipeline folder.
        model: its class.
        bind: configuration -> call; ValueError for inputs nobody here would supply.
        lora_targets: ends of names of the layers that adapters change, attention first.
        feature_block: configuration -> name of the block in the middle, for discriminator heads.
    """

    folder: Literal["unet", "transformer"]
    model: type[ModelMixin]
    bind: Callable[[Config], Call]
    lora_targets: tuple[str, ...]
    feature_block: Callable[[Config], str]


def _bind_unet(config: Config) -> Call:
    match config.get("addition_embed_type"):
        case None:
            return call_sd_unet
        case "text_time":
            return call_sdxl_unet
    raise ValueError(f"addition_embed_type {config['addition_embed_type']!r} is not supported")


def _bind_pixart(config: Config) -> Call:
    chosen = config.get("use_additional_conditions")
    is_told_size = config["sample_size"] == 128 if chosen is None else bool(chosen)
    return partial(call_pixart, is_told_size=is_told_size)


def _bind_sana(config: Config) -> Call:
    return partial(call_sana, time_scale=float(str(config.get("timestep_scale", 1.0))))


def _bind_flux(config: Config) -> Call:
    # 3.5 is what FLUX.1 dev's own pipeline is told when nobody says otherwise
    return partial(call_flux, embedded_guidance=3.5 if config.get("guidance_embeds") else None)


def _middle_block(config: Config) -> str:
    return f"transformer_blocks.{int(str(config['num_layers'])) // 2}"


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_CONTEXT = ("ff_context.net.0.proj", "ff_context.net.2")
# DMD2's list for SDXL: attention, feed-forward, projections, residual convolutions, resampling and
# what the time embedding adds to every residual block
_UNET = (
    *("conv1", "conv2", "conv_shortcut"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)

#: backbones by the ``_class_name`` of their configuration
FAMILIES: Mapping[str, Family] = {
    "UNet2DModel": Family(
        "unet", UNet2DModel, lambda _: call_unet2d, (*_ATTENTION, *_UNET), lambda _: "mid_block"
    ),
    "UNet2DConditionModel": Family(
        "unet",
        UNet2DConditionModel,
        _bind_unet,
        (*_ATTENTION, "proj_in", "proj_out", *_FEED_FORWARD, *_UNET),
        lambda _: "mid_block",
    ),
    "SD3Transformer2DModel": Family(
        "transformer",
        SD3Transformer2DModel,
        lambda _: call_sd3,
        (*_ATTENTION, *_JOINT, *_FEED_FORWARD, *_CONTEXT),
        _middle_block,
    ),
    "PixArtTransformer2DModel": Family(
        "transformer",
        PixArtTransformer2DModel,
        _bind_pixart,
        (*_ATTENTION, *_FEED_FORWARD),
        _middle_block,
    ),
    "SanaTransformer2DModel": Family(
        "transformer",
        SanaTransformer2DModel,
        _bind_sana,
        (*_ATTENTION, "conv_inverted", "conv_point"),
        _middle_block,
    ),
    "FluxTransformer2DModel": Family(
        "transformer",
        FluxTransformer2DModel,
        _bind_flux,
        (*_ATTENTION, *_JOINT, *_FEED_FORWARD, *_CONTEXT, "proj_mlp", "proj_out"),
        _middle_block,
    ),
}


def lora_targets(net: nn.Module) -> tuple[str, ...]:
    """The adapter targets of the network's family that this network has.

    Small or unusual configurations lack some (a U-Net of one level never resamples).
    """
    family = FAMILIES[type(net).__name__]
    names = [f".{name}" for name, _ in net.named_modules()]
    return tuple(t for t in family.lora_targets if any(n.endswith(f".{t}") for n in names))


def latent_shape(config: Config) -> tuple[int, int, int]:
    """Shape (channels, height, width) of the samples a backbone was built for."""
    channels = int(str(config["in_channels"]))
    if "sample_size" not in config:  # FLUX: channels of 2x2 patches; trained at 1024 pixels
        return channels // 4, 128, 128
    size = cast("int | list[int]", config["sample_size"])
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def schedule_for(
    name: str, config: Config, shape: tuple[int, int, int]
) -> tuple[Schedule, PredictionKind]:
    """Schedule and prediction kind of a pipeline's scheduler, resolution-dependent shift included.

    Adds to :func:`schedule_from_config` the flow modes of multistep solvers (SANA) and the shift
    that FLUX computes from the number of 2x2 patches: linear in it, exponentiated.

    Args:
        name: class name of the scheduler.
        config: its configuration.
        shape: of one sample (C, H, W), in latents.

    Raises:
        ValueError: if that scheduler cannot be converted.
    """
    if config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas"):
        return rectified_flow(shift=float(str(config.get("flow_shift", 1.0)))), "flow"
    schedule, kind = schedule_from_config(name, config)
    if not config.get("use_dynamic_shifting"):
        return schedule, kind
    low, high = (float(str(config[f"{end}_image_seq_len"])) for end in ("base", "max"))
    low_mu, high_mu = (float(str(config[f"{end}_shift"])) for end in ("base", "max"))
    patches = (shape[1] // 2) * (shape[2] // 2)
    mu = low_mu + (high_mu - low_mu) * (patches - low) / (high - low)
    is_linear = config.get("time_shift_type") == "linear"
    return rectified_flow(shift=mu if is_linear else exp(mu)), kind


def middle_block(net: nn.Module) -> str:
    """Name of the block in the middle of a network, whose features a discriminator can read."""
    return FAMILIES[type(net).__name__].feature_block(cast(ModelMixin, net).config)
