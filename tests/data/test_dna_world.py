"""The DNA grammar: likelihood against enumeration, samples against both."""

from itertools import pairwise, product

import pytest
import torch

from diffdiv.data.dna_world import (
    background_tables,
    bits_per_base,
    dna_world,
    make_grammar,
    world_motifs,
)
from diffdiv.data.motifs import iupac_motif

TINY = [iupac_motif("a", "AC", purity=0.9), iupac_motif("b", "TGW", purity=0.8)]


def tiny(length, **changes):
    settings = {"start": 0.3, "linked": 0.6, "gaps": range(1, 3), "spacer": 1}
    return make_grammar(TINY, {"a": ("b",)}, length=length, **{**settings, **changes})


def all_sequences(length):
    return torch.tensor(list(product(range(4), repeat=length)))


def by_paths(grammar, word):
    """Likelihood as the sum over all hidden paths that have any probability."""
    p0, p1, p2 = (table.tolist() for table in background_tables())
    move, emission = grammar.transition.tolist(), grammar.emission.tolist()
    background = grammar.is_background.tolist()

    def emit(state, i):
        if not background[state]:
            return emission[state][word[i]]
        if i == 0:
            return p0[word[0]]
        if i == 1:
            return p1[word[0]][word[1]]
        return p2[word[i - 2]][word[i - 1]][word[i]]

    def rest(state, i):
        here = emit(state, i)
        if i == len(word) - 1:
            return here
        return here * sum(p * rest(to, i + 1) for to, p in enumerate(move[state]) if p)

    return sum(p * rest(state, 0) for state, p in enumerate(grammar.start.tolist()) if p)


@pytest.mark.parametrize("length", [1, 2, 6])
def test_likelihoods_of_all_short_sequences_sum_to_one(length):
    for grammar in (dna_world(length), tiny(length)):
        total = grammar.log_prob(all_sequences(length)).exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-10)


def test_likelihood_is_the_sum_over_hidden_paths():
    grammar = tiny(5)
    words = all_sequences(5)[::97]
    paths = [by_paths(grammar, word) for word in words.tolist()]
    wanted = torch.tensor(paths, dtype=torch.float64)
    torch.testing.assert_close(grammar.log_prob(words).exp(), wanted, rtol=1e-12, atol=0)


def test_samples_follow_the_likelihood():
    """Chi-square over 64 words; the bound 130 is exceeded once in 600,000 (63 degrees)."""
    grammar = tiny(3)
    p = grammar.log_prob(all_sequences(3)).exp()
    tokens = grammar.sample(range(20_000), seed=0)
    counts = torch.bincount((tokens * torch.tensor([16, 4, 1])).sum(1), minlength=64)
    chi2 = float(((counts - 20_000 * p).square() / (20_000 * p)).sum())
    assert chi2 < 130


def test_the_world():
    world = dna_world()
    assert len(world.names) == 189
    assert (world.transition.sum(1) - 1).abs().max() < 1e-12 and (world.transition >= 0).all()
    tokens, states = world.sample_with_states(range(1500), seed=1)
    starts = torch.tensor([name.endswith(("+0", "-0")) for name in world.names])
    assert float(starts[states].double().sum(1).mean()) == pytest.approx(3.10, abs=0.25)
    entropy, error = bits_per_base(world.log_prob(tokens), 100)
    # 1.7618, error 0.00015, of 800,000 samples (benchmarks/dna_front.py); 4.5 errors: 7e-6
    assert entropy == pytest.approx(1.7618, abs=4.5 * error)
    assert error < 0.005
    torch.testing.assert_close(world.sample([7, 1400], seed=1), tokens[[7, 1400]])
    assert not torch.equal(world.sample([7], seed=2), tokens[[7]])


def test_what_a_motif_state_shows():
    """The letters of a motif state are those of its matrix."""
    world = dna_world()
    tokens, states = world.sample_with_states(range(3000), seed=2)
    motif = world_motifs()[2]  # CTCF
    for strand, table in (("+", motif.probabilities), ("-", motif.reverse_complement())):
        place = world.names.index(f"CTCF{strand}4")
        letters = tokens[states == place]
        assert len(letters) > 300
        share = torch.bincount(letters, minlength=4) / len(letters)
        # 4.5 deviations of the largest variance 1/4: at most 1e-5
        assert (share - table[4]).abs().max() < 4.5 * 0.5 / len(letters) ** 0.5


def test_after_a_gap_comes_a_partner():
    world = dna_world()
    _, states = world.sample_with_states(range(500), seed=3)
    names = [[world.names[s] for s in row] for row in states.tolist()]
    followers = {b[:-2] for row in names for a, b in pairwise(row) if a == "gap HNF1 1"}
    assert followers == {"HNF4", "FOXA"}


def test_wrong_questions():
    world = dna_world(10)
    for tokens in (torch.zeros(2, 9).long(), torch.full((1, 10), 4), torch.zeros(0, 10).long()):
        with pytest.raises(ValueError, match="tokens"):
            world.log_prob(tokens)
    with pytest.raises(ValueError, match="links"):
        make_grammar(TINY, {"a": ("c",)}, length=4)
