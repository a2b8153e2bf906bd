"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, t = 0 is data.

    family           t                     alpha            sigma
    vp_from_betas    index 0..N-1          sqrt(abar_t)     sqrt(1 - abar_t)
    edm              sigma itself          1                t
    rectified_flow   0..1                  1 - t            t

A schedule also says how training times are drawn: ``sample_t`` is the quantile function of that
law, so a uniform number u is at once the draw and its rank (the ratio statistics bin by u).
Tables and coefficients are float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor

from diffdiv.core.noise import normal, uniform
from diffdiv.core.prediction import PredictionKind
from diffdiv.core.tensor import expand_like

_VP_SCHEDULERS = (
    "DDPM DDIM PNDM LCM TCD EulerDiscrete EulerAncestralDiscrete HeunDiscrete LMSDiscrete "
    "DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep KDPM2Discrete"
).split()
_EDM_SCHEDULERS = ("EDMEuler", "EDMDPMSolverMultistep")
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
_KINDS: dict[str, PredictionKind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# DDPMScheduler understands every beta table of the vp family, zero terminal SNR included.
_BETA_SETTINGS = (
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr"
).split()


@dataclass(frozen=True)
class Schedule:
    """Coefficients of the forward process and the law of training times.

    Attributes:
        family: "vp", "edm" or "flow".
        alpha: t [B] -> signal coefficient [B], float64.
        sigma: t [B] -> noise standard deviation [B], float64.
        quantile: u in [0, 1) [B] -> t [B], float64; the law from which training times are drawn.
        t_max: largest time (pure or almost pure noise).
        net_time: t -> the number the network is conditioned on.
    """

    family: str
    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    quantile: Callable[[Tensor], Tensor]
    t_max: float
    net_time: Callable[[Tensor], Tensor]

    def sample_t(self, u: Tensor) -> Tensor:
        """Training times of ranks ``u`` in [0, 1), shape [B], float64."""
        return self.quantile(u.double())

    def between(self, low: float, high: float) -> "Schedule":
        """The same schedule with times drawn between two quantiles (0 <= low < high <= 1).

        Ranks stay uniform: u = 0 is now ``low``, u = 1 is ``high``.

        Raises:
            ValueError: if the bounds are not increasing within [0, 1].
        """
        if not 0 <= low < high <= 1:
            raise ValueError(f"time range must satisfy 0 <= low < high <= 1, not {low}, {high}")
        quantile = self.quantile
        return replace(self, quantile=lambda u: quantile(low + (high - low) * u))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps, of shape and dtype of ``x0`` (t of shape [B])."""
        alpha, sigma = expand_like(self.alpha(t), x0), expand_like(self.sigma(t), x0)
        return alpha * x0 + sigma * eps


@dataclass(frozen=True)
class Noising:
    """How a batch is noised: times t [B] with their ranks u [B] in [0, 1), and eps [B, ...]."""

    t: Tensor
    u: Tensor
    eps: Tensor

    @staticmethod
    def draw(
        schedule: Schedule,
        shape: Sequence[int],
        indices: Sequence[int],
        *,
        seed: int,
        purpose: str,
        device: torch.device,
    ) -> "Noising":
        """Times from the schedule's law and standard normal noise, by global sample index."""
        u = uniform(seed=seed, purpose=f"{purpose}_t", indices=indices)
        eps = normal(shape, seed=seed, purpose=f"{purpose}_eps", indices=indices)
        return Noising(schedule.sample_t(u).to(device), u, eps.to(device))


def vp_from_betas(betas: Tensor) -> Schedule:
    """Variance-preserving schedule from a beta table (DDPM, arXiv 2006.11239); t is an index.

    Args:
        betas: shape [N], in (0, 1); 1 at the end is a zero-terminal-SNR schedule.
    """
    abar = torch.cumprod(1 - betas.double(), 0).clamp(0, 1)
    size = len(abar)

    def look_up(table: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda t: table.to(t.device)[t.round().long()]

    return Schedule(
        family="vp",
        alpha=look_up(abar.sqrt()),
        sigma=look_up((1 - abar).sqrt()),
        quantile=lambda u: (u * size).floor().clamp(0, size - 1),
        t_max=float(size - 1),
        net_time=lambda t: t,
    )


def edm(
    *, sigma_min: float = 0.002, sigma_max: float = 80.0, p_mean: float = -1.2, p_std: float = 1.2
) -> Schedule:
    """EDM schedule (arXiv 2206.00364): alpha = 1, sigma = t, ln t ~ N(p_mean, p_std^2) clamped.

    The network is told c_noise = ln(sigma)/4 times 1000, so that a sinusoidal embedding built for
    indices up to 1000 resolves it.
    """

    def quantile(u: Tensor) -> Tensor:
        # the ends of the normal are infinite; u = 0 occurs
        log_t = p_mean + p_std * torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9))
        return log_t.exp().clamp(sigma_min, sigma_max)

    return Schedule(
        family="edm",
        alpha=torch.ones_like,
        sigma=lambda t: t,
        quantile=quantile,
        t_max=sigma_max,
        net_time=lambda t: 250.0 * t.log(),
    )


def rectified_flow(*, shift: float = 1.0, num_train_timesteps: int = 1000) -> Schedule:
    """Rectified flow (arXiv 2209.03003): alpha = 1 - t, sigma = t; t shifted as SD3 does.

    Args:
        shift: t = shift u / (1 + (shift - 1) u) (arXiv 2403.03206).
        num_train_timesteps: the network is told t times this number.
    """
    if shift <= 0:
        raise ValueError(f"shift must be positive, not {shift}")
    return Schedule(
        family="flow",
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        quantile=lambda u: (shift * u / (1 + (shift - 1) * u)).clamp(1e-5, 1.0),
        t_max=1.0,
        net_time=lambda t: t * num_train_timesteps,
    )


def schedule_from_config(
    name: str, config: Mapping[str, object]
) -> tuple[Schedule, PredictionKind]:
    """Schedule and prediction kind of a diffusers scheduler configuration.

    EDM schedulers give kind "x0": the preconditioning of the network belongs to the denoiser.

    Args:
        name: class name of the scheduler ("DDIMScheduler", ...).
        config: its configuration mapping.

    Raises:
        ValueError: if diffdiv cannot convert that scheduler.
    """
    short = name.removesuffix("Scheduler")
    if short in _EDM_SCHEDULERS:
        low, high = float(str(config["sigma_min"])), float(str(config["sigma_max"]))
        return edm(sigma_min=low, sigma_max=high), "x0"
    if short in _FLOW_SCHEDULERS:
        shift = float(str(config.get("shift", 1.0)))
        steps = int(str(config.get("num_train_timesteps", 1000)))
        return rectified_flow(shift=shift, num_train_timesteps=steps), "flow"
    prediction = str(config.get("prediction_type", "epsilon"))
    if short not in _VP_SCHEDULERS or prediction not in _KINDS:
        known = ", ".join((*_VP_SCHEDULERS, *_EDM_SCHEDULERS, *_FLOW_SCHEDULERS))
        raise ValueError(
            f"scheduler {name} with prediction_type {prediction!r} cannot be converted; "
            f"known schedulers: {known}"
        )
    settings = {name: config[name] for name in _BETA_SETTINGS if name in config}
    return vp_from_betas(DDPMScheduler.from_config(settings).betas), _KINDS[prediction]


def from_diffusers(scheduler: ConfigMixin) -> Schedule:
    """Schedule of a diffusers scheduler; ValueError if it cannot be converted."""
    return schedule_from_config(type(scheduler).__name__, scheduler.config)[0]
