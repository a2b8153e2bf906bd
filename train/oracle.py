"""Train two oracles of sequence activity: one to fine-tune on, one to judge by.

    diffdiv train configs/oracle/dna.yaml data.positive=ctcf.fa data.negative=pu1.fa
    diffdiv train configs/oracle/dna.yaml data.path=mpra.csv data.values=[hepg2]

They see different chromosomes (DRAKES, arXiv 2410.13643, likewise), so what one has learned by
heart does not count with the other. RUN/export/finetune and RUN/export/evaluation hold them,
RUN/export/evaluation.json their figures on chromosomes that neither has seen.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from diffdiv.runtime.config import Config, OptimizerConfig, ReplicatedRunConfig
from diffdiv.runtime.launch import run_recipe_file

if TYPE_CHECKING:
    from torch import Tensor

    from diffdiv.data.sequences import SequenceSet
    from diffdiv.rewards.oracle import Oracle

Chromosomes = Annotated[tuple[str, ...], Field(min_length=1)]
NAMES = ("finetune", "evaluation")


class DataConfig(Config):
    """A table of measured activities, or two files as two classes."""

    path: Path | None = None  # CSV, TSV (.gz too) or parquet with the columns below
    values: tuple[str, ...] = ("activity",)  # columns of measured numbers
    sequence_column: str = "sequence"
    chromosome_column: str = "chromosome"
    positive: Path | None = None  # FASTA (or a table): class 1; instead of ``path``
    negative: Path | None = None  # class 0
    length: int | None = Field(None, ge=8)  # bases; None: the commonest in the file
    crop: bool = False  # longer sequences are cut to their middle
    # arXiv 2410.13643 trains on chr1-11 and chr12-22; two are kept back here for the figures
    finetune: Chromosomes = tuple(f"chr{i}" for i in (1, 2, 3, 4, 5, 6, 7, 10, 11))
    evaluation: Chromosomes = (*(f"chr{i}" for i in range(12, 23)), "chrX")
    held_out: Chromosomes = ("chr8", "chr9")

    @model_validator(mode="after")
    def _files(self) -> Self:
        files = [self.path] if self.path else [self.positive, self.negative]
        if self.path and (self.positive or self.negative):
            raise ValueError("path: give a table of activities or two classes, not both")
        for path in files:
            if path is None or not path.is_file():
                raise ValueError(
                    f"path {str(path)!r} must be a file (a table of activities, or positive and "
                    "negative sequences)"
                )
        return self


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} (safetensors of the trunk's weights)")
    return path


class TrunkConfig(Config):
    """EnformerTrunk of diffdiv/models/enformer.py; the defaults are the published sizes."""

    path: Annotated[Path, AfterValidator(_existing)] | None = None  # None: random weights
    channels: int = Field(1536, ge=6)
    num_conv: int = Field(7, ge=3)
    num_transformer: int = Field(11, ge=0)
    heads: int = Field(8, ge=1)
    key_size: int = Field(64, ge=1)
    divisor: int = Field(128, ge=1)  # channels of the convolutional layers are multiples of it


class ModelConfig(Config):
    """SequenceOracle or EnformerOracle of diffdiv/rewards/oracle.py."""

    kind: Literal["convolutional", "enformer"] = "convolutional"
    width: int = Field(96, ge=4)  # width, kernel: convolutional
    kernel: int = Field(15, ge=3)  # odd
    dropout: float = Field(0.0, ge=0, lt=1)  # above 0, several processes are not as one
    trunk: TrunkConfig = TrunkConfig()  # enformer

    @model_validator(mode="after")
    def _trunk_is_used(self) -> Self:
        if self.kind == "convolutional" and self.trunk != TrunkConfig():
            raise ValueError("trunk: only kind enformer has one; give kind=enformer too")
        return self


class RecipeConfig(Config):
    """Everything the oracles depend on."""

    recipe: str = "oracle"
    run: ReplicatedRunConfig
    data: DataConfig
    model: ModelConfig = ModelConfig()
    lr: float = Field(gt=0)
    ema_half_life: int = Field(10_000, gt=0)  # sequences; the averaged weights are exported
    optimizer: OptimizerConfig = OptimizerConfig()


def read_data(data: DataConfig) -> "SequenceSet":
    """All sequences with their values [N, D]; the quarantine is kept."""
    from diffdiv.data.sequence_files import Columns, read_sequences
    from diffdiv.data.sequences import merge_classes

    if data.path is not None:
        columns = Columns(data.sequence_column, data.chromosome_column, data.values)
        found = read_sequences(data.path, length=data.length, crop=data.crop, columns=columns)
        if not data.values or found.values.shape[1] == 0:
            raise ValueError(f"{data.path}: a table of activities is wanted, with data.values")
        return found
    assert data.positive is not None and data.negative is not None
    columns = Columns(data.sequence_column, data.chromosome_column)
    positive, negative = (
        read_sequences(path, length=data.length, crop=data.crop, columns=columns)
        for path in (data.positive, data.negative)
    )
    return merge_classes(positive, negative)


def build_oracles(config: RecipeConfig, seen: "Tensor", is_classes: bool) -> "dict[str, Oracle]":
    """Both networks, differently initialised, with outputs in the unit of ``seen`` [N, D]."""
    import torch

    from diffdiv.models.enformer import load_enformer_trunk
    from diffdiv.rewards.oracle import EnformerOracle, SequenceOracle

    model, data, oracles = config.model, config.data, dict[str, "Oracle"]()
    classes = [str(path) for path in (data.negative, data.positive)] if is_classes else None
    common = {"num_outputs": seen.shape[1], "dropout": model.dropout, "classes": classes}
    if not is_classes:
        common |= {"shift": seen.mean(0).tolist(), "scale": seen.std(0).clamp_min(1e-6).tolist()}
    for number, name in enumerate(NAMES):
        torch.manual_seed(2 * config.run.seed + number)
        if model.kind == "convolutional":
            oracles[name] = SequenceOracle(width=model.width, kernel=model.kernel, **common)
            continue
        sizes = model.trunk.model_dump(exclude={"path"})
        oracles[name] = oracle = EnformerOracle(**sizes, **common)
        if model.trunk.path is not None:
            load_enformer_trunk(oracle.trunk, model.trunk.path)
    return oracles


def prediction_loss(output: "Tensor", values: "Tensor", spread: "Tensor | None") -> "Tensor":
    """Cross-entropy of two classes, or (``spread`` [D] given) squared error in its unit."""
    from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

    if spread is None:
        return binary_cross_entropy_with_logits(output.float(), values)
    return mse_loss(output.float() / spread, values / spread)


def main(config: RecipeConfig) -> None:
    """Train both, measure, export; resumes by itself when the run folder holds a valid state."""
    import torch
    from torch.nn.functional import one_hot

    from diffdiv.metrics.card import Row, metric_card, write_evaluation
    from diffdiv.metrics.sequences import prediction_metrics
    from diffdiv.runtime.run import Run

    run = Run(config.run, main=NAMES[0], resolved=config.model_dump(mode="json"))
    data, seed, half_life = config.data, config.run.seed, config.ema_half_life
    found, is_classes = read_data(data), data.path is None
    for name, reason in found.quarantine:
        run.event("quarantine", f"{name}: {reason}")
    held_out, *sets = found.of_chromosomes(data.held_out, data.finetune, data.evaluation)
    unused = len(found) - len(held_out) - sum(map(len, sets))
    run.event("data", f"{len(held_out)} held out, {[len(s) for s in sets]} used, {unused} unused")
    parts = dict(zip(NAMES, sets, strict=True))
    seen = torch.cat([part.values for part in sets])
    oracles = build_oracles(config, seen, is_classes)
    spread = None if is_classes else seen.std(0).clamp_min(1e-6).to(run.device)
    settings = {"lr": config.lr, "optimizer": config.optimizer, "ema_half_lives": (half_life,)}
    trained = {name: run.add(name, net, **settings) for name, net in oracles.items()}

    def measure(name: str) -> dict[str, float]:
        """Figures of an oracle's average on the chromosomes that neither has seen."""
        with run.averaged(name, half_life) as net:
            net.eval()
            chunks = [one_hot(part, 4).float() for part in held_out.tokens.split(512)]
            outputs = torch.cat([net(chunk.to(run.device)).cpu() for chunk in chunks])
            net.train()
        return prediction_metrics(outputs, held_out.values, is_classes=is_classes)

    run.restore()
    with run:
        while run.step < config.run.steps:
            is_level = len(set(run.updates.values())) == 1  # not stopped between the two
            if is_level and run.every(config.run.sample_every):
                for name in NAMES:
                    run.log({f"{name}/{key}": value for key, value in measure(name).items()})
            for number, name in reversed(list(enumerate(NAMES))):  # the main one last: it counts
                if run.updates[name] > run.step:
                    continue
                with run.turn(name):
                    for indices in run.micro_batches(name):
                        tokens, values = parts[name].batch(
                            indices, seed=2 * seed + number, reverse_complement=False
                        )
                        with run.autocast():
                            output = trained[name](one_hot(tokens, 4).float().to(run.device))
                        loss = prediction_loss(output, values.to(run.device), spread)
                        run.update(name, loss)
                        run.log({f"{name}/loss": loss.detach()})
    rows = [Row(name=n, network_evaluations=1, metrics=measure(n)) for n in NAMES]
    if run.is_main:
        for name, net in oracles.items():
            net.load_state_dict(run.ema_weights(name, half_life))
            net.save_pretrained(run.folder / "export" / name)
        card = metric_card(
            n=len(held_out),
            seed=seed,
            features="none: predictions against values, on chromosomes that neither oracle saw",
            device=run.device,
            command=f"train/oracle.py, {config.run.steps} steps",
            details={key: list(vars(data)[key]) for key in ("held_out", "finetune", "evaluation")},
        )
        write_evaluation(run.folder / "export", rows, card)


if __name__ == "__main__":
    run_recipe_file(__file__)
