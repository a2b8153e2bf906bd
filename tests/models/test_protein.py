"""The protein network against ProteinMPNN's equations, its invariances, and the contract."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding, gelu, layer_norm, linear, one_hot

from diffdiv.core.masking import counter_gumbel, log_linear, sample_ancestral
from diffdiv.data.backbones import MASK_ID, UNKNOWN, Backbone, BackboneBatch
from diffdiv.data.structures import read_backbone
from diffdiv.models.protein import encode, freeze_encoder, from_protein_mpnn, protein_denoiser
from diffdiv.models.protein_networks import ProteinTokenNet, nearest
from diffdiv.objectives.drakes import SoftPath, drakes_loss
from diffdiv.objectives.masked_denoising import Masks, masked_nll
from diffdiv.objectives.rollout import path_kl, path_log_ratio, roll_out

FILE = Path(__file__).parents[1] / "data" / "6mrr_backbone.pdb"


@pytest.fixture(scope="module")
def real():
    return read_backbone(FILE)


def made(length, seed, chains=1):
    """A random chain of residues about 3.8 angstrom apart, in float64."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(length, 3, generator=generator, dtype=torch.float64)
    ca = (3.8 * steps / steps.norm(dim=-1, keepdim=True)).cumsum(0)
    atoms = ca[:, None] + torch.randn(length, 4, 3, generator=generator, dtype=torch.float64)
    atoms[:, 1] = ca
    number = torch.arange(length) * chains // length
    return Backbone(
        f"made-{seed}",
        atoms,
        number,
        torch.arange(length),
        torch.randint(0, 20, (length,), generator=generator),
        torch.ones(length, dtype=torch.bool),
        torch.zeros(length, dtype=torch.bool),
        tuple("ABC"[:chains]),
        tuple(str(i) for i in range(length)),
    )


def small(seed=0, **more):
    torch.manual_seed(seed)
    settings = {"width": 16, "encoder_depth": 2, "decoder_depth": 2, "neighbours": 6, **more}
    return ProteinTokenNet(**settings).double().eval()


