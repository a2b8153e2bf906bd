"""What the report of `diffdiv demo drakes` draws: fronts, logos, marked sequences."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffdiv.data.dna_world import world_motifs
from diffdiv.data.motifs import Motif as Word
from diffdiv.data.motifs import MotifScan
from diffdiv.data.sequences import decode, reverse_complement_of
from diffdiv.rewards.dna_world import (
    FrontPoint,
    front_point,
    read_front,
    score,
    world_reward,
    world_twin,
)
from diffdiv.sequence_figures import Line, Motif, SequenceFigures, Stack, Text

SITE = 0.8  # of the best word's score


def draw(laws: Mapping[str, Tensor]) -> SequenceFigures:
    """The figures of some laws by name, each sequences [N, L]; the first is the pretrained one."""
    return SequenceFigures(
        lines=_fronts(next(iter(laws.values()))),
        motifs=[_logos(word, laws) for word in world_motifs()],
        texts={name: marked_texts(tokens[:6]) for name, tokens in laws.items()},
        note="Of every sequence the window that fits the motif best, on either strand, whether it "
        "is a site or not: sharp letters mean that most sequences have a good one. Sites, here and "
        "below: windows with 80 % of the best word's score.",
    )


def _fronts(pretrained: Tensor) -> list[Line]:
    """The exact front of the world, and an estimate of that of the pretrained model."""
    reward, twin = (score(judge, pretrained) for judge in (world_reward(), world_twin()))
    points = [
        front_point(reward, row.alpha, twin=twin, bits=torch.zeros_like(reward))
        for row in read_front().rows
    ]
    carried = [point for point in points if point.effective > 100]
    return [
        _line("exact front of the world", read_front().rows),
        _line("best laws of the pretrained model", carried),
    ]


def _line(name: str, points: Sequence[FrontPoint]) -> Line:
    values = {
        "kl": [max(point.kl, 0.0) for point in points],
        "reward": [point.reward for point in points],
        "twin": [point.twin for point in points],
    }
    return Line(name=name, values=values)


def _logos(word: Word, laws: Mapping[str, Tensor]) -> Motif:
    """The motif itself, and the best window of every sequence of each law."""
    scan = MotifScan([word], pseudo=0.0)
    stacks = [Stack(name=f"{word.name} in the world", places=word.probabilities.tolist())]
    for name, tokens in laws.items():
        sites = float(scan.counts(tokens, threshold=SITE)[0]) / len(tokens)
        windows = best_windows(word, tokens)
        places = one_hot(windows, 4).double().mean(0)
        stacks.append(Stack(name=f"{name}: {sites:.2f} sites a sequence", places=places.tolist()))
    return Motif(name=word.name, stacks=stacks)


def best_windows(word: Word, tokens: Tensor) -> Tensor:
    """The window of each sequence [N, L] that fits best, read along the motif's strand [N, W]."""
    table = (4 * word.probabilities).log()
    width = len(table)
    both = torch.stack([tokens, reverse_complement_of(tokens)], 1).unfold(2, width, 1)
    scores = table[torch.arange(width), both].sum(-1).flatten(1)  # [N, 2 (L - W + 1)]
    windows = both.flatten(1, 2)
    return windows[torch.arange(len(tokens)), scores.argmax(1)]


def marked_texts(tokens: Tensor) -> list[Text]:
    """Sequences [N, L] cut into sites and what lies between, with their rewards."""
    scan = MotifScan(world_motifs(), pseudo=0.0)
    share = scan(one_hot(tokens, 4).float()) / scan.best[:, None]  # [N, M, L] at the centres
    owner = torch.full(tokens.shape, -1)
    best = torch.full(tokens.shape, SITE)
    for m, word in enumerate(world_motifs()):
        width = len(word.probabilities)
        for row, centre in (share[:, m] >= SITE).nonzero().tolist():
            span = slice(centre - width // 2, centre - width // 2 + width)
            stronger = share[row, m, centre] > best[row, span]
            owner[row, span] = torch.where(stronger, m, owner[row, span])
            best[row, span] = best[row, span].clamp_min(float(share[row, m, centre]))
    found, names = [], scan.names
    for letters, row, value in zip(
        decode(tokens), owner.tolist(), score(world_reward(), tokens).tolist(), strict=True
    ):
        runs = groupby(zip(letters, row, strict=True), key=itemgetter(1))
        parts = [("".join(c for c, _ in run), names[m] if m >= 0 else None) for m, run in runs]
        found.append(Text(head=f"reward {value:.2f}", parts=parts))
    return found
