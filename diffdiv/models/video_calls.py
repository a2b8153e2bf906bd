"""How each image-to-video network is called: ``call(net, x_in, time, cond, y=...)``.

    x_in    [B, F, C, H, W]          y   the image's latents, frames first        raw   as x_in

Beside them, Stable Video Diffusion's noise schedule.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from diffdiv.core.schedule import Schedule, edm
from diffdiv.models.denoiser import Condition


def svd_schedule(
    *,
    p_mean: float = 0.7,
    p_std: float = 1.6,
    sigma_min: float = 0.002,
    sigma_max: float = 700.0,
) -> Schedule:
    """Stable Video Diffusion's noise (arXiv 2311.15127): ln sigma ~ N(0.7, 1.6^2).

    The network is told 0.25 ln sigma itself.
    """
    law = edm(sigma_min=sigma_min, sigma_max=sigma_max, p_mean=p_mean, p_std=p_std)
    return replace(law, net_time=lambda t: 0.25 * t.log())


def call_svd(net: nn.Module, x_in: Tensor, time: Tensor, cond: Condition, *, y: Tensor) -> Tensor:
    """UNetSpatioTemporalConditionModel; its v is minus EDM's F (sigma_data 1)."""
    image = y.to(x_in.dtype).expand(-1, x_in.shape[1], -1, -1, -1)
    both = torch.cat([x_in, image], 2)
    return -net(
        both,
        time.to(x_in.dtype),
        encoder_hidden_states=cond.text,
        added_time_ids=cond.time_ids,
        return_dict=False,
    )[0]


def call_wan(
    net: nn.Module,
    x_in: Tensor,
    time: Tensor,
    cond: Condition,
    *,
    y: Tensor,
    tokens: Tensor | None,
    time_stride: int,
) -> Tensor:
    """WanTransformer3DModel of image-to-video: video, mask of the first frame, image."""
    mask = torch.zeros_like(x_in[:, :, :1]).repeat(1, 1, time_stride, 1, 1)
    mask[:, 0] = 1
    both = torch.cat([x_in, mask, y.to(x_in.dtype)], 2).transpose(1, 2)
    return net(
        hidden_states=both,
        timestep=time,
        encoder_hidden_states=cond.text,
        encoder_hidden_states_image=tokens,
        return_dict=False,
    )[0].transpose(1, 2)


def call_cogvideox(
    net: nn.Module,
    x_in: Tensor,
    time: Tensor,
    cond: Condition,
    *,
    y: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    has_offset: bool,
) -> Tensor:
    """CogVideoXTransformer3DModel of image-to-video."""
    image = torch.cat([y.to(x_in.dtype), torch.zeros_like(x_in[:, 1:])], 1)
    return net(
        hidden_states=torch.cat([x_in, image], 2),
        encoder_hidden_states=cond.text,
        timestep=time,
        ofs=x_in.new_full((1,), 2.0) if has_offset else None,  # as the pipeline always says
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]