def released(width, encoder, decoder, letters=21, seed=0):
    """Random weights under the names and shapes of ProteinMPNN's released files."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "features.embeddings.linear": (16, 66),
        "features.edge_embedding": (width, 16 + 16 * 25),
        "W_e": (width, width),
        "W_out": (letters, width),
    }
    norms = ["features.norm_edges"]
    for i in range(encoder):
        p = f"encoder_layers.{i}"
        shapes |= {f"{p}.W{n}": (width, 3 * width if n in (1, 11) else width)
                   for n in (1, 2, 3, 11, 12, 13)}  # fmt: skip
        norms += [f"{p}.norm{n}" for n in (1, 2, 3)]
    for i in range(decoder):
        p = f"decoder_layers.{i}"
        shapes |= {f"{p}.W{n}": (width, 4 * width if n == 1 else width) for n in (1, 2, 3)}
        norms += [f"{p}.norm{n}" for n in (1, 2)]
    for i, kind in [(i, "encoder") for i in range(encoder)] + [
        (i, "decoder") for i in range(decoder)
    ]:
        p = f"{kind}_layers.{i}.dense"
        shapes |= {f"{p}.W_in": (4 * width, width), f"{p}.W_out": (width, 4 * width)}
    state = {}
    for name, (rows, columns) in shapes.items():
        draw = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        state[f"{name}.weight"] = draw / columns**0.5
        state[f"{name}.bias"] = torch.randn(rows, generator=generator, dtype=torch.float64)
    del state["features.edge_embedding.bias"]
    for name in norms:
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = torch.randn(width, generator=generator, dtype=torch.float64)
    state["W_s.weight"] = torch.randn(letters, width, generator=generator, dtype=torch.float64)
    return state


def written_out(state, backbone, tokens, neighbours, encoder, decoder):
    """Logits of one backbone by ProteinMPNN's equations, every concatenation written out."""

    def layer(name, x):
        return linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name, x):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def dense(p, x):
        return layer(f"{p}.dense.W_out", gelu(layer(f"{p}.dense.W_in", x)))

    n, ca, c, o = backbone.coordinates.unbind(1)
    b, d = ca - n, c - ca
    cb = -0.58273431 * torch.cross(b, d, dim=-1) + 0.56802827 * b - 0.54067466 * d + ca
    atom = {"Ca": ca, "N": n, "C": c, "O": o, "Cb": cb}
    order = torch.cdist(ca, ca, compute_mode="donot_use_mm_for_euclid_dist").argsort(1)
    near = order[:, :neighbours]
    pairs = "Ca-Ca N-N C-C O-O Cb-Cb Ca-N Ca-C Ca-O Ca-Cb N-C N-O N-Cb Cb-C Cb-O O-C N-Ca C-Ca O-Ca"
    pairs += " Cb-Ca C-N O-N Cb-N C-Cb O-Cb C-O"
    rows = []
    for pair in pairs.split():
        first, second = pair.split("-")
        gap = atom[first][:, None] - atom[second][near]
        distance = ((gap**2).sum(-1) + 1e-6).sqrt()
        mu = torch.linspace(2, 22, 16, dtype=torch.float64)
        rows.append(torch.exp(-(((distance[..., None] - mu) / 1.25) ** 2)))
    step = (backbone.residues[:, None] - backbone.residues[near] + 32).clamp(0, 64)
    step[backbone.chains[:, None] != backbone.chains[near]] = 65
    places = layer("features.embeddings.linear", one_hot(step, 66).double())
    edges = layer("features.edge_embedding", torch.cat([places, *rows], -1))
    edges = layer("W_e", norm("features.norm_edges", edges))
    nodes = torch.zeros(len(backbone), edges.shape[-1], dtype=torch.float64)

    def around(x):
        return x[:, None].expand(-1, neighbours, -1)

    for i in range(encoder):
        p = f"encoder_layers.{i}"
        x = torch.cat([around(nodes), edges, nodes[near]], -1)
        m = layer(f"{p}.W3", gelu(layer(f"{p}.W2", gelu(layer(f"{p}.W1", x)))))
        nodes = norm(f"{p}.norm1", nodes + m.sum(1) / 30)
        nodes = norm(f"{p}.norm2", nodes + dense(p, nodes))
        x = torch.cat([around(nodes), edges, nodes[near]], -1)
        m = layer(f"{p}.W13", gelu(layer(f"{p}.W12", gelu(layer(f"{p}.W11", x)))))
        edges = norm(f"{p}.norm3", edges + m)
    letters = embedding(tokens, torch.cat([state["W_s.weight"], torch.zeros(1, edges.shape[-1])]))
    for i in range(decoder):
        p = f"decoder_layers.{i}"
        x = torch.cat([around(nodes), edges, letters[near], nodes[near]], -1)
        m = layer(f"{p}.W3", gelu(layer(f"{p}.W2", gelu(layer(f"{p}.W1", x)))))
        nodes = norm(f"{p}.norm1", nodes + m.sum(1) / 30)
        nodes = norm(f"{p}.norm2", nodes + dense(p, nodes))
    return layer("W_out", nodes)


def test_released_weights_give_the_logits_of_the_equations():
    backbone, state = made(24, 1, chains=2), released(16, 2, 3)
    net = small(encoder_depth=2, decoder_depth=3, neighbours=9)
    net.load_state_dict(from_protein_mpnn(net, state))
    tokens = torch.where(torch.arange(24) % 3 == 0, MASK_ID, backbone.tokens)
    with torch.no_grad():
        found = net(tokens[None], encode(net, BackboneBatch.of([backbone]))).logits[0]
        wanted = written_out(state, backbone, tokens, 9, 2, 3)
    assert torch.allclose(found[:, :20], wanted[:, :20], atol=1e-10)
    assert (found[:, UNKNOWN] == -1e4).all()


