"""Fine-tune a masked diffusion over DNA for a reward: DRAKES (arXiv 2410.13643), and a rival.

    diffdiv train configs/demo/drakes.yaml
    diffdiv train configs/drakes/dna.yaml reference.path=runs/dna reward.path=runs/oracle/export

Maximises E[reward] - alpha KL(policy || reference), the KL on trajectories and exact. "drakes"
differentiates the reward through the last steps of the trajectory; "policy_gradient" needs no
gradient of the reward. RUN/export is a diffusers folder, RUN/samples/ holds scored sequences,
RUN/evaluation.json the figures of the reference and of the policy.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from diffdiv.core.names import divergence_name
from diffdiv.runtime.config import Config, ExistingFolder, OptimizerConfig, ReplicatedRunConfig
from diffdiv.runtime.launch import run_recipe_file

if TYPE_CHECKING:
    import torch

    from diffdiv.rewards.sequences import SequenceReward


class ReferenceConfig(Config):
    """What the policy starts as, and is held near."""

    path: ExistingFolder  # run of train/masked_pretrain.py, or its export


class RewardConfig(Config):
    """What to make more of."""

    kind: Literal["dna_world", "dna_world_affinity", "oracle", "motifs"]
    path: Path | None = None  # oracle: folder of train/oracle.py's export; motifs: MEME or JASPAR
    output: int = Field(0, ge=0)  # oracle: which of its outputs
    bound: float | None = Field(None, gt=0)  # oracle: reward is bound * tanh(output / bound)

    @model_validator(mode="after")
    def _path(self) -> Self:
        if self.kind == "oracle" and (self.path is None or not (self.path / "finetune").is_dir()):
            raise ValueError(f"path {str(self.path)!r} must hold finetune/ (see train/oracle.py)")
        if self.kind == "motifs" and (self.path is None or not self.path.is_file()):
            raise ValueError(f"path {str(self.path)!r} must be a MEME or JASPAR file")
        return self


class ObjectiveConfig(Config):
    """How the policy is moved towards reward, and what holds it back."""

    name: Literal["drakes", "policy_gradient"] = "drakes"
    alpha: float = Field(gt=0)  # reward units per nat of KL
    target_kl: float | None = Field(None, gt=0)  # nats; alpha is adapted until the KL is there
    num_steps: int = Field(128, ge=2)  # of a trajectory, K
    num_graded: int | None = Field(None, ge=1)  # steps drawn for the KL or gradient; None: all
    num_soft: int = Field(50, ge=1)  # drakes: last steps that are differentiated, T
    tau: float = Field(1.0, gt=0)  # drakes: temperature of the Gumbel-softmax
    hard: Literal["end", "step"] = "end"  # drakes: where states are made one-hot
    kl: Literal["path", "legacy"] = "path"  # drakes: legacy is what the released code computes
    checkpointing: bool = False  # drakes: recompute activations in the backward
    divergence: Annotated[str, AfterValidator(divergence_name)] = "reverse_kl"  # policy_gradient

    @model_validator(mode="after")
    def _fits(self) -> Self:
        hard = self.num_steps - self.num_soft if self.name == "drakes" else self.num_steps
        if hard < 0:
            raise ValueError(f"num_soft {self.num_soft} is more than num_steps {self.num_steps}")
        if self.num_graded is not None and self.num_graded > hard:
            raise ValueError(f"num_graded {self.num_graded} is more than the {hard} hard steps")
        if self.name == "drakes" and self.divergence != "reverse_kl":
            raise ValueError("divergence: drakes has the KL only; use policy_gradient")
        return self


class RecipeConfig(Config):
    """Everything a fine-tuning depends on."""

    recipe: Literal["drakes"] = "drakes"
    run: ReplicatedRunConfig
    reference: ReferenceConfig
    reward: RewardConfig
    objective: ObjectiveConfig
    lr: float = Field(gt=0)
    ema_half_life: int = Field(300, gt=0)  # sequences; the averaged weights are exported
    num_evaluated: int = Field(256, ge=16)  # sequences behind each figure
    optimizer: OptimizerConfig = OptimizerConfig()


def open_rewards(
    config: RewardConfig, device: "torch.device"
) -> "tuple[SequenceReward, dict[str, SequenceReward]]":
    """The reward that is trained on, and those that are reported: the twin is never trained on."""
    from diffdiv.rewards.dna_world import world_affinity, world_reward, world_twin
    from diffdiv.rewards.oracle import load_oracle, oracle_reward
    from diffdiv.rewards.sequences import motif_file_reward

    if config.kind == "motifs":
        assert config.path is not None
        reward = motif_file_reward(config.path)
        return reward, {"reward": reward}
    if config.kind == "oracle":
        assert config.path is not None
        folders = {"reward": config.path / "finetune", "twin": config.path / "evaluation"}
        opened = {
            name: oracle_reward(
                load_oracle(folder).to(device), output=config.output, bound=config.bound, name=name
            )
            for name, folder in folders.items()
            if folder.is_dir()
        }
        return opened["reward"], opened
    judged = {"reward": world_reward(), "twin": world_twin()}
    return (world_affinity() if config.kind == "dna_world_affinity" else judged["reward"]), judged


def main(config: RecipeConfig) -> None:
    """Fine-tune, measure, export; resumes by itself when the run folder holds a valid state."""
    import copy

    import torch

    from diffdiv.core.divergence import get_divergence
    from diffdiv.core.masking import counter_gumbel, log_linear
    from diffdiv.core.noise import uniform
    from diffdiv.core.tensor import sum_over_ranks
    from diffdiv.data.sequence_files import write_fasta
    from diffdiv.export_sequences import (
        export_masked_sequences,
        load_token_denoiser,
        stored_length,
    )
    from diffdiv.metrics.card import Row, metric_card, write_evaluation
    from diffdiv.metrics.sequences import diversity
    from diffdiv.objectives.drakes import SoftPath, drakes_loss
    from diffdiv.objectives.policy_gradient import (
        KlController,
        Regulariser,
        policy_gradient_loss,
    )
    from diffdiv.objectives.rollout import path_log_ratio, roll_out
    from diffdiv.rewards.sequences import check_reward
    from diffdiv.runtime.run import Run

    run = Run(config.run, main="policy", resolved=config.model_dump(mode="json"))
    seed, objective, half_life = config.run.seed, config.objective, config.ema_half_life
    is_drakes = objective.name == "drakes"
    reference = load_token_denoiser(config.reference.path)
    reference.net.to(run.device)
    length, letters = stored_length(config.reference.path), reference.num_tokens + 1
    reward, judged = open_rewards(config.reward, run.device)
    check_reward(reward, length, needs_gradient=is_drakes, device=run.device)
    net = copy.deepcopy(reference.net).requires_grad_(True)
    policy = reference.with_net(net)
    learner = policy.with_net(
        run.add(
            "policy", net, lr=config.lr, optimizer=config.optimizer, ema_half_lives=(half_life,)
        )
    )
    chain = log_linear().chain(objective.num_steps)
    controller = None
    if objective.target_kl is not None:
        controller = KlController(objective.alpha, target=objective.target_kl)
        run.attach("alpha", controller)

    def noise_of(purpose, indices):
        return counter_gumbel(
            (length, letters), seed=seed, purpose=purpose, indices=indices, device=run.device
        )

    def graded_steps(count):
        """A uniformly random choice of ``count`` steps, the same on all ranks."""
        if objective.num_graded is None:
            return None
        draws = [run.step * count + k for k in range(count)]
        order = uniform(seed=seed, purpose="graded", indices=draws).argsort()
        return sorted(order[: objective.num_graded].tolist())

    def drakes_terms(alpha):
        """Loss and metrics of each micro-batch: the reward's gradient through the trajectory."""
        path = SoftPath(
            chain, objective.num_soft, objective.tau, objective.hard, objective.checkpointing
        )
        kl_steps = graded_steps(path.num_hard)
        for indices in run.micro_batches("policy"):
            start = policy.all_masked(len(indices), length, run.device)
            with run.autocast():
                yield drakes_loss(
                    learner, reference, reward, start, noise_of("rollout", indices),
                    path=path, alpha=alpha, kl=objective.kl, kl_steps=kl_steps,
                )  # fmt: skip

    def policy_gradient_terms(alpha):
        """The same from trajectories alone; the baseline is the mean over all ranks."""
        regulariser, found = Regulariser(get_divergence(objective.divergence), alpha), []
        for indices in run.micro_batches("policy"):
            start = policy.all_masked(len(indices), length, run.device)
            rollout = roll_out(policy, chain, noise_of("rollout", indices), start)
            with torch.no_grad():
                score = reward(rollout.one_hot(reference.num_tokens))
            ratio = path_log_ratio(rollout, reference)
            metrics = {"policy/reward": score.mean(), "policy/kl": ratio.mean()}
            found.append((rollout, regulariser.advantage(score, ratio), metrics))
        values = torch.cat([values for _, values, _ in found]).double()
        total, count = sum_over_ranks(torch.stack([values.sum(), values.new_tensor(len(values))]))
        steps = graded_steps(objective.num_steps)
        batches = zip(run.micro_batches("policy"), found, strict=True)
        for _, (rollout, values, metrics) in batches:
            # the mean of the others: without bias
            advantage = (values - total / count) * count / (count - 1)
            with run.autocast():
                loss = policy_gradient_loss(learner, rollout, advantage.float(), steps)
            yield loss, metrics

    @torch.no_grad()
    def figures(denoiser, name):
        """Rewards, path KL (nats) and diversity of fresh sequences; they go to samples/NAME.fa."""
        rows = range(10**9, 10**9 + config.num_evaluated)  # far from every training index
        start = denoiser.all_masked(len(rows), length, run.device)
        rollout = roll_out(denoiser, chain, noise_of("evaluation", rows), start)
        scores = {key: value(rollout.tokens).cpu() for key, value in judged.items()}
        ratio, n = path_log_ratio(rollout, reference).cpu(), len(rows) ** 0.5
        if run.is_main:
            file = run.folder / "samples" / f"{name}.fa"
            write_fasta(file, rollout.tokens.cpu(), scores=scores)
        means = {key: float(value.mean()) for key, value in scores.items()}
        errors = {f"{key}_error": float(value.std()) / n for key, value in scores.items()}
        kl = {"path_kl": float(ratio.mean()), "path_kl_error": float(ratio.std()) / n}
        return {**means, **errors, **kl, **diversity(rollout.tokens.cpu())}

    def look(name):
        with run.averaged("policy", half_life) as averaged:
            return figures(policy.with_net(averaged), name)

    if run.is_main:
        (run.folder / "samples").mkdir(exist_ok=True)
    terms = drakes_terms if is_drakes else policy_gradient_terms
    run.restore()
    with run:
        while run.step < config.run.steps:
            if run.every(config.run.sample_every):
                found = look(f"step-{run.step:08d}")
                run.log({f"held_out/{key}": value for key, value in found.items()})
            alpha, kls = controller.alpha if controller else objective.alpha, []
            with run.turn("policy"):
                for loss, metrics in terms(alpha):
                    run.update("policy", loss)
                    run.log({**metrics, "policy/alpha": alpha})
                    kls.append(metrics["policy/kl"].double())
                if controller is not None:  # in the turn: a state is saved at its end
                    kl = sum_over_ranks(torch.stack(kls).mean()) / run.world_size
                    controller.observe(float(kl))
    rows = [("reference", figures(reference, "reference")), ("policy", look("policy"))]
    if run.is_main:
        export_masked_sequences(
            net, run.ema_weights("policy", half_life), run.folder / "export",
            length=length, num_steps=objective.num_steps,
            title=f"Masked diffusion fine-tuned for {reward.name} by {objective.name}",
            facts={"training steps": config.run.steps, "alpha": objective.alpha, **rows[1][1]},
        )  # fmt: skip
        card = metric_card(
            n=config.num_evaluated, seed=seed, features="none", device=run.device,
            command=f"train/drakes.py, {config.run.steps} steps of {objective.name}",
            details={"reward": reward.name, "judged by": list(judged), "alpha": objective.alpha},
        )  # fmt: skip
        table = [
            Row(name=name, network_evaluations=objective.num_steps, metrics=values)
            for name, values in rows
        ]
        write_evaluation(run.folder, table, card)


if __name__ == "__main__":
    run_recipe_file(__file__)
