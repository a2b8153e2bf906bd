"""f-distill: a diffusion teacher becomes a generator of one or a few steps (arXiv 2502.15681v1).

    diffdiv train configs/demo/f_distill.yaml
    accelerate launch train/f_distill.py configs/f_distill/sd.yaml teacher.path=... data.path=...

A cycle is ``critic_updates`` updates of the critic (fake score and discriminator), then one of the
student. The critic's samples of a cycle are made once and reused at fresh times and noise: the
student does not change in between. They are not the samples of the student's own update: a fake
score judges badly what it was just fitted to. Reverse KL with a GAN loss is DMD2
(arXiv 2405.14867).
"""

from importlib.util import find_spec
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diffdiv.runtime.config import Config, OptimizerConfig, RunConfig
from diffdiv.runtime.distillation_config import (
    DataConfig,
    DivergenceConfig,
    GanConfig,
    LoraConfig,
    TeacherConfig,
)
from diffdiv.runtime.launch import run_recipe_file


class StudentConfig(Config):
    """The generator, a copy of the teacher (or an adapter on it) at the start."""

    t_init: float = Field(gt=0)  # its first time: index (vp), sigma (edm), 0..1 (flow)
    num_steps: int = Field(1, ge=1, le=8)  # more than one: trained by backward simulation
    input_convention: Literal["unit", "ve"] = "unit"  # network input: z, or sigma z
    lr: float = Field(gt=0)
    ema_half_lives: tuple[Annotated[int, Field(gt=0)], ...] = (1000,)  # images; the first is used
    lora: LoraConfig | None = None
    ode_warm_up: int = Field(0, ge=0)  # first updates: regression on 1,024 ODE pairs of the teacher


class RecipeConfig(Config):
    """Everything a run of f-distill depends on."""

    recipe: Literal["f_distill"] = "f_distill"
    run: RunConfig
    teacher: TeacherConfig
    student: StudentConfig
    fake_lr: float = Field(gt=0)
    fake_lora: LoraConfig | None = None
    divergence: DivergenceConfig = DivergenceConfig()
    gan: GanConfig = GanConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    critic_updates: int = Field(5, ge=1)  # per student update (f-distill table 5: 5, 5, 10)
    t_range: tuple[float, float] = (0.02, 0.98)  # quantiles of the student's times (DMD2)

    @model_validator(mode="after")
    def _dtype_can_be_had(self) -> Self:
        dtype = self.teacher.dtype
        if dtype != "fp32" and self.run.precision != "bf16":
            raise ValueError(f"teacher.dtype {dtype!r} needs run.precision 'bf16'")
        if dtype == "int8" and None in (self.student.lora, self.fake_lora):
            raise ValueError("teacher.dtype 'int8' cannot be trained: set student.lora, fake_lora")
        if dtype == "int8" and find_spec("torchao") is None:
            raise ValueError("teacher.dtype 'int8' needs torchao: pip install 'diffdiv[memory]'")
        return self

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Self:
        refused = {
            "gan.r1 'exact' (it differentiates twice)": self.gan.r1 == "exact",
            "optimizer.eight_bit": self.optimizer.eight_bit,
            "teacher.compile": self.teacher.compile,
        }
        for setting, is_set in refused.items():
            if self.run.sharding == "fsdp2" and is_set:
                raise ValueError(f"{setting} cannot be had with run.sharding 'fsdp2'")
        return self

    @property
    def needs_ratio(self) -> bool:
        """Whether a discriminator is trained; reverse KL without a GAN loss needs none."""
        return self.divergence.name != "reverse_kl" or self.gan.weight is not None