def test_weights_that_do_not_fit_are_named():
    net = small()
    state = released(16, 2, 2)
    with pytest.raises(ValueError, match=r"1 missing or left over: \['W_e.bias'\]"):
        from_protein_mpnn(net, {k: v for k, v in state.items() if k != "W_e.bias"})
    with pytest.raises(ValueError, match="missing or left over"):
        from_protein_mpnn(small(decoder_depth=3), state)
    wide = {**state, "W_e.weight": torch.zeros(8, 8)}
    with pytest.raises(ValueError, match="of another shape"):
        from_protein_mpnn(net, wide)
    masked = released(16, 2, 2, letters=22)  # with a row of its own for the mask
    assert torch.equal(from_protein_mpnn(net, masked)["embed.weight"], masked["W_s.weight"])


def test_the_size_of_the_published_network():
    """1.66 M parameters (ProteinMPNN, 21 letters), counted from its layers; ours + a mask row."""
    width = 128
    message, dense = 2 * (width**2 + width), 8 * width**2 + 5 * width
    encoder = 2 * (3 * width**2 + width + message) + 6 * width + dense
    decoder = 4 * width**2 + width + message + 4 * width + dense
    edges = 66 * 16 + 16 + 416 * width + 2 * width + width**2 + width
    published = 3 * encoder + 3 * decoder + edges + 21 * width + 21 * width + 21
    assert published == 1_660_485
    count = sum(p.numel() for p in ProteinTokenNet().parameters())
    assert count == published + width


def test_turning_and_moving_a_backbone_changes_nothing():
    backbone, net = made(30, 2), small()
    batch = BackboneBatch.of([backbone])
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    turn = turn * turn.det().sign()
    moved = batch.coordinates @ turn.T + torch.tensor([5.0, -7.0, 11.0], dtype=torch.float64)
    x = torch.where(torch.arange(30) % 2 == 0, MASK_ID, backbone.tokens)[None]
    with torch.no_grad():
        found = net(x, encode(net, batch)).logits
        again = net(x, net.encode(moved, batch.chains, batch.residues, batch.valid)).logits
        mirror = net(
            x, net.encode(-batch.coordinates, batch.chains, batch.residues, batch.valid)
        ).logits
    assert (found - again).abs().max() < 1e-11
    assert (found - mirror).abs().max() > 1e-4  # the virtual CB tells left from right


def test_padding_and_missing_residues_change_nothing():
    """Three backbones of other lengths, one shorter than K, one with a hole."""
    backbones, net = [made(9, 1), made(4, 2), made(14, 3)], small()
    backbones[2].missing[5] = True
    batch = BackboneBatch.of(backbones)
    x = torch.where(torch.rand(2, *batch.tokens.shape) < 0.5, MASK_ID, batch.tokens)
    x = torch.where(batch.valid, x, batch.tokens)
    with torch.no_grad():
        together = net(x.flatten(0, 1), encode(net, batch)).logits.unflatten(0, (2, 3))
        for b, backbone in enumerate(backbones):
            alone = encode(net, BackboneBatch.of([backbone]))
            size = len(backbone)
            for s in range(2):
                found = net(x[s, b, :size][None], alone).logits[0]
                keep = ~backbone.missing
                assert torch.allclose(found[keep], together[s, b, :size][keep], atol=1e-12)
        other = BackboneBatch.of(backbones)
        other.coordinates[2, 5] = 77.0
        shown = x.clone()
        shown[:, 2, 5] = 3
        again = net(shown.flatten(0, 1), encode(net, other)).logits.unflatten(0, (2, 3))
    assert torch.equal(again[:, 2][:, batch.valid[2]], together[:, 2][:, batch.valid[2]])


def test_neighbours_are_the_nearest():
    ca = torch.randn(2, 40, 3, dtype=torch.float64)
    valid = torch.rand(2, 40) < 0.8
    rows, present = nearest(ca, valid, 7)
    for b in range(2):
        for i in valid[b].nonzero()[:, 0].tolist():
            distance = (ca[b] - ca[b, i]).norm(dim=-1)
            wanted = sorted(valid[b].nonzero()[:, 0].tolist(), key=lambda j: distance[j])[:7]
            assert rows[b, i].tolist() == wanted and present[b, i].all()
            assert wanted[0] == i


