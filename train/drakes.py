"""Fine-tune a masked diffusion for a reward: DRAKES (arXiv 2410.13643), and two rivals.

    diffdiv train configs/demo/drakes.yaml
    diffdiv train configs/drakes/dna.yaml reference.path=runs/dna reward.path=runs/oracle/export
    diffdiv train configs/drakes/protein.yaml reference.path=runs/protein backbones.path=1abc.pdb

Maximises E[reward] - alpha KL(policy || reference), the KL on trajectories and exact. "drakes"
differentiates the reward through the last steps of the trajectory; "policy_gradient" and
"masked_cross_entropy" need no gradient of the reward. RUN/export is a diffusers folder,
RUN/samples/ holds scored sequences, RUN/evaluation.json the figures of reference and policy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from diffdiv.core.names import divergence_name
from diffdiv.runtime.config import Config, ExistingFolder, OptimizerConfig, ReplicatedRunConfig
from diffdiv.runtime.launch import run_recipe_file

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from diffdiv.core.masking import Chain, Noise
    from diffdiv.models.tokens import TokenDenoiser
    from diffdiv.objectives.rollout import Rollout
    from diffdiv.rewards.sequences import SequenceReward
    from diffdiv.runtime.run import Run
    from diffdiv.subjects import Subject


ROWS_PER_CALL = 256  # sequences that are evaluated together


class ReferenceConfig(Config):
    """What the policy starts as, and is held near."""

    path: ExistingFolder  # run of train/masked_pretrain.py or inverse_folding.py, or its export


class RewardConfig(Config):
    """What to make more of."""

    kind: Literal["dna_world", "dna_world_affinity", "oracle", "motifs", "stability", "energies"]
    # oracle, stability: export of train/oracle.py, train/stability.py; motifs: MEME or JASPAR;
    # energies: CSV of values per position and amino acid (diffdiv/rewards/protein.py)
    path: Path | None = None
    output: int = Field(0, ge=0)  # oracle: which of its outputs
    bound: float | None = Field(None, gt=0)  # oracle, stability: bound * tanh(output / bound)

    @model_validator(mode="after")
    def _path(self) -> Self:
        is_oracle = self.kind in ("oracle", "stability")
        if is_oracle and (self.path is None or not (self.path / "finetune").is_dir()):
            recipe = "oracle" if self.kind == "oracle" else "stability"
            raise ValueError(f"path {str(self.path)!r} must hold finetune/ (see train/{recipe}.py)")
        if self.kind == "motifs" and (self.path is None or not self.path.is_file()):
            raise ValueError(f"path {str(self.path)!r} must be a MEME or JASPAR file")
        if self.kind == "energies" and (self.path is None or not self.path.is_file()):
            raise ValueError(f"path {str(self.path)!r} must be a CSV of energies")
        return self


class BackbonesConfig(Config):
    """Proteins only: what to design for; diffdiv/data/structures.py says what is refused."""

    path: Path | None = None  # PDB or mmCIF, or a folder of them
    design: str | None = None  # "A:10-25,B"; None: all positions

    @model_validator(mode="after")
    def _path(self) -> Self:
        if self.path is not None and not self.path.exists():
            raise ValueError(f"path {str(self.path)!r} must be a structure or a folder of them")
        return self


class ObjectiveConfig(Config):
    """How the policy is moved towards reward, and what holds it back."""

    name: Literal["drakes", "policy_gradient", "masked_cross_entropy"] = "drakes"
    alpha: float = Field(ge=0)  # reward units per nat of KL; 0 (drakes only): nothing holds back
    target_kl: float | None = Field(None, gt=0)  # nats; alpha is adapted until the KL is there
    num_steps: int = Field(128, ge=2)  # of a trajectory, K
    # steps drawn for the KL or gradient, masked_cross_entropy: maskings; None: num_steps
    num_graded: int | None = Field(None, ge=1)
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
        if self.name != "policy_gradient" and self.divergence != "reverse_kl":
            raise ValueError(f"divergence: {self.name} has the KL only; use policy_gradient")
        if self.alpha == 0 and (self.name != "drakes" or self.target_kl is not None):
            raise ValueError("alpha: 0 is for drakes without target_kl; elsewhere it is positive")
        return self


class RecipeConfig(Config):
    """Everything a fine-tuning depends on."""

    recipe: Literal["drakes"] = "drakes"
    run: ReplicatedRunConfig
    reference: ReferenceConfig
    reward: RewardConfig
    backbones: BackbonesConfig = BackbonesConfig()
    objective: ObjectiveConfig
    lr: float = Field(gt=0)
    ema_half_life: int = Field(300, gt=0)  # sequences; the averaged weights are exported
    num_evaluated: int = Field(256, ge=16)  # sequences behind each figure
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def is_protein(self) -> bool:
        """Whether the sequences are designed for backbones."""
        return self.reward.kind in ("stability", "energies")

    @model_validator(mode="after")
    def _backbones(self) -> Self:
        if self.is_protein is (self.backbones.path is None):
            what = "wants" if self.is_protein else "has no"
            raise ValueError(
                f"backbones: path {str(self.backbones.path)!r} must be a structure for "
                f"reward.kind stability or energies; {self.reward.kind} {what} backbones"
            )
        return self


def open_sequences(config: RecipeConfig, run: "Run") -> "Subject":
    """DNA; the twin is never trained on."""
    from diffdiv.export_sequences import load_token_denoiser, stored_length
    from diffdiv.rewards.dna_world import world_affinity, world_reward, world_twin
    from diffdiv.rewards.oracle import load_oracle, oracle_reward
    from diffdiv.rewards.sequences import motif_file_reward
    from diffdiv.subjects import Sequences

    wanted, path, device = config.reward, config.reward.path, run.device
    if wanted.kind == "motifs":
        assert path is not None
        reward = motif_file_reward(path)
        judged = {"reward": reward}
    elif wanted.kind == "oracle":
        assert path is not None
        folders = {"reward": path / "finetune", "twin": path / "evaluation"}
        judged = {
            name: oracle_reward(
                load_oracle(folder).to(device), output=wanted.output, bound=wanted.bound, name=name
            )
            for name, folder in folders.items()
            if folder.is_dir()
        }
        reward = judged["reward"]
    else:
        judged = {"reward": world_reward(), "twin": world_twin()}
        is_affinity = wanted.kind == "dna_world_affinity"
        reward = world_affinity() if is_affinity else judged["reward"]
    reference = load_token_denoiser(config.reference.path)
    reference.net.to(device)
    return Sequences(reference, stored_length(config.reference.path), reward, judged, device)


def open_designs(config: RecipeConfig, run: "Run") -> "Subject":
    """Proteins: backbones, and a stability oracle with its twin or a table of energies."""
    from diffdiv.data.structures import read_backbone, read_backbones
    from diffdiv.export_proteins import load_protein_net
    from diffdiv.rewards.protein import load_stability, read_energies
    from diffdiv.subject_proteins import Designs

    wanted, path, folder = config.reward, config.backbones.path, config.reward.path
    assert path is not None and folder is not None
    design, device = config.backbones.design, run.device
    if path.is_dir():
        found = read_backbones(path, design=design)
        backbones = found.backbones
        for name, reason in found.quarantine:
            run.event("quarantine", f"{name}: {reason}")
    else:
        backbones = (read_backbone(path, design=design),)
    if len(backbones) > 1 and config.objective.name == "masked_cross_entropy":
        raise ValueError(
            "objective.name: masked_cross_entropy weighs sequences against each other, so it needs "
            f"one backbone, not {len(backbones)}; use drakes or policy_gradient"
        )
    energies, oracles = None, {}
    if wanted.kind == "energies":
        energies = read_energies(folder, backbones)
    else:
        oracles = {
            name: load_stability(folder / part).to(device)
            for name, part in (("reward", "finetune"), ("twin", "evaluation"))
            if (folder / part).is_dir()
        }
    net, seed = load_protein_net(config.reference.path).to(device), config.run.seed
    return Designs(net, backbones, oracles, energies, bound=wanted.bound, seed=seed, device=device)


@dataclass(frozen=True)
class Task:
    """What the objectives and the evaluation work with.

    ``trained`` is the policy as it is called in its own turn; elsewhere ``net`` is.
    """

    run: "Run"
    objective: ObjectiveConfig
    subject: "Subject"
    net: "Module"
    trained: "Module"
    chain: "Chain"

    def at(self, indices: Sequence[int]) -> "Here":
        """Networks bound to what these samples are made for."""
        bound = self.subject.at(indices)
        nets = (self.net, self.trained, self.subject.net)
        policy, learner, reference = (bound.denoiser(net) for net in nets)
        return Here(policy, learner, reference, bound.reward, bound.start)

    def noise(self, purpose: str, indices: Sequence[int]) -> "Noise":
        """Gumbel noise of these samples."""
        from diffdiv.core.masking import counter_gumbel

        (length, tokens), seed = self.subject.shape, self.run.config.seed
        return counter_gumbel(
            (length, tokens + 1), seed=seed, purpose=purpose, indices=indices,
            device=self.run.device,
        )  # fmt: skip

    def graded_steps(self, count: int) -> list[int] | None:
        """A uniformly random choice of ``count`` steps, the same on all ranks; None: all."""
        from diffdiv.core.noise import uniform

        if self.objective.num_graded is None:
            return None
        draws = [self.run.step * count + k for k in range(count)]
        order = uniform(seed=self.run.config.seed, purpose="graded", indices=draws).argsort()
        return sorted(order[: self.objective.num_graded].tolist())


class Here(NamedTuple):
    """Of a micro-batch; trajectories begin with ``start`` [B, L]."""

    policy: "TokenDenoiser"
    learner: "TokenDenoiser"
    reference: "TokenDenoiser"
    reward: "SequenceReward"
    start: "Tensor"


Terms = Iterator["tuple[Tensor, dict[str, Tensor]]"]  # loss and metrics of each micro-batch


def drakes_terms(task: Task, alpha: float) -> Terms:
    """The reward's gradient through the trajectory."""
    from diffdiv.objectives.drakes import SoftPath, drakes_loss

    setting = task.objective
    path = SoftPath(task.chain, setting.num_soft, setting.tau, setting.hard, setting.checkpointing)
    kl_steps = task.graded_steps(path.num_hard)
    for indices in task.run.micro_batches("policy"):
        here, noise = task.at(indices), task.noise("rollout", indices)
        with task.run.autocast():
            found = drakes_loss(
                here.learner, here.reference, here.reward, here.start, noise,
                path=path, alpha=alpha, kl=setting.kl, kl_steps=kl_steps,
            )  # fmt: skip
        yield found


