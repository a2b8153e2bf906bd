"""Stable Diffusion (1.x, 2.x, XL) students that make an image in one pass of the U-Net.

The encoder of the U-Net runs once on pure noise; its decoder runs at K times in one batch, and the
K predictions are combined into the latents by a fixed linear map (TiUE, arXiv 2505.21960). The
U-Net is a plain UNet2DConditionModel; called the ordinary way it is another, worse sampler.
Everything around it is the stock pipeline. This file needs torch and diffusers only.
"""

from contextlib import ExitStack, contextmanager

import torch
from diffusers import (
    ConfigMixin,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput


class TiUEScheduler(SchedulerMixin, ConfigMixin):
    """One step from noise to latents: ``noise_gain * z + sum_k output_gains[k] * output_k``.

    Args:
        encoder_time: the timestep that the U-Net's encoder is told.
        decoder_times: the K timesteps of its decoder.
        noise_gain: factor of the noise.
        output_gains: K factors of the outputs.
        num_train_timesteps: of the noise schedule that all times belong to.
        prediction_type: what an output is; for information.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        encoder_time: int = 751,
        decoder_times: tuple[int, ...] = (751, 501, 251, 1),
        noise_gain: float = 1.0,
        output_gains: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0),
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
    ) -> None:
        if len(output_gains) != len(decoder_times):
            raise ValueError(
                f"output_gains: {len(output_gains)} for {len(decoder_times)} decoder_times"
            )
        self.timesteps = torch.tensor([encoder_time])

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Accept one step; ValueError for any other number."""
        if num_inference_steps != 1:
            raise ValueError(
                f"num_inference_steps: {num_inference_steps} given to a one-pass generator"
            )
        self.timesteps = torch.tensor([self.config.encoder_time], device=device)

    def scale_model_input(
        self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        """Latents from all K outputs.

        Args:
            model_output: `(K * batch_size, channels, height, width)`, row k * batch_size + b.
            timestep: the encoder's; not used.
            sample: the noise `(batch_size, channels, height, width)`.
            return_dict: a SchedulerOutput if true, else a tuple of one.
        """
        outputs = model_output.float().unflatten(0, (-1, len(sample)))
        gains = torch.tensor(self.config.output_gains, device=outputs.device)
        latents = self.config.noise_gain * sample.float() + torch.tensordot(gains, outputs, 1)
        latents = latents.to(sample.dtype)
        return SchedulerOutput(prev_sample=latents) if return_dict else (latents,)


class _OnePass:
    """What both pipelines add to the stock ones."""

    def __call__(self, *args, num_inference_steps: int = 1, guidance_scale: float = 0.0, **kwargs):
        """Generate images; arguments and output are those of the stock pipeline.

        Args:
            num_inference_steps: 1.
            guidance_scale: at most 1, that is, off: guidance was distilled into the student.

        Raises:
            ValueError: for more steps, or guidance.
        """
        if num_inference_steps != 1:
            raise ValueError(
                f"num_inference_steps: {num_inference_steps} given to a one-pass generator"
            )
        if guidance_scale > 1:
            raise ValueError(
                f"guidance_scale: {guidance_scale} given, but guidance was distilled into the "
                "student; leave it out"
            )
        with _shared_encoder(self.unet, self.scheduler.config.decoder_times):
            return super().__call__(
                *args, num_inference_steps=1, guidance_scale=guidance_scale, **kwargs
            )


class TiUEPipeline(_OnePass, StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x in one pass.

    ```python
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    image = pipe("a photo of a lighthouse").images[0]
    ```
    """


class TiUEXLPipeline(_OnePass, StableDiffusionXLPipeline):
    """Stable Diffusion XL in one pass; called as :class:`TiUEPipeline`."""


@contextmanager
def _shared_encoder(unet, decoder_times):
    """Inside, a call of the U-Net returns the outputs at all K times, `(K * batch_size, ...)`.

    The up blocks are told the embedding of their row's time, and are given the encoder's features
    once for each time. Hooks do it; none is left behind.
    """
    count, found = len(decoder_times), {}

    def embed(module, args, kwargs):
        named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False))
        named |= kwargs
        sample, batch = named["sample"], len(named["sample"])
        times = torch.tensor(decoder_times, dtype=torch.float64, device=sample.device)
        labels, guidance, added, text = (
            _tile(named.get(name), count, batch)
            for name in (
                "class_labels", "timestep_cond", "added_cond_kwargs", "encoder_hidden_states"
            )
        )  # fmt: skip
        like = sample[:1].expand(count * batch, *sample.shape[1:])
        time = module.get_time_embed(sample=like, timestep=times.repeat_interleave(batch))
        embedding = module.time_embedding(time, guidance)
        of_class = module.get_class_embed(sample=like, class_labels=labels)
        if of_class is not None and module.config.class_embeddings_concat:
            embedding = torch.cat([embedding, of_class], dim=-1)
        elif of_class is not None:
            embedding = embedding + of_class
        extra = module.get_aug_embed(
            emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added
        )
        embedding = embedding if extra is None else embedding + extra
        act = module.time_embed_act
        found.update(batch=batch, temb=embedding if act is None else act(embedding))

    def widen(first):
        names = [
            "res_hidden_states_tuple", "encoder_hidden_states", "attention_mask",
            "encoder_attention_mask", "cross_attention_kwargs",
        ]  # fmt: skip
        names += ["hidden_states"] if first else []

        def hook(module, args, kwargs):
            batch = found["batch"]
            wide = {name: _tile(kwargs[name], count, batch) for name in names if name in kwargs}
            return args, {**kwargs, **wide, "temb": found["temb"]}

        return hook

    with ExitStack() as hooks:
        handles = [unet.register_forward_pre_hook(embed, with_kwargs=True)]
        for number, block in enumerate(unet.up_blocks):
            handles.append(block.register_forward_pre_hook(widen(number == 0), with_kwargs=True))
        for handle in handles:
            hooks.callback(handle.remove)
        yield


def _tile(value, count, batch):
    """Every tensor of leading size ``batch`` in ``value``, repeated ``count`` times."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value] * count) if value.ndim and len(value) == batch else value
    if isinstance(value, (tuple, list)):
        return type(value)(_tile(part, count, batch) for part in value)
    if isinstance(value, dict):
        return {
            key: part if key == "ip_adapter_masks" else _tile(part, count, batch)
            for key, part in value.items()
        }
    return value
