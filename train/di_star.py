"""Diff-Instruct*: a one-step generator raised in reward, held near a diffusion (arXiv 2410.20898).

    diffdiv train configs/demo/di_star.yaml student.path=runs/demo-f-distill/export
    diffdiv train configs/di_star/sdxl.yaml student.path=... teacher.path=... data.path=...

Minimises D(student, reference) - sum of alpha r. D is a score divergence, by a loss of equal
gradient that differentiates both frozen networks with respect to their inputs; or integral KL
(Diff-Instruct++), or the KL to the diffused reward-tilted law (DIDR), which takes the reward
into the reference. The fake score, an adapter on the reference or a copy, follows the student.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diffdiv.runtime.config import (
    Config,
    ExistingFolder,
    OptimizerConfig,
    ReplicatedRunConfig,
)
from diffdiv.runtime.distillation_config import LoraConfig, TeacherConfig
from diffdiv.runtime.launch import run_recipe_file


class StudentConfig(Config):
    """The generator to start from: a one-step pipeline folder, such as an f-distill export."""

    path: ExistingFolder
    t_init: float = Field(gt=0)  # as it was distilled; export.json of its folder says so
    input_convention: Literal["unit", "ve"] = "unit"
    lr: float = Field(gt=0)
    ema_half_lives: tuple[Annotated[int, Field(gt=0)], ...] = (1000,)  # images; the first is used


class RegulariserConfig(Config):
    """What holds the student near the reference."""

    name: Literal["squared", "pseudo_huber", "ikl", "didr"] = "pseudo_huber"
    c: float = Field(0.1, gt=0)  # pseudo_huber, in the unit of ``space``
    space: Literal["score", "eps", "x0"] = "x0"  # squared, pseudo_huber
    beta: float = Field(1.0, gt=0)  # didr: reward units per nat; a reward's scale has no part then
    guidance_reward: float = Field(0.0, ge=0)  # scale of guidance as a reward outside ("CFG out")


class RewardConfig(Config):
    """One reward; see diffdiv/rewards/images.py."""

    path: ExistingFolder
    scale: float = Field(1.0, ge=0)  # alpha: weight against the regulariser


class JudgeConfig(RewardConfig):
    """The embedded world's: a colour, where the prompt leaves it open."""

    colour: str


class RewardsConfig(Config):
    """All rewards; at least one."""

    clip_score: RewardConfig | None = None
    pickscore: RewardConfig | None = None
    aesthetic: RewardConfig | None = None
    judge: JudgeConfig | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not any((self.clip_score, self.pickscore, self.aesthetic, self.judge)):
            raise ValueError("no reward is set: clip_score, pickscore, aesthetic or judge")
        return self


class PromptsConfig(Config):
    """What the student is asked for."""

    kind: Literal["prompted_digits", "prompts"]
    path: Path | None = None  # prompt file
    cache: Path | None = None  # folder for text embeddings, computed once

    @model_validator(mode="after")
    def _path(self) -> Self:
        if self.kind == "prompts" and (self.path is None or not self.path.is_file()):
            raise ValueError(f"path {str(self.path)!r} must be a prompt file for kind 'prompts'")
        return self


class RecipeConfig(Config):
    """Everything a run depends on."""

    recipe: Literal["di_star"] = "di_star"
    run: ReplicatedRunConfig
    teacher: TeacherConfig  # the reference; its guidance acts inside the regulariser ("CFG in")
    student: StudentConfig
    regulariser: RegulariserConfig = RegulariserConfig()
    rewards: RewardsConfig
    fake_lr: float = Field(gt=0)
    fake_lora: LoraConfig | None = LoraConfig()
    data: PromptsConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    critic_updates: int = Field(5, ge=1)  # per student update; no source gives the paper's
    t_range: tuple[float, float] = (0.02, 0.98)  # quantiles of the student's times

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.teacher.dtype == "int8":
            raise ValueError("teacher.dtype 'int8' has no gradient at its inputs; use 'bf16'")
        if self.teacher.dtype == "bf16" and self.run.precision != "bf16":
            raise ValueError("teacher.dtype 'bf16' needs run.precision 'bf16'")
        return self


