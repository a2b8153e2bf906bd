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

from diffdiv.runtime.config import Config, ExistingFolder, OptimizerConfig, ReplicatedRunConfig
from diffdiv.runtime.distillation_config import LoraConfig, TeacherConfig
from diffdiv.runtime.launch import run_recipe_file
from diffdiv.runtime.reward_config import RewardsConfig


class StudentConfig(Config):
    """The generator to start from: a one-step pipeline folder, such as an f-distill export.

    With ``lora`` an adapter on the reference's own network, as `diffdiv export --lora` writes it.
    """

    path: ExistingFolder
    lora: LoraConfig | None = None
    t_init: float = Field(gt=0)  # as it was distilled; export.json of its folder says so
    input_convention: Literal["unit", "ve"] = "unit"
    lr: float = Field(gt=0)
    ema_half_lives: tuple[Annotated[int, Field(gt=0)], ...] = (1000,)  # images; the first is used

    @model_validator(mode="after")
    def _path_holds_it(self) -> Self:
        if (self.path / "pytorch_lora_weights.safetensors").is_file() != (self.lora is not None):
            wanted = "an adapter (diffdiv export --lora)" if self.lora else "a whole pipeline"
            raise ValueError(f"path {str(self.path)!r} does not hold {wanted}; lora says which")
        return self


class RegulariserConfig(Config):
    """What holds the student near the reference."""

    name: Literal["squared", "pseudo_huber", "ikl", "didr"] = "pseudo_huber"
    c: float = Field(0.1, gt=0)  # pseudo_huber, in the unit of ``space``
    space: Literal["score", "eps", "x0"] = "x0"  # squared, pseudo_huber
    beta: float = Field(1.0, gt=0)  # didr: reward units per nat; a reward's scale has no part then
    guidance_reward: float = Field(0.0, ge=0)  # scale of guidance as a reward outside ("CFG out")
    # mean |fake_x0 - reference_x0|: the regulariser's weight, at first 1, is adapted until it is
    # there (all but didr, whose beta says how far)
    target: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _is_weighed(self) -> Self:
        if self.name == "didr" and self.target is not None:
            raise ValueError("target has no part in didr: beta says how far it goes")
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
    rewards: RewardsConfig  # at least one; of scale 0: held out, only looked at
    keep_best: str | None = None  # a held-out reward: the state best in it is kept in RUN/best
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
        held_out = {name for name, own in self.rewards.items() if own and own.scale == 0}
        if self.keep_best is not None and self.keep_best not in held_out:
            raise ValueError(f"keep_best: {self.keep_best!r} is no reward of scale 0")
        if self.keep_best is not None and self.run.sample_every is None:
            raise ValueError("keep_best looks every run.sample_every updates, which is null")
        return self


