"""One-step image generator on an unconditional or class-conditional UNet2DModel.

A student distilled from a diffusion model makes a sample by one network call at a fixed noise
level: x_t = input_scale * z with z ~ N(0, I), then x0 from what the network predicts. Symbols:
x0 clean image in [-1, 1]; alpha, sigma the signal and noise coefficients of x_t = alpha x0 +
sigma eps; F the network's output. This file needs torch and diffusers only.
"""

import math

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow", "edm")


class OneStepUNetPipeline(DiffusionPipeline):
    """Generates images with one call of a UNet2DModel.

    ```python
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipe(batch_size=4).images
    ```

    Args:
        unet: the network F.
        scheduler: the noise schedule the student was trained with; kept for further training, not
            used for sampling.
        prediction: what F predicts. "epsilon": eps; "v_prediction": alpha eps - sigma x0;
            "sample": x0; "flow": eps - x0; "edm": x0 behind the preconditioning of Karras et al.,
            arXiv 2206.00364v2, table 1.
        t_init: the timestep given to the network (not used by "edm").
        alpha_init: alpha at the start.
        sigma_init: sigma at the start, positive.
        input_scale: standard deviation of the network's noisy image x_t.
        sigma_data: standard deviation of the data ("edm" only).
        edm_time_scale: the timestep given to the network is edm_time_scale * log(sigma) / 4
            ("edm" only).
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        prediction: str = "epsilon",
        t_init: float = 999.0,
        alpha_init: float = 0.0682,
        sigma_init: float = 0.9977,
        input_scale: float = 1.0,
        sigma_data: float = 0.5,
        edm_time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        if not sigma_init > 0 or not input_scale > 0:
            raise ValueError(
                f"sigma_init, input_scale: {sigma_init}, {input_scale} are not positive"
            )
        if prediction == "epsilon" and not alpha_init > 0:
            raise ValueError(f"alpha_init: {alpha_init} is not positive, as epsilon needs it to be")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            prediction=prediction,
            t_init=t_init,
            alpha_init=alpha_init,
            sigma_init=sigma_init,
            input_scale=input_scale,
            sigma_data=sigma_data,
            edm_time_scale=edm_time_scale,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            batch_size: number of images; by default that of the labels or latents, else 1.
            class_labels: one class for all images or one for each; required exactly when the
                network has classes.
            num_inference_steps: 1.
            generator: one for the batch or one for each image.
            latents: z [B, C, H, W], standard normal, instead of drawing it.
            output_type: "pil" for PIL images, "np" for [B, H, W, C] in [0, 1], "pt" for
                [B, C, H, W] in [0, 1], "x0" for [B, C, H, W] as predicted, unclipped.
            return_dict: an ImagePipelineOutput if true, else a tuple of one.

        Raises:
            ValueError: for another number of steps, or labels, latents, generators or a type of
                output that do not fit.
        """
        if num_inference_steps != 1:
            raise ValueError(
                f"num_inference_steps: {num_inference_steps} given to a one-step generator"
            )
        if output_type not in ("pil", "np", "pt", "x0"):
            raise ValueError(f"output_type: {output_type!r} is not one of pil, np, pt, x0")
        batch_size = self._batch_size(batch_size, class_labels, latents)
        labels = self._labels(class_labels, batch_size)
        height, width = _pair(self.unet.config.sample_size)
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is None:
            # float32 whatever the weights: half precision would draw different noise
            latents = randn_tensor(shape, generator, self._execution_device, torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: shape {tuple(latents.shape)} is not {shape}")
        x0 = self._x0(latents.to(self._execution_device, torch.float32), labels)
        self.maybe_free_model_hooks()
        if output_type == "x0":
            images = x0
        else:
            images = self.image_processor.postprocess(x0.clamp(-1, 1), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _x0(self, z: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Clean image of the latents ``z``, float32; the network runs in its own precision."""
        config = self.config
        alpha, sigma = config.alpha_init, config.sigma_init
        x_t = config.input_scale * z
        if config.prediction == "edm":
            total = sigma**2 + config.sigma_data**2
            t = config.edm_time_scale * math.log(sigma) / 4
            c_skip, c_out = config.sigma_data**2 / total, sigma * config.sigma_data / total**0.5
            return c_skip * x_t + c_out * self._network(x_t / total**0.5, t, labels)
        out = self._network(x_t, config.t_init, labels)
        if config.prediction == "sample":
            return out
        if config.prediction == "epsilon":
            return (x_t - sigma * out) / alpha
        if config.prediction == "v_prediction":
            return (alpha * x_t - sigma * out) / (alpha**2 + sigma**2)
        return (x_t - sigma * out) / (alpha + sigma)

    def _network(self, x: torch.Tensor, t: float, labels: torch.Tensor | None) -> torch.Tensor:
        timesteps = torch.full((len(x),), t, device=x.device, dtype=torch.float32)
        return self.unet(x.to(self.unet.dtype), timesteps, class_labels=labels).sample.float()

    def _batch_size(
        self,
        batch_size: int | None,
        class_labels: int | list[int] | torch.Tensor | None,
        latents: torch.Tensor | None,
    ) -> int:
        sizes = {} if batch_size is None else {"batch_size": batch_size}
        if latents is not None:
            sizes["latents"] = len(latents)
        if class_labels is not None and torch.as_tensor(class_labels).ndim:
            sizes["class_labels"] = len(torch.as_tensor(class_labels))
        if len(set(sizes.values())) > 1:
            raise ValueError(f"numbers of images that do not agree: {sizes}")
        size = next(iter(sizes.values()), 1)
        if size < 1:
            raise ValueError(f"batch_size: {size} is not positive")
        return size

    def _labels(
        self, class_labels: int | list[int] | torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        num = self.unet.config.num_class_embeds
        if (class_labels is None) != (num is None):
            needs = "takes none" if num is None else f"needs one of 0..{num - 1} for each image"
            raise ValueError(f"class_labels: {class_labels} given, but this network {needs}")
        if class_labels is None:
            return None
        labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= num:
            raise ValueError(f"class_labels: {labels.tolist()} are not whole numbers 0..{num - 1}")
        return labels.expand(batch_size)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
