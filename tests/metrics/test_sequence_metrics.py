"""Metrics of sequences against loops, scipy and scikit-learn."""

from collections import Counter
from math import log2

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score

from diffdiv.data.motifs import MotifScan, iupac_motif
from diffdiv.data.sequences import decode, reverse_complement_of
from diffdiv.metrics.sequences import (
    Estimate,
    activity,
    auroc,
    diversity,
    excess_bits,
    kmer_counts,
    kmer_pearson,
    motif_spearman,
    novelty,
    prediction_metrics,
)


def sequences(count, length=30, seed=0, weights=(1.0, 1.0, 1.0, 1.0)):
    generator = torch.Generator().manual_seed(seed)
    p = torch.tensor(weights, dtype=torch.float32)
    return torch.multinomial(p, count * length, True, generator=generator).view(count, length)


def words(tokens, k):
    return Counter(t[i : i + k] for t in decode(tokens) for i in range(len(t) - k + 1))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_kmer_counts(k):
    tokens = sequences(20)
    found, wanted = kmer_counts(tokens, k), words(tokens, k)
    for index in found.nonzero()[:, 0].tolist():
        word = "".join("ACGT"[index // 4**j % 4] for j in range(k - 1, -1, -1))
        assert int(found[index]) == wanted.pop(word)
    assert not wanted
    with pytest.raises(ValueError, match="k: 0"):
        kmer_counts(tokens, 0)


def test_kmer_pearson():
    a, b = sequences(50, weights=(4, 1, 1, 4)), sequences(200, seed=1, weights=(3, 1, 2, 4))
    pairs = [
        (words(a, 3)[w], words(b, 3)[w])
        for w in {x + y + z for x in "ACGT" for y in "ACGT" for z in "ACGT"}
    ]
    assert kmer_pearson(a, b) == pytest.approx(pearsonr(*zip(*pairs, strict=True)).statistic)
    assert kmer_pearson(a, a) == pytest.approx(1)


def test_motif_spearman():
    motifs = [
        iupac_motif(w, w, purity=0.9)
        for w in ("TGASTCA", "GATAA", "AAAA", "CCGG", "TTNAA", "ACGTACGT")
    ]
    a, b = sequences(60, weights=(4, 1, 1, 4)), sequences(90, seed=1, weights=(2, 1, 1, 3))
    scan = MotifScan(motifs)
    counts = [scan.counts(t, threshold=0.8).double() / len(t) for t in (a, b)]
    assert any(0 in c.tolist() for c in counts)  # ties and absent motifs are part of it
    wanted = spearmanr(*(c.numpy() for c in counts)).statistic
    assert motif_spearman(a, b, motifs) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="too few"):
        motif_spearman(a, b, motifs[:2])


def test_diversity():
    tokens = torch.cat([sequences(12), sequences(12)[:3]])
    found = diversity(tokens)
    texts = decode(tokens)
    pairs = [
        sum(x != y for x, y in zip(a, b, strict=True)) / len(a)
        for i, a in enumerate(texts)
        for j, b in enumerate(texts)
        if i != j
    ]
    assert found["hamming"] == pytest.approx(sum(pairs) / len(pairs))
    assert found["distinct"] == pytest.approx(12 / 15)
    counts = words(tokens, 6)
    total = sum(counts.values())
    wanted = -sum(c / total * log2(c / total) for c in counts.values())
    assert found["kmer_entropy"] == pytest.approx(wanted)
    with pytest.raises(ValueError, match="one sequence"):
        diversity(tokens[:1])


def test_novelty():
    reference = sequences(40, length=12)
    tokens = torch.cat([sequences(9, length=12, seed=5), reverse_complement_of(reference[3:4])])
    both = decode(torch.cat([reference, reverse_complement_of(reference)]))
    nearest = [
        min(sum(x != y for x, y in zip(a, b, strict=True)) for b in both) / 12
        for a in decode(tokens)
    ]
    found = novelty(tokens, reference, chunk=4)
    assert found["nearest"] == pytest.approx(sum(nearest) / 10, abs=1e-6)
    assert found["new"] == pytest.approx(sum(n > 0 for n in nearest) / 10) and nearest[-1] == 0
    with pytest.raises(ValueError, match="lengths"):
        novelty(tokens[:, :5], reference)


def test_activity():
    tokens = sequences(11)
    found = activity(lambda x: x[..., 0].sum(1), tokens, chunk=4)
    values = [float(t.count("A")) for t in decode(tokens)]
    assert found["mean"] == pytest.approx(sum(values) / 11)
    assert found["median"] == sorted(values)[5]
    assert found["error"] == pytest.approx(float(torch.tensor(values).std()) / 11**0.5)


def test_auroc_with_ties():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (200,), generator=generator)
    scores = (labels + torch.randint(0, 5, (200,), generator=generator)).float()
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    with pytest.raises(ValueError, match="both are needed"):
        auroc(scores, torch.ones(200))


def test_prediction_metrics():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100, 2, generator=generator)
    outputs = values + 0.5 * torch.randn(100, 2, generator=generator)
    found = prediction_metrics(outputs, values, is_classes=False)
    wanted = [pearsonr(outputs[:, d], values[:, d]).statistic for d in range(2)]
    assert found["pearson"] == pytest.approx(sum(wanted) / 2)
    assert found["mse_share"] == pytest.approx(0.25, abs=0.15)
    labels = (values[:, :1] > 0).float()
    classes = prediction_metrics(outputs[:, :1], labels, is_classes=True)
    assert classes["auroc"] == pytest.approx(roc_auc_score(labels[:, 0], outputs[:, 0]))
    right = ((outputs[:, :1] > 0) == (labels > 0)).double().mean()
    assert classes["accuracy"] == float(right)


def test_excess_bits():
    front = [(1.0, 1.8), (2.0, 1.6), (3.0, 1.5)]
    assert excess_bits(1.7, 1.5, front) == pytest.approx(0.0)
    assert excess_bits(1.7, 3.0, front[::-1]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"reward: 3\.1"):
        excess_bits(1.7, 3.1, front)


def test_estimate_needs_two():
    with pytest.raises(ValueError, match="two sequences"):
        Estimate.of(torch.ones(1))
