"""f-distill: distil a diffusion teacher into a one-step generator (arXiv 2502.15681v1).

    diffdiv train configs/demo/f_distill.yaml
    accelerate launch train/f_distill.py configs/f_distill/sd.yaml teacher.path=... data.path=...

A cycle is ``critic_updates`` updates of the critic (fake score and discriminator), then one of the
student. The critic's samples of a cycle are made once and reused at fresh times and noise: the
student does not change in between. They are not the samples of the student's own update: a fake
score judges badly what it was just fitted to.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from diffdiv.core.names import divergence_name
from diffdiv.runtime.config import Config, ExistingFolder, OptimizerConfig, RunConfig
from diffdiv.runtime.launch import run_recipe_file


class TeacherConfig(Config):
    """The frozen teacher."""

    path: ExistingFolder  # diffusers folder: Stable Diffusion, or UNet2DModel + scheduler
    guidance_scale: float | None = Field(None, ge=1)  # None: no guidance


class StudentConfig(Config):
    """The one-step generator, a copy of the teacher at the start."""

    t_init: float = Field(gt=0)  # its only time: index (vp), sigma (edm), 0..1 (flow)
    input_convention: Literal["unit", "ve"] = "unit"  # network input: z, or sigma z
    lr: float = Field(gt=0)
    ema_half_lives: tuple[Annotated[int, Field(gt=0)], ...] = (1000,)  # images; the first is used


class DivergenceConfig(Config):
    """Which divergence, and how its weights are normalised."""

    name: Annotated[str, AfterValidator(divergence_name)] = "jensen_shannon"
    decay: float = Field(0.9, ge=0, lt=1)  # of the running means of r and h, per update
    clip: tuple[float, float] = (0.1, 20.0)  # bounds on r (FastGen's default)

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if not 0 < self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {list(self.clip)} is not increasing and positive")
        return self


class GanConfig(Config):
    """Discriminator (always trained when a ratio is needed) and GAN loss."""

    weight: float | None = Field(1e-3, ge=0)  # of the student's GAN loss; None: off
    balance: bool = False  # weight = GAN to VSD gradient norm at x0
    trunk: Literal["teacher", "fake"] = "teacher"  # whose features the heads read
    blocks: Annotated[tuple[str, ...], Field(min_length=1)] = ("mid_block",)
    lr: float = Field(1e-4, gt=0)
    r1_gamma: float = Field(0.0, ge=0)
    r1: Literal["exact", "approximate"] = "approximate"

    @model_validator(mode="after")
    def _exact_needs_frozen_trunk(self) -> Self:
        if self.trunk == "fake" and self.r1 == "exact" and self.r1_gamma > 0:
            raise ValueError("r1 'exact' differentiates a frozen trunk: use trunk 'teacher'")
        return self


class DataConfig(Config):
    """Conditions and real samples."""

    kind: Literal["prompted_digits", "digits", "images", "prompts"]
    path: Path | None = None  # image folder, or prompt file (txt, csv, jsonl, parquet)
    real: Literal["data", "teacher"] = "data"  # whose samples the discriminator calls real

    @model_validator(mode="after")
    def _path(self) -> Self:
        if self.kind in ("images", "prompts") and (self.path is None or not self.path.exists()):
            raise ValueError(f"path {str(self.path)!r} must exist for kind {self.kind!r}")
        if self.kind == "prompts" and self.real == "data":
            raise ValueError("kind 'prompts' has no images: set data.real to 'teacher'")
        return self


class RecipeConfig(Config):
    """Everything a run of f-distill depends on."""

    recipe: Literal["f_distill"] = "f_distill"
    run: RunConfig
    teacher: TeacherConfig
    student: StudentConfig
    fake_lr: float = Field(gt=0)
    divergence: DivergenceConfig = DivergenceConfig()
    gan: GanConfig = GanConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    critic_updates: int = Field(5, ge=1)  # per student update (f-distill table 5: 5, 5, 10)
    t_range: tuple[float, float] = (0.02, 0.98)  # quantiles of the student's times (DMD2)

    @property
    def needs_ratio(self) -> bool:
        """Whether a discriminator is trained; reverse KL without a GAN loss needs none."""
        return self.divergence.name != "reverse_kl" or self.gan.weight is not None


def main(config: RecipeConfig) -> None:
    """Train; resumes by itself when the run folder holds a valid state."""
    import copy
    from functools import partial

    import torch

    from diffdiv.core.divergence import get_divergence
    from diffdiv.core.noise import normal
    from diffdiv.core.schedule import Noising
    from diffdiv.models.backbones import load_denoiser
    from diffdiv.models.denoiser import guided
    from diffdiv.models.discriminator import heads_for
    from diffdiv.models.generator import Generator
    from diffdiv.objectives import f_distill
    from diffdiv.runtime.preview import Preview
    from diffdiv.runtime.run import Run
    from diffdiv.samplers import sample_ode, time_grid
    from diffdiv.sources import open_source

    # -- networks: the student and the fake score start as copies of the teacher ------------------
    run = Run(config.run, main="student", resolved=config.model_dump(mode="json"))
    seed, gan, pool = config.run.seed, config.gan, run.folder / "teacher_samples.safetensors"
    base = load_denoiser(config.teacher.path)
    base.net.requires_grad_(False).to(run.device)
    source = open_source(
        config.data.kind,
        config.data.path,
        teacher_path=config.teacher.path,
        teacher=base,
        guidance_scale=config.teacher.guidance_scale,
        teacher_pool=pool if config.data.real == "teacher" else None,
        seed=seed,
        device=run.device,
    )
    teacher = guided(base, config.teacher.guidance_scale, source.uncond)
    student_net, fake_net = (copy.deepcopy(base.net).requires_grad_(True) for _ in range(2))
    options = {"optimizer": config.optimizer}
    ema = config.student.ema_half_lives
    student = run.add("student", student_net, lr=config.student.lr, ema_half_lives=ema, **options)
    fake = base.with_net(run.add("fake", fake_net, lr=config.fake_lr, **options))
    disc, critics = None, ["fake"]
    if config.needs_ratio:
        critics.append("disc")
        heads = heads_for(base, source.shape, source.conditions([0]), gan.blocks, seed=seed)
        disc = run.add("disc", heads, lr=gan.lr, **options)
    t_init, convention = config.student.t_init, config.student.input_convention
    generator = Generator(base.with_net(student), t_init, convention)
    critic = f_distill.Critic(teacher, base.with_net(fake_net), disc, gan.blocks, gan.trunk)
    ratio = f_distill.RatioStatistics(
        get_divergence(config.divergence.name),
        decay=config.divergence.decay,
        clip=config.divergence.clip,
    )
    run.attach("ratio", ratio)
    beside = partial(sample_ode, teacher, times=time_grid(base.schedule, 20))
    preview = Preview(run, source, "student", ema[0], generator.with_net, teacher=beside)

    # -- draws: functions of (seed, purpose, global sample index) --------------------------------
    student_times = base.schedule.between(*config.t_range)
    draw = partial(Noising.draw, shape=source.shape, seed=seed, device=run.device)

    def generate(net, indices):
        """Student samples [B, C, H, W] and their conditions."""
        cond = source.conditions(indices).to(run.device)
        z = normal(source.shape, seed=seed, purpose="z", indices=indices).to(run.device)
        with run.autocast():
            return generator.with_net(net)(z, cond), cond

    run.restore()
    with run:
        preview.show()
        while run.step < config.run.steps:
            # even samples are the student's, odd ones the critic's
            with torch.no_grad():
                samples = [
                    generate(student_net, [2 * i + 1 for i in indices])
                    for indices in run.micro_batches("student")
                ]
            while run.updates["fake"] < (run.step + 1) * config.critic_updates:
                with run.turn(*critics):
                    for indices, (x0, cond) in zip(run.micro_batches("fake"), samples, strict=True):
                        at = draw(base.schedule, indices=indices, purpose="critic")
                        with run.autocast():
                            loss, metrics = f_distill.fake_score_loss(fake, x0, cond, at)
                        run.update("fake", loss)
                        if disc is not None:
                            real = f_distill.Real(
                                *source.real_on(run.device, indices),
                                draw(base.schedule, indices=indices, purpose="real"),
                            )
                            with run.autocast():
                                loss, more = f_distill.density_ratio_loss(
                                    x0, cond, at, real,
                                    critic=critic, ratio=ratio, r1_gamma=gan.r1_gamma, r1=gan.r1,
                                )  # fmt: skip
                            run.update("disc", loss)
                            metrics |= more
                        run.log(metrics)
                    ratio.commit()

            with run.turn("student"):
                for indices in run.micro_batches("student"):
                    x0, cond = generate(student, [2 * i for i in indices])
                    with run.autocast():
                        loss, metrics = f_distill.student_loss(
                            x0, cond, draw(student_times, indices=indices, purpose="student"),
                            critic=critic, ratio=ratio, gan_weight=gan.weight,
                            balance_gan=gan.balance,
                        )  # fmt: skip
                    run.update("student", loss)
                    run.log(metrics)
                ratio.commit()
            if run.every(100) and (warning := ratio.warning()):
                run.event("warning", warning)
            if run.every(config.run.sample_every):
                preview.show()


if __name__ == "__main__":
    run_recipe_file(__file__)