@dataclass(frozen=True)
class Scored:
    """Trajectories of a micro-batch, their rewards and path log ratios, each [B]."""

    here: Here
    rollout: "Rollout"
    reward: "Tensor"
    ratio: "Tensor"

    def metrics(self) -> "dict[str, Tensor]":
        return {"policy/reward": self.reward.mean(), "policy/kl": self.ratio.mean()}


def scored_rollouts(task: Task) -> list[Scored]:
    """All micro-batches of an update, sampled from the present policy."""
    import torch

    from diffdiv.objectives.rollout import path_log_ratio, roll_out

    found = []
    for indices in task.run.micro_batches("policy"):
        here, noise = task.at(indices), task.noise("rollout", indices)
        rollout = roll_out(here.policy, task.chain, noise, here.start)
        with torch.no_grad():
            reward = here.reward(rollout.one_hot(here.policy.num_tokens))
        found.append(Scored(here, rollout, reward, path_log_ratio(rollout, here.reference)))
    return found


def policy_gradient_terms(task: Task, alpha: float) -> Terms:
    """Exact probabilities of the steps; the baseline is the mean of the other samples."""
    import torch

    from diffdiv.core.divergence import get_divergence
    from diffdiv.core.tensor import sum_over_ranks
    from diffdiv.objectives.policy_gradient import Regulariser, policy_gradient_loss

    regulariser = Regulariser(get_divergence(task.objective.divergence), alpha)
    found, steps = scored_rollouts(task), task.graded_steps(task.chain.num_steps)
    values = [regulariser.advantage(part.reward, part.ratio) for part in found]
    all_values = torch.cat(values).double()
    sums = torch.stack([all_values.sum(), all_values.new_tensor(len(all_values))])
    total, count = sum_over_ranks(sums)
    for _, part, value in zip(task.run.micro_batches("policy"), found, values, strict=True):
        advantage = (value - total / count) * count / (count - 1)  # the mean of the others: no bias
        with task.run.autocast():
            loss = policy_gradient_loss(part.here.learner, part.rollout, advantage, steps)
        yield loss, part.metrics()


