"""Recovery, bounds and self-consistency against counts and linear algebra by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from synthetic_proteins import make, write
from torch import nn

from diffdiv.data.backbones import UNKNOWN, BackboneBatch
from diffdiv.data.designs import design_names, write_designs
from diffdiv.metrics.protein import (
    backbone_rmsd,
    folding_rates,
    residue_nll,
    self_consistency,
    sequence_recovery,
    stability,
)
from diffdiv.models.tokens import TokenDenoiser
from diffdiv.objectives.inverse_folding import draw_masks
from diffdiv.objectives.masked_denoising import Masks


def test_recovery_counts_designed_known_residues_only():
    backbone = make("a", 10, 0)
    backbone.tokens[3] = UNKNOWN
    batch = BackboneBatch.of([backbone.with_design("A:2-6"), make("b", 12, 1)])
    tokens = batch.tokens.clone()
    tokens[0, [0, 1, 3]] = (tokens[0, [0, 1, 3]] + 1) % 20  # fixed, designed, unknown
    tokens[1, :6] = (tokens[1, :6] + 1) % 20
    assert sequence_recovery(tokens, batch).tolist() == pytest.approx([3 / 4, 6 / 12])


def test_the_bound_of_independent_residues_is_their_likelihood():
    """A network that ignores the other tokens: every mask gives the same mean in expectation."""
    torch.manual_seed(0)
    logits = torch.randn(12, 21)
    logits[:, UNKNOWN] = -1e4
    backbones = [make("a", 7, 1).with_design("A:2-5"), make("b", 12, 2)]
    batch = BackboneBatch.of(backbones)
    denoiser = TokenDenoiser(nn.Identity(), lambda _, x: logits.expand(len(x), -1, -1), 21)
    draws = torch.stack([residue_nll(denoiser, batch, draws=4, seed=s) for s in range(300)])
    log_p = logits.log_softmax(-1).gather(1, batch.tokens.T).T
    for row in range(2):
        exact = -float(log_p[row][batch.known[row]].double().mean())
        error = float(draws[:, row].std()) / math.sqrt(300)
        assert abs(float(draws[:, row].mean()) - exact) < 5 * error + 1e-6


def test_masks_have_uniform_sizes_and_know_no_padding():
    backbones = [make("a", 6, 1).with_design("A:2-4"), make("b", 11, 2)]
    known = BackboneBatch.of(backbones).known
    sizes = torch.zeros(2, 12)
    for block in range(600):
        indices = [2 * block, 2 * block + 1]
        masks = draw_masks(known, indices, batch_size=2, seed=0, purpose="m")
        assert not (masks.masked & ~known).any()
        for row, count in enumerate(masks.masked.sum(1).tolist()):
            sizes[row, count] += 1
    for row, n in ((0, 3), (1, 11)):
        assert sizes[row, 0] == 0 and sizes[row, n + 1 :].sum() == 0
        chi2 = ((sizes[row, 1 : n + 1] - 600 / n) ** 2 / (600 / n)).sum()
        assert chi2 < {3: 27.7, 11: 45.1}[n]  # false alarms below 1e-6 (2 and 10 degrees)
    alone = draw_masks(known[:1, :6], [4], batch_size=2, seed=0, purpose="m")
    padded = draw_masks(known[:1], [4], batch_size=2, seed=0, purpose="m")
    assert torch.equal(alone.masked, padded.masked[:, :6])
    with pytest.raises(ValueError, match="row 0 has no residue to learn from"):
        draw_masks(torch.zeros(1, 4, dtype=torch.bool), [0], batch_size=1, seed=0, purpose="m")


def test_where_all_is_known_masks_are_those_of_sequences():
    known = torch.ones(4, 20, dtype=torch.bool)
    ours = draw_masks(known, range(4), batch_size=8, seed=3, purpose="m")
    theirs = Masks.draw(20, range(4), batch_size=8, seed=3, purpose="m")
    assert torch.equal(ours.masked, theirs.masked)


def kabsch(a, b):
    """RMSD of two point sets [N, 3] after the best rotation, by singular values."""
    a, b = a - a.mean(0), b - b.mean(0)
    u, s, vt = np.linalg.svd(a.T @ b)
    s[-1] *= np.sign(np.linalg.det(u @ vt))
    return math.sqrt(max(0.0, ((a**2).sum() + (b**2).sum() - 2 * s.sum()) / len(a)))


def test_rmsd_is_that_of_the_best_superposition():
    one, two = make("a", 15, 1), make("b", 15, 2)
    wanted = kabsch(*(x.coordinates.double().flatten(0, 1).numpy() for x in (one, two)))
    assert backbone_rmsd(two, one) == pytest.approx(wanted, rel=1e-4)
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    two.coordinates[:] = one.coordinates @ (turn * turn.det().sign()).T + 5
    assert backbone_rmsd(two, one) < 1e-3
    two.missing[4] = True
    two.coordinates[4] = 0
    assert backbone_rmsd(two, one) < 1e-3
    with pytest.raises(ValueError, match="15 residues, c has 14"):
        backbone_rmsd(two, make("c", 14, 1))


def test_a_folder_of_predictions_becomes_a_table(tmp_path):
    target = make("t", 12, 3)
    names = design_names([target] * 3)
    write(tmp_path, make("t-0", 12, 3))
    write(tmp_path, make("t-1", 12, 3))
    write(tmp_path, make("t-2", 12, 4))
    (tmp_path / "log.txt").write_text("other files are passed over")
    targets = dict.fromkeys(names, target)
    table = self_consistency(tmp_path, targets, ddg=dict(zip(names, (1.0, -0.5, 2.0), strict=True)))
    assert [row.name for row in table] == ["t-0", "t-1", "t-2"]
    assert [row.rmsd < 0.01 for row in table] == [True, True, False]
    assert [row.is_success for row in table] == [True, False, False]
    rates = folding_rates(table)
    assert rates["folds_back"] == pytest.approx(2 / 3) and rates["success"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"no structure of 1 designs: \['t-9'\]"):
        self_consistency(tmp_path, {"t-9": target})
    found = stability(torch.tensor([1.0, -0.5, 2.0, 0.0]))
    assert found["stabilised"] == 0.5 and found["ddg"] == 0.625


def test_designs_are_written_with_their_scores(tmp_path):
    one, two = make("a", 5, 1), make("b", 7, 2)
    batch = BackboneBatch.of([one, two, one])
    scores = {"reward": torch.tensor([1.0, 2.5, -3.0])}
    write_designs(tmp_path / "d.fa", [one, two, one], batch.tokens, scores=scores)
    lines = (tmp_path / "d.fa").read_text().splitlines()
    assert lines[::2] == [">a-0 reward=1", ">b-0 reward=2.5", ">a-1 reward=-3"]
    assert lines[1::2] == [x.text(x.tokens) for x in (one, two, one)]
    assert [len(t) for t in lines[1::2]] == [5, 7, 5] and len(set(itertools.chain(lines))) == 5
    with pytest.raises(ValueError, match="for 2 backbones"):
        write_designs(tmp_path / "d.fa", [one, two], batch.tokens)
