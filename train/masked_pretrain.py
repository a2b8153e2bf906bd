"""Pretrain a masked diffusion over DNA sequences (MDLM, arXiv 2406.07524).

    diffdiv train configs/pretrain/dna.yaml data.path=peaks.fa

RUN/export is a diffusers folder (pipelines/masked_sequences.py) that configs/drakes/*.yaml take as
``reference.path``; RUN/samples/ holds sequences drawn during training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from diffdiv.runtime.config import Config, OptimizerConfig, ReplicatedRunConfig
from diffdiv.runtime.launch import run_recipe_file

if TYPE_CHECKING:
    from torch import Tensor

    from diffdiv.export_sequences import TokenNet


class DataConfig(Config):
    """Sequences of one length; diffdiv/data/sequence_files.py says what is set aside or refused."""

    path: Path | None = None  # FASTA, CSV, TSV (.gz too) or parquet; None: the embedded world
    length: int | None = Field(None, ge=8)  # bases; None: the commonest in the file
    crop: bool = False  # longer sequences are cut to their middle
    sequence_column: str = "sequence"  # of a table
    chromosome_column: str = "chromosome"
    # chromosomes for the reported bound; []: one sequence in twenty, chosen by its letters
    held_out: tuple[str, ...] = ("chr8", "chr9")
    reverse_complement: bool = False  # half of the samples are shown as the other strand

    @model_validator(mode="after")
    def _path(self) -> Self:
        if self.path is not None and not self.path.is_file():
            raise ValueError(f"path {str(self.path)!r} must be a FASTA file or a table")
        if self.path is None and self.reverse_complement:
            raise ValueError("reverse_complement: the embedded world's law differs by strand")
        return self


class ModelConfig(Config):
    """DilatedTokenNet or TransformerTokenNet of diffdiv/models/token_networks.py."""

    kind: Literal["dilated", "transformer"] = "dilated"
    width: int = Field(128, ge=8)
    kernel: int = Field(9, ge=1)  # dilated: odd
    dilations: Annotated[tuple[int, ...], Field(min_length=1)] | None = None  # None: the paper's 20
    depth: int = Field(4, ge=1)  # transformer: blocks
    heads: int = Field(4, ge=1)  # transformer


class ExportConfig(Config):
    """What RUN/export holds."""

    num_steps: int = Field(128, ge=1)  # of the sampler, by default
    dtype: Literal["float32", "float16"] = "float32"  # of the saved weights
    num_evaluated: int = Field(1024, ge=2)  # sequences behind each figure


class RecipeConfig(Config):
    """Everything a pretraining depends on."""

    recipe: Literal["masked_pretrain"] = "masked_pretrain"
    run: ReplicatedRunConfig
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    export: ExportConfig = ExportConfig()
    lr: float = Field(gt=0)
    ema_half_life: int = Field(50_000, gt=0)  # sequences; the averaged weights are exported
    optimizer: OptimizerConfig = OptimizerConfig()


class Sequences(NamedTuple):
    """What to train on and what to look at."""

    batch: "Callable[[Sequence[int]], Tensor]"  # global sample indices -> tokens [B, L]
    held_out: "Tensor"  # [N, L]
    quarantine: tuple[tuple[str, str], ...]


def open_data(config: RecipeConfig) -> Sequences:
    """The embedded world, or the sequences of a file without the held-out ones."""
    from diffdiv.data.dna_world import dna_world
    from diffdiv.data.sequence_files import Columns, read_sequences

    data, seed, count = config.data, config.run.seed, config.export.num_evaluated
    if data.path is None:
        world = dna_world(data.length or 100)
        held_out = world.sample(range(count), seed=seed + 1)
        return Sequences(lambda indices: world.sample(indices, seed=seed), held_out, ())
    columns = Columns(data.sequence_column, data.chromosome_column)
    found = read_sequences(data.path, length=data.length, crop=data.crop, columns=columns)
    split = found.split(data.held_out) if data.held_out else found.split_by_letters(0.05)
    train, test = split

    def batch(indices: Sequence[int]) -> "Tensor":
        return train.batch(indices, seed=seed, reverse_complement=data.reverse_complement)[0]

    shown = test.batch(range(min(count, len(test))), seed=seed, reverse_complement=False)[0]
    return Sequences(batch, shown, found.quarantine)


def build_net(model: ModelConfig) -> "TokenNet":
    """The network, randomly initialised."""
    from diffdiv.models.token_networks import DNA_DILATIONS, DilatedTokenNet, TransformerTokenNet

    # by keyword: diffusers takes positional arguments for defaults when it copies a configuration
    if model.kind == "dilated":
        dilations = model.dilations or DNA_DILATIONS
        return DilatedTokenNet(
            num_tokens=4, width=model.width, kernel=model.kernel, dilations=dilations
        )
    return TransformerTokenNet(
        num_tokens=4, width=model.width, depth=model.depth, heads=model.heads
    )


def main(config: RecipeConfig) -> None:
    """Train and export; resumes by itself when the run folder holds a valid state."""
    import torch

    from diffdiv.core.masking import counter_gumbel, log_linear, sample_ancestral
    from diffdiv.data.sequence_files import write_fasta
    from diffdiv.export_sequences import export_masked_sequences
    from diffdiv.metrics.sequences import bits, log_likelihood_bound
    from diffdiv.models.tokens import token_denoiser
    from diffdiv.objectives.masked_denoising import Masks, masked_nll
    from diffdiv.runtime.run import Run

    run = Run(config.run, main="denoiser", resolved=config.model_dump(mode="json"))
    seed, size, half_life = config.run.seed, config.run.batch_size, config.ema_half_life
    data, export = open_data(config), config.export
    for name, reason in data.quarantine:
        run.event("quarantine", f"{name}: {reason}")
    torch.manual_seed(seed)
    net, length = build_net(config.model), data.held_out.shape[1]
    denoiser = token_denoiser(net)
    trained = run.add(
        "denoiser", net, lr=config.lr, optimizer=config.optimizer, ema_half_lives=(half_life,)
    )
    learner = denoiser.with_net(trained)

    def look() -> dict[str, float]:
        """Bound on the held-out sequences, bits per base; draws samples/step-*.fa."""
        rows = range(10**9, 10**9 + 32)  # far from every training index
        z = counter_gumbel((length, 5), seed=seed, purpose="z", indices=rows, device=run.device)
        with run.averaged("denoiser", half_life) as averaged:
            shown = denoiser.with_net(averaged)
            found = bits(log_likelihood_bound(shown, data.held_out, device=run.device), length)
            start = shown.all_masked(len(rows), length, run.device)
            chain = log_linear().chain(export.num_steps)
            tokens = sample_ancestral(shown.log_probs, chain, z, start)
        if run.is_main:
            (run.folder / "samples").mkdir(exist_ok=True)
            write_fasta(run.folder / "samples" / f"step-{run.step:08d}.fa", tokens.cpu())
        return {"held_out/bits": found.mean, "held_out/error": found.error}

    run.restore()
    with run:
        while run.step < config.run.steps:
            # before the turn: a run that is stopped at its end looks when it is resumed
            if run.every(config.run.sample_every):
                run.log(look())
            with run.turn("denoiser"):
                for indices in run.micro_batches("denoiser"):
                    tokens = data.batch(indices).to(run.device)
                    masks = Masks.draw(
                        length, indices, batch_size=size, seed=seed, purpose="masks"
                    ).to(run.device)
                    with run.autocast():
                        loss = masked_nll(learner, tokens, masks).mean()
                    run.update("denoiser", loss)
                    run.log({"denoiser/nats": loss.detach()})
    figures = look()
    if run.is_main:
        source = config.data.path.name if config.data.path else "the embedded DNA world"
        facts = {"trained on": source, "training steps": config.run.steps, **figures}
        export_masked_sequences(
            net,
            run.ema_weights("denoiser", half_life),
            run.folder / "export",
            length=length,
            num_steps=export.num_steps,
            dtype=vars(torch)[export.dtype],
            title=f"Masked diffusion of {source}",
            facts={**facts, "sequences held out": len(data.held_out)},
        )


if __name__ == "__main__":
    run_recipe_file(__file__)
