"""Backbones from files written by hand, and from gemmi's own writer."""

import gzip
from pathlib import Path

import gemmi
import pytest
import torch

from diffdiv.data.backbones import LETTERS, MASK_ID, UNKNOWN, BackboneBatch
from diffdiv.data.structures import read_backbone, read_backbones

FILE = Path(__file__).parent / "6mrr_backbone.pdb"
SEQUENCE = "GWSTELEKHREELKEFLKKEGITNVEIRIDNGRLEVRVEGGTERLKRFLEELRQKLEKKGYTVDIKIE"


def line(number, atom, name, chain, seqid, at, altloc=" ", occ=1.0, kind="ATOM"):
    x, y, z = at
    label = f"{seqid:>5}" if seqid[-1].isalpha() else f"{seqid:>4} "
    return (
        f"{kind:<6}{number:>5}  {atom:<3}{altloc}{name:<3} {chain}{label}   "
        f"{x:8.3f}{y:8.3f}{z:8.3f}{occ:6.2f}{0:6.2f}           {atom[0]}\n"
    )


def residue(name, chain, seqid, at, atoms="N CA C O", **more):
    kind = "ATOM" if name in ("ALA", "GLY", "SER", "TRP") else "HETATM"
    rows = {"N": 0.0, "CA": 1.4, "C": 2.4, "O": 3.3}
    return "".join(
        line(1, atom, name, chain, seqid, (at, rows[atom], 0.5 * at), kind=kind, **more)
        for atom in atoms.split()
    )


def write(path, text):
    path.write_text(text + "END\n")
    return path


def test_a_real_entry_reads_like_its_publication():
    backbone = read_backbone(FILE)
    assert backbone.text(backbone.tokens) == SEQUENCE
    assert backbone.labels[0] == "1" and backbone.labels[-1] == "68"
    first = [float(v) for v in FILE.read_text().splitlines()[3][30:54].split()]
    assert backbone.coordinates[0, 1].tolist() == pytest.approx(first)
    bonds = (backbone.coordinates[1:, 0] - backbone.coordinates[:-1, 2]).norm(dim=-1)
    assert bonds.min() > 1.25 and bonds.max() < 1.42  # peptide bonds
    assert torch.equal(backbone.encode(SEQUENCE.lower()), backbone.tokens)
    assert backbone.design.all() and not backbone.missing.any()


def test_mmcif_and_compressed_files_read_the_same(tmp_path):
    backbone = read_backbone(FILE)
    structure = gemmi.read_structure(str(FILE))
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(tmp_path / "a.cif"))
    with gzip.open(tmp_path / "b.pdb.gz", "wt") as file:
        file.write(FILE.read_text())
    for name in ("a.cif", "b.pdb.gz"):
        again = read_backbone(tmp_path / name)
        assert torch.allclose(again.coordinates, backbone.coordinates, atol=2e-3)
        assert torch.equal(again.tokens, backbone.tokens) and again.labels == backbone.labels
    assert read_backbone(tmp_path / "b.pdb.gz").name == "b"


@pytest.fixture
def odd(tmp_path):
    """Two chains with all that occurs in real files."""
    text = (
        residue("ALA", "A", "1", 0.0)
        + residue("GLY", "A", "2", 4.0, altloc="A", occ=0.3)
        + residue("GLY", "A", "2", 5.0, altloc="B", occ=0.7)
        + residue("MSE", "A", "2A", 8.0)
        + residue("SER", "A", "3", 12.0, atoms="N CA C")
        + residue("SEP", "A", "7", 16.0)
        + residue("ALA", "A", "8", 20.0)
        + "TER\n"
        + residue("TRP", "B", "-1", 30.0)
        + residue("SER", "B", "0", 34.0)
        + residue("ALA", "B", "1", 38.0)
        + "TER\n"
        + residue("HOH", "A", "101", 50.0, atoms="O")
        + residue("GLY", "A", "102", 55.0).replace("ATOM  ", "HETATM")
    )
    return write(tmp_path / "odd.pdb", text)


def test_what_is_not_a_plain_residue_is_handled_as_documented(odd):
    backbone = read_backbone(odd)
    assert backbone.text(backbone.tokens) == "AGMSXA/WSA"
    assert backbone.labels == ("1", "2", "2A", "3", "7", "8", "-1", "0", "1")
    assert backbone.residues.tolist() == [0, 1, 2, 3, 7, 8, 0, 1, 2]
    assert backbone.chains.tolist() == [0] * 6 + [1] * 3 and backbone.chain_names == ("A", "B")
    assert backbone.missing.nonzero()[:, 0].tolist() == [3]
    assert not backbone.design[3] and backbone.tokens[4] == UNKNOWN
    assert backbone.coordinates[1, 0].tolist() == [5.0, 0.0, 2.5]  # the fuller conformer
    assert (backbone.coordinates[3] == 0).all()
    assert set(backbone.notes) == {
        "1 x SEP read as X",
        "1 residues with alternate locations",
        "1 residues lack backbone atoms",
    }


@pytest.mark.parametrize(
    ("design", "rows"),
    [
        ("B", [6, 7, 8]),
        ("A", [0, 1, 2, 4, 5]),
        ("A:2-2A", [1, 2]),
        ("A:7", [4]),
        ("B:-1", [6]),
        ("B:-1-0, A:1", [0, 6, 7]),
    ],
)
def test_positions_are_named_as_a_viewer_shows_them(odd, design, rows):
    assert read_backbone(odd, design=design).design.nonzero()[:, 0].tolist() == rows


