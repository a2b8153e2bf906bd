"""Fine-tuning of an inverse-folding model: designs for given backbones; see subjects.py."""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdiv.core.noise import permuted
from diffdiv.data.backbones import NUM_TOKENS, UNKNOWN, Backbone, BackboneBatch
from diffdiv.data.designs import write_designs
from diffdiv.export_proteins import export_protein_design
from diffdiv.metrics.protein import sequence_recovery
from diffdiv.models.protein import freeze_encoder, protein_denoiser
from diffdiv.models.protein_networks import ProteinTokenNet, StructureEncoding
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.rewards.protein import StabilityNet, stability_reward, table_reward
from diffdiv.rewards.sequences import check_reward
from diffdiv.subjects import Bound


class _Encoded:
    """The encodings of backbones by a frozen encoder, made once; the latest ``limit`` are kept."""

    def __init__(self, net: ProteinTokenNet | StabilityNet, limit: int) -> None:
        self.net, self.limit = net, limit
        self._kept: OrderedDict[int, StructureEncoding] = OrderedDict()

    @torch.no_grad()
    def __call__(self, batch: BackboneBatch, numbers: Sequence[int]) -> StructureEncoding:
        """Of the rows of ``batch``, which are the backbones of these numbers."""
        absent = sorted({n for n in numbers if n not in self._kept})
        if absent:
            part = batch.rows([list(numbers).index(n) for n in absent])
            found = self.net.encode(part.coordinates, part.chains, part.residues, part.valid)
            self._kept |= {n: found.rows([i]) for i, n in enumerate(absent)}
        codes = [self._kept[n] for n in numbers]
        for number in numbers:
            self._kept.move_to_end(number)
        while len(self._kept) > max(self.limit, len(numbers)):
            self._kept.popitem(last=False)
        return StructureEncoding(
            torch.cat([code.nodes for code in codes]),
            tuple(torch.cat(edges) for edges in zip(*(c.edges for c in codes), strict=True)),
            torch.cat([code.neighbours for code in codes]),
            torch.cat([code.present for code in codes]),
            torch.cat([code.valid for code in codes]),
        )


class Designs:
    """Sequences of given backbones; sample i is of backbone ``permuted(i)``.

    The reference's encoder is frozen and shared with the policy, and a backbone is encoded once as
    long as no more than ``kept`` others have come since. All backbones are padded to the longest.

    Args:
        net: frozen, on the device of the run.
        backbones: with the positions to design.
        oracles: "reward" is trained on, "twin" only reported.
        energies: the reward where there is no oracle, tables by backbone's name.
        bound: of stability, see :func:`diffdiv.rewards.protein.stability_reward`.
        seed: of the order of the backbones.
        device: of the run.
        kept: encodings.
    """

    def __init__(
        self,
        net: ProteinTokenNet,
        backbones: Sequence[Backbone],
        oracles: Mapping[str, StabilityNet],
        energies: Mapping[str, Tensor] | None,
        *,
        bound: float | None,
        seed: int,
        device: torch.device,
        kept: int = 64,
    ) -> None:
        self._net, self.backbones, self.bound, self.seed = net, tuple(backbones), bound, seed
        self._all = BackboneBatch.of(self.backbones).to(device)
        self._encoded = _Encoded(net, kept)
        self._oracles = {name: (net, _Encoded(net, kept)) for name, net in oracles.items()}
        self._energies = energies

    @property
    def net(self) -> nn.Module:
        """The frozen reference."""
        return self._net

    @property
    def shape(self) -> tuple[int, int]:
        """L, of the longest, and V."""
        return self._all.tokens.shape[1], NUM_TOKENS

    def policy(self) -> nn.Module:
        """The decoder is trained."""
        net = copy.deepcopy(self._net).requires_grad_(True)
        freeze_encoder(net)
        return net

    def numbers(self, indices: Sequence[int]) -> list[int]:
        """Backbones of these samples; each epoch visits every one once."""
        count = len(self.backbones)
        return [permuted(i, count, seed=self.seed, purpose="backbones") for i in indices]

    def at(self, indices: Sequence[int]) -> Bound:
        """Denoisers and rewards on the backbones of these samples."""
        numbers = self.numbers(indices)
        # one backbone for all: its encoding is not copied
        distinct = numbers[:1] if len(set(numbers)) == 1 else numbers
        batch = self._all.rows(distinct)
        encoding = self._encoded(batch, distinct)

        def denoiser(net: nn.Module) -> TokenDenoiser:
            return protein_denoiser(self._net, encoding).with_net(net)

        judged = {
            name: stability_reward(oracle, code(batch, distinct), bound=self.bound, name=name)
            for name, (oracle, code) in self._oracles.items()
        }
        if self._energies is not None:
            backbones = [self.backbones[number] for number in distinct]
            judged["reward"] = table_reward(
                self._energies, backbones, self.shape[0], name="energies"
            )
        start = self._all.rows(numbers).start
        return Bound(start, denoiser, judged["reward"], judged)

    def check(self, *, needs_gradient: bool) -> None:
        """Try the reward on the first sample's backbone."""
        first = self.at([0])
        check_reward(
            first.reward, self.shape[0],
            needs_gradient=needs_gradient, device=first.start.device, start=first.start[0],
        )  # fmt: skip

    def figures(self, indices: Sequence[int], tokens: Tensor) -> dict[str, float]:
        """Recovery of the native residues; of one backbone, also the designs' diversity."""
        batch = self._all.rows(self.numbers(indices)).to("cpu")
        found = {"recovery": float(sequence_recovery(tokens, batch).nanmean())}
        if len(self.backbones) == 1:
            chosen = tokens[:, batch.design[0]]
            same = torch.stack([(chosen == k).sum(0) for k in range(UNKNOWN)]).double()
            count = len(tokens)
            alike = (same * (same - 1)).sum(0) / (count * (count - 1))
            found["hamming"] = float(1 - alike.mean())
            found["distinct"] = len(torch.unique(chosen, dim=0)) / count
        return found

    def write(
        self, path: Path, indices: Sequence[int], tokens: Tensor, scores: Mapping[str, Tensor]
    ) -> None:
        """FASTA with scores [N]; chains are separated by a slash."""
        write_designs(
            path, [self.backbones[n] for n in self.numbers(indices)], tokens, scores=scores
        )

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
        """A ProteinInverseFoldingPipeline."""
        assert isinstance(policy, ProteinTokenNet)
        return export_protein_design(
            policy, weights, folder, num_steps=num_steps, title=title, facts=facts
        )
