"""Train two oracles of protein stability: one to fine-tune on, one to judge by.

    diffdiv train configs/oracle/protein.yaml data.path=ddg.csv structures.path=structures/ \
        start.path=runs/protein

They see different structures, so what one has learned by heart does not count with the other.
RUN/export/finetune and RUN/export/evaluation hold them, RUN/export/evaluation.json their figures on
structures that neither has seen.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from diffdiv.runtime.config import Config, ExistingFolder, OptimizerConfig, ReplicatedRunConfig
from diffdiv.runtime.launch import run_recipe_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffdiv.data.stability import StabilitySet
    from diffdiv.rewards.protein import StabilityNet

Share = Annotated[float, Field(gt=0, lt=1)]
NAMES = ("finetune", "evaluation")


class DataConfig(Config):
    """A table of measured stability; diffdiv/data/stability.py says what is set aside."""

    path: Path | None = None  # CSV: structure, value, and sequence or mutations
    by: Literal["structure", "sequence"] = "structure"  # what is on one side of the split
    held_out: Share = 0.1  # of the structures, for the figures; the rest is halved
    noise: float = Field(0.0, ge=0)  # angstrom, standard deviation, added to all coordinates

    @model_validator(mode="after")
    def _path(self) -> Self:
        if self.path is None or not self.path.is_file():
            raise ValueError(f"path {str(self.path)!r} must be a CSV of measured stability")
        return self


class StructuresConfig(Config):
    """Structures; diffdiv/data/structures.py says what is set aside or refused."""

    path: ExistingFolder  # of PDB and mmCIF files


class StartConfig(Config):
    """What the oracles begin as."""

    path: ExistingFolder | None = None  # run of train/inverse_folding.py; None: random weights


class ModelConfig(Config):
    """StabilityNet of diffdiv/rewards/protein.py; with ``start`` given, sizes are the start's."""

    width: int = Field(128, ge=8)
    encoder_depth: int = Field(3, ge=1)
    decoder_depth: int = Field(3, ge=1)
    neighbours: int = Field(30, ge=2)
    dropout: float = Field(0.0, ge=0, lt=1)  # above 0, several processes are not as one


class RecipeConfig(Config):
    """Everything the oracles depend on."""

    recipe: Literal["stability"] = "stability"
    run: ReplicatedRunConfig
    data: DataConfig
    structures: StructuresConfig
    start: StartConfig = StartConfig()
    model: ModelConfig = ModelConfig()
    lr: float = Field(gt=0)
    ema_half_life: int = Field(5_000, gt=0)  # variants; the averaged weights are exported
    optimizer: OptimizerConfig = OptimizerConfig()


def build_oracles(config: RecipeConfig, seen: "Tensor") -> "dict[str, StabilityNet]":
    """Both networks, with different last layers and outputs in the unit of ``seen`` [N]."""
    import torch

    from diffdiv.export_proteins import load_protein_net
    from diffdiv.rewards.protein import StabilityNet

    unit = {"shift": float(seen.mean()), "scale": float(seen.std().clamp_min(1e-6))}
    made = {}
    for number, name in enumerate(NAMES):
        torch.manual_seed(2 * config.run.seed + number)
        if config.start.path is None:
            made[name] = StabilityNet(**config.model.model_dump(), **unit)
        else:
            begun = load_protein_net(config.start.path)
            made[name] = StabilityNet.from_denoiser(begun, dropout=config.model.dropout, **unit)
    return made


def predict(
    net: "StabilityNet",
    called: "nn.Module",
    data: "StabilitySet",
    rows: Sequence[int],
    noise: "Callable[[int], Tensor] | None" = None,
) -> "Tensor":
    """Outputs [B] for rows; each of their backbones is encoded once.

    ``called`` is ``net``, or its wrapper in its own turn; ``noise`` [L, 4, 3] is of a backbone.
    """
    import torch

    numbers = data.numbers[list(rows)].tolist()
    distinct = sorted(set(numbers))
    batch = data.backbones.rows(distinct)
    if noise is not None:
        batch = batch.moved(torch.stack([noise(number) for number in distinct]))
    batch = batch.to(net.device)
    code = net.encode(batch.coordinates, batch.chains, batch.residues, batch.valid)
    tokens = data.tokens[list(rows)].to(net.device)
    outputs: Tensor = called(tokens, code.rows([distinct.index(number) for number in numbers]))
    return outputs


