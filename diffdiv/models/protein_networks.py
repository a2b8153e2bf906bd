"""A masked model of protein sequences given a backbone, shaped like ProteinMPNN. Needs torch and
diffusers only, so that the file can travel beside exported weights.

    B, L, K    backbones, residues, neighbours of a residue (by CA distance, itself included)
    S          sequences of each backbone that go through the decoder together
    C          width
    x          int64 tokens [B, L] or [S*B, L] in 0..V, V for the mask; or soft states [..., V+1]

After ProteinMPNN (Dauparas et al., Science 378, 2022, doi 10.1126/science.add2187): RBF distances
of the 25 pairs of N, CA, C, O and a virtual CB, relative places in the chain, messages over edges.
The decoder has no order, as in DRAKES (arXiv 2410.13643): every call sees all tokens, masked ones
as the mask. The first layer of a message is linear in (node, edge, neighbour), so it is taken
apart: what depends on the backbone alone is computed once (:class:`StructureEncoding`), nodes are
multiplied before they are gathered, and the last layer comes after the sum over neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, linear, one_hot

#: pairs of (N, CA, C, O, CB) in the order of ProteinMPNN's edge features; weights depend on it
PAIRS = (
    (1, 1), (0, 0), (2, 2), (3, 3), (4, 4), (1, 0), (1, 2), (1, 3), (1, 4), (0, 2), (0, 3), (0, 4),
    (4, 2), (4, 3), (3, 2), (0, 1), (2, 1), (3, 1), (4, 1), (2, 0), (3, 0), (4, 0), (2, 4), (3, 4),
    (2, 3),
)  # fmt: skip
NUM_RBF, NUM_PLACES, REACH = 16, 16, 32
MESSAGE_SCALE = 30.0
#: logit of a token that is never predicted; finite, so that 0 * log 0 is 0 and fp16 holds it
NEVER = -1e4


@dataclass
class ProteinOutput(BaseOutput):
    """What the network returns: ``logits`` [.., L, V] of the clean tokens."""

    logits: Tensor


@dataclass(frozen=True)
class StructureEncoding:
    """All that the decoder needs of B backbones.

    Attributes:
        nodes: features of the residues [B, L, C].
        edges: what each decoder layer makes of the edges, [B, L, K, C] each.
        neighbours: their rows [B, L, K] int64.
        present: which of them are there [B, L, K] bool.
        valid: residues that are there [B, L] bool.
    """

    nodes: Tensor
    edges: tuple[Tensor, ...]
    neighbours: Tensor
    present: Tensor
    valid: Tensor

    def rows(self, rows: Sequence[int]) -> "StructureEncoding":
        """These backbones, one may come several times."""
        index = torch.tensor(list(rows), device=self.nodes.device)
        edges = tuple(part[index] for part in self.edges)
        rest = (self.neighbours[index], self.present[index], self.valid[index])
        return StructureEncoding(self.nodes[index], edges, *rest)


def nearest(ca: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` nearest valid residues of each one, itself first: rows and whether there.

    Args:
        ca: [B, L, 3].
        valid: [B, L] bool.
        count: K; fewer where L is smaller.

    Returns:
        Rows [B, L, K] int64 and [B, L, K] bool; where there are fewer than K, the rest is False.
    """
    size = min(count, ca.shape[1])
    rows, distances = [], []
    with torch.no_grad():
        for part in ca.split(1024, 1):  # a 10,000-residue complex fits into memory
            # not cdist: its matrix product moves the nearest ones by rounding
            square = (part[:, :, None] - ca[:, None]).square().sum(-1)
            square = square.masked_fill(~valid[:, None], torch.inf)
            found = square.topk(size, -1, largest=False)
            rows.append(found.indices)
            distances.append(found.values)
    present = torch.cat(distances, 1).isfinite() & valid[..., None]
    return torch.cat(rows, 1), present


def gathered(nodes: Tensor, neighbours: Tensor) -> Tensor:
    """Node features [..., B, L, C] at neighbours [B, L, K] -> [..., B, L, K, C]."""
    batch, length = nodes.shape[-3:-1]
    rows = neighbours + length * torch.arange(batch, device=nodes.device)[:, None, None]
    picked = nodes.flatten(-3, -2).index_select(-2, rows.flatten())
    return picked.unflatten(-2, neighbours.shape)


