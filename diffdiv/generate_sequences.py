"""Sequences as FASTA, with scores, from an export of a masked diffusion."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from diffdiv.data.sequence_files import write_fasta
from diffdiv.rewards.dna_world import world_affinity, world_reward, world_twin
from diffdiv.rewards.oracle import load_oracle, oracle_reward
from diffdiv.rewards.sequences import SequenceReward, motif_file_reward

WORLD: dict[str, Callable[[], SequenceReward]] = {
    "dna_world": world_reward,
    "dna_world_twin": world_twin,
    "dna_world_affinity": world_affinity,
}
_AT_ONCE = 256


class Drawn(Protocol):
    """What the pipeline returns: token ids [B, L]."""

    sequences: Tensor


def sample_sequences(
    pipe: DiffusionPipeline,
    templates: Sequence[str],
    num: int,
    seed: int,
    out: Path,
    rewards: Sequence[SequenceReward] = (),
) -> Path:
    """Write sequences of a MaskedSequencesPipeline into a FASTA file.

    The i-th sequence drawn has a generator of its own, seeded with seed + i.

    Args:
        pipe: the pipeline.
        templates: letters to keep, N where the model designs; none: everything is designed.
        num: sequences for each template.
        seed: of the first sequence.
        out: file to write.
        rewards: scores in the headers, '>sequence-0 dna_world=1.5'.

    Raises:
        ValueError: if a template holds other letters, or templates differ in length.
    """
    lengths = sorted({len(template) for template in templates})
    if len(lengths) > 1:
        raise ValueError(f"prompts: lengths {lengths} differ; one file holds one length")
    generate = cast(Callable[..., Drawn], pipe)
    wanted = [template for template in templates for _ in range(num)]
    seeds, parts = range(seed, seed + (len(wanted) or num)), []
    for first in range(0, len(seeds), _AT_ONCE):
        draws = [torch.Generator().manual_seed(s) for s in seeds[first : first + _AT_ONCE]]
        chosen = wanted[first : first + _AT_ONCE] or None
        found = generate(template=chosen, batch_size=len(draws), generator=draws)
        parts.append(found.sequences.cpu())
    tokens = torch.cat(parts)
    with torch.no_grad():
        scores = {reward.name: torch.cat([reward(p) for p in parts]) for reward in rewards}
    write_fasta(out, tokens, scores=scores)
    return out


def open_rewards(asked: str | None) -> list[SequenceReward]:
    """What to score DNA by.

    Args:
        asked: a name of ``WORLD``; a MEME or JASPAR file; the export of train/oracle.py (both of
            its oracles score); None = nothing.

    Raises:
        ValueError: if it is none of these.
    """
    if asked is None:
        return []
    if asked in WORLD:
        return [WORLD[asked]()]
    path = Path(asked)
    if path.is_file():
        return [motif_file_reward(path)]
    folders = {name: path / name for name in ("finetune", "evaluation")}
    found = [
        oracle_reward(load_oracle(folder), name=f"oracle-{name}")
        for name, folder in folders.items()
        if folder.is_dir()
    ]
    if not found:
        raise ValueError(
            f"reward: {asked!r} is not one of {', '.join(WORLD)}, a file of motifs, or the export "
            "of train/oracle.py"
        )
    return found
