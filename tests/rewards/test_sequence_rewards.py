"""Rewards of sequences: against loops, finite differences and closed forms; faults by name."""

from itertools import pairwise
from math import exp, inf, log, log1p

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from diffdiv.data.dna_world import dna_world, world_motifs
from diffdiv.data.motifs import MotifScan, iupac_motif
from diffdiv.data.sequences import encode, reverse_complement_of
from diffdiv.rewards.dna_world import (
    Front,
    front_point,
    read_front,
    score,
    world_affinity,
    world_reward,
    world_twin,
)
from diffdiv.rewards.oracle import SequenceOracle, load_oracle, oracle_reward
from diffdiv.rewards.sequences import (
    MotifPanel,
    RewardError,
    SequenceReward,
    affinity_reward,
    check_reward,
    motif_file_reward,
    occupancy_reward,
)

LENGTH = 40
TEXTS = [
    "TTTTGTTAATAATTAACGGGGGGGCAAAGTCCATTTTTTT",  # HNF1, then HNF4, centres 18 apart
    "ACGTTGCATGACTCATTAGCACGTTGCATGACTCATTAGC",
    "GGGGGGGGGGTGTTTACAAAACCCCTTGCGCAATTTTTTT",
]


def sigmoid(x):
    return 1 / (1 + exp(-x))


def panel(pairs=(("a", "b", 0.7),)):
    motifs = [iupac_motif("a", "TGTTTAC", purity=0.85), iupac_motif("b", "TTGCGCAA", purity=0.85)]
    return MotifPanel(MotifScan(motifs, pseudo=0.0), {"a": 0.5, "b": -0.3}, pairs, 0.62)