def atoms_of(coordinates: Tensor) -> Tensor:
    """N, CA, C, O and an ideal CB [B, L, 5, 3] of [B, L, 4, 3], angstrom."""
    n, ca, c = coordinates[..., 0, :], coordinates[..., 1, :], coordinates[..., 2, :]
    b, d = ca - n, c - ca
    a = torch.linalg.cross(b, d)
    cb = -0.58273431 * a + 0.56802827 * b - 0.54067466 * d + ca
    return torch.cat([coordinates, cb[..., None, :]], -2)


class _EdgeFeatures(nn.Module):
    """Distances and places of neighbours as C channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = nn.Linear(2 * REACH + 2, NUM_PLACES)
        self.mix = nn.Linear(NUM_PLACES + NUM_RBF * len(PAIRS), width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(
        self, coordinates: Tensor, chains: Tensor, residues: Tensor, neighbours: Tensor
    ) -> Tensor:
        """[B, L, K, C]."""
        atoms = atoms_of(coordinates)
        near = gathered(atoms.flatten(2), neighbours).unflatten(-1, (5, 3))
        own, other = (list(pair) for pair in zip(*PAIRS, strict=True))
        offset = atoms[:, :, None, own] - near[..., other, :]
        distance = (offset.square().sum(-1) + 1e-6).sqrt()  # [B, L, K, 25]
        centres = torch.linspace(2, 22, NUM_RBF).to(distance)
        square = ((distance[..., None] - centres) / (20 / NUM_RBF)) ** 2
        # numbers too small for float32 make matrix products on a CPU ten times slower
        rbf = square.clamp_max(60).neg().exp().masked_fill(square > 60, 0).flatten(-2)
        facts = torch.stack([chains, residues], -1)
        chain, place = gathered(facts, neighbours).unbind(-1)
        step = (residues[..., None] - place + REACH).clamp(0, 2 * REACH)
        step = torch.where(chain == chains[..., None], step, 2 * REACH + 1)
        dtype = self.mix.weight.dtype
        places = self.places(one_hot(step, 2 * REACH + 2).to(dtype))
        return self.out(self.norm(self.mix(torch.cat([places, rbf.to(dtype)], -1))))


class _Message(nn.Module):
    """Two layers over (node, edge, neighbour), and a third that may come after a sum."""

    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, width)
        self.other = nn.Linear(other, width, bias=False)
        self.mid, self.last = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, nodes: Tensor, edges: Tensor, others: Tensor, near: Tensor) -> Tensor:
        """Before the third layer [..., L, K, C]; ``edges`` already multiplied."""
        total = self.own(nodes)[..., None, :] + edges + gathered(self.other(others), near)
        return gelu(self.mid(gelu(total)))

    def summed(self, messages: Tensor, present: Tensor) -> Tensor:
        """Sum of the third layer over the neighbours that are there, divided by 30 [..., L, C]."""
        share = present[..., None].to(messages.dtype)
        count = share.sum(-2)
        total = (messages * share).sum(-2)
        return (linear(total, self.last.weight) + count * self.last.bias) / MESSAGE_SCALE


class _NodeUpdate(nn.Module):
    """Adds messages to nodes, then a GELU layer of four times the width; norms after."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, nodes: Tensor, message: Tensor, valid: Tensor) -> Tensor:
        nodes = self.norm1(nodes + self.drop(message))
        nodes = self.norm2(nodes + self.drop(self.down(gelu(self.up(nodes)))))
        return nodes * valid[..., None].to(nodes.dtype)


