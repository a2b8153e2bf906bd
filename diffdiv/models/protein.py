"""Protein denoisers: a network of models/protein_networks.py bound to encoded backbones.

The contract of models/tokens.py, so trajectories, rewards' gradients and bounds work unchanged: row
s * B + b of a batch belongs to backbone b. Positions that are not to be designed show their residue
from the start; padding shows X; both are revealed, so they count nowhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffdiv.data.backbones import BackboneBatch
from diffdiv.models.protein_networks import ProteinTokenNet, StructureEncoding
from diffdiv.models.tokens import TokenDenoiser


@dataclass(frozen=True)
class BoundCall:
    """How the network is called on sequences of these backbones.

    Attributes:
        encoding: of B backbones.
    """

    encoding: StructureEncoding

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        """Logits [S*B, L, V]."""
        logits: Tensor = net(x, self.encoding).logits
        return logits


def encode(net: ProteinTokenNet, batch: BackboneBatch) -> StructureEncoding:
    """Encode backbones; with a graph unless under no_grad or the encoder is frozen."""
    return net.encode(batch.coordinates, batch.chains, batch.residues, batch.valid)


def protein_denoiser(net: ProteinTokenNet, encoding: StructureEncoding) -> TokenDenoiser:
    """Denoiser of the sequences of encoded backbones.

    ``with_net`` exchanges the decoder and keeps the encoding: right for networks with the same
    encoder, such as a policy and its reference (see :func:`freeze_encoder`).
    """
    return TokenDenoiser(net, BoundCall(encoding), int(net.config["num_tokens"]))


def freeze_encoder(net: ProteinTokenNet) -> None:
    """Train the decoder only.

    So a policy and its reference share one encoding, made once, and no graph of the encoder is held
    while a trajectory is differentiated. DRAKES' released code trains the encoder too, and runs it
    at every call.
    """
    net.structure.requires_grad_(False)


_UPDATE = {"norm1": "norm1", "norm2": "norm2", "up": "dense.W_in", "down": "dense.W_out"}


def from_protein_mpnn(net: ProteinTokenNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This network's weights from those of ProteinMPNN (its vanilla models, not CA-only).

    Args:
        net: of the same width and depths; unchanged.
        state: ``model_state_dict`` of a released file, as tensors by name.

    Returns:
        All of this network's weights. The mask's embedding is zero, which is how ProteinMPNN shows
        a residue that is not decoded yet, unless ``state`` has a row for it (22 letters).

    Raises:
        ValueError: if a weight is missing, left over or of another shape.
    """
    modules, messages = _correspondence(net)
    names = {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }
    wanted, out = net.state_dict(), dict[str, Tensor]()
    del names["structure.features.mix.bias"]  # it has none
    expected = {*names.values(), "W_s.weight"}
    expected |= {f"{theirs}.{kind}" for *_, theirs in messages for kind in ("weight", "bias")}
    if odd := sorted(expected ^ set(state)):
        raise ValueError(f"ProteinMPNN weights: {len(odd)} missing or left over: {odd[:5]}")
    for ours, theirs in names.items():
        out[ours] = state[theirs]
    for message, edge, theirs in messages:
        width = wanted[f"{edge}.weight"].shape[1]
        # columns: the node itself, the edge, the neighbour (letter before features)
        own, along, other = state[f"{theirs}.weight"].tensor_split((width, 2 * width), 1)
        out |= {f"{message}.own.weight": own, f"{message}.own.bias": state[f"{theirs}.bias"]}
        out |= {f"{edge}.weight": along, f"{message}.other.weight": other}
    out["embed.weight"] = _with_mask_row(state["W_s.weight"], wanted["embed.weight"])
    for kind in ("weight", "bias"):  # 22 letters: the mask is not predicted here
        out[f"head.{kind}"] = state[f"W_out.{kind}"][: net.num_tokens]
    if wrong := [k for k, v in wanted.items() if k not in out or out[k].shape != v.shape]:
        raise ValueError(f"ProteinMPNN weights: {wrong[:5]} are of another shape; check the depths")
    return {key: out[key].to(value.dtype).clone() for key, value in wanted.items()}


def _with_mask_row(table: Tensor, like: Tensor) -> Tensor:
    if len(table) == len(like):
        return table
    return torch.cat([table, table.new_zeros(1, table.shape[1])])


def _correspondence(net: ProteinTokenNet) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Names of modules, ours to theirs; and (message, its edge layer, their one layer for both)."""
    modules = {
        "structure.features.places": "features.embeddings.linear",
        "structure.features.mix": "features.edge_embedding",
        "structure.features.norm": "features.norm_edges",
        "structure.features.out": "W_e",
        "head": "W_out",
    }
    messages = []
    for i in range(int(net.config["encoder_depth"])):
        ours, theirs = f"structure.layers.{i}", f"encoder_layers.{i}"
        for part, edge, row in (("to_nodes", "edge1", ""), ("to_edges", "edge2", "1")):
            messages.append((f"{ours}.{part}", f"{ours}.{edge}", f"{theirs}.W{row}1"))
            modules[f"{ours}.{part}.mid"] = f"{theirs}.W{row}2"
            modules[f"{ours}.{part}.last"] = f"{theirs}.W{row}3"
        modules[f"{ours}.norm"] = f"{theirs}.norm3"
        modules |= {f"{ours}.update.{a}": f"{theirs}.{b}" for a, b in _UPDATE.items()}
    for i in range(int(net.config["decoder_depth"])):
        ours, theirs = f"layers.{i}", f"decoder_layers.{i}"
        messages.append((f"{ours}.message", f"structure.for_decoder.{i}", f"{theirs}.W1"))
        modules[f"{ours}.message.mid"] = f"{theirs}.W2"
        modules[f"{ours}.message.last"] = f"{theirs}.W3"
        modules |= {f"{ours}.update.{a}": f"{theirs}.{b}" for a, b in _UPDATE.items()}
    return modules, messages