def margins(text, motif, threshold):
    """{centre: score - threshold}, by letters."""
    found, width = {}, len(motif.probabilities)
    for start in range(len(text) - width + 1):
        strands = []
        for table in (motif.probabilities.tolist(), motif.reverse_complement().tolist()):
            word = text[start : start + width]
            odds = sum(log(table[j]["ACGT".index(c)] / 0.25) for j, c in enumerate(word))
            strands.append(exp(odds))
        found[start + width // 2] = log(sum(strands)) - threshold * motif.best_score()
    return found


def test_occupancy_is_what_loops_find():
    reward = world_reward()
    weights = {
        "HNF1": 0.6, "HNF4": 0.6, "FOXA": 0.5, "CEBP": 0.4, "AP1": 0.3, "GATA": -0.2, "CTCF": -0.6,
    }  # fmt: skip
    motifs = {motif.name: motif for motif in world_motifs(0.85)}
    for text in TEXTS:
        seen = {
            name: {i: sigmoid(m) for i, m in margins(text, motif, 0.62).items()}
            for name, motif in motifs.items()
        }
        wanted = sum(w * log1p(sum(seen[name].values())) for name, w in weights.items())
        for a, b, c in (("HNF1", "HNF4", 1.2), ("FOXA", "CEBP", 0.9), ("HNF4", "FOXA", 0.6)):
            near = [
                p * q
                for i, p in seen[a].items()
                for j, q in seen[b].items()
                if 8 <= abs(i - j) <= 26
            ]
            wanted += c * log1p(sum(near))
        assert float(reward(encode([text]))) == pytest.approx(wanted, abs=1e-4)
    assert float(reward(encode(TEXTS[:1]))) > 1.5  # two sites and a pair


def test_affinity_is_what_loops_find():
    reward = affinity_reward(panel(), tau=3.0, scale=2.0)
    motifs = [iupac_motif("a", "TGTTTAC", purity=0.85), iupac_motif("b", "TTGCGCAA", purity=0.85)]
    for text in TEXTS:
        a, b = (
            sigmoid(log(sum(exp(m) for m in margins(text, motif, 0.62).values())) / 3)
            for motif in motifs
        )
        found = reward(one_hot(encode([text]), 4).double())
        assert float(found) == pytest.approx(2 * (0.5 * a - 0.3 * b + 0.7 * a * b), abs=1e-5)


@pytest.mark.parametrize(
    "function",
    [affinity_reward(panel()), occupancy_reward(panel(), tau=2.0, window=(3, 9))],
    ids=["affinity", "occupancy"],
)
def test_gradients_are_those_of_finite_differences(function):
    generator = torch.Generator().manual_seed(0)
    soft = torch.randn(2, 24, 4, generator=generator).double().softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(function, (soft,))


def test_the_worlds_rewards_agree_with_each_other():
    tokens = dna_world().sample(range(600), seed=5)
    scores = [score(r, tokens) for r in (world_reward(), world_twin(), world_affinity())]
    correlation = torch.corrcoef(torch.stack(scores))
    assert correlation[0, 1] > 0.93 and correlation[0, 2] > 0.5
    assert float(scores[0].mean()) == pytest.approx(1.06, abs=0.2)  # 5 errors of 0.04
    for reward in (world_reward(), world_affinity()):
        check_reward(reward, 100, needs_gradient=True)
        torch.testing.assert_close(reward(tokens[:4]), reward(one_hot(tokens[:4], 4).float()))


def test_motif_files(tmp_path):
    path = tmp_path / "m.jaspar"
    path.write_text(">M1 X\nA [8 0 0]\nC [0 8 0]\nG [0 0 8]\nT [0 0 0]\n>M2 Y\n1\n1\n1\n1\n")
    reward = motif_file_reward(path, weights={"M1 X": 2.0})
    check_reward(reward, 12, needs_gradient=True)
    assert reward.bounds == (0.0, 2.0)
    present, absent = reward(encode(["TTTACGTTT", "TTTTTTTTT"])).tolist()
    assert present > absent
    with pytest.raises(ValueError, match="M9"):
        motif_file_reward(path, weights={"M9": 1.0})


def mean_of_a(x):
    return x[..., 0].mean(1)


def raises(x):
    raise KeyError("column")


def once_on_batch(x):
    return mean_of_a(x) - mean_of_a(x).mean()


FAULTY = {
    "raised KeyError": raises,
    r"returned \[4, 1\]": lambda x: mean_of_a(x)[:, None],
    r"returned \[\]": lambda x: mean_of_a(x).sum(),
    "returned float": lambda x: 1.0,
    "4 of 4 values are not finite": lambda x: mean_of_a(x) * float("nan"),
    "two calls differ": lambda x: mean_of_a(x) + torch.rand(len(x)),
    "other sequences of the batch": once_on_batch,
    "gradient is zero": lambda x: mean_of_a(one_hot(x.argmax(-1), 4).float() + 0 * x),
    "has no gradient": lambda x: mean_of_a(x.detach()),
    "gradient is not finite": lambda x: (x[..., 0].amin(1)).sqrt() + x.sum((1, 2)),
}


@pytest.mark.parametrize("word", FAULTY)
def test_faulty_rewards_are_named_before_training(word):
    with pytest.raises(RewardError, match=f"reward mine: .*{word}"):
        check_reward(SequenceReward("mine", FAULTY[word]), 30, needs_gradient=True)


def test_what_a_reward_needs_depends_on_the_method():
    counts = SequenceReward(
        "g", lambda t: (t == 2).float().mean(1), takes="tokens", differentiable=False
    )
    check_reward(counts, 30, needs_gradient=False)
    x = one_hot(encode(["GGAA"]), 4).float()
    assert float(counts(x)) == float(counts(encode(["GGAA"]))) == 0.5
    with pytest.raises(RewardError, match="not differentiable"):
        check_reward(counts, 30, needs_gradient=True)
    with pytest.raises(ValueError, match="no gradient"):
        SequenceReward("g", counts.function, takes="tokens")
    with pytest.raises(RewardError, match="outside its bounds"):
        check_reward(SequenceReward("a", mean_of_a, bounds=(2, 3)), 30, needs_gradient=False)


def test_oracle(tmp_path):
    torch.manual_seed(0)
    oracle = SequenceOracle(num_outputs=2, width=8, kernel=5, shift=(1.0, -1.0), scale=(2.0, 3.0))
    tokens = torch.randint(0, 4, (6, 30))
    x = one_hot(tokens, 4).float()
    torch.testing.assert_close(oracle(x), oracle(one_hot(reverse_complement_of(tokens), 4).float()))
    plain = SequenceOracle(num_outputs=2, width=8, kernel=5)
    plain.load_state_dict(oracle.state_dict())
    scale, shift = torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0])
    torch.testing.assert_close(oracle(x), shift + scale * plain(x))
    oracle.save_pretrained(tmp_path / "o")
    loaded = load_oracle(tmp_path / "o")
    assert torch.equal(loaded(x), oracle.eval()(x))
    assert not any(p.requires_grad for p in loaded.parameters())
    reward = oracle_reward(loaded, output=1, bound=0.5)
    check_reward(reward, 30, needs_gradient=True)
    torch.testing.assert_close(reward(tokens), 0.5 * (loaded(x)[:, 1] / 0.5).tanh())
    for bad in ({"output": 2}, {"bound": 0.0}):
        with pytest.raises(ValueError, match="output, bound"):
            oracle_reward(loaded, **bad)
    with pytest.raises(ValueError, match="no oracle"):
        load_oracle(tmp_path)
    assert sum(p.numel() for p in SequenceOracle().parameters()) == 29_041


