"""Protein rewards: tables against sums by hand, the stability head's contract, checks."""

from dataclasses import replace

import pytest
import torch
from synthetic_proteins import make
from torch.nn.functional import one_hot

from diffdiv.data.backbones import LETTERS, UNKNOWN, BackboneBatch
from diffdiv.models.protein_networks import ProteinTokenNet
from diffdiv.rewards.protein import (
    StabilityNet,
    callable_reward,
    load_stability,
    read_energies,
    stability_reward,
    table_reward,
)
from diffdiv.rewards.sequences import RewardError, check_reward

SIZES = {"width": 16, "encoder_depth": 1, "decoder_depth": 2, "neighbours": 6}


@pytest.fixture
def pair():
    return [make("a", 9, 1), make("b", 12, 2)]


def table_file(path, *lines):
    path.write_text("structure,chain,position,amino_acid,value\n" + "\n".join(lines) + "\n")
    return path


def test_a_table_is_summed_over_its_own_backbone(pair, tmp_path):
    path = table_file(
        tmp_path / "t.csv", "a,A,2,W,1.5", "a,A,9,g,-2", "b,A,2,W,10", "b,A,12,Y,0.25"
    )
    tables = read_energies(path, pair)
    reward = table_reward(tables, pair, 12, name="t")
    tokens = torch.randint(0, 19, (6, 12))
    tokens[tokens == LETTERS.index("W")] = 0
    tokens[tokens == LETTERS.index("G")] = 0
    tokens[:, 11] = 0
    tokens[0::2, 9:] = UNKNOWN
    assert reward(tokens).tolist() == [0] * 6
    tokens[0, 1] = tokens[1, 1] = tokens[4, 1] = LETTERS.index("W")
    tokens[4, 8], tokens[5, 11] = LETTERS.index("G"), LETTERS.index("Y")
    assert reward(tokens).tolist() == [1.5, 10, 0, 0, -0.5, 0.25]
    alone = table_reward(tables, pair[:1], 12, name="t")
    check_reward(alone, 12, needs_gradient=True, start=torch.full((12,), 21))


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (["c,A,2,W,1"], "line 2: there is no c A:2 W"),
        (["a,B,2,W,1"], "there is no a B:2 W"),
        (["a,A,10,W,1"], "there is no a A:10 W"),
        (["a,A,2,X,1"], "there is no a A:2 X"),
        (["a,A,2,W,nan"], "no finite number"),
        (["a,A,2,W,1", "a,A,2,W,2"], "line 3: value '2': given twice"),
        ([], "no rows"),
    ],
)
def test_faults_of_a_table_are_named(pair, tmp_path, lines, word):
    with pytest.raises(ValueError, match=word):
        read_energies(table_file(tmp_path / "t.csv", *lines), pair)


def test_a_table_without_its_columns(pair, tmp_path):
    (tmp_path / "t.csv").write_text("chain,position,amino_acid,value\nA,1,W,1\n")
    with pytest.raises(ValueError, match=r"no column \['structure'\]"):
        read_energies(tmp_path / "t.csv", pair)
    assert read_energies(tmp_path / "t.csv", pair[:1])["a"].sum() == 1


def test_stability_depends_on_its_own_row_and_is_differentiable(pair, tmp_path):
    torch.manual_seed(0)
    net = StabilityNet(**SIZES, shift=0.5, scale=30.0)
    net.save_pretrained(tmp_path)
    net = load_stability(tmp_path)
    with pytest.raises(ValueError, match=r"no oracle .train/stability\.py"):
        load_stability(tmp_path / "none")
    batch = BackboneBatch.of(pair)
    code = net.encode(batch.coordinates, batch.chains, batch.residues, batch.valid)
    reward = stability_reward(net, code, name="oracle")
    tokens = torch.randint(0, 20, (4, 12))
    both = reward(tokens)
    soft = one_hot(tokens, 21).float().requires_grad_()
    assert torch.allclose(reward(soft), both, atol=1e-4)
    gradient = torch.autograd.grad(reward(soft)[1], soft)[0]
    assert gradient[1].any() and not gradient[[0, 2, 3]].any()
    alone = BackboneBatch.of(pair[:1])
    code = net.encode(alone.coordinates, alone.chains, alone.residues, alone.valid)
    single = stability_reward(net, code, name="oracle")
    assert torch.allclose(single(tokens[[0, 2], :9]), both[[0, 2]], atol=1e-4)  # no padding
    check_reward(single, 9, needs_gradient=True)
    bounded = stability_reward(net, code, bound=0.1, name="oracle")
    assert bounded(tokens[:2, :9]).abs().max() <= 0.1
    with pytest.raises(ValueError, match="not positive"):
        stability_reward(net, code, bound=0.0, name="oracle")


def test_an_oracle_begins_as_its_denoiser(pair):
    torch.manual_seed(0)
    net = ProteinTokenNet(**SIZES)
    oracle = StabilityNet.from_denoiser(net)
    ours, theirs = oracle.trunk.state_dict(), net.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    trained = {name for name, p in oracle.named_parameters() if p.requires_grad}
    assert not [name for name in trained if name.startswith("trunk.head")]


def test_a_users_function_is_checked_on_proteins(pair):
    start = torch.where(torch.arange(9) < 4, pair[0].tokens, 21)
    seen = []

    def charge(x):
        seen.append(x)
        return x[..., [LETTERS.index(k) for k in "KR"]].sum((1, 2))

    check_reward(callable_reward(charge, name="charge"), 9, needs_gradient=True, start=start)
    assert seen[0].shape == (4, 9, 21) and not seen[0][..., UNKNOWN].any()
    assert torch.equal(seen[0][:, :4].argmax(-1), pair[0].tokens[:4].expand(4, -1))
    flat = callable_reward(lambda x: x.argmax(-1).float().mean(1), name="flat")
    with pytest.raises(RewardError, match="gradient"):
        check_reward(flat, 9, needs_gradient=True)
    check_reward(replace(flat, differentiable=False), 9, needs_gradient=False)