def masked_cross_entropy_terms(task: Task, alpha: float) -> Terms:
    """Denoising of the policy's own samples, weighted towards the tilted law (arXiv 2508.10684).

    The weights are centred: at equal weights there is nothing to learn.
    """
    import torch

    from diffdiv.core.tensor import sum_over_ranks
    from diffdiv.objectives.inverse_folding import draw_masks
    from diffdiv.objectives.masked_denoising import Masks, masked_nll

    run, repeats = task.run, task.objective.num_graded or task.chain.num_steps
    found, size, seed = scored_rollouts(task), run.config.batch_size, run.config.seed
    tilts = [(part.reward / alpha - part.ratio).double() for part in found]
    by_rank = torch.zeros(run.world_size, dtype=torch.float64, device=run.device)
    by_rank[run.rank] = torch.cat(tilts).logsumexp(0)
    log_sum = sum_over_ranks(by_rank).logsumexp(0)
    batches = zip(run.micro_batches("policy"), found, tilts, strict=True)
    for indices, part, tilt in batches:
        designed = part.here.start == part.here.policy.mask_id
        drawn = [
            draw_masks(designed.cpu(), indices, batch_size=size, seed=seed, purpose=f"masks/{k}")
            for k in range(repeats)
        ]
        masks = Masks(torch.cat([one.masked for one in drawn])).to(run.device)
        with run.autocast():
            nll = masked_nll(part.here.learner, part.rollout.tokens.repeat(repeats, 1), masks)
        weights = size * (tilt - log_sum).exp() - 1  # mean 0 over the batch
        bound = designed.sum(1) * nll.view(repeats, -1).mean(0)
        yield (weights * bound).mean(), part.metrics()


