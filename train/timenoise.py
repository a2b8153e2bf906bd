"""Fine-tune an image-to-video model so that it stops copying its image (arXiv 2406.15735v3).

    diffdiv train configs/timenoise/svd.yaml model.path=/path/to/svd videos.path=/path/to/videos

The model's own loss and noise law; only its image is degraded, the more the noisier the video
(TimeNoise), or as much at all times (constant), or by a blur (low_pass), or not at all (none: the
control). RUN/export is the stock pipeline. Sample with it from the clean image.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from diffdiv.runtime.config import Config, ExistingFolder, OptimizerConfig, RunConfig
from diffdiv.runtime.launch import run_recipe_file


class LoraConfig(Config):
    """A low-rank adapter in place of training the whole network."""

    rank: int = Field(64, ge=1)
    alpha: int = Field(64, ge=1)  # the update is scaled by alpha / rank


class ModelConfig(Config):
    """The image-to-video pipeline that is fine-tuned."""

    path: ExistingFolder  # diffusers folder: Stable Video Diffusion, Wan 2.1 or CogVideoX
    lora: LoraConfig | None = None  # None: the whole network is trained
    dtype: Literal["fp32", "bf16"] = "fp32"  # of frozen weights; bf16 with lora alone
    checkpointing: bool = False  # recompute activations in the backward
    motion_bucket: int = Field(127, ge=0, le=255)  # what Stable Video Diffusion is told
    p_mean: float = 0.7  # mean and std of its ln sigma (arXiv 2311.15127)
    p_std: float = Field(1.6, gt=0)

    @model_validator(mode="after")
    def _whole_networks_are_fp32(self) -> Self:
        if self.dtype != "fp32" and self.lora is None:
            raise ValueError("dtype 'bf16' cannot be trained whole: set lora")
        return self


class VideosConfig(Config):
    """Clips."""

    path: Path  # folder of videos (mp4, gif, ...) or of folders of frames
    num_frames: int = Field(14, ge=2)
    height: int = Field(320, ge=8)
    width: int = Field(512, ge=8)
    fps: float = Field(7.0, gt=0)  # frames a second of a clip
    flip: bool = False  # mirror half of them
    cache: Path | None = None  # folder for latents of the middle clips, computed once

    @model_validator(mode="after")
    def _path(self) -> Self:
        if not self.path.is_dir():
            raise ValueError(f"path {str(self.path)!r} must be a folder of videos")
        return self


class NoiseConfig(Config):
    """How the image is degraded in training."""

    kind: Literal["time_noise", "constant", "low_pass", "none"] = "time_noise"
    strength: float = Field(15.0, gt=0)  # bound beta_m, level, or width of the blur in latents
    a: float = Field(5.0, gt=0)  # power of the time: large = only near pure noise
    mu_max: float = Field(4.0, ge=0)  # contrast between both ends of time (released for SVD: 1)
    s: float = Field(1.0, gt=0)  # spread of the level's logit
    time: Literal["rank", "log_snr", "time"] = "rank"  # what counts as time in TimeNoise, low_pass
    clean_probability: float = Field(0.1, ge=0, le=1)
    space: Literal["latent", "pixel"] = "latent"  # where; pixels are noised before the VAE


class RecipeConfig(Config):
    """Everything a fine-tuning depends on."""

    recipe: Literal["timenoise"] = "timenoise"
    run: RunConfig
    model: ModelConfig
    videos: VideosConfig
    noise: NoiseConfig = NoiseConfig()
    condition_dropout: float = Field(0.1, ge=0, lt=1)  # samples without image (SVD) or text
    lr: float = Field(gt=0)
    ema_half_life: int = Field(5000, gt=0)  # samples; the averaged weights are exported
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _can_be_had(self) -> Self:
        if self.run.sample_every is not None:
            raise ValueError("run.sample_every: this recipe draws no samples; leave it null")
        if self.noise.space == "pixel" and self.videos.cache is not None:
            raise ValueError("videos.cache holds no pixels: set it to null for noise.space 'pixel'")
        if self.videos.cache is not None and self.videos.flip:
            raise ValueError("videos.cache holds latents, which cannot be mirrored: flip=false")
        if self.model.dtype == "bf16" and self.run.precision != "bf16":
            raise ValueError("model.dtype 'bf16' needs run.precision 'bf16'")
        if self.model.checkpointing and self.run.sharding == "fsdp2":
            raise ValueError("model.checkpointing cannot be had with run.sharding 'fsdp2'")
        return self


def main(config: RecipeConfig) -> None:
    """Train and export; resumes by itself when the run folder holds a valid state."""
    import torch

    from diffdiv.core.leakage import ConditionDraw, condition_noise
    from diffdiv.core.noise import normal, uniform
    from diffdiv.core.schedule import Noising
    from diffdiv.data.video import VideoFolder
    from diffdiv.export_video import export_video
    from diffdiv.models.adapters import SharedBase, enable_checkpointing
    from diffdiv.models.image_to_video import open_host
    from diffdiv.models.video_calls import svd_schedule
    from diffdiv.objectives.denoising import denoising_loss
    from diffdiv.runtime.run import Run
    from diffdiv.video_clips import cached_rows, live_rows

    run = Run(config.run, main="model", resolved=config.model_dump(mode="json"))
    choice, clips, seed = config.model, config.videos, config.run.seed

    # -- the network: whole, or an adapter on it --------------------------------------------------
    host = open_host(
        choice.path, run.device, dtype=torch.float32 if choice.dtype == "fp32" else torch.bfloat16,
        fps=clips.fps, motion_bucket=choice.motion_bucket,
        svd=svd_schedule(p_mean=choice.p_mean, p_std=choice.p_std),
    )  # fmt: skip
    net = host.net
    if choice.lora is None:
        net.requires_grad_(True)
        if choice.checkpointing:
            enable_checkpointing(net)
    else:
        shared = SharedBase(net)
        rank, alpha = choice.lora.rank, choice.lora.alpha
        net = shared.add("model", rank=rank, alpha=alpha, targets=host.lora_targets, seed=seed)
        if choice.checkpointing:
            enable_checkpointing(shared)
    half_life = config.ema_half_life
    trained = run.add(
        "model", net, lr=config.lr, optimizer=config.optimizer, ema_half_lives=(half_life,)
    )

    # -- clips and what is done to their images ---------------------------------------------------
    space = host.codec.space(clips.num_frames, clips.height, clips.width)
    size = (clips.height, clips.width)
    folder = VideoFolder(
        clips.path, num_frames=clips.num_frames, size=size, fps=clips.fps, flip=clips.flip
    )
    for path, reason in folder.quarantine:
        run.event("quarantine", f"{path}: {reason}")
    facts = {"num_frames": clips.num_frames, "height": size[0], "width": size[1], "fps": clips.fps}
    rows_of = live_rows(host, folder, seed=seed)
    if clips.cache is not None:
        rows_of = cached_rows(
            host, folder, clips.cache, model=choice.path, facts=facts, seed=seed, device=run.device
        )
    noise = condition_noise(schedule=host.schedule, **config.noise.model_dump())

    def degraded(rows, t, indices):
        """The image as the network is given it, and its level [B]."""
        y = rows["first"] if noise.space == "pixel" else rows["image"]
        draw = ConditionDraw.draw(y.shape[1:], indices, seed=seed, device=run.device)
        y, level = noise(y, t, draw)
        return (host.image(y, clips.num_frames) if noise.space == "pixel" else y), level

    run.restore()
    with run:
        while run.step < config.run.steps:
            with run.turn("model"):
                for indices in run.micro_batches("model"):
                    rows = rows_of(indices)
                    eps = normal(space.shape, seed=seed, purpose="posterior", indices=indices)
                    x0 = host.codec.draw(rows["mean"], rows["std"], eps)
                    at = Noising.draw(
                        host.schedule, space.shape, indices, seed=seed, purpose="model",
                        device=run.device,
                    )  # fmt: skip
                    y, level = degraded(rows, at.t, indices)
                    drawn = uniform(seed=seed, purpose="dropout", indices=indices)
                    dropped = (drawn < config.condition_dropout).to(run.device)
                    rows, y = host.without(rows, y, dropped)
                    if host.tells_level:  # no image, so nothing was done to it
                        level = level * ~dropped
                    denoiser, cond = host.denoiser(trained, rows, y, level)
                    with run.autocast():
                        loss = denoising_loss(denoiser, x0, cond, at)
                    run.update("model", loss)
                    run.log({"model/loss": loss.detach(), "image/level": level.mean()})
    weights = run.ema_weights("model", half_life)
    if run.is_main:
        told = config.noise.model_dump() | {"seed": seed, "steps": config.run.steps}
        told |= {"p_mean": choice.p_mean, "p_std": choice.p_std} if host.tells_level else {}
        export_video(choice.path, weights, run.folder / "export", lora=choice.lora, facts=told)


if __name__ == "__main__":
    run_recipe_file(__file__)
