"""What a masked diffusion is fine-tuned on: free sequences, or sequences of given backbones.

Objectives see :class:`Bound` only: denoisers, rewards and a start for the samples of one
micro-batch. Global sample indices decide everything about a sample, its backbone too.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from diffdiv.data.sequence_files import write_fasta
from diffdiv.export_sequences import export_masked_sequences
from diffdiv.metrics.sequences import diversity
from diffdiv.models.token_networks import DilatedTokenNet, TransformerTokenNet
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.rewards.sequences import SequenceReward, check_reward

Rewards = Mapping[str, SequenceReward]


@dataclass(frozen=True)
class Bound:
    """What belongs to the samples of a micro-batch.

    Attributes:
        start: tokens that trajectories begin with [B, L]; the mask is what is to be designed.
        denoiser: around the reference's or the policy's network, wrapped or averaged too.
        reward: to train on.
        judged: to report, by name.
    """

    start: Tensor
    denoiser: Callable[[nn.Module], TokenDenoiser]
    reward: SequenceReward
    judged: Rewards


class Subject(Protocol):
    """What is fine-tuned: :class:`Sequences`, or designs for backbones (subject_proteins.py)."""

    @property
    def net(self) -> nn.Module:
        """The frozen reference."""

    @property
    def shape(self) -> tuple[int, int]:
        """L (the longest) and V."""

    def policy(self) -> nn.Module:
        """A copy of the reference; what is to be trained in it requires gradients."""

    def at(self, indices: Sequence[int]) -> Bound:
        """What belongs to these samples."""

    def check(self, *, needs_gradient: bool) -> None:
        """Try the reward; RewardError if it does not do what training needs."""

    def figures(self, indices: Sequence[int], tokens: Tensor) -> dict[str, float]:
        """What sequences [N, L] are like, besides their rewards."""

    def write(
        self, path: Path, indices: Sequence[int], tokens: Tensor, scores: Mapping[str, Tensor]
    ) -> None:
        """FASTA with scores [N]."""

    def export(
        self,
        policy: nn.Module,
        weights: Mapping[str, Tensor],
        folder: Path,
        *,
        num_steps: int,
        title: str,
        facts: Mapping[str, object],
    ) -> Path:
        """A diffusers folder of the policy with these weights."""


@dataclass(frozen=True)
class Sequences:
    """Free sequences of one length (DNA).

    Attributes:
        reference: frozen, on the device of the run.
        length: L.
        reward, judged: see :class:`Bound`.
        device: of the run.
    """

    reference: TokenDenoiser
    length: int
    reward: SequenceReward
    judged: Rewards
    device: torch.device

    @property
    def net(self) -> nn.Module:
        """The frozen reference."""
        return self.reference.net

    @property
    def shape(self) -> tuple[int, int]:
        """L and V."""
        return self.length, self.reference.num_tokens

    def policy(self) -> nn.Module:
        """All of it is trained."""
        return copy.deepcopy(self.net).requires_grad_(True)

    def at(self, indices: Sequence[int]) -> Bound:
        """The same for all samples: everything is designed."""
        start = self.reference.all_masked(len(indices), self.length, self.device)
        return Bound(start, self.reference.with_net, self.reward, self.judged)

    def check(self, *, needs_gradient: bool) -> None:
        """See :func:`diffdiv.rewards.sequences.check_reward`."""
        check_reward(self.reward, self.length, needs_gradient=needs_gradient, device=self.device)

    def figures(self, indices: Sequence[int], tokens: Tensor) -> dict[str, float]:
        """Diversity."""
        return diversity(tokens)

    def write(
        self, path: Path, indices: Sequence[int], tokens: Tensor, scores: Mapping[str, Tensor]
    ) -> None:
        """FASTA with scores [N]."""
        write_fasta(path, tokens, scores=scores)

    def export(
        self,
        policy: nn.Module,
        weights: Mapping[str, Tensor],
        folder: Path,
        *,
        num_steps: int,
        title: str,
        facts: Mapping[str, object],
    ) -> Path:
        """A MaskedSequencesPipeline."""
        assert isinstance(policy, DilatedTokenNet | TransformerTokenNet)
        return export_masked_sequences(
            policy, weights, folder,
            length=self.length, num_steps=num_steps, title=title, facts=facts,
        )  # fmt: skip
