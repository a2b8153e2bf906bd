"""Rewards of protein sequences given their backbones: a stability network, tables of energies.

x         one-hot or soft sequences [B, L, V] of data/backbones.py (V = 21, the last is X)
reward    [B], higher is better; row s * B' + b belongs to backbone b of an encoding of B'
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from diffdiv.data.backbones import LETTERS, NUM_TOKENS, UNKNOWN, Backbone
from diffdiv.models.protein_networks import ProteinTokenNet, StructureEncoding
from diffdiv.rewards.sequences import RewardFunction, SequenceReward


class StabilityNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' bases disagree
    """Stability of sequences on their backbones: features of the denoiser's kind, mean, two layers.

    The oracle of DRAKES' protein experiments (arXiv 2410.13643): begun from inverse-folding weights
    (:meth:`from_denoiser`), trained on differences of folding free energy to the wild type.

    Args:
        width, encoder_depth, decoder_depth, neighbours, dropout: of the trunk, a ProteinTokenNet.
        shift, scale: outputs are shift + scale * (last layer), in the unit of the data.
    """

    @register_to_config
    def __init__(
        self,
        width: int = 128,
        encoder_depth: int = 3,
        decoder_depth: int = 3,
        neighbours: int = 30,
        dropout: float = 0.0,
        shift: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.trunk = ProteinTokenNet(
            num_tokens=NUM_TOKENS,
            width=width,
            encoder_depth=encoder_depth,
            decoder_depth=decoder_depth,
            neighbours=neighbours,
            dropout=dropout,
        )
        self.trunk.head.requires_grad_(False)  # predicts tokens; not used here
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, 1)

    @classmethod
    def from_denoiser(
        cls, net: ProteinTokenNet, *, dropout: float = 0.0, shift: float = 0.0, scale: float = 1.0
    ) -> "StabilityNet":
        """With the trunk of a denoiser (copied) and new last layers."""
        kept = ("width", "encoder_depth", "decoder_depth", "neighbours")
        shape = {key: int(net.config[key]) for key in kept}
        made = cls(**shape, dropout=dropout, shift=shift, scale=scale)
        made.trunk.load_state_dict(net.state_dict())
        return made

    def encode(
        self, coordinates: Tensor, chains: Tensor, residues: Tensor, valid: Tensor
    ) -> StructureEncoding:
        """As :meth:`ProteinTokenNet.encode`; once per backbone."""
        return self.trunk.encode(coordinates, chains, residues, valid)

    def forward(self, x: Tensor, encoding: StructureEncoding) -> Tensor:
        """Stability [S*B] of tokens [S*B, L] or soft states [S*B, L, V or V+1]."""
        if x.is_floating_point() and x.shape[-1] == NUM_TOKENS:
            x = pad(x, (0, 1))  # no mask mass
        features = self.trunk.features(x, encoding).unflatten(0, (-1, len(encoding.valid)))
        weight = encoding.valid[..., None].to(features.dtype)
        mean = (features * weight).sum(-2) / weight.sum(-2)
        value = self.head(relu(self.mix(mean)))[..., 0].flatten()
        return float(self.config["shift"]) + float(self.config["scale"]) * value


def load_stability(folder: Path) -> StabilityNet:
    """The frozen network of a folder that train/stability.py wrote.

    Raises:
        ValueError: if there is none.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there, so it is no oracle (train/stability.py)")
    net = StabilityNet.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return net.eval().requires_grad_(False)


def stability_reward(
    net: StabilityNet, encoding: StructureEncoding, *, bound: float | None = None, name: str
) -> SequenceReward:
    """A stability network on these backbones as a reward.

    Args:
        net: frozen, on the device of the sequences.
        encoding: by this network.
        bound: None, or the reward is bound * tanh(value / bound): a prediction that was driven far
            out of the data counts no more than ``bound``.
        name: in reports and errors.

    Raises:
        ValueError: if ``bound`` is not positive.
    """
    if bound is not None and not bound > 0:
        raise ValueError(f"bound: {bound} is not positive")

    def reward(x: Tensor) -> Tensor:
        value: Tensor = net(x, encoding)
        return value if bound is None else bound * (value / bound).tanh()

    limits = None if bound is None else (-bound, bound)
    return SequenceReward(name, reward, bounds=limits, num_tokens=NUM_TOKENS)


def read_energies(path: Path, backbones: Sequence[Backbone]) -> dict[str, Tensor]:
    """A table of values per position and amino acid, for each backbone [L, 20], higher is better.

    CSV with the columns chain, position (the file's number with insertion code), amino_acid, value,
    and, where there are several backbones, structure (its name). What is not listed counts 0.

    Args:
        path: of the table.
        backbones: whose names, chains and labels are meant.

    Raises:
        ValueError: if a column is missing, or a row names nothing, no amino acid or no number, or
            repeats another.
    """
    by_name = {backbone.name: backbone for backbone in backbones}
    tables = {name: torch.zeros(len(b), NUM_TOKENS - 1) for name, b in by_name.items()}
    places = {
        (name, b.chain_names[chain], label): row
        for name, b in by_name.items()
        for row, (chain, label) in enumerate(zip(b.chains.tolist(), b.labels, strict=True))
    }
    seen: set[tuple[str, int, str]] = set()
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        needed = ["chain", "position", "amino_acid", "value"]
        needed += ["structure"] if len(by_name) > 1 else []
        if absent := sorted(set(needed) - set(reader.fieldnames or ())):
            raise ValueError(f"{path}: no column {absent}; needed are {', '.join(needed)}")
        for number, row in enumerate(reader, 2):
            name = row.get("structure") or next(iter(by_name))
            chain, position, letter = (
                (row[key] or "").strip() for key in ("chain", "position", "amino_acid")
            )
            place, letter = places.get((name, chain, position)), letter.upper()
            if place is None or letter not in LETTERS[:UNKNOWN] or len(letter) != 1:
                given = f"{name} {row['chain']}:{row['position']} {row['amino_acid']}"
                raise ValueError(f"{path}: line {number}: there is no {given}")
            value = _number(row["value"])
            if value is None or (name, place, letter) in seen:
                problem = "no finite number" if value is None else "given twice"
                raise ValueError(f"{path}: line {number}: value {row['value']!r}: {problem}")
            seen.add((name, place, letter))
            tables[name][place, LETTERS.index(letter)] = value
    if not seen:
        raise ValueError(f"{path}: the table has no rows")
    return tables


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def table_reward(
    tables: Mapping[str, Tensor], backbones: Sequence[Backbone], length: int, *, name: str
) -> SequenceReward:
    """Sum of a table's values over the residues of each sequence.

    Args:
        tables: [L, 20] by name of the backbone, see :func:`read_energies`.
        backbones: of the rows.
        length: rows are padded to it.
        name: in reports and errors.
    """
    rows = [tables[backbone.name] for backbone in backbones]
    padded = torch.stack([pad(t, (0, NUM_TOKENS - t.shape[1], 0, length - len(t))) for t in rows])

    def reward(x: Tensor) -> Tensor:
        values = padded.to(x).expand(len(x) // len(padded), -1, -1, -1).flatten(0, 1)
        return (x * values).sum((1, 2))

    return SequenceReward(name, reward, num_tokens=NUM_TOKENS)


def callable_reward(
    function: RewardFunction | Callable[[Tensor], Tensor], *, name: str, differentiable: bool = True
) -> SequenceReward:
    """A function of one-hot sequences [B, L, 21] as a reward; see rewards/sequences.py."""
    return SequenceReward(name, function, differentiable=differentiable, num_tokens=NUM_TOKENS)
