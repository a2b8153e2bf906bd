"""Train an image-to-video denoiser on digits that move: naive, TimeNoise or constant noise.

    diffdiv train configs/demo/i2v.yaml

In this world the ideal denoiser is known (diffdiv/data/moving_digits.py), so leakage can be read
off: a network that learns by heart how each training image moves is better than the ideal on those
images and worse on others. RUN/export holds the averaged weights (denoiser/, scheduler/).
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from diffdiv.runtime.config import Config, OptimizerConfig, ReplicatedRunConfig
from diffdiv.runtime.launch import run_recipe_file

if TYPE_CHECKING:
    from diffdiv.core.leakage import ConditionNoise
    from diffdiv.core.schedule import Schedule


class WorldConfig(Config):
    """Which clips there are."""

    num_pairs: int | None = Field(64, gt=0, le=1500)  # images, one clip each; None: all, any clip
    still_probability: float = Field(0.6, gt=0, lt=1)  # of clips in which nothing moves


class ConditionConfig(Config):
    """How the image is degraded in training; symbols as in diffdiv/core/leakage.py."""

    kind: Literal["clean", "timenoise", "constant"] = "timenoise"
    beta_m: float = Field(5.0, gt=0)  # bound of the level; constant noise: the level
    a: float = Field(5.0, gt=0)
    mu_max: float = 4.0
    # images left clean: these leak at every t, and low levels are rehearsed late in time anyhow
    clean_probability: float = Field(0.0, ge=0, le=1)


class ModelConfig(Config):
    """Residual perceptron."""

    width: int = Field(256, gt=0)
    num_blocks: int = Field(3, gt=0)


class RecipeConfig(Config):
    """Everything the training depends on."""

    recipe: Literal["moving_digits"] = "moving_digits"
    run: ReplicatedRunConfig
    world: WorldConfig = WorldConfig()
    condition: ConditionConfig = ConditionConfig()
    model: ModelConfig = ModelConfig()
    lr: float = Field(1e-3, gt=0)
    ema_half_life: int = Field(20_000, gt=0)  # clips; the averaged weights are exported
    optimizer: OptimizerConfig = OptimizerConfig()


def condition_noise(config: ConditionConfig, schedule: "Schedule") -> "ConditionNoise | None":
    """The degradation of this configuration; None leaves the image clean."""
    from diffdiv.core.leakage import ConstantNoise, TimeNoise, time_map

    clean = config.clean_probability
    match config.kind:
        case "clean":
            return None
        case "constant":
            return ConstantNoise(config.beta_m, clean)
    noise_time = time_map(schedule)
    return TimeNoise(noise_time, config.beta_m, config.a, config.mu_max, clean_probability=clean)


def main(config: RecipeConfig) -> None:
    """Train and export; resumes by itself when the run folder holds a valid state."""
    from functools import partial

    import torch

    from diffdiv.core.leakage import ConditionDraw
    from diffdiv.core.schedule import Noising, from_diffusers
    from diffdiv.data.moving_digits import MovingDigits, strip_world
    from diffdiv.models.clip_net import (
        ClipNet,
        clip_denoiser,
        clip_scheduler,
        save_clip_net,
        show_clean,
    )
    from diffdiv.models.denoiser import Condition
    from diffdiv.objectives.denoising import denoising_loss
    from diffdiv.runtime.run import Run

    run = Run(config.run, main="denoiser", resolved=config.model_dump(mode="json"))
    seed, half_life = config.run.seed, config.ema_half_life
    world = strip_world(still_probability=config.world.still_probability)
    data = MovingDigits(world, num_pairs=config.world.num_pairs, seed=seed)
    schedule = from_diffusers(clip_scheduler())
    noise = condition_noise(config.condition, schedule)
    torch.manual_seed(seed)
    net = ClipNet(space=world.space, num_frames=world.num_frames, **config.model.model_dump())
    trained = run.add(
        "denoiser", net, lr=config.lr, optimizer=config.optimizer, ema_half_lives=(half_life,)
    )
    run.restore()
    with run:
        while run.step < config.run.steps:
            with run.turn("denoiser"):
                for indices in run.micro_batches("denoiser"):
                    x0, image = (part.to(run.device) for part in data.batch(indices))
                    at = Noising.draw(
                        schedule, x0.shape[1:], indices, seed=seed, purpose="clip",
                        device=run.device,
                    )  # fmt: skip
                    draw = ConditionDraw.draw(world.space, indices, seed=seed, device=run.device)
                    shown = show_clean if noise is None else partial(noise, noise=draw)
                    denoiser = clip_denoiser(trained, schedule, image, shown)
                    with run.autocast():
                        loss = denoising_loss(denoiser, x0, Condition(), at)
                    run.update("denoiser", loss)
                    run.log({"denoiser/loss": loss.detach()})
    if run.is_main:
        save_clip_net(net, run.ema_weights("denoiser", half_life), run.folder / "export")


if __name__ == "__main__":
    run_recipe_file(__file__)