OBJECTIVES = {
    "drakes": drakes_terms,
    "policy_gradient": policy_gradient_terms,
    "masked_cross_entropy": masked_cross_entropy_terms,
}


def main(config: RecipeConfig) -> None:
    """Fine-tune, measure, export; resumes by itself when the run folder holds a valid state."""
    import torch

    from diffdiv.core.masking import log_linear
    from diffdiv.core.tensor import sum_over_ranks
    from diffdiv.objectives.policy_gradient import KlController
    from diffdiv.runtime.run import Run

    run = Run(config.run, main="policy", resolved=config.model_dump(mode="json"))
    objective, half_life = config.objective, config.ema_half_life
    subject = (open_designs if config.is_protein else open_sequences)(config, run)
    subject.check(needs_gradient=objective.name == "drakes")
    net = subject.policy()
    trained = run.add(
        "policy", net, lr=config.lr, optimizer=config.optimizer, ema_half_lives=(half_life,)
    )
    task = Task(run, objective, subject, net, trained, log_linear().chain(objective.num_steps))
    controller = None
    if objective.target_kl is not None:
        controller = KlController(objective.alpha, target=objective.target_kl)
        run.attach("alpha", controller)

    def look(name: str) -> dict[str, float]:
        with run.averaged("policy", half_life) as averaged:
            return figures(task, averaged, config.num_evaluated, name)

    if run.is_main:
        (run.folder / "samples").mkdir(exist_ok=True)
    run.restore()
    with run:
        while run.step < config.run.steps:
            if run.every(config.run.sample_every):
                found = look(f"step-{run.step:08d}")
                run.log({f"held_out/{key}": value for key, value in found.items()})
            alpha, kls = controller.alpha if controller else objective.alpha, []
            with run.turn("policy"):
                for loss, metrics in OBJECTIVES[objective.name](task, alpha):
                    run.update("policy", loss)
                    run.log({**metrics, "policy/alpha": alpha})
                    kls.append(metrics["policy/kl"].double())
                if controller is not None:  # in the turn: a state is saved at its end
                    kl = sum_over_ranks(torch.stack(kls).mean()) / run.world_size
                    controller.observe(float(kl))
    before = figures(task, subject.net, config.num_evaluated, "reference")
    after = look("policy")
    if run.is_main:
        subject.export(
            net, run.ema_weights("policy", half_life), run.folder / "export",
            num_steps=objective.num_steps,
            title=f"Masked diffusion fine-tuned for {config.reward.kind} by {objective.name}",
            facts={"training steps": config.run.steps, "alpha": objective.alpha, **after},
        )  # fmt: skip
        write_figures(task, config, {"reference": before, "policy": after})


