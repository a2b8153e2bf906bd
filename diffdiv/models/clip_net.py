"""A small network that denoises clips of a small world given their first frame, and its files.

    x_t     noised clips [B, F, *space]         image   first frames [B, *space], perhaps degraded
    level   how much of the image was taken     v       alpha eps - sigma x0 (arXiv 2202.00512)
            away [B], 0 = clean

A residual perceptron over all cells at once: it sees the whole image at every noise level, so
nothing keeps it from reading the motion off the image if the training clips let it.
"""

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from torch.nn.functional import silu

from diffdiv.core.schedule import Schedule, from_diffusers
from diffdiv.core.tensor import expand_like
from diffdiv.models.denoiser import Denoiser

_TIME_CHANNELS = 64
#: ``degrade(image, t) -> (image, level)``: what the network is shown of the image at times t
Degrade = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ClipNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' bases disagree
    """Residual perceptron (x_t, t, image, level) -> v; 0.5 million parameters for the strip.

    Args:
        space: cells along each direction.
        num_frames: F.
        width: features.
        num_blocks: residual blocks of one hidden layer.
    """

    @register_to_config
    def __init__(
        self,
        space: Sequence[int] = (16,),
        num_frames: int = 6,
        width: int = 256,
        num_blocks: int = 3,
    ) -> None:
        super().__init__()
        cells = prod(space)
        self.stem = nn.Linear((num_frames + 1) * cells, width)
        self.time = nn.Linear(2 * _TIME_CHANNELS, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(),
                          nn.Linear(width, width))
            for _ in range(num_blocks)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_frames * cells)

    def forward(self, x_t: Tensor, t: Tensor, image: Tensor, level: Tensor) -> Tensor:
        """Prediction v, of the shape of ``x_t``; t in 0..999."""
        level = level.to(x_t.dtype)
        seen = image * expand_like((1 + level.square()).rsqrt(), image)  # of about unit variance
        told = [
            get_timestep_embedding(number, _TIME_CHANNELS).to(x_t.dtype)
            for number in (t, 250 * level.log1p())
        ]
        features = self.stem(torch.cat([x_t.flatten(1), seen.flatten(1)], 1))
        features = features + self.time(torch.cat(told, 1))
        for block in self.blocks:
            features = features + block(features)
        return self.head(silu(self.norm(features))).view_as(x_t)


def show_clean(image: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The image itself at all times, level 0."""
    return image, torch.zeros(len(image), device=image.device)


def clip_denoiser(
    net: nn.Module, schedule: Schedule, image: Tensor, degrade: Degrade = show_clean
) -> Denoiser:
    """Denoiser of the clips of these images.

    Args:
        net: a :class:`ClipNet`, perhaps wrapped.
        schedule: of the vp family.
        image: first frames [B, *space].
        degrade: what of them the network is shown.
    """

    def call(net: nn.Module, x_t: Tensor, t: Tensor, _cond: object) -> Tensor:
        v: Tensor = net(x_t, t, *degrade(image, t))
        return v

    return Denoiser(net, call, schedule, "v")


def clip_scheduler() -> DDIMScheduler:
    """The schedule of Stable Diffusion, v-prediction, trailing steps."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip


def save_clip_net(net: ClipNet, weights: dict[str, Tensor], folder: Path) -> None:
    """Write a diffusers folder: denoiser/ (these weights in fp16) and scheduler/."""
    copy = ClipNet.from_config(net.config)
    copy.load_state_dict(weights)
    copy.half().save_pretrained(folder / "denoiser")
    clip_scheduler().save_pretrained(folder / "scheduler")


def load_clip_net(folder: Path) -> tuple[ClipNet, Schedule]:
    """The network, float32 and frozen, and its schedule, from a folder of :func:`save_clip_net`.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not (folder / "denoiser").is_dir():
        raise FileNotFoundError(f"{folder}: no denoiser of clips here (made by diffdiv train)")
    net = ClipNet.from_pretrained(folder / "denoiser", dtype=torch.float32)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    return net.eval().requires_grad_(False), from_diffusers(scheduler)