@pytest.mark.parametrize(
    ("design", "word"),
    [
        ("C", "has no chain 'C' .it has A, B"),
        ("A:4", "no such residues; its numbers go from 1 to 8"),
        ("A:8-1", "no such residues"),
        ("A:2-3", "without a complete backbone .* 3"),
        ("", "no chain ''"),
    ],
)
def test_positions_that_are_not_there_are_refused(odd, design, word):
    with pytest.raises(ValueError, match=word):
        read_backbone(odd, design=design)


def test_models_and_two_residues_at_one_place(tmp_path):
    one = residue("ALA", "A", "1", 0.0) + residue("GLY", "A", "2", 4.0)
    two = residue("ALA", "A", "1", 1.0) + residue("GLY", "A", "2", 6.0)
    text = f"MODEL        1\n{one}ENDMDL\nMODEL        2\n{two}ENDMDL\n"
    path = write(tmp_path / "nmr.pdb", text)
    assert read_backbone(path).notes == ("model 1 of 2",)
    assert read_backbone(path, model=2).coordinates[1, 0, 0] == 6.0
    with pytest.raises(ValueError, match="no model 3; there are 2"):
        read_backbone(path, model=3)
    both = residue("SER", "A", "2", 4.0, altloc="A", occ=0.4)
    both += residue("TRP", "A", "2", 4.0, altloc="B", occ=0.6)
    text = residue("ALA", "A", "1", 0.0) + both + residue("ALA", "A", "3", 8.0)
    backbone = read_backbone(write(tmp_path / "hetero.pdb", text))
    assert backbone.text(backbone.tokens) == "AWA"


def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, odd):
    water = write(tmp_path / "water.pdb", residue("HOH", "A", "1", 0.0, atoms="O"))
    with pytest.raises(ValueError, match="no protein in this file"):
        read_backbone(water)
    bare = "".join(residue("ALA", "A", str(i), 4.0 * i, atoms="CA") for i in range(1, 9))
    with pytest.raises(ValueError, match="fewer than 2 residues have all of N, CA, C, O"):
        read_backbone(write(tmp_path / "ca.pdb", bare))
    with pytest.raises(ValueError, match="9 residues, more than 5"):
        read_backbone(odd, max_residues=5)
    with pytest.raises(ValueError, match=r"structures come as \.pdb"):
        read_backbone(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="no such file"):
        read_backbone(tmp_path / "none.pdb")
    (tmp_path / "broken.cif").write_text("data_x\nloop_\n_atom_site.id\n'")
    with pytest.raises(ValueError, match="cannot be read as a structure"):
        read_backbone(tmp_path / "broken.cif")


def test_a_chain_of_ten_thousand_residues(tmp_path):
    rows = [residue("ALA", "A", str(i), 0.5 * i) for i in range(1, 10_000)]
    path = write(tmp_path / "long.pdb", "".join(rows) + residue("GLY", "B", "1", 0.0))
    backbone = read_backbone(path)
    assert len(backbone) == 10_000 and backbone.residues[9998] == 9998
    assert read_backbone(path, design="A:9990-9999").design.sum() == 10
    path.write_text(path.read_text().replace("END\n", "") + residue("ALA", "B", "2", 3.0))
    with pytest.raises(ValueError, match="10001 residues, more than 10000"):
        read_backbone(path)


def test_a_folder_sets_broken_files_aside_but_not_too_many(tmp_path):
    for i in range(20):
        (tmp_path / f"s{i:02}.pdb").write_text(FILE.read_text())
    for i in range(20, 40):
        (tmp_path / f"s{i:02}.ent").write_text(FILE.read_text())
    (tmp_path / "s07.ent").write_text(FILE.read_text())
    (tmp_path / "bad.pdb").write_text(residue("HOH", "A", "1", 0.0, atoms="O"))
    found = read_backbones(tmp_path)
    assert [b.name for b in found.backbones] == [f"s{i:02}" for i in range(40)]
    assert found.quarantine == (
        ("bad.pdb", "there is no protein in this file"),
        ("s07.pdb", "another file is called s07"),
    )
    (tmp_path / "worse.pdb").write_text("nothing")
    with pytest.raises(ValueError, match=r"3 of 43 structures cannot be used .*bad\.pdb"):
        read_backbones(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no structures there"):
        read_backbones(tmp_path / "empty")


def test_a_batch_shows_padding_as_unknown_and_keeps_what_is_fixed(odd):
    short, long = read_backbone(odd, design="A:1-2,A:7"), read_backbone(FILE)
    batch = BackboneBatch.of([short, long])
    assert batch.tokens.shape == (2, 68) and (batch.tokens[0, 9:] == UNKNOWN).all()
    assert batch.valid.sum(1).tolist() == [8, 68]
    assert (batch.start[1] == MASK_ID).all()
    assert (batch.start[0] == MASK_ID).nonzero()[:, 0].tolist() == [0, 1, 4]
    assert batch.known.sum(1).tolist() == [2, 68]  # X is designed, not learned
    twice = batch.rows([1, 1, 0])
    assert torch.equal(twice.tokens[0], long.tokens) and len(twice.tokens) == 3
    assert short.text(batch.start[0]) == "--MS-A/WSA"
    with pytest.raises(ValueError, match="8 letters for 9 residues"):
        short.encode("ACDEFGHI")
    assert len(LETTERS) == 21


def test_without_gemmi_one_sentence_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(ImportError, match=r"pip install 'diffdiv\[bio\]'"):
        read_backbone(FILE)
