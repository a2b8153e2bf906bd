"""Pretrain a masked diffusion over protein sequences, given their backbones (inverse folding).

    diffdiv train configs/pretrain/protein.yaml data.path=structures/

RUN/export is a diffusers folder (pipelines/protein_inverse_folding.py) that
configs/drakes/protein.yaml takes as ``reference.path``; RUN/samples/ holds designs for the
structures that were held out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from diffdiv.runtime.config import Config, ExistingFolder, OptimizerConfig, ReplicatedRunConfig
from diffdiv.runtime.launch import run_recipe_file

if TYPE_CHECKING:
    from diffdiv.data.backbones import Backbone, BackboneBatch


class DataConfig(Config):
    """Structures; diffdiv/data/structures.py says what is set aside or refused."""

    path: ExistingFolder  # of PDB and mmCIF files
    held_out: ExistingFolder | None = None  # for the figures; None: some of ``path``
    share: float = Field(0.05, gt=0, lt=1)  # of ``path`` that is held out, by the letters
    max_residues: int = Field(1000, ge=2)  # larger structures are set aside
    noise: float = Field(0.0, ge=0)  # angstrom, standard deviation, added to all coordinates


class ModelConfig(Config):
    """ProteinTokenNet of diffdiv/models/protein_networks.py."""

    width: int = Field(128, ge=8)
    encoder_depth: int = Field(3, ge=1)
    decoder_depth: int = Field(3, ge=1)
    neighbours: int = Field(30, ge=2)
    dropout: float = Field(0.0, ge=0, lt=1)  # above 0, several processes are not as one


class ExportConfig(Config):
    """What RUN/export holds."""

    num_steps: int = Field(50, ge=1)  # of the sampler, by default
    dtype: Literal["float32", "float16"] = "float32"  # of the saved weights
    num_evaluated: int = Field(64, ge=2)  # structures behind each figure


class RecipeConfig(Config):
    """Everything a pretraining depends on."""

    recipe: Literal["inverse_folding"] = "inverse_folding"
    run: ReplicatedRunConfig
    data: DataConfig
    model: ModelConfig = ModelConfig()
    export: ExportConfig = ExportConfig()
    lr: float = Field(gt=0)
    ema_half_life: int = Field(20_000, gt=0)  # structures; the averaged weights are exported
    optimizer: OptimizerConfig = OptimizerConfig()


class Structures(NamedTuple):
    """What to train on and what to look at."""

    train: "tuple[Backbone, ...]"
    held_out: "tuple[Backbone, ...]"
    quarantine: tuple[tuple[str, str], ...]


def open_data(data: DataConfig) -> Structures:
    """The structures of a folder; those with the same letters are on one side."""
    import hashlib

    from diffdiv.data.backbones import UNKNOWN
    from diffdiv.data.structures import read_backbones

    def usable(folder: Path) -> "tuple[list[Backbone], list[tuple[str, str]]]":
        found, unknown = read_backbones(folder, max_residues=data.max_residues), []
        for backbone in found.backbones:
            if not (backbone.design & (backbone.tokens != UNKNOWN)).any():
                unknown.append((backbone.name, "no residue with a backbone is known"))
        names = {name for name, _ in unknown}
        kept = [backbone for backbone in found.backbones if backbone.name not in names]
        return kept, [*found.quarantine, *unknown]

    backbones, quarantine = usable(data.path)
    if data.held_out is not None:
        held_out, more = usable(data.held_out)
        return Structures(tuple(backbones), tuple(held_out), (*quarantine, *more))

    def is_held(backbone: "Backbone") -> bool:
        letters = backbone.text(backbone.tokens).encode()
        digest = hashlib.blake2b(letters, digest_size=4).digest()
        return int.from_bytes(digest, "little") < data.share * 2**32

    sides = [tuple(b for b in backbones if is_held(b) is held) for held in (False, True)]
    if not all(sides):
        raise ValueError(
            f"data.share: {data.share:.0%} of {len(backbones)} structures leave one side empty; "
            "name a folder as data.held_out"
        )
    return Structures(sides[0], sides[1], tuple(quarantine))


def training_batch(
    backbones: "tuple[Backbone, ...]", indices: Sequence[int], seed: int, noise: float
) -> "BackboneBatch":
    """Structures of global sample indices; each epoch visits every one once."""
    import torch

    from diffdiv.core.noise import normal, permuted
    from diffdiv.data.backbones import BackboneBatch

    rows = [permuted(i, len(backbones), seed=seed, purpose="structures") for i in indices]
    batch = BackboneBatch.of([backbones[row] for row in rows])
    if noise == 0:
        return batch
    moved = torch.zeros_like(batch.coordinates)
    for place, row, index in zip(moved, rows, indices, strict=True):
        size = len(backbones[row])  # padding must not change the draw
        draw = normal((size, 4, 3), seed=seed, purpose="structures.noise", indices=[index])
        place[:size] = noise * draw[0]
    return batch.moved(moved)


def main(config: RecipeConfig) -> None:
    """Train and export; resumes by itself when the run folder holds a valid state."""
    import torch

    from diffdiv.core.masking import counter_gumbel, log_linear, sample_ancestral
    from diffdiv.data.backbones import NUM_TOKENS, BackboneBatch
    from diffdiv.data.designs import write_designs
    from diffdiv.export_proteins import export_protein_design
    from diffdiv.metrics.protein import residue_nll, sequence_recovery
    from diffdiv.metrics.sequences import Estimate
    from diffdiv.models.protein import BoundCall, encode
    from diffdiv.models.protein_networks import ProteinTokenNet
    from diffdiv.models.tokens import TokenDenoiser
    from diffdiv.objectives.inverse_folding import draw_masks
    from diffdiv.objectives.masked_denoising import masked_nll
    from diffdiv.runtime.run import Run

    run = Run(config.run, main="denoiser", resolved=config.model_dump(mode="json"))
    seed, size, half_life = config.run.seed, config.run.batch_size, config.ema_half_life
    data, export = open_data(config.data), config.export
    for name, reason in data.quarantine:
        run.event("quarantine", f"{name}: {reason}")
    run.event("data", f"{len(data.train)} to train on, {len(data.held_out)} held out")
    torch.manual_seed(seed)
    net = ProteinTokenNet(num_tokens=NUM_TOKENS, **config.model.model_dump())
    trained = run.add(
        "denoiser", net, lr=config.lr, optimizer=config.optimizer, ema_half_lives=(half_life,)
    )
    shown = data.held_out[: export.num_evaluated]
    chain = log_linear().chain(export.num_steps)

    def look() -> dict[str, float]:
        """Bound and recovery on held-out structures; draws samples/step-*.fa."""
        nats, shares, scores, tokens = [], [], [], []
        with run.averaged("denoiser", half_life) as averaged:
            averaged.eval()
            for row, backbone in enumerate(shown):  # one by one: as long as it is
                batch = BackboneBatch.of([backbone]).to(run.device)
                code = averaged.encode(batch.coordinates, batch.chains, batch.residues, batch.valid)
                bound = TokenDenoiser(averaged, BoundCall(code), NUM_TOKENS)
                shape = (len(backbone), NUM_TOKENS + 1)
                z = counter_gumbel(
                    shape, seed=seed, purpose="z", indices=[10**9 + row], device=run.device
                )
                found = sample_ancestral(bound.log_probs, chain, z, batch.start)
                nats.append(residue_nll(bound, batch, seed=row))
                shares.append(sequence_recovery(found, batch).cpu())
                tokens.append(found[0].cpu())
            averaged.train()
        scores = Estimate.of(torch.cat(nats)), Estimate.of(torch.cat(shares))
        if run.is_main:
            (run.folder / "samples").mkdir(exist_ok=True)
            padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
            write_designs(
                run.folder / "samples" / f"step-{run.step:08d}.fa", shown, padded,
                scores={"recovery": torch.cat(shares)},
            )  # fmt: skip
        keys = (("nats", scores[0]), ("recovery", scores[1]))
        figures = {f"held_out/{key}": value.mean for key, value in keys}
        return figures | {f"held_out/{key}_error": value.error for key, value in keys}

    run.restore()
    with run:
        while run.step < config.run.steps:
            # before the turn: a run that is stopped at its end looks when it is resumed
            if run.every(config.run.sample_every):
                run.log(look())
            with run.turn("denoiser"):
                for indices in run.micro_batches("denoiser"):
                    batch = training_batch(data.train, indices, seed, config.data.noise)
                    masks = draw_masks(
                        batch.known, indices, batch_size=size, seed=seed, purpose="masks"
                    ).to(run.device)
                    batch = batch.to(run.device)
                    with run.autocast():
                        call = BoundCall(encode(net, batch))  # once per backbone and update
                        learner = TokenDenoiser(trained, call, NUM_TOKENS)
                        loss = masked_nll(learner, batch.tokens, masks).mean()
                    run.update("denoiser", loss)
                    run.log({"denoiser/nats": loss.detach()})
    figures = look()
    if run.is_main:
        facts = {"trained on": f"{len(data.train)} structures", "training steps": config.run.steps}
        export_protein_design(
            net,
            run.ema_weights("denoiser", half_life),
            run.folder / "export",
            num_steps=export.num_steps,
            dtype=vars(torch)[export.dtype],
            title=f"Inverse folding of {config.data.path.name}",
            facts={**facts, **figures, "structures held out": len(shown)},
        )


if __name__ == "__main__":
    run_recipe_file(__file__)