def main(config: RecipeConfig) -> None:
    """Train both, measure, export; resumes by itself when the run folder holds a valid state."""
    import torch
    from torch.nn.functional import mse_loss

    from diffdiv.core.noise import normal
    from diffdiv.data.stability import read_stability
    from diffdiv.data.structures import read_backbones
    from diffdiv.metrics.card import Row, metric_card, write_evaluation
    from diffdiv.metrics.sequences import prediction_metrics
    from diffdiv.runtime.run import Run

    run = Run(config.run, main=NAMES[0], resolved=config.model_dump(mode="json"))
    data, seed, half_life = config.data, config.run.seed, config.ema_half_life
    assert data.path is not None
    structures = read_backbones(config.structures.path)
    found = read_stability(data.path, structures.backbones)
    for name, reason in structures.quarantine + found.quarantine:
        run.event("quarantine", f"{name}: {reason}")
    half = (1 - data.held_out) / 2
    parts = found.split({NAMES[0]: half, NAMES[1]: half, "held_out": data.held_out}, by=data.by)
    run.event("data", ", ".join(f"{len(part)} {name}" for name, part in parts.items()))
    oracles, held_out = build_oracles(config, found.values), parts["held_out"]
    spread = found.values.std().clamp_min(1e-6).to(run.device)
    settings = {"lr": config.lr, "optimizer": config.optimizer, "ema_half_lives": (half_life,)}
    trained = {name: run.add(name, net, **settings) for name, net in oracles.items()}

    def noise_of(name: str) -> "Callable[[int], Tensor] | None":
        """Of a backbone in this update: the same in all micro-batches and processes."""
        if data.noise == 0:
            return None
        shape, purpose = found.backbones.coordinates.shape[1:], f"{name}/{run.updates[name]}"
        return lambda number: (
            data.noise * normal(tuple(shape), seed=seed, purpose=purpose, indices=[number])[0]
        )

    def measure(name: str) -> dict[str, float]:
        """Figures of an oracle's average on what neither has seen."""
        with run.averaged(name, half_life) as net:
            net.eval()
            chunks = torch.arange(len(held_out)).split(128)
            outputs = torch.cat(
                [predict(oracles[name], net, held_out, rows.tolist()).cpu() for rows in chunks]
            )
            net.train()
        return prediction_metrics(outputs[:, None], held_out.values[:, None], is_classes=False)

    run.restore()
    with run:
        while run.step < config.run.steps:
            is_level = len(set(run.updates.values())) == 1  # not stopped between the two
            if is_level and run.every(config.run.sample_every):
                for name in NAMES:
                    run.log({f"{name}/{key}": value for key, value in measure(name).items()})
            for name in reversed(NAMES):  # the main one last: it counts
                if run.updates[name] > run.step:
                    continue
                part, noise = parts[name], noise_of(name)
                with run.turn(name):
                    for indices in run.micro_batches(name):
                        rows = part.rows(indices, seed=seed)
                        with run.autocast():
                            outputs = predict(oracles[name], trained[name], part, rows, noise)
                        values = part.values[rows].to(run.device)
                        loss = mse_loss(outputs.float() / spread, values / spread)
                        run.update(name, loss)
                        run.log({f"{name}/loss": loss.detach()})
    rows = [Row(name=n, network_evaluations=1, metrics=measure(n)) for n in NAMES]
    if run.is_main:
        for name, net in oracles.items():
            net.load_state_dict(run.ema_weights(name, half_life))
            net.save_pretrained(run.folder / "export" / name)
        card = metric_card(
            n=len(held_out), seed=seed, device=run.device,
            features=f"none: predictions against values, on a {data.by} that neither oracle saw",
            command=f"train/stability.py, {config.run.steps} steps",
        )  # fmt: skip
        write_evaluation(run.folder / "export", rows, card)


if __name__ == "__main__":
    run_recipe_file(__file__)
