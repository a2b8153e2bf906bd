"""The likelihood bound against enumeration of all masks, orders and sequences."""

from itertools import combinations, permutations, product

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from diffdiv.metrics.sequences import bits, log_likelihood_bound
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives.masked_denoising import Masks, masked_nll

V, L = 2, 4


def table_denoiser(rule):
    """Logits from ``rule(tokens [L]) -> [L, V]`` of each of the 81 partly masked states."""
    states = list(product(range(V + 1), repeat=L))
    logits = torch.stack([rule(torch.tensor(state)) for state in states])
    powers = (V + 1) ** torch.arange(L - 1, -1, -1)
    return TokenDenoiser(nn.Identity(), lambda net, x: logits[(x * powers).sum(-1)], V)


def random_rule(tokens):
    seed = int((tokens * 3 ** torch.arange(L)).sum())
    return torch.randn(L, V, generator=torch.Generator().manual_seed(seed))


SEQUENCES = torch.tensor(list(product(range(V), repeat=L)))
JOINT = torch.rand(V**L, generator=torch.Generator().manual_seed(9)).double().softmax(0)


def exact_rule(tokens):
    """Log of the true conditionals of JOINT given what is shown."""
    fits = ((SEQUENCES == tokens) | (tokens == V)).all(1)
    return (JOINT * fits @ one_hot(SEQUENCES, V).double().flatten(1)).view(L, V).log().float()


def enumerated_bound(denoiser, tokens):
    """Mean over all orders of revealing of the log-probability, one token at a time."""
    total = []
    for order in permutations(range(L)):
        state, log_p = torch.full((L,), V), 0.0
        for place in order:
            log_p += float(denoiser.log_probs(state[None])[0, place, tokens[place]])
            state[place] = tokens[place]
        total.append(log_p)
    return sum(total) / len(total)


def test_mean_over_all_masks_is_the_mean_over_all_orders():
    denoiser = table_denoiser(random_rule)
    for tokens in SEQUENCES[[0, 5, 14]]:
        by_count = []
        for n in range(1, L + 1):
            masked = torch.zeros(len(list(combinations(range(L), n))), L, dtype=torch.bool)
            for row, places in enumerate(combinations(range(L), n)):
                masked[row, list(places)] = True
            nll = masked_nll(denoiser, tokens.expand(len(masked), L), Masks(masked))
            by_count.append(float(nll.mean()))
        wanted = -enumerated_bound(denoiser, tokens)
        assert sum(by_count) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("draws", [1, 3, 8])
def test_the_estimate_is_unbiased_and_its_error_is_right(draws):
    """4.5 standard errors of 4,000 copies of one sequence, thrice: 2e-5."""
    denoiser, tokens = table_denoiser(random_rule), SEQUENCES[6]
    found = log_likelihood_bound(denoiser, tokens.expand(4000, L), draws=draws, seed=draws)
    assert abs(found.mean - enumerated_bound(denoiser, tokens)) < 4.5 * found.error
    assert 0 < found.error < 0.05


def test_a_consistent_denoisers_bound_is_the_likelihood():
    denoiser = table_denoiser(exact_rule)
    for row in (0, 7, 12):
        assert enumerated_bound(denoiser, SEQUENCES[row]) == pytest.approx(
            float(JOINT[row].log()), abs=1e-5
        )
    rows = torch.multinomial(JOINT, 8000, True, generator=torch.Generator().manual_seed(0))
    found = log_likelihood_bound(denoiser, SEQUENCES[rows], draws=4)
    entropy = float(-(JOINT * JOINT.log()).sum())
    assert abs(-found.mean - entropy) < 4.5 * found.error
    per_base = bits(found, L)
    assert per_base.mean == pytest.approx(-found.mean / L / 0.6931472, rel=1e-6)
    assert per_base.error == pytest.approx(found.error / L / 0.6931472, rel=1e-6)


def test_counts_of_a_batch_are_spread_evenly_and_do_not_depend_on_who_draws():
    length, size = 10, 20
    masks = Masks.draw(length, range(60), batch_size=size, seed=1, purpose="m")
    counts = masks.masked.sum(1)
    for block in counts.split(size):  # two of each count, give or take one at the ends
        assert (torch.bincount(block, minlength=11)[1:] - 2).abs().max() <= 1
    parts = [Masks.draw(length, [i], batch_size=size, seed=1, purpose="m") for i in range(60)]
    assert torch.equal(masks.masked, torch.cat([part.masked for part in parts]))
    places = Masks.draw(4, range(4000), batch_size=1, seed=2, purpose="m").masked.float().mean(0)
    assert (places - 0.625).abs().max() < 4.5 * 0.5 / 4000**0.5  # mean of n / L; 3e-5


def test_gradient_is_that_of_the_mean():
    logits = torch.zeros(1, 3, V, requires_grad=True)
    denoiser = TokenDenoiser(nn.Identity(), lambda net, x: logits.expand(len(x), -1, -1), V)
    masked = torch.tensor([[True, False, True]])
    masked_nll(denoiser, torch.tensor([[0, 1, 1]]), Masks(masked)).mean().backward()
    wanted = torch.tensor([[[-0.25, 0.25], [0, 0], [0.25, -0.25]]])
    torch.testing.assert_close(logits.grad, wanted)