def test_dropout_left_on_is_found():
    torch.manual_seed(0)
    oracle = SequenceOracle(width=8, kernel=5, dropout=0.5).train()
    with pytest.raises(RewardError, match="dropout"):
        check_reward(oracle_reward(oracle), 30, needs_gradient=True)
    assert isinstance(oracle.drop, nn.Dropout)


@pytest.mark.parametrize("alpha", [inf, 2.0, 1.0, 0.6])
def test_a_normal_reward_is_tilted_in_closed_form(alpha):
    """r ~ N(1, 1) under the law: tilted mean 1 + 1 / alpha, KL 1 / (2 alpha^2). 5 errors: 6e-7."""
    generator = torch.Generator().manual_seed(1)
    r = 1 + torch.randn(200_000, generator=generator, dtype=torch.float64)
    point = front_point(r, alpha, twin=r, bits=3 * r)
    assert abs(point.reward - 1 - 1 / alpha) < 5 * point.reward_error + 1e-9
    assert abs(point.kl - 1 / (2 * alpha**2)) < 5 * point.kl_error + 1e-9
    assert point.twin == pytest.approx(point.reward)
    assert point.bits_per_base == pytest.approx(3 * point.reward)
    if alpha < inf:
        assert point.value == pytest.approx(point.reward - alpha * point.kl, abs=1e-9)
        spread = [front_point(part, alpha, twin=part, bits=part) for part in r.view(100, -1)]
        for name in ("reward", "kl"):
            found = torch.tensor([vars(p)[name] for p in spread]).double().std() / 10
            assert float(found) == pytest.approx(vars(point)[f"{name}_error"], rel=0.5)


def test_an_enumerated_law_is_tilted_exactly():
    """All sequences of a law as its samples: weights p exp(r / alpha) by direct summation."""
    p = torch.tensor([1, 2, 3, 4]).double() / 10
    values = torch.tensor([0.0, 1.0, -1.0, 2.0]).double()
    r = values.repeat_interleave(torch.tensor([1, 2, 3, 4]))
    point = front_point(r, 0.7, twin=r, bits=r)
    tilted = p * (values / 0.7).exp()
    log_z, tilted = float(tilted.sum().log()), tilted / tilted.sum()
    assert point.reward == pytest.approx(float(tilted @ values), abs=1e-12)
    assert point.kl == pytest.approx(float(tilted @ (tilted / p).log()), abs=1e-12)
    assert point.value == pytest.approx(0.7 * log_z, abs=1e-12)


def test_front_table_round_trip_and_interpolation():
    r = torch.randn(100_000, generator=torch.Generator().manual_seed(2)).double()
    alphas = (inf, 4.0, 2.0, 1.0, 0.7)
    front = Front(tuple(front_point(r, a, twin=r, bits=r) for a in alphas), {"n": 3})
    again = Front.from_json(front.to_json())
    assert again.facts == {"n": 3} and again.rows[0].alpha == inf
    for kl in (0.01, 0.2, 0.8):  # of the normal reward: sqrt(2 KL), straight in sqrt(KL)
        assert again.reward_at(kl) == pytest.approx((2 * kl) ** 0.5, abs=0.03)
        bound = again.bound_at(kl)
        assert again.reward_at(kl) - 0.01 < bound < (2 * kl) ** 0.5 + 0.06
    with pytest.raises(ValueError, match="kl"):
        again.reward_at(5.0)
    assert again.bound_at(5.0) > 10**0.5


def test_the_front_that_ships():
    front = read_front()
    rows = front.rows
    assert rows[0].alpha == inf and rows[0].kl == 0 and len(rows) >= 16
    assert rows[0].reward == pytest.approx(1.076, abs=0.006)
    for before, after in pairwise(rows):
        assert after.reward > before.reward and after.kl > before.kl
        slope = (after.reward - before.reward) / (after.kl - before.kl)
        assert after.alpha <= slope <= before.alpha  # d reward / d KL = alpha on the front
    assert min(row.effective for row in rows) > 300
    for count, best in front.facts["best_of_n"].items():  # below the front at its bound of the KL
        n = int(count)
        kl = log(n) - (n - 1) / n
        assert best <= front.reward_at(kl) <= front.bound_at(kl) + 0.02
