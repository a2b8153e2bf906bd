"""Protein designs as FASTA, with scores, from an export of an inverse-folding model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from diffdiv.data.backbones import LETTERS, Backbone, BackboneBatch
from diffdiv.data.designs import write_designs
from diffdiv.generate_sequences import Drawn
from diffdiv.rewards.protein import load_stability, read_energies, stability_reward, table_reward
from diffdiv.rewards.sequences import SequenceReward
from diffdiv.sample_options import stability_folders

_RESIDUES_AT_ONCE = 2**14  # of all designs of a call; what bounds its memory


def sample_designs(
    pipe: DiffusionPipeline,
    backbone: Backbone,
    num: int,
    seed: int,
    out: Path,
    rewards: Sequence[SequenceReward] = (),
) -> Path:
    """Write designs of a ProteinInverseFoldingPipeline into a FASTA file.

    Chains are separated by a slash. The i-th design has a generator of its own, seeded with
    seed + i.

    Args:
        pipe: the pipeline.
        backbone: with the positions to design; the others keep their residues.
        num: of designs.
        seed: of the first design.
        out: file to write.
        rewards: scores in the headers, '>1abc-0 energies=1.5', see :func:`open_design_rewards`.
    """
    generate = cast(Callable[..., Drawn], pipe)
    # the pipeline knows a missing residue by coordinates that are not finite
    coordinates = backbone.coordinates.masked_fill(backbone.missing[:, None, None], torch.nan)
    at_once, parts = max(1, _RESIDUES_AT_ONCE // len(backbone)), []
    for first in range(0, num, at_once):
        rows = range(first, min(first + at_once, num))
        found = generate(
            coordinates,
            design=backbone.design,
            num_designs=len(rows),
            generator=[torch.Generator().manual_seed(seed + i) for i in rows],
            chains=backbone.chains,
            places=backbone.residues,
            letters="".join(LETTERS[token] for token in backbone.tokens.tolist()),
        )
        parts.append(found.sequences.cpu())
    with torch.no_grad():
        scores = {reward.name: torch.cat([reward(p) for p in parts]) for reward in rewards}
    write_designs(out, [backbone] * num, torch.cat(parts), scores=scores)
    return out


def open_design_rewards(asked: str | None, backbone: Backbone) -> list[SequenceReward]:
    """What to score designs for a backbone by.

    Args:
        asked: the export of train/stability.py (both of its oracles score), or a CSV of values per
            position and amino acid (see :func:`diffdiv.rewards.protein.read_energies`); None =
            nothing.
        backbone: of the designs.

    Raises:
        ValueError: if it is neither, or the table does not fit the backbone.
    """
    if asked is None:
        return []
    folders = stability_folders(Path(asked))
    if not folders:
        tables = read_energies(Path(asked), [backbone])
        return [table_reward(tables, [backbone], len(backbone), name="energies")]
    batch, rewards = BackboneBatch.of([backbone]), list[SequenceReward]()
    for name, folder in folders.items():
        net = load_stability(folder)
        with torch.no_grad():
            code = net.encode(batch.coordinates, batch.chains, batch.residues, batch.valid)
        rewards.append(stability_reward(net, code, name=f"stability-{name}"))
    return rewards