def test_a_soft_state_of_whole_tokens_is_the_tokens(real):
    net = small().float()
    encoding = encode(net, BackboneBatch.of([real]))
    x = torch.where(torch.rand(3, len(real)) < 0.5, MASK_ID, real.tokens)
    denoiser = protein_denoiser(net, encoding)
    found = denoiser.log_probs(one_hot(x, 22).float())
    assert torch.allclose(found, denoiser.log_probs(x), atol=1e-6)
    assert (denoiser.log_probs(denoiser.all_masked(1, len(real)))[..., UNKNOWN] < -5000).all()


class Counting:
    """Counts the calls of a network's encoder and decoder."""

    def __init__(self, net):
        self.calls = Counter()
        net.structure.register_forward_hook(lambda *_: self.calls.update(["encoder"]))
        net.head.register_forward_hook(lambda *_: self.calls.update(["decoder"]))


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_one_encoder_call_serves_a_whole_update(is_frozen, checkpointing):
    """Trajectory, KL and reward's gradient: K decoder calls, one encoder call per network."""
    backbones = [made(7, 1), made(5, 2)]
    batch = BackboneBatch.of(backbones)
    net, reference = small(), small().requires_grad_(False)
    if is_frozen:
        freeze_encoder(net)
    counts = Counting(net)
    policy = protein_denoiser(net, encode(net, batch))
    rows = 4
    encoding = policy.call.encoding.rows([0, 0, 1, 1])
    policy = protein_denoiser(net, encoding)
    anchor = policy.with_net(reference)
    start = batch.rows([0, 0, 1, 1]).start
    noise = counter_gumbel((7, 22), seed=0, purpose="z", indices=range(rows))
    target = one_hot(torch.randint(0, 20, (7,)), 21).double()
    loss, metrics = drakes_loss(
        policy,
        anchor,
        lambda x: (x.double() * target).sum((1, 2)),
        start,
        noise,
        path=SoftPath(log_linear().chain(6), 4, checkpointing=checkpointing),
        alpha=0.1,
    )
    loss.backward()
    assert counts.calls["encoder"] == 1
    assert counts.calls["decoder"] == (12 if checkpointing else 6)
    assert metrics["policy/kl"] == pytest.approx(0, abs=1e-12)
    got = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("structure.") for name in got) is not is_frozen
    assert {name for name, _ in net.named_parameters() if name[:9] != "structure"} <= got


def test_trajectories_bounds_and_kl_work_unchanged(real):
    net, other = small(1).float(), small(2).float().requires_grad_(False)
    backbone = real.with_design("A:10-20,A:40")
    batch = BackboneBatch.of([backbone, backbone])
    policy = protein_denoiser(net.requires_grad_(False), encode(net, batch))
    noise = counter_gumbel((len(real), 22), seed=0, purpose="z", indices=[0, 1])
    rollout = roll_out(policy, log_linear().chain(8), noise, batch.start)
    kept = ~backbone.design
    assert torch.equal(rollout.tokens[:, kept], backbone.tokens[kept].expand(2, -1))
    assert (rollout.tokens < UNKNOWN).all()
    assert torch.equal(path_log_ratio(rollout, policy), torch.zeros(2))
    exact = path_kl(policy, policy.with_net(other), rollout)
    assert (exact > 0).all()
    masks = Masks(batch.design)
    assert torch.isfinite(masked_nll(policy, batch.tokens, masks)).all()
    again = sample_ancestral(policy.log_probs, log_linear().chain(8), noise, batch.start)
    assert torch.equal(again, rollout.tokens)


def test_sequences_that_fit_no_backbone_are_refused(real):
    net = small().float()
    encoding = encode(net, BackboneBatch.of([real, real]))
    with pytest.raises(ValueError, match="do not fit 2 backbones of 68"):
        net(torch.zeros(3, 68, dtype=torch.long), encoding)


def test_it_is_saved_and_read_back(tmp_path, real):
    net = small().float()
    net.save_pretrained(tmp_path)
    again = ProteinTokenNet.from_pretrained(tmp_path, use_safetensors=True).eval()
    batch = BackboneBatch.of([real])
    with torch.no_grad():
        a, b = (m(batch.start, encode(m, batch)).logits for m in (net, again))
    assert torch.equal(a, b) and isinstance(again, nn.Module)
    assert not list(tmp_path.glob("*.bin"))