def main(config: RecipeConfig) -> None:
    """Align; resumes by itself when the run folder holds a valid state."""
    from functools import partial

    import torch

    from diffdiv.core.noise import normal
    from diffdiv.core.schedule import Noising
    from diffdiv.core.score_distance import pseudo_huber, squared
    from diffdiv.core.tensor import at_once, loss_with_gradient, sum_over_ranks
    from diffdiv.models.adapters import enable_checkpointing, trained_copies
    from diffdiv.models.backbones import load_denoiser
    from diffdiv.models.denoiser import guided
    from diffdiv.models.generator import Generator
    from diffdiv.objectives import diff_instruct
    from diffdiv.objectives.f_distill import fake_score_loss
    from diffdiv.objectives.policy_gradient import KlController
    from diffdiv.runtime.best import KeepBest
    from diffdiv.runtime.preview import Preview
    from diffdiv.runtime.rewards import attach_rewards
    from diffdiv.runtime.run import Run
    from diffdiv.runtime.student import read_adapter
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
    roles = {"fake": config.fake_lora, **({"student": choice.lora} if choice.lora else {})}
    nets = trained_copies(
        base.net, roles, seed=seed, checkpointing=config.teacher.checkpointing,
        compiled=config.teacher.compile,
    )  # fmt: skip
    fake_net = nets["fake"]
    if choice.lora is not None:
        (net := nets["student"]).load_state_dict(read_adapter(choice.path, choice.lora.rank))
    else:
        net = load_denoiser(choice.path).net.float().requires_grad_(True)
        if config.teacher.checkpointing:
            enable_checkpointing(net)
    options, ema = {"optimizer": config.optimizer}, choice.ema_half_lives
    student = run.add("student", net, lr=choice.lr, ema_half_lives=ema, **options)
    fake = base.with_net(run.add("fake", fake_net, lr=config.fake_lr, **options))
    judged_by = base.with_net(fake_net)
    generator = Generator(base.with_net(student), choice.t_init, choice.input_convention)

    # -- rewards of decoded images ----------------------------------------------------------------
    rewards = attach_rewards(run, config.rewards, pipeline=config.teacher.path, source=source)
    best = controller = None
    if config.keep_best is not None:
        best = KeepBest(run, config.keep_best)
        run.attach("best", best)
    if regulariser.target is not None:
        controller = KlController(1.0, target=regulariser.target)
        run.attach("controller", controller)

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

        def wanted(clean):
            return rewards.total(clean, prompts, indices)

        at = draw(student_times, indices=indices, purpose="student")
        common = {"reference": reference, "fake": judged_by, "schedule": base.schedule}
        match regulariser.name:
            case "ikl":
                return diff_instruct.ikl_loss(x0, cond, at, **common)
            case "didr":
                tilt = partial(
                    diff_instruct.diffused_reward_score, reference=reference,
                    reward=wanted, beta=regulariser.beta,
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

    @torch.no_grad()
    def held_out(name):
        """Mean of a reward over 64 prompts, the same at every look and on all ranks."""
        values, first = [], 2 * 10**9  # far from every training index
        with run.averaged("student", ema[0]) as network:
            size = at_once(source.shape)
            for start in range(first, first + 64, size):
                x0, _, prompts = generate(network, range(start, start + size))
                images = source.decode(x0).to(run.device)
                values.append(rewards.rewards[name].reward(images, prompts))
        return float(torch.cat(values).double().mean())

    def show():
        preview.show()
        if best is not None:
            best.keep()

    run.restore()
    with run:
        show()
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
                weight, gaps = controller.alpha if controller else 1.0, []
                for indices in run.micro_batches("student"):
                    x0, cond, prompts = generate(student, [2 * i for i in indices])
                    # now, so that the decoder's activations are gone when the regulariser's come
                    leaf = x0.detach().requires_grad_()
                    reward, seen = rewards(leaf, prompts, indices)
                    (pull,) = torch.autograd.grad(reward.mean(), leaf)
                    with run.autocast():
                        loss, metrics = held(x0, cond, prompts, indices)
                        loss = weight * loss
                        gaps.append(metrics["regulariser/score_gap"])
                        if regulariser.guidance_reward > 0:
                            at = draw(student_times, indices=indices, purpose="guidance")
                            loss = loss + regulariser.guidance_reward * (
                                diff_instruct.guidance_reward_loss(
                                    x0, cond, at, reference=base, uncond=source.uncond,
                                    schedule=base.schedule,
                                )
                            )  # fmt: skip
                    if regulariser.name != "didr":  # there the reward is in the reference
                        loss = loss - loss_with_gradient(x0, pull)
                    run.update("student", loss)
                    run.log({**metrics, **seen})
                rewards.commit()
                # in the turn: a state saved at its end knows of both
                if controller is not None:
                    gap = sum_over_ranks(torch.stack(gaps).mean()) / run.world_size
                    controller.observe(float(gap))
                    run.log({"regulariser/weight": weight})
                if best is not None and run.every(config.run.sample_every):
                    best.observe(held_out(config.keep_best))
            if run.every(config.run.sample_every):
                show()


if __name__ == "__main__":
    run_recipe_file(__file__)
