"""Sequences: what is read, what is set aside, what is refused; order and strands by index."""

import gzip
import importlib.util
from collections import Counter

import pytest
import torch

from diffdiv.data.sequence_files import Columns, read_sequences, write_fasta
from diffdiv.data.sequences import (
    SequenceSet,
    decode,
    encode,
    merge_classes,
    problem_of,
    reverse_complement_of,
)

GOOD = [">chr1:0-8", "ACGTacgt", ">chr2:5-13 strand=+", "AAAA", "CCCC", "", ">chrX", "TTTTGGGG"]


def fasta(folder, lines, name="a.fa"):
    path = folder / name
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def complemented(text):
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


def many(folder, *bad, count=40):
    lines = [line for i in range(count) for line in (f">chr{i % 4}:{i}", "ACGTACGT")]
    return fasta(folder, [*lines, *bad])


@pytest.mark.parametrize("name", ["a.fa", "b.fasta.gz", "c.FA"])
def test_fasta(tmp_path, name):
    found = read_sequences(fasta(tmp_path, GOOD, name))
    assert decode(found.tokens) == ["ACGTACGT", "AAAACCCC", "TTTTGGGG"]
    assert found.chromosomes == ("chr1", "chr2", "chrX") and found.names[1] == "chr2:5-13 strand=+"
    assert found.tokens.dtype == torch.int64 and found.values.shape == (3, 0)


def test_what_is_written_is_read_again(tmp_path):
    tokens = torch.randint(0, 4, (5, 30), generator=torch.Generator().manual_seed(0))
    write_fasta(tmp_path / "a.fa", tokens, scores={"reward": torch.arange(5) / 4})
    assert torch.equal(read_sequences(tmp_path / "a.fa").tokens, tokens)
    assert (tmp_path / "a.fa").read_text().splitlines()[2] == ">sequence-1 reward=0.25"
    write_fasta(tmp_path / "b.fa", torch.tensor([[0, 4]]), names=["x"])
    assert (tmp_path / "b.fa").read_text() == ">x\nAN\n"
    with pytest.raises(ValueError, match="given for 5"):
        write_fasta(tmp_path / "c.fa", tokens, scores={"reward": torch.zeros(4)})
    assert not (tmp_path / "c.fa").exists()


@pytest.mark.parametrize(
    ("sequence", "reason"),
    [
        ("ACGNACGT", "IUPAC code 'N' at base 4"),
        ("ACRTACGT", "IUPAC code 'R' at base 3"),
        ("ACGUACGT", "character 'U' at base 4"),
        ("ACG-ACGT", "character '-'"),
        ("ACGTACG", "length 7, not 8"),
        ("ACGTACGTA", "length 9, not 8"),
        ("", "empty"),
        ("ACGTACGé", "character 'É'"),
    ],
)
def test_broken_records_are_set_aside_by_name(tmp_path, sequence, reason):
    found = read_sequences(many(tmp_path, ">chr1:bad one", sequence))
    assert len(found) == 40
    ((name, why),) = found.quarantine
    assert name == "chr1:bad one" and reason in why


def test_longer_ones_can_be_cut_to_their_middle(tmp_path):
    path = fasta(tmp_path, [">a", "TTACGTACGTGG", ">b", "ACGTACGT", ">c", "TACGTACGT"])
    found = read_sequences(path, length=8, crop=True)
    assert decode(found.tokens) == ["ACGTACGT", "ACGTACGT", "TACGTACG"]


def test_more_than_five_percent_stops(tmp_path):
    bad = [line for i in range(3) for line in (f">bad{i}", "ACGN")]
    with pytest.raises(ValueError, match=r"3 of 43 .* bad0: length 4"):
        read_sequences(many(tmp_path, *bad), length=8)
    assert len(read_sequences(many(tmp_path, *bad[:4])).quarantine) == 2


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.fa", b"", "no sequence"),
        ("a.fa", b"ACGT\n", "line 1 is not a FASTA header"),
        ("a.fa", b"\xff\xfe\x00", "text"),
        ("a.fa.gz", b"not gzip", "text"),
        ("a.bed", b"chr1 1 2", "sequences come as"),
        ("a.csv", b"seq,x\nACGT,1\n", "no column"),
        ("a.csv", b"sequence\n", "no sequence"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=word):
        read_sequences(tmp_path / name)


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_tables(tmp_path, name, mark):
    rows = ["seq,chrom,x,y", "ACGT,chr1,0.5,1", "acga,,2,-1e-3"]
    rows += ["AAAA,chr2,1,2"] * 38 + ["CCCC,chr2,,2", "CCCC,chr2,nan,2"]
    path = fasta(tmp_path, [row.replace(",", mark) for row in rows], name)
    columns = Columns("seq", "chrom", ("x", "y"))
    found = read_sequences(path, columns=columns)
    assert found.chromosomes[:3] == ("chr1", None, "chr2")
    torch.testing.assert_close(found.values[:2], torch.tensor([[0.5, 1], [2, -1e-3]]))
    assert [name for name, _ in found.quarantine] == ["row 41", "row 42"]
    assert "value" in found.quarantine[0][1]


