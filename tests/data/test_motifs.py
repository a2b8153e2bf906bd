"""Motifs: files of known content, and scans against loops over places, strands and letters."""

from math import log

import pytest
import torch
from torch.nn.functional import one_hot

from diffdiv.data.motifs import NO_SITE, Motif, MotifScan, iupac_motif, read_motifs
from diffdiv.data.sequences import encode, reverse_complement_of

JASPAR = """>MA0001.1 ONE
A  [ 0  3 10 ]
C  [ 0  3  0 ]
G  [10  3  0 ]
T  [ 0  1  0 ]
>two
1 0
0 1
0 0
0 0
"""
MEME = """MEME version 4

ALPHABET= ACGT

strands: + -

MOTIF MA0001.1 ONE
letter-probability matrix: alength= 4 w= 2 nsites= 10 E= 0
 0.1 0.2 0.3 0.4
 1.0 0 0 0
URL http://example.org
MOTIF two
letter-probability matrix: alength= 4 w=1
0.25 0.25 0.25 0.25
"""


def write(folder, text):
    path = folder / "motifs.txt"
    path.write_text(text)
    return path


def test_jaspar(tmp_path):
    one, two = read_motifs(write(tmp_path, JASPAR))
    assert (one.name, two.name) == ("MA0001.1 ONE", "two")
    wanted = [[0, 0, 1, 0], [0.3, 0.3, 0.3, 0.1], [1, 0, 0, 0]]
    torch.testing.assert_close(one.probabilities, torch.tensor(wanted).double())
    assert two.probabilities.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_meme(tmp_path):
    one, two = read_motifs(write(tmp_path, MEME))
    assert (one.name, two.name) == ("MA0001.1 ONE", "two")
    torch.testing.assert_close(
        one.probabilities, torch.tensor([[0.1, 0.2, 0.3, 0.4], [1, 0, 0, 0]]).double()
    )
    assert two.probabilities.shape == (1, 4)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "neither"),
        ("ACGT", "neither"),
        ("MEME version 4\n", "no motif"),
        (MEME.replace("ACGT", "ACDEFGHIKLMNPQRSTVWY"), "alphabet"),
        (MEME.replace("w= 2", "w= 3"), "has not 3 rows"),
        (MEME.replace("1.0 0 0 0", "1.0 0 0"), "no matrix"),
        (MEME.replace("two", "MA0001.1 ONE"), "twice"),
        (JASPAR.replace("T  [ 0  1  0 ]", "T  [ 0 1 ]"), "four rows"),
        (JASPAR.replace("[10  3  0 ]", "[0 3 0]"), "without counts"),
        (JASPAR.replace("[ 0  3 10 ]", "[ 0 -3 10 ]"), "no matrix"),
    ],
)
def test_files_that_are_refused(tmp_path, text, word):
    with pytest.raises(ValueError, match=word):
        read_motifs(write(tmp_path, text))
    (tmp_path / "b").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="not text"):
        read_motifs(tmp_path / "b")


def test_iupac():
    motif = iupac_motif("m", "ARN", purity=0.94)
    wanted = [[0.94, 0.02, 0.02, 0.02], [0.47, 0.03, 0.47, 0.03], [0.25] * 4]
    torch.testing.assert_close(motif.probabilities, torch.tensor(wanted).double())
    back = motif.reverse_complement()
    assert back[2].tolist() == pytest.approx([0.02, 0.02, 0.02, 0.94])
    for name, word in [("x", "AXA"), ("x", "")]:
        with pytest.raises(ValueError, match="IUPAC"):
            iupac_motif(name, word, purity=0.9)


def naive_scan(text, motif, pseudo):
    """{centre: (forward score, backward score)} by loops over letters."""

    def odds(table, word):
        probabilities = [table[j]["ACGT".index(c)] for j, c in enumerate(word)]
        return sum(log(((1 - pseudo) * p + pseudo / 4) / 0.25) for p in probabilities)

    forward = motif.probabilities.tolist()
    backward = [row[::-1] for row in forward[::-1]]
    width = len(forward)
    return {
        start + width // 2: tuple(
            odds(table, text[start : start + width]) for table in (forward, backward)
        )
        for start in range(len(text) - width + 1)
    }


def test_scan_is_what_loops_find():
    texts = ["ACGTTGCATGACTCATTAGC", "TTTTGAGTCAAACCCGGGTA"]
    motifs = [iupac_motif("ap1", "TGASTCA", purity=0.9), iupac_motif("x", "ACGT", purity=1.0)]
    scores = MotifScan(motifs, pseudo=0.05)(one_hot(encode(texts), 4).double())
    assert scores.shape == (2, 2, 20)
    for b, text in enumerate(texts):
        for m, motif in enumerate(motifs):
            found = naive_scan(text, motif, 0.05)
            for place in range(20):
                wanted = NO_SITE
                if place in found:
                    wanted = float(torch.tensor(found[place]).double().logsumexp(0))
                assert float(scores[b, m, place]) == pytest.approx(wanted, abs=1e-4)


def test_scan_is_the_same_on_both_strands_and_linear_in_soft_letters():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (3, 31), generator=generator)
    scan = MotifScan([iupac_motif("a", "TGASTCA", purity=0.9)])  # odd width: centres mirror
    x = one_hot(tokens, 4).double()
    mirrored = scan(one_hot(reverse_complement_of(tokens), 4).double()).flip(2)
    torch.testing.assert_close(scan(x), mirrored, atol=1e-9, rtol=0)
    soft = torch.rand(2, 31, 4, generator=generator).double().softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(scan, (soft,))
    assert (scan(x[:, :5]) == NO_SITE).all()  # too short for any site


def test_counts():
    scan = MotifScan(
        [iupac_motif("ap1", "TGASTCA", purity=0.9), iupac_motif("p", "ACGT", purity=1)]
    )
    tokens = encode(["TGACTCATTTTGAGTCA", "ACGTACGTCCCCCCCCC"])
    assert scan.counts(tokens, threshold=0.99).tolist() == [2, 2]
    with pytest.raises(ValueError, match="different names"):
        MotifScan([])


def test_motif_refuses_what_are_no_probabilities():
    for table in (torch.ones(3, 4), torch.full((2, 3), 1 / 3), -torch.eye(4)):
        with pytest.raises(ValueError, match="motif m"):
            Motif("m", table.double())