def main(config: RecipeConfig) -> None:
    """Train; resumes by itself when the run folder holds a valid state."""
    from functools import partial

    import torch

    from diffdiv.core.divergence import get_divergence
    from diffdiv.core.noise import normal, uniform
    from diffdiv.core.schedule import Noising
    from diffdiv.models.adapters import quantise_linears, trained_copies
    from diffdiv.models.backbones import load_denoiser
    from diffdiv.models.denoiser import guided
    from diffdiv.models.discriminator import heads_for
    from diffdiv.models.families import middle_block
    from diffdiv.models.generator import Generator
    from diffdiv.objectives import f_distill
    from diffdiv.objectives.denoising import regression_loss
    from diffdiv.runtime.preview import Preview
    from diffdiv.runtime.run import Run
    from diffdiv.samplers import sample_ode, time_grid
    from diffdiv.sources import TeacherSamples, open_source

    # -- networks: student and fake score start as the teacher, full copies or adapters on it -----
    run = Run(config.run, main="student", resolved=config.model_dump(mode="json"))
    seed, gan, choice = config.run.seed, config.gan, config.student
    dtype = torch.float32 if config.teacher.dtype == "fp32" else torch.bfloat16
    base = load_denoiser(config.teacher.path, dtype=dtype)
    # convolutions are faster with the channels last, on the CPU as on a GPU
    base.net.requires_grad_(False).to(run.device, memory_format=torch.channels_last)
    if config.teacher.dtype == "int8":
        quantise_linears(base.net)
    source = open_source(
        config.data.kind, config.data.path, cache=config.data.cache,
        teacher_path=config.teacher.path, teacher=base, seed=seed, device=run.device,
    )  # fmt: skip
    teacher = guided(base, config.teacher.guidance_scale, source.uncond)
    roles = {"student": choice.lora, "fake": config.fake_lora}
    nets = trained_copies(
        base.net, roles, seed=seed, checkpointing=config.teacher.checkpointing,
        compiled=config.teacher.compile,
    )  # fmt: skip
    options, ema = {"optimizer": config.optimizer}, choice.ema_half_lives
    student = run.add("student", nets["student"], lr=choice.lr, ema_half_lives=ema, **options)
    fake = base.with_net(run.add("fake", nets["fake"], lr=config.fake_lr, **options))
    blocks = gan.blocks or (middle_block(base.net),)
    disc, critics = None, ["fake"]
    if config.needs_ratio:
        critics.append("disc")
        with run.autocast():
            heads = heads_for(base, source.shape, source.conditions([0]), blocks, seed=seed)
        disc = run.add("disc", heads, lr=gan.lr, **options)
    run.add_frozen(base.net)
    generator = Generator(
        base.with_net(student), choice.t_init, choice.input_convention, choice.num_steps
    )
    critic = f_distill.Critic(teacher, base.with_net(nets["fake"]), disc, blocks, gan.trunk)
    ratio = f_distill.RatioStatistics(
        get_divergence(config.divergence.name),
        decay=config.divergence.decay,
        clip=config.divergence.clip,
    )
    run.attach("ratio", ratio)

    # -- the teacher's own samples: the preview's column, data-free mode, regression warm-up -------
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

    noise_shape = generator.noise_shape(source.shape)
    preview = Preview(run, source, "student", ema[0], sampler_with, beside, noise_shape)

    # -- draws: functions of (seed, purpose, global sample index) --------------------------------
    student_times = base.schedule.between(*config.t_range)
    draw = partial(Noising.draw, shape=source.shape, seed=seed, device=run.device)

    def generate(net, indices, update):
        """Student samples [B, C, H, W] and their conditions."""
        cond = source.conditions(indices).to(run.device)
        z = normal(noise_shape, seed=seed, purpose="z", indices=indices).to(run.device)
        # one step for the whole update, the same on all ranks: backward simulation up to there
        last = int(uniform(seed=seed, purpose="last", indices=[update])[0] * choice.num_steps)
        with run.autocast():
            return generator.with_net(net)(z, cond, last=last), cond

    run.restore()
    with run:
        preview.show()
        while run.step < choice.ode_warm_up:
            with run.turn("student"):
                for indices in run.micro_batches("student"):
                    z, x0, cond = pool.pairs(indices)
                    z = z.repeat(1, choice.num_steps, 1, 1).to(run.device)  # one draw is used
                    with run.autocast():
                        guess = generator(z, cond.to(run.device), last=0)
                    loss = regression_loss(guess, x0.to(run.device))
                    run.update("student", loss)
                    run.log({"student/regression": loss.detach()})

        while run.step < config.run.steps:
            # even samples are the student's, odd ones the critic's
            cycle = run.step - choice.ode_warm_up
            with torch.no_grad():
                samples = [
                    generate(nets["student"], [2 * i + 1 for i in indices], 2 * run.step + 1)
                    for indices in run.micro_batches("student")
                ]
            while run.updates["fake"] < (cycle + 1) * config.critic_updates:
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
                    x0, cond = generate(student, [2 * i for i in indices], 2 * run.step)
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