def test_parquet_without_pyarrow_is_a_sentence(tmp_path):
    if importlib.util.find_spec("pyarrow"):
        pytest.skip("pyarrow is installed")
    with pytest.raises(ImportError, match=r"diffdiv\[data\]"):
        read_sequences(tmp_path / "a.parquet")


def test_letters():
    texts = ["ACGT", "ttga"]
    tokens = encode(texts)
    assert tokens.tolist() == [[0, 1, 2, 3], [3, 3, 2, 0]]
    assert decode(reverse_complement_of(tokens)) == [complemented(t.upper()) for t in texts]
    assert reverse_complement_of(torch.tensor([4, 0])).tolist() == [3, 4]
    assert problem_of("ACGT", 4) is None
    for bad in (["ACGT", "ACG"], [], ["ACXT"]):
        with pytest.raises(ValueError, match="texts"):
            encode(bad)


def numbered(count):
    """Sequences that spell their row in base 4."""
    tokens = torch.tensor([[i // 4**k % 4 for k in range(6)] for i in range(count)])
    names = tuple(map(str, range(count)))
    chromosomes = tuple(f"chr{i % 5}" for i in range(count))
    return SequenceSet(tokens, torch.arange(count)[:, None].float(), names, chromosomes)


def test_every_epoch_visits_every_row_once_whoever_asks():
    data = numbered(37)
    whole, values = data.batch(range(74), seed=3, reverse_complement=True)
    parts = [data.batch([i], seed=3, reverse_complement=True)[0] for i in range(74)]
    assert torch.equal(whole, torch.cat(parts))
    assert Counter(values[:37, 0].tolist()) == Counter(values[37:, 0].tolist())
    assert not torch.equal(values[:37], values[37:])
    own = data.tokens[values[:, 0].long()]
    flipped = (whole != own).any(1)
    assert torch.equal(whole[flipped], reverse_complement_of(own[flipped]))
    assert 17 <= int(flipped.sum()) <= 57  # 4.6 standard deviations of a fair coin: 4e-6
    plain, again = data.batch(range(74), seed=3, reverse_complement=False)
    assert torch.equal(again, values) and torch.equal(plain, own)


def test_chromosomes_are_kept_apart_and_share_no_sequence():
    data = numbered(100)
    copy = reverse_complement_of(data.tokens[:1])  # of a sequence of chr0, on chr1
    data = SequenceSet(
        torch.cat([data.tokens, copy]),
        torch.cat([data.values, torch.zeros(1, 1)]),
        (*data.names, "copy"),
        (*data.chromosomes, "chr1"),
    )
    held, a, b = data.of_chromosomes(["chr0"], ["chr1", "chr2"], ["chr3", "chr9"])
    assert set(held.chromosomes) == {"chr0"} and set(a.chromosomes) == {"chr1", "chr2"}
    assert "copy" not in a.names and len(held) == 20
    train, test = data.split(["chr0"])
    assert len(train) < 81 and test.names == held.names

    def strands(part):
        return {t for text in decode(part.tokens) for t in (text, complemented(text))}

    for first, second in [(held, a), (held, b), (a, b), (test, train)]:
        assert not strands(first) & set(decode(second.tokens))
    for groups, word in [((["chr7"],), "there is chr0"), ((["chr1"], ["chr1"]), "two groups")]:
        with pytest.raises(ValueError, match=word):
            data.of_chromosomes(*groups)
    unknown = SequenceSet(data.tokens[:1], data.values[:1], ("row 1",), (None,))
    with pytest.raises(ValueError, match="row 1: no chromosome"):
        unknown.split(["chr0"])


def test_split_by_letters_keeps_copies_together():
    tokens = torch.randint(0, 4, (2000, 12), generator=torch.Generator().manual_seed(0))
    both = torch.cat([tokens, reverse_complement_of(tokens)])
    data = SequenceSet(both, torch.zeros(4000, 0), tuple(map(str, range(4000))), (None,) * 4000)
    train, held = data.split_by_letters(0.1)
    assert len(train) + len(held) == 4000
    assert 280 <= len(held) <= 520  # 2000 fair draws at 0.1, two each: 4.5 deviations, 1e-5
    assert {int(n) % 2000 for n in held.names}.isdisjoint(int(n) % 2000 for n in train.names)
    with pytest.raises(ValueError, match="empty"):
        data.select([0]).split_by_letters(0.05)


def test_classes():
    both = merge_classes(numbered(3), numbered(2))
    assert both.values[:, 0].tolist() == [1, 1, 1, 0, 0] and len(both.names) == 5
    short = SequenceSet(torch.zeros(1, 5).long(), torch.zeros(1, 0), ("a",), (None,))
    with pytest.raises(ValueError, match="lengths"):
        merge_classes(numbered(3), short)
