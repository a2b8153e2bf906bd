"""TiUE: a student whose encoder runs once and whose decoder runs at K times (arXiv 2505.21960).

    diffdiv train configs/demo/tiue.yaml
    diffdiv train configs/tiue/sd21.yaml teacher.path=... data.path=prompts.txt

One forward gives K predictions; K fixed DDIM steps combine them into x0 by a linear map. The
student is trained by variational score distillation (a fake score, an adapter on the teacher, is
fitted to its samples) plus a KL that keeps every predicted noise standard normal; or, with
``objective.name: f_distill``, by any f-divergence and a GAN loss in place of the former. Rewards
of the decoded images are optional: a CLIP score with a ceiling and a decay is the paper's CLIP
loss.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diffdiv.runtime.config import Config, OptimizerConfig, ReplicatedRunConfig
from diffdiv.runtime.distillation_config import (
    DataConfig,
    DivergenceConfig,
    GanConfig,
    LoraConfig,
    TeacherConfig,
)
from diffdiv.runtime.launch import run_recipe_file
from diffdiv.runtime.reward_config import OptionalRewardsConfig


class StudentConfig(Config):
    """The student, a full copy of the teacher at the start."""

    # of the decoder, falling indices; the default is the paper's, whose last one does little
    decoder_times: tuple[Annotated[int, Field(ge=0)], ...] = (751, 501, 251, 1)
    encoder_time: int | None = Field(None, ge=0)  # None: the first of the decoder's
    lr: float = Field(gt=0)
    ema_half_lives: tuple[Annotated[int, Field(gt=0)], ...] = (1000,)  # images; the first is used

    @model_validator(mode="after")
    def _falling(self) -> Self:
        times = list(self.decoder_times)
        if not times or times != sorted(set(times), reverse=True):
            raise ValueError(f"decoder_times {times} do not fall")
        return self


class ObjectiveConfig(Config):
    """What moves the student."""

    name: Literal["vsd", "f_distill"] = "vsd"
    # sum over K, mean over the batch; the paper's 0.1 is a sum over 8 samples
    kl_weight: float = Field(0.8, ge=0)
    divergence: DivergenceConfig = DivergenceConfig()  # f_distill
    gan: GanConfig = GanConfig()  # f_distill


class RecipeConfig(Config):
    """Everything a run of TiUE depends on."""

    recipe: Literal["tiue"] = "tiue"
    run: ReplicatedRunConfig
    teacher: TeacherConfig
    student: StudentConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    rewards: OptionalRewardsConfig = Field(default_factory=dict)  # of images; see docs/tiue.md
    fake_lr: float = Field(gt=0)
    fake_lora: LoraConfig | None = LoraConfig(rank=64, alpha=108)
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    drop_probability: float = Field(0.1, ge=0, le=1)  # of the fake score's condition
    t_range: tuple[float, float] = (0.02, 0.98)  # quantiles of the student's times

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.teacher.dtype == "int8":
            raise ValueError("teacher.dtype 'int8': the student is a full copy; use 'bf16'")
        if self.teacher.dtype == "bf16" and self.run.precision != "bf16":
            raise ValueError("teacher.dtype 'bf16' needs run.precision 'bf16'")
        if self.objective.name == "f_distill" and self.objective.gan.weight is None:
            if self.objective.divergence.name == "reverse_kl":
                raise ValueError("objective: 'f_distill' by reverse_kl without a GAN is 'vsd'")
        if any(self.rewards.values()) and self.data.kind in ("digits", "images"):
            raise ValueError(f"rewards: data kind {self.data.kind!r} has no prompts and no VAE")
        return self


def main(config: RecipeConfig) -> None:
    """Train; resumes by itself when the run folder holds a valid state."""
    from functools import partial

    import torch

    from diffdiv.core.divergence import get_divergence
    from diffdiv.core.noise import normal, uniform
    from diffdiv.core.schedule import Noising
    from diffdiv.models.adapters import trained_copies
    from diffdiv.models.backbones import load_denoiser
    from diffdiv.models.denoiser import dropped, guided
    from diffdiv.models.discriminator import heads_for
    from diffdiv.models.families import middle_block
    from diffdiv.models.shared_encoder import parallel_generator
    from diffdiv.objectives import f_distill
    from diffdiv.objectives.tiue import moment_kl, vsd_loss
    from diffdiv.runtime.preview import Preview
    from diffdiv.runtime.rewards import attach_rewards
    from diffdiv.runtime.run import Run
    from diffdiv.samplers import sample_ode, time_grid
    from diffdiv.sources import TeacherSamples, open_source

    # -- networks: the student is a full copy, the fake score a copy or an adapter ----------------
    run = Run(config.run, main="student", resolved=config.model_dump(mode="json"))
    seed, choice, objective = config.run.seed, config.student, config.objective
    gan, scale = objective.gan, config.teacher.guidance_scale
    base = load_denoiser(
        config.teacher.path,
        dtype=torch.float32 if config.teacher.dtype == "fp32" else torch.bfloat16,
    )
    base.net.requires_grad_(False).to(run.device, memory_format=torch.channels_last)
    source = open_source(
        config.data.kind, config.data.path, cache=config.data.cache,
        teacher_path=config.teacher.path, teacher=base, seed=seed, device=run.device,
    )  # fmt: skip
    teacher = guided(base, scale, source.uncond)
    nets = trained_copies(
        base.net, {"student": None, "fake": config.fake_lora}, seed=seed,
        checkpointing=config.teacher.checkpointing, compiled=config.teacher.compile,
    )  # fmt: skip
    generator = parallel_generator(base, nets["student"], choice.decoder_times, choice.encoder_time)
    options, ema = {"optimizer": config.optimizer}, choice.ema_half_lives
    learner = generator.with_net(
        run.add("student", generator.denoiser.net, lr=choice.lr, ema_half_lives=ema, **options)
    )
    fake = base.with_net(run.add("fake", nets["fake"], lr=config.fake_lr, **options))
    blocks, disc, trained = gan.blocks or (middle_block(base.net),), None, ["student", "fake"]
    if objective.name == "f_distill":
        trained.append("disc")
        with run.autocast():
            heads = heads_for(base, source.shape, source.conditions([0]), blocks, seed=seed)
        disc = run.add("disc", heads, lr=gan.lr, **options)
    critic = f_distill.Critic(teacher, base.with_net(nets["fake"]), disc, blocks, gan.trunk)
    divergence = objective.divergence
    ratio = f_distill.RatioStatistics(
        get_divergence(divergence.name), decay=divergence.decay, clip=divergence.clip
    )
    run.attach("ratio", ratio)

    # -- optional rewards of decoded images -------------------------------------------------------
    rewards = None
    if any(config.rewards.values()):
        rewards = attach_rewards(run, config.rewards, pipeline=config.teacher.path, source=source)

    # -- the teacher's own samples: the preview's column, data-free mode --------------------------
    @torch.no_grad()
    def beside(z, cond):
        with run.autocast():
            return sample_ode(teacher, z, cond, time_grid(base.schedule, 20))

    file = run.folder / "teacher_samples.safetensors"
    pool = TeacherSamples(source, beside, file, seed=seed, device=run.device)
    if config.data.real == "teacher":
        source = pool.as_data()

    def sampler_with(net):
        def sample(z, cond):
            with run.autocast():
                return generator.with_net(net)(z, cond)

        return sample

    preview = Preview(run, source, "student", ema[0], sampler_with, beside)

    # -- draws: functions of (seed, purpose, global sample index) --------------------------------
    draw = partial(Noising.draw, shape=source.shape, seed=seed, device=run.device)
    student_times = base.schedule.between(*config.t_range)

    def distil(x0, cond, indices):
        """The part of the student's loss that compares it with the teacher."""
        at = draw(student_times, indices=indices, purpose="student")
        if objective.name == "f_distill":
            return f_distill.student_loss(
                x0, cond, at, critic=critic, ratio=ratio, gan_weight=gan.weight,
                balance_gan=gan.balance,
            )  # fmt: skip
        judge = guided(critic.fake, scale, source.uncond)  # under the teacher's guidance
        return vsd_loss(x0, cond, at, teacher=teacher, fake=judge, schedule=base.schedule)

    run.restore()
    with run:
        preview.show()
        while run.step < config.run.steps:
            with run.turn(*trained):
                for indices in run.micro_batches("student"):
                    z = normal(source.shape, seed=seed, purpose="z", indices=indices)
                    z, cond = z.to(run.device), source.conditions(indices).to(run.device)
                    with run.autocast():
                        outputs = learner.outputs(z, cond)
                        x0 = generator.steps.combine(z, outputs)
                        loss, metrics = distil(x0, cond, indices)
                    kl = moment_kl(generator.steps.predicted_noise(z, outputs))
                    loss = loss + objective.kl_weight * kl
                    if rewards is not None and not rewards.is_over:
                        reward, seen = rewards(x0, source.captions(indices), indices)
                        loss, metrics = loss - reward.mean(), metrics | seen
                    run.update("student", loss)
                    run.log({**metrics, "student/moment_kl": kl.detach()})

                    # the critic is fitted to samples that it has judged: none is judged twice
                    x0, at = x0.detach(), draw(base.schedule, indices=indices, purpose="critic")
                    drop = uniform(seed=seed, purpose="drop", indices=indices)
                    told = dropped(cond, source.uncond, drop < config.drop_probability)
                    with run.autocast():
                        loss, metrics = f_distill.fake_score_loss(fake, x0, told, at)
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
                if rewards is not None:
                    rewards.commit()
            if run.every(config.run.sample_every):
                preview.show()


if __name__ == "__main__":
    run_recipe_file(__file__)
