"""Stock schedulers that begin sampling at a time M below the noisiest one.

The grid of a plain run is kept and its first steps are left out, so every level is one the model
was trained on. (Changing ``num_train_timesteps`` instead would spread the betas anew and move all
levels.) Their configuration has one more entry, ``_start``: M as a share of the noisiest time, in
(0, 1]. This file needs torch and diffusers only: it is copied beside weights that use it.
"""

from collections.abc import Mapping

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

_CPU = torch.device("cpu")


def _first(levels: Tensor, start: float) -> int:
    """Number of the first level that is not above ``start``; ValueError if none is left."""
    kept = levels <= start + 1e-6
    if not bool(kept.any()):
        raise ValueError(f"start {start:g} lies below the last of {len(levels)} sampling steps")
    return int(kept.int().argmax())


def _from_index(timesteps: Tensor, config: Mapping[str, float]) -> Tensor:
    """The indices from the first one below start * num_train_timesteps on."""
    return timesteps[_first((timesteps + 1) / config["num_train_timesteps"], config["_start"]) :]


class StartDDIMScheduler(DDIMScheduler):
    """DDIM from M."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device = _CPU) -> None:
        """As the stock scheduler's, then cut; ValueError if no step is left."""
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = _from_index(self.timesteps, self.config)


class StartCogVideoXDDIMScheduler(CogVideoXDDIMScheduler):
    """CogVideoX's DDIM from M."""

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """As the stock scheduler's, then cut; ValueError if no step is left."""
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = _from_index(self.timesteps, self.config)


class StartCogVideoXDPMScheduler(CogVideoXDPMScheduler):
    """CogVideoX's DPM++ from M."""

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """As the stock scheduler's, then cut; ValueError if no step is left."""
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = _from_index(self.timesteps, self.config)


class StartFlowMatchEulerDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow-matching Euler from M."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device = _CPU,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the stock scheduler's, then cut; ValueError if no step is left."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        first = _first(self.sigmas[:-1], self.config["_start"])  # the last sigma is data
        self.timesteps, self.sigmas = self.timesteps[first:], self.sigmas[first:]


class StartUniPCMultistepScheduler(UniPCMultistepScheduler):
    """UniPC of a flow from M."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device = _CPU,
        sigmas: list[float] | None = None,
        mu: bool | None = None,
    ) -> None:
        """As the stock scheduler's, then cut; ValueError if no step is left."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu)
        first = _first(self.sigmas[:-1], self.config["_start"])
        self.timesteps, self.sigmas = self.timesteps[first:], self.sigmas[first:]


StartScheduler = (
    StartDDIMScheduler
    | StartCogVideoXDDIMScheduler
    | StartCogVideoXDPMScheduler
    | StartFlowMatchEulerDiscreteScheduler
    | StartUniPCMultistepScheduler
)

#: by the class name of the stock scheduler
START_SCHEDULERS: Mapping[str, type[StartScheduler]] = {
    "DDIMScheduler": StartDDIMScheduler,
    "CogVideoXDDIMScheduler": StartCogVideoXDDIMScheduler,
    "CogVideoXDPMScheduler": StartCogVideoXDPMScheduler,
    "FlowMatchEulerDiscreteScheduler": StartFlowMatchEulerDiscreteScheduler,
    "UniPCMultistepScheduler": StartUniPCMultistepScheduler,
}