def figures(task: Task, net: "Module", count: int, name: str) -> dict[str, float]:
    """Rewards, path KL (nats) and more of fresh sequences; they go to samples/NAME.fa."""
    import torch

    from diffdiv.metrics.sequences import Estimate
    from diffdiv.objectives.rollout import path_log_ratio, roll_out

    rows, tokens, values = range(10**9, 10**9 + count), [], []  # far from every training index
    for first in range(0, count, ROWS_PER_CALL):
        indices = rows[first : first + ROWS_PER_CALL]
        bound, noise = task.subject.at(indices), task.noise("evaluation", indices)
        rollout = roll_out(bound.denoiser(net), task.chain, noise, bound.start)
        with torch.no_grad():
            scores = {key: judge(rollout.tokens) for key, judge in bound.judged.items()}
        scores["path_kl"] = path_log_ratio(rollout, bound.denoiser(task.subject.net))
        tokens.append(rollout.tokens.cpu())
        values.append(scores)
    joined = {key: torch.cat([part[key].cpu() for part in values]) for key in values[0]}
    found = dict[str, float]()
    for key, value in joined.items():
        estimate = Estimate.of(value)
        found |= {key: estimate.mean, f"{key}_error": estimate.error}
    del joined["path_kl"]
    if task.run.is_main:
        path = task.run.folder / "samples" / f"{name}.fa"
        task.subject.write(path, rows, torch.cat(tokens), joined)
    return {**found, **task.subject.figures(rows, torch.cat(tokens))}


def write_figures(task: Task, config: RecipeConfig, found: dict[str, dict[str, float]]) -> None:
    """RUN/evaluation.json."""
    from diffdiv.metrics.card import Row, metric_card, write_evaluation

    run, objective = task.run, task.objective
    card = metric_card(
        n=config.num_evaluated, seed=config.run.seed, features="none", device=run.device,
        command=f"train/drakes.py, {config.run.steps} steps of {objective.name}",
        details={
            "reward": config.reward.kind,
            "judged by": [key for key in ("reward", "twin") if key in found["policy"]],
            "alpha": objective.alpha,
        },
    )  # fmt: skip
    table = [
        Row(name=name, network_evaluations=objective.num_steps, metrics=values)
        for name, values in found.items()
    ]
    write_evaluation(run.folder, table, card)


if __name__ == "__main__":
    run_recipe_file(__file__)
