"""Tables in parquet: read as the same table in CSV is, with its gaps and its quarantine."""

import csv

import pytest
import torch

from diffdiv.data.sequence_files import Columns, read_sequences

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
COLUMNS = Columns("seq", "where", ("up", "down"))
ROWS = {
    "seq": [f"{'ACGT'[i % 4]}CGTACGTA{'ACGT'[i // 4 % 4]}" for i in range(200)],
    "where": [f"chr{i % 3}" for i in range(200)],
    "up": [i / 7 for i in range(200)],
    "down": [float(-i) for i in range(200)],
    "ignored": [i % 2 == 0 for i in range(200)],
}


def written(folder, rows, **options):
    parquet.write_table(pa.table(rows), folder / "t.parquet", **options)
    with (folder / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows)
        writer.writerows(zip(*rows.values(), strict=True))
    return read_sequences(folder / "t.parquet", columns=COLUMNS), read_sequences(
        folder / "t.csv", columns=COLUMNS
    )


@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "row_group_size": 17}])
def test_it_is_read_like_csv(tmp_path, options):
    ours, theirs = written(tmp_path, ROWS, **options)
    assert torch.equal(ours.tokens, theirs.tokens) and len(ours) == 200
    assert torch.equal(ours.values, theirs.values) and ours.values.shape == (200, 2)
    assert ours.chromosomes == theirs.chromosomes == tuple(ROWS["where"])
    assert ours.names == theirs.names and ours.quarantine == theirs.quarantine == ()


def test_nulls_and_broken_rows_are_set_aside_by_number(tmp_path):
    rows = {name: list(values) for name, values in ROWS.items()}
    rows["up"][3], rows["seq"][5], rows["where"][7] = None, None, None
    rows["seq"][9] = "ACGTNACGTA"
    ours, theirs = written(tmp_path, rows)
    assert [name for name, _ in ours.quarantine] == ["row 4", "row 6", "row 10"]
    assert ours.quarantine == theirs.quarantine and len(ours) == 197
    assert ours.chromosomes.count(None) == 1  # row 8
    assert torch.equal(ours.tokens, theirs.tokens)


def test_columns_of_other_types(tmp_path):
    """Categories, large strings and 32-bit numbers, as other tools write them."""
    table = pa.table({
        "seq": pa.array(ROWS["seq"], pa.large_string()),
        "where": pa.array(ROWS["where"]).dictionary_encode(),
        "up": pa.array(ROWS["up"], pa.float32()),
        "down": pa.array(range(200), pa.int64()),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "t.parquet")
    found = read_sequences(tmp_path / "t.parquet", columns=COLUMNS)
    torch.testing.assert_close(found.values[:, 0], torch.tensor(ROWS["up"]))
    assert found.values[:, 1].tolist() == list(range(200))
    assert set(found.chromosomes) == {"chr0", "chr1", "chr2"}


def test_mistakes_are_named(tmp_path):
    parquet.write_table(pa.table({"sequence": ["ACGT" * 3]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"no column \['seq', 'up', 'down'\]; there is sequence"):
        read_sequences(tmp_path / "t.parquet", columns=COLUMNS)
    (tmp_path / "no.parquet").write_bytes(b"not parquet at all")
    with pytest.raises((ValueError, OSError), match="arquet"):
        read_sequences(tmp_path / "no.parquet", columns=COLUMNS)
