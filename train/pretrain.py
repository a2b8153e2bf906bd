"""Train a small pixel-space diffusion teacher with EDM preconditioning (arXiv 2206.00364).

    diffdiv train configs/pretrain/imagefolder.yaml data.path=/path/to/images

The result, RUN/export, is a diffusers folder (unet/ + scheduler/) that configs/f_distill/*.yaml
take as ``teacher.path``.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diffdiv.runtime.config import Config, OptimizerConfig, ReplicatedRunConfig
from diffdiv.runtime.launch import run_recipe_file


class DataConfig(Config):
    """Images, and whether their classes are told to the network."""

    kind: Literal["digits", "images"]
    path: Path | None = None  # image folder; with classes, one sub-folder each
    size: int = Field(32, ge=8)  # pixels; images are resized and cropped to a square
    channels: Literal[1, 3] = 3
    conditional: bool = True  # class-conditional

    @model_validator(mode="after")
    def _path(self) -> Self:
        if self.kind == "images" and (self.path is None or not self.path.is_dir()):
            raise ValueError(f"path {str(self.path)!r} must be a folder of images")
        return self


class ModelConfig(Config):
    """UNet2DModel: one level per entry of ``channels``, halving the resolution between levels."""

    channels: Annotated[tuple[int, ...], Field(min_length=1)] = (64, 128, 128)
    layers: int = Field(2, ge=1)  # residual blocks a level
    attention: tuple[int, ...] = (2,)  # levels (0 = full resolution) with self-attention

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if any(c % 8 or c <= 0 for c in self.channels):
            raise ValueError(f"channels {list(self.channels)}: multiples of 8 are wanted")
        if any(not 0 <= level < len(self.channels) for level in self.attention):
            raise ValueError(
                f"attention {list(self.attention)}: levels are 0..{len(self.channels) - 1}"
            )
        return self


class NoiseConfig(Config):
    """EDM noise levels; defaults from arXiv 2206.00364, table 1."""

    sigma_data: float = Field(0.5, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    p_mean: float = -1.2  # mean and std of ln sigma in training
    p_std: float = Field(1.2, gt=0)


class RecipeConfig(Config):
    """Everything a teacher's training depends on."""

    recipe: Literal["pretrain"] = "pretrain"
    run: ReplicatedRunConfig
    data: DataConfig
    model: ModelConfig = ModelConfig()
    noise: NoiseConfig = NoiseConfig()
    lr: float = Field(gt=0)
    ema_half_life: int = Field(500_000, gt=0)  # images; the averaged weights are exported
    optimizer: OptimizerConfig = OptimizerConfig()


def main(config: RecipeConfig) -> None:
    """Train and export; resumes by itself when the run folder holds a valid state."""
    from functools import partial

    import torch

    from diffdiv.core.schedule import Noising, edm
    from diffdiv.models.backbones import build_unet2d, call_unet2d, save_edm_teacher
    from diffdiv.models.denoiser import Denoiser
    from diffdiv.objectives.denoising import denoising_loss
    from diffdiv.runtime.preview import Preview
    from diffdiv.runtime.run import Run
    from diffdiv.samplers import sample_ode, time_grid
    from diffdiv.sources import digits, image_folder

    run = Run(config.run, main="teacher", resolved=config.model_dump(mode="json"))
    data, noise, seed = config.data, config.noise, config.run.seed
    if data.path is None:
        source = digits(conditional=data.conditional, null_label=None, seed=seed)
    else:
        shape = (data.channels, data.size, data.size)
        source = image_folder(data.path, shape=shape, conditional=data.conditional, seed=seed)
    torch.manual_seed(seed)
    net = build_unet2d(
        source.shape,
        channels=config.model.channels,
        layers=config.model.layers,
        attention=config.model.attention,
        num_labels=source.num_labels,
    )
    schedule = edm(sigma_max=noise.sigma_max, p_mean=noise.p_mean, p_std=noise.p_std)
    denoiser = Denoiser(net, call_unet2d, schedule, "x0", noise.sigma_data)
    half_life = config.ema_half_life
    trained = run.add(
        "teacher", net, lr=config.lr, optimizer=config.optimizer, ema_half_lives=(half_life,)
    )
    teacher = denoiser.with_net(trained)
    grid = time_grid(schedule, 18)

    def sampler(net: torch.nn.Module):
        return partial(sample_ode, denoiser.with_net(net), times=grid, heun=True)

    preview = Preview(run, source, "teacher", half_life, sampler)
    run.restore()
    with run:
        while run.step < config.run.steps:
            with run.turn("teacher"):
                for indices in run.micro_batches("teacher"):
                    x0, cond = source.real_on(run.device, indices)
                    at = Noising.draw(
                        schedule, source.shape, indices, seed=seed, purpose="teacher",
                        device=run.device,
                    )  # fmt: skip
                    with run.autocast():
                        loss = denoising_loss(teacher, x0, cond, at)
                    run.update("teacher", loss)
                    run.log({"teacher/loss": loss.detach()})
            if run.every(config.run.sample_every):
                preview.show()
    if run.is_main:
        weights = run.ema_weights("teacher", half_life)
        save_edm_teacher(net, weights, run.folder / "export", noise.sigma_data, noise.sigma_max)


if __name__ == "__main__":
    run_recipe_file(__file__)