class _EncoderLayer(nn.Module):
    """Updates nodes, then edges."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.edge1 = nn.Linear(width, width, bias=False)
        self.edge2 = nn.Linear(width, width, bias=False)
        self.to_nodes, self.to_edges = _Message(width, width), _Message(width, width)
        self.update = _NodeUpdate(width, dropout)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(
        self, nodes: Tensor, edges: Tensor, near: Tensor, present: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = self.to_nodes(nodes, self.edge1(edges), nodes, near)
        nodes = self.update(nodes, self.to_nodes.summed(found, present), valid)
        found = self.to_edges.last(self.to_edges(nodes, self.edge2(edges), nodes, near))
        return nodes, self.norm(edges + self.drop(found))


class _Structure(nn.Module):
    """Everything that sees the backbone only."""

    def __init__(self, width: int, depth: int, layers: int, neighbours: int, dropout: float):
        super().__init__()
        self.count = neighbours
        self.features = _EdgeFeatures(width)
        self.layers = nn.ModuleList(_EncoderLayer(width, dropout) for _ in range(depth))
        self.for_decoder = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(
        self, coordinates: Tensor, chains: Tensor, residues: Tensor, valid: Tensor
    ) -> StructureEncoding:
        # distances of half-precision coordinates would be wrong by tenths of an angstrom
        coordinates = coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))
        near, present = nearest(coordinates[:, :, 1], valid, self.count)
        edges = self.features(coordinates, chains, residues, near)
        nodes = edges.new_zeros(*edges.shape[:2], edges.shape[-1])
        for layer in self.layers:
            nodes, edges = layer(nodes, edges, near, present, valid)
        projected = tuple(layer(edges) for layer in self.for_decoder)
        return StructureEncoding(nodes, projected, near, present, valid)


class _DecoderLayer(nn.Module):
    """Updates nodes from their neighbours' features and tokens."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.message, self.update = _Message(width, 2 * width), _NodeUpdate(width, dropout)

    def forward(
        self, nodes: Tensor, letters: Tensor, edges: Tensor, code: StructureEncoding
    ) -> Tensor:
        both = torch.cat([letters, nodes], -1)
        found = self.message(nodes, edges, both, code.neighbours)
        return self.update(nodes, self.message.summed(found, code.present), code.valid)


class ProteinTokenNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' bases disagree
    """Structure encoder, run once per backbone, and an order-free decoder over tokens.

    Differs from ProteinMPNN in: no decoding order; messages from missing neighbours are left out in
    the decoder too, so that padding changes nothing; a row of the embedding for the mask.

    Args:
        num_tokens: V, the last of which (X, unknown) is shown but never predicted.
        width: C.
        encoder_depth, decoder_depth: layers.
        neighbours: K; ProteinMPNN's released weights have 48, DRAKES 30.
        dropout: in training, on messages and updates.
    """

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 21,
        width: int = 128,
        encoder_depth: int = 3,
        decoder_depth: int = 3,
        neighbours: int = 30,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if neighbours < 1 or num_tokens < 2:
            raise ValueError(f"neighbours, num_tokens: {neighbours}, {num_tokens} are too few")
        self.num_tokens = num_tokens
        self.structure = _Structure(width, encoder_depth, decoder_depth, neighbours, dropout)
        self.embed = nn.Embedding(num_tokens + 1, width)
        self.layers = nn.ModuleList(_DecoderLayer(width, dropout) for _ in range(decoder_depth))
        self.head = nn.Linear(width, num_tokens)

    def encode(
        self, coordinates: Tensor, chains: Tensor, residues: Tensor, valid: Tensor
    ) -> StructureEncoding:
        """Encode backbones.

        Args:
            coordinates: N, CA, C, O [B, L, 4, 3], angstrom; anything where not valid.
            chains: number of the chain [B, L] int64.
            residues: place in the chain [B, L] int64.
            valid: residues that are there [B, L] bool.
        """
        return cast(StructureEncoding, self.structure(coordinates, chains, residues, valid))

    def features(self, x: Tensor, encoding: StructureEncoding) -> Tensor:
        """Features of the residues after the decoder, [S*B, L, C] or [B, L, C].

        Raises:
            ValueError: if the sequences are not a multiple of the backbones, or of other length.
        """
        count, length = encoding.valid.shape
        if x.shape[0] % count or x.shape[1] != length:
            raise ValueError(
                f"x: {list(x.shape[:2])} sequences do not fit {count} backbones of {length}"
            )
        table = self.embed.weight
        letters = x.to(table.dtype) @ table if x.is_floating_point() else embedding(x, table)
        letters = letters.unflatten(0, (-1, count))  # sequence s of backbone b is row s * B + b
        nodes = encoding.nodes.expand_as(letters)
        for layer, edges in zip(self.layers, encoding.edges, strict=True):
            nodes = layer(nodes, letters, edges, encoding)
        return nodes.flatten(0, 1)

    def forward(self, x: Tensor, encoding: StructureEncoding) -> ProteinOutput:
        """Logits of the clean tokens; row s * B + b of ``x`` belongs to backbone b."""
        logits = self.head(self.features(x, encoding))
        never = torch.full_like(logits[..., :1], NEVER)
        return ProteinOutput(logits=torch.cat([logits[..., :-1], never], -1))
