"""Scheduler of masked (absorbing-state) discrete diffusion over token sequences.

The ancestral sampler of MDLM (arXiv 2406.07524): between times t > s a masked position is revealed
with probability (m_t - m_s) / m_t, m the mask rate, by a token drawn from the network's prediction;
a revealed token stays. This file needs torch and diffusers only.
"""

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

MASK_SCHEDULES = ("log_linear", "cosine", "polynomial")


@dataclass
class MaskedDiffusionSchedulerOutput(BaseOutput):
    """Output of a step.

    Args:
        prev_sample (`torch.LongTensor` of shape `(batch_size, length)`): tokens after the step.
        sampled_tokens (`torch.LongTensor` of shape `(batch_size, length)`): a token for every
            position, whether or not it was revealed in this step.
        sampled_probs (`torch.Tensor` of shape `(batch_size, length)`): their probabilities.
        pred_logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`): the model output.
    """

    prev_sample: torch.LongTensor
    sampled_tokens: torch.LongTensor
    sampled_probs: torch.Tensor
    pred_logits: torch.Tensor


class MaskedDiffusionScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral sampling of masked diffusion; `step` keeps no state between calls.

    `timesteps` count the remaining steps down: timestep `n` leads from time `(n + 1) / N` to
    `n / N` of `N = num_inference_steps`, and timestep 0 reveals all that is left.

    Args:
        mask_token_id: id of the mask; it is never predicted.
        mask_schedule: mask rate as a function of time, "log_linear" `(1 - eps) t`, "cosine"
            `sin(pi t / 2)`, or "polynomial" `t ** power`.
        eps: of "log_linear".
        power: of "polynomial", positive.
        num_train_timesteps: how many times `add_noise` knows.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        mask_token_id: int = 4,
        mask_schedule: str = "log_linear",
        eps: float = 1e-3,
        power: float = 1.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        if mask_schedule not in MASK_SCHEDULES:
            raise ValueError(
                f"`mask_schedule`: {mask_schedule!r} is not one of {', '.join(MASK_SCHEDULES)}."
            )
        if not power > 0 or not 0 <= eps < 1:
            raise ValueError(f"`power`, `eps`: {power}, {eps} are not > 0 and in [0, 1).")
        self.set_timesteps(min(128, num_train_timesteps))

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Choose the number of steps.

        Args:
            num_inference_steps: N, at least 1.
            device: where `timesteps` go.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be >= 1, got {num_inference_steps}.")
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)

    def mask_rate(self, t: torch.Tensor) -> torch.Tensor:
        """Probability that a token is masked at times `t` in [0, 1]."""
        if self.config.mask_schedule == "log_linear":
            return (1 - self.config.eps) * t
        if self.config.mask_schedule == "cosine":
            return torch.sin(math.pi / 2 * t)
        return t**self.config.power

    def scale_model_input(
        self, sample: torch.LongTensor, timestep: int | torch.Tensor | None = None
    ) -> torch.LongTensor:
        """The sample itself; there is nothing to scale."""
        return sample

    def add_noise(
        self, original_samples: torch.LongTensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.LongTensor:
        """Mask tokens.

        Args:
            original_samples: clean tokens `(batch_size, length)`.
            noise: uniform numbers in [0, 1) of the same shape; a token is masked where its number
                is below the mask rate.
            timesteps: `(batch_size,)`, index n in `0 .. num_train_timesteps - 1` is the time
                `(n + 1) / num_train_timesteps`.
        """
        t = (timesteps.double() + 1) / self.config.num_train_timesteps
        masked = noise < self.mask_rate(t).to(noise.device)[:, None]
        return torch.where(masked, self.config.mask_token_id, original_samples)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> MaskedDiffusionSchedulerOutput | tuple[torch.Tensor, ...]:
        """Reveal some of the masked positions.

        Args:
            model_output: raw logits `(batch_size, length, vocab_size)`; the mask's column, if
                there is one, is ignored.
            timestep: one of `timesteps`.
            sample: tokens before the step `(batch_size, length)`.
            temperature: of the logits; 0 takes the likeliest token.
            generator: one for the batch or one for each sequence.
            return_dict: an output class if true, else the tuple of its fields.
        """
        rho = self._reveal_probability(int(timestep))
        logits = self._without_mask(model_output, sample)
        if temperature < 0:
            raise ValueError(f"`temperature` must be >= 0, got {temperature}.")
        log_probs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
        gumbel = self._gumbel((*sample.shape, logits.shape[-1] + 1), generator, sample.device)
        scores = log_probs if temperature == 0 else log_probs + gumbel[..., :-1]
        sampled = scores.argmax(-1)
        if temperature == 0:
            # the best of the token outcomes has the law of one Gumbel number at log(rho)
            reveal = gumbel[..., 0] + math.log(rho) > gumbel[..., -1] + _log(1 - rho)
        else:
            reveal = scores.amax(-1) + math.log(rho) > gumbel[..., -1] + _log(1 - rho)
        masked = sample == self.config.mask_token_id
        prev_sample = torch.where(masked & reveal, sampled, sample)
        probs = log_probs.exp().gather(-1, sampled[..., None])[..., 0]
        if not return_dict:
            return prev_sample, sampled, probs, model_output
        return MaskedDiffusionSchedulerOutput(prev_sample, sampled, probs, model_output)

    def _reveal_probability(self, timestep: int) -> float:
        steps = self.num_inference_steps
        if not 0 <= timestep < steps:
            raise ValueError(f"`timestep`: {timestep} is not in 0..{steps - 1}.")
        t = torch.tensor([timestep + 1, timestep], dtype=torch.float64) / steps
        before, after = self.mask_rate(t).tolist()
        return (before - after) / before

    def _without_mask(self, logits: torch.Tensor, sample: torch.LongTensor) -> torch.Tensor:
        if sample.is_floating_point() or logits.shape[:-1] != sample.shape:
            raise ValueError(
                f"`sample`: {sample.dtype} of shape {tuple(sample.shape)} is not whole-numbered "
                f"of the shape {tuple(logits.shape[:-1])} that `model_output` calls for."
            )
        mask = self.config.mask_token_id
        if mask >= logits.shape[-1]:
            return logits
        column = torch.arange(logits.shape[-1], device=logits.device) == mask
        return logits.masked_fill(column, -math.inf)

    def _gumbel(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Standard Gumbel noise, float32; made from normal numbers, in float64 where there is any,
        so that the rare tokens of a large vocabulary are not cut off."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        z = randn_tensor(shape, generator, device, dtype)
        return -(-torch.special.log_ndtr(z)).log().float()


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
