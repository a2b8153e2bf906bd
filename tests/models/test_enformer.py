"""Enformer's trunk against its equations written out, place by place."""

from math import exp, gamma, log

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import one_hot

from diffdiv.models.enformer import (
    AttentionPool,
    EnformerTrunk,
    RelativeAttention,
    channel_widths,
    load_enformer_trunk,
    relative_features,
)

TINY = {"channels": 24, "num_conv": 3, "heads": 2, "key_size": 4, "divisor": 4}


def tiny(**changes):
    """Random, with statistics and output layers that are not those of a fresh trunk."""
    torch.manual_seed(0)
    trunk = EnformerTrunk(**{**TINY, "num_transformer": 1, **changes}).double().eval()
    for value in trunk.state_dict().values():
        value.add_(0.1 * torch.rand_like(value))
    return trunk


def sequences(count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return one_hot(torch.randint(0, 4, (count, length), generator=generator), 4).double()


def feature(i, r, places, size):
    """Basis function i of distance r, by the published formulas."""
    if i >= 3 * size:
        return ((r > 0) - (r < 0)) * feature(i - 3 * size, r, places, size)
    family, i = divmod(i, size)
    part = i / (size - 1) if size > 1 else 0
    if family == 0:
        return exp(-log(2) * abs(r) / 2 ** (3 + part * (log(places, 2) - 3)))
    if family == 1:
        return float(abs(r) < 2 ** (i + 1) - 1)
    mean = places / size + part * (places - places / size)
    variance = (places / 2 / size) ** 2
    shape, rate = mean**2 / variance, mean / variance

    def density(x):
        return rate**shape / gamma(shape) * x ** (shape - 1) * exp(-rate * x) + 1e-8

    return density(abs(r)) / max(density(x) for x in range(places))


@pytest.mark.parametrize(("places", "size"), [(1, 2), (2, 4), (7, 3), (20, 4), (5, 1)])
def test_features_of_distance(places, size):
    found = relative_features(places, 6 * size, dtype=torch.float64)
    wanted = [
        [feature(i, r, places, size) for i in range(6 * size)] for r in range(1 - places, places)
    ]
    torch.testing.assert_close(
        found, torch.tensor(wanted, dtype=torch.float64), atol=1e-10, rtol=1e-10
    )
    assert found.isfinite().all()


def test_published_sizes():
    assert channel_widths(1536, 7, 128) == [768, 768, 896, 1024, 1152, 1280, 1536]
    assert relative_features(1536, 192, dtype=torch.float32).isfinite().all()
    with torch.device("meta"):
        trunk = EnformerTrunk()
    shapes = {name: list(value.shape) for name, value in trunk.state_dict().items()}
    assert shapes["stem.0.weight"] == [768, 4, 15]
    assert shapes["stem.1.fn.0.running_var"] == [768]
    assert shapes["stem.2.to_attn_logits.weight"] == [768, 768, 1, 1]
    assert shapes["conv_tower.5.0.2.weight"] == [1536, 1280, 5]
    assert shapes["conv_tower.0.1.fn.2.bias"] == [768]
    assert shapes["transformer.10.0.fn.0.weight"] == [1536]
    assert shapes["transformer.0.0.fn.1.to_rel_k.weight"] == [512, 192]
    assert shapes["transformer.0.0.fn.1.to_v.weight"] == [1536, 1536]
    assert shapes["transformer.0.0.fn.1.rel_pos_bias"] == [1, 8, 1, 64]
    assert shapes["transformer.0.1.fn.1.weight"] == [3072, 1536]
    assert shapes["transformer.0.1.fn.4.weight"] == [1536, 3072]
    assert shapes["final_pointwise.1.2.weight"] == [3072, 1536, 1]


def test_attention_is_its_sum():
    torch.manual_seed(1)
    heads, places, d, value_size = 2, 5, 3, 6
    net = RelativeAttention(12, heads, d, 0.0).double()
    torch.nn.init.normal_(net.to_out.weight)
    x = torch.randn(2, places, 12, dtype=torch.float64)
    q, k, v = net.to_q(x) / d**0.5, net.to_k(x), net.to_v(x)
    u, w = net.rel_content_bias[0, :, 0], net.rel_pos_bias[0, :, 0]
    mixed = torch.zeros(2, places, 12, dtype=torch.float64)
    for b in range(2):
        for h in range(heads):
            mine, values = slice(h * d, h * d + d), slice(h * value_size, (h + 1) * value_size)
            for i in range(places):
                logits = []
                for j in range(places):
                    basis = [feature(n, j - i, places, 1) for n in range(6)]
                    key = net.to_rel_k.weight[mine] @ torch.tensor(basis, dtype=torch.float64)
                    logit = (q[b, i, mine] + u[h]) @ k[b, j, mine] + (q[b, i, mine] + w[h]) @ key
                    logits.append(logit)
                weights = torch.stack(logits).softmax(0)
                mixed[b, i, values] = sum(weights[j] * v[b, j, values] for j in range(places))
    torch.testing.assert_close(net(x), net.to_out(mixed), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("length", [1, 6, 7])
def test_pooling_is_its_definition(length):
    torch.manual_seed(2)
    pool = AttentionPool(3).double()
    torch.testing.assert_close(pool.to_attn_logits.weight[..., 0, 0], 2 * torch.eye(3).double())
    torch.nn.init.normal_(pool.to_attn_logits.weight)
    x = torch.randn(2, 3, length, dtype=torch.float64)
    logits = torch.einsum("ed,bdl->bel", pool.to_attn_logits.weight[..., 0, 0], x)
    wanted = []
    for start in range(0, length, 2):
        pair = slice(start, start + 2)
        weights = logits[..., pair].exp() / logits[..., pair].exp().sum(-1, keepdim=True)
        wanted.append((weights * x[..., pair]).sum(-1))
    torch.testing.assert_close(pool(x), torch.stack(wanted, -1), atol=1e-10, rtol=1e-10)


def test_shifts_strands_and_neighbours():
    """Without attention a shift by 8 bases is one by a place; a strand is not the other one."""
    trunk, whole = tiny(num_transformer=0), tiny()
    x = sequences(2, 136)
    here, there = trunk(x[:, 8:]), trunk(x[:, :-8])
    assert here.shape == (2, 16, 48)
    torch.testing.assert_close(here[:, 5:10], there[:, 6:11], atol=1e-10, rtol=1e-10)
    assert (here[:, 0] - there[:, 1]).abs().max() > 1e-6  # the edge
    assert (here[:, 5:10] - trunk(x[:, 7:-1])[:, 5:10]).abs().max() > 1e-3
    assert (whole(x) - whole(x.flip(1, 2)).flip(1)).abs().max() > 1e-3
    torch.testing.assert_close(whole(x)[:1], whole(x[:1]), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(whole.train()(x), whole.eval()(x))
    assert [whole(x[:, :n]).shape[1] for n in (1, 8, 9, 20)] == [1, 1, 2, 3]


def test_soft_sequences_have_a_gradient():
    trunk, x = tiny(), sequences(1, 17).requires_grad_()
    assert torch.autograd.gradcheck(lambda part: trunk(part)[..., :2], x, fast_mode=True)


def test_weights_by_path(tmp_path):
    trunk, x = tiny(), sequences(1, 24)
    state = {name: value.clone() for name, value in trunk.state_dict().items()}
    extra = {"_heads.human.0.weight": torch.ones(2), "stem.1.fn.0.num_batches_tracked": x[0, 0, 0]}
    save_file({**state, **extra}, tmp_path / "a.safetensors")
    places = {"stem": "1", "conv_tower": "2", "transformer": "4", "final_pointwise": "6"}
    twice = {f"_trunk.{places[(p := n.partition('.'))[0]]}.{p[2]}": v for n, v in state.items()}
    save_file(twice, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        other = EnformerTrunk(**TINY, num_transformer=1).double().eval()
        load_enformer_trunk(other, tmp_path / f"{name}.safetensors")
        assert torch.equal(other(x), trunk(x))
    fresh = EnformerTrunk(**TINY, num_transformer=2)
    with pytest.raises(ValueError, match=r"transformer\.1\.0\.fn\.0\.weight and \d+ more"):
        load_enformer_trunk(fresh, tmp_path / "a.safetensors")
    fresh = EnformerTrunk(**{**TINY, "key_size": 6}, num_transformer=1)
    with pytest.raises(ValueError, match=r"rel_content_bias is \[1, 2, 1, 4\], the trunk's is"):
        load_enformer_trunk(fresh, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="pickles are not read"):
        load_enformer_trunk(fresh, tmp_path / "pytorch_model.bin")
    (tmp_path / "c.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_enformer_trunk(fresh, tmp_path / "c.safetensors")


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of 6"):
        EnformerTrunk(channels=32, heads=2)
    with pytest.raises(ValueError, match="at least 3"):
        EnformerTrunk(**{**TINY, "num_conv": 2})
    with pytest.raises(ValueError, match="multiple of divisor"):
        EnformerTrunk(**{**TINY, "divisor": 5})
    with pytest.raises(ValueError, match="positive multiple of 6"):
        relative_features(4, 8, dtype=torch.float32)