def main(config: RecipeConfig) -> None:
    """Align; resumes by itself when the run folder holds a valid state."""
    from functools import partial

    import torch

    from diffdiv.core.noise import normal
    from diffdiv.core.schedule import Noising
    from diffdiv.core.score_distance import pseudo_huber, squared
    from diffdiv.models.adapters import trained_copies
    from diffdiv.models.backbones import LatentCodec, load_denoiser
    from diffdiv.models.denoiser import guided
    from diffdiv.models.generator import Generator
    from diffdiv.objectives import diff_instruct
    from diffdiv.objectives.f_distill import fake_score_loss
    from diffdiv.rewards.images import check_image_reward, open_image_rewards
    from diffdiv.runtime.preview import Preview
    from diffdiv.runtime.run import Run
    from diffdiv.samplers import sample_ode, time_grid
    from diffdiv.sources import open_source

    # -- networks ---------------------------------------------------------------------------------
    run = Run(config.run, main="student", resolved=config.model_dump(mode="json"))
    seed, choice, regulariser = config.run.seed, config.student, config.regulariser
    scale = config.teacher.guidance_scale
    dtype = torch.float32 if config.teacher.dtype == "fp32" else torch.bfloat16
    base = load_denoiser(config.teacher.path, dtype=dtype)
    base.net.requires_grad_(False).to(run.device, memory_format=torch.channels_last)
    source = open_source(
        config.data.kind, config.data.path, cache=config.data.cache,
        teacher_path=config.teacher.path, teacher=base, seed=seed, device=run.device,
    )  # fmt: skip
    reference = guided(base, scale, source.uncond)
    fake_net = trained_copies(
        base.net, {"fake": config.fake_lora}, seed=seed,
        checkpointing=config.teacher.checkpointing, compiled=config.teacher.compile,
    )["fake"]  # fmt: skip
    net = load_denoiser(choice.path).net.float().requires_grad_(True)
    options, ema = {"optimizer": config.optimizer}, choice.ema_half_lives
    student = run.add("student", net, lr=choice.lr, ema_half_lives=ema, **options)
    fake = base.with_net(run.add("fake", fake_net, lr=config.fake_lr, **options))
    judged_by = base.with_net(fake_net)
    generator = Generator(base.with_net(student), choice.t_init, choice.input_convention)

    # -- rewards of decoded images ----------------------------------------------------------------
    codec = LatentCodec(config.teacher.path, run.device)
    rewards = open_image_rewards(config.rewards, run.device)
    for weighted in rewards:
        size = codec.factor * source.shape[-1]
        check_image_reward(weighted.reward, size, source.captions([0])[0], run.device)

    def score(x0, prompts):
        """Weighted sum of all rewards [B], and the mean of each."""
        images, total, seen = codec.decode_with_gradient(x0), 0.0, {}
        for weighted in rewards:
            value, plain = weighted(images, prompts)
            total = total + value
            seen[f"reward/{weighted.reward.name}"] = plain.mean()
        return total, seen

    # -- draws: functions of (seed, purpose, global sample index) --------------------------------
    draw = partial(Noising.draw, shape=source.shape, seed=seed, device=run.device)
    student_times = base.schedule.between(*config.t_range)

    def generate(network, indices):
        """Student samples [B, C, H, W], their conditions and prompts."""
        cond = source.conditions(indices).to(run.device)
        z = normal(source.shape, seed=seed, purpose="z", indices=indices).to(run.device)
        with run.autocast():
            return generator.with_net(network)(z, cond), cond, source.captions(indices)

    def held(x0, cond, prompts, indices):
        """The regulariser's loss and metrics."""
        at = draw(student_times, indices=indices, purpose="student")
        common = {"reference": reference, "fake": judged_by, "schedule": base.schedule}
        match regulariser.name:
            case "ikl":
                return diff_instruct.ikl_loss(x0, cond, at, **common)
            case "didr":
                tilt = partial(
                    diff_instruct.diffused_reward_score, reference=reference,
                    reward=lambda clean: score(clean, prompts)[0], beta=regulariser.beta,
                    schedule=base.schedule,
                )  # fmt: skip
                common["reference"] = diff_instruct.tilted_reference(reference, base.schedule, tilt)
                return diff_instruct.ikl_loss(x0, cond, at, **common)
        distance = squared() if regulariser.name == "squared" else pseudo_huber(regulariser.c)
        return diff_instruct.score_divergence_loss(
            x0, cond, at, distance=distance, space=regulariser.space, **common
        )

    # -- what people see --------------------------------------------------------------------------
    def sampler_with(network):
        def sample(z, cond):
            with run.autocast():
                return generator.with_net(network)(z, cond)

        return sample

    @torch.no_grad()
    def beside(z, cond):
        with run.autocast():
            return sample_ode(reference, z, cond, time_grid(base.schedule, 20))

    preview = Preview(run, source, "student", ema[0], sampler_with, beside)

    run.restore()
    with run:
        preview.show()
        while run.step < config.run.steps:
            # even samples are the student's, odd ones the critic's
            with torch.no_grad():
                samples = [
                    generate(net, [2 * i + 1 for i in indices])
                    for indices in run.micro_batches("student")
                ]
            while run.updates["fake"] < (run.step + 1) * config.critic_updates:
                with run.turn("fake"):
                    batches = zip(run.micro_batches("fake"), samples, strict=True)
                    for indices, (x0, cond, _) in batches:
                        at = draw(base.schedule, indices=indices, purpose="critic")
                        with run.autocast():
                            loss, metrics = fake_score_loss(fake, x0, cond, at)
                        run.update("fake", loss)
                        run.log(metrics)

            with run.turn("student"):
                for indices in run.micro_batches("student"):
                    x0, cond, prompts = generate(student, [2 * i for i in indices])
                    with run.autocast():
                        loss, metrics = held(x0, cond, prompts, indices)
                        if regulariser.guidance_reward > 0:
                            at = draw(student_times, indices=indices, purpose="guidance")
                            loss = loss + regulariser.guidance_reward * (
                                diff_instruct.guidance_reward_loss(
                                    x0, cond, at, reference=base, uncond=source.uncond,
                                    schedule=base.schedule,
                                )
                            )  # fmt: skip
                    reward, seen = score(x0, prompts)
                    if regulariser.name != "didr":  # there the reward is in the reference
                        loss = loss - reward.mean()
                    run.update("student", loss)
                    run.log({**metrics, **seen})
            if run.every(config.run.sample_every):
                preview.show()


if __name__ == "__main__":
    run_recipe_file(__file__)
