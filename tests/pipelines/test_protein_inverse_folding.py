"""The pipeline that travels with an export reads what the library reads, keeps what is fixed."""

import importlib.util
import sys
from pathlib import Path

import gemmi
import pytest
import torch

from diffdiv.data.backbones import MASK_ID
from diffdiv.data.structures import read_backbone
from diffdiv.models.protein_networks import ProteinTokenNet

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "tests" / "data" / "6mrr_backbone.pdb"


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "pipelines" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


folding = load("protein_inverse_folding")
scheduling = load("scheduling_masked")


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    net = ProteinTokenNet(width=16, encoder_depth=1, decoder_depth=1, neighbours=8).eval()
    scheduler = scheduling.MaskedDiffusionScheduler(mask_token_id=MASK_ID)
    made = folding.ProteinInverseFoldingPipeline(net, scheduler, num_inference_steps=6)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def odd(tmp_path):
    """6MRR with a second chain, MSE, a phosphoserine, a gap, a hole, and other conformers."""
    structure = gemmi.read_structure(str(REAL))
    model = structure[0]
    second = model["A"].clone()
    second.name = "B"
    for residue in second:
        for atom in residue:
            atom.pos = gemmi.Position(atom.pos.x + 40, atom.pos.y, atom.pos.z)
    model.add_chain(second)
    chain = model["A"]
    chain[4].name, chain[6].name = "MSE", "SEP"
    chain[8].remove_atom("O", "\0", gemmi.Element("O"))
    chain[10].seqid = gemmi.SeqId(10, "A")
    del chain[20:23]
    for atom in chain[12]:
        other = atom.clone()
        atom.altloc, atom.occ, other.altloc, other.occ = "A", 0.3, "B", 0.7
        other.pos = gemmi.Position(other.pos.x + 1, other.pos.y, other.pos.z)
        chain[12].add_atom(other)
    structure.setup_entities()
    path = tmp_path / "odd.cif"
    structure.make_mmcif_document().write_file(str(path))
    return path


@pytest.mark.parametrize("design", [None, "A", "A:2-8,A:10A,B:5-8", "B:-3"])
def test_it_reads_what_the_library_reads(odd, design):
    ours, theirs = read_backbone(odd), folding.Residues.read(odd)
    assert theirs.letters == ours.text(ours.tokens).replace("/", "")
    assert theirs.letters.count("X") == 1 and theirs.letters[4] == "M"
    assert torch.equal(theirs.chains, ours.chains) and torch.equal(theirs.places, ours.residues)
    assert torch.equal(theirs.valid, ~ours.missing) and not theirs.valid.all()
    there = ours.coordinates[~ours.missing]
    assert torch.equal(theirs.coordinates[theirs.valid], there)
    if design == "B:-3":
        for read in (lambda: ours.with_design(design), lambda: theirs.positions(design)):
            with pytest.raises(ValueError, match="no such residues"):
                read()
    else:
        assert torch.equal(theirs.positions(design), ours.with_design(design).design)


def test_designs_keep_what_is_fixed_and_follow_their_generator(pipe, odd):
    backbone = read_backbone(odd, design="A:2-5,B:10-20")
    native = backbone.text(backbone.tokens)

    def designs(**more):
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return pipe(odd, design="A:2-5,B:10-20", num_designs=3, generator=generators, **more)

    found, again = designs(), designs()
    assert found.texts == again.texts and len(set(found.texts)) == 3
    fixed = [i for i, c in enumerate(native.replace("/", "")) if not backbone.design[i]]
    for text in found.texts:
        assert text.index("/") == native.index("/")
        plain = text.replace("/", "")
        assert all(plain[i] == native.replace("/", "")[i] for i in fixed)
        assert "X" not in "".join(plain[i] for i in range(len(plain)) if backbone.design[i])
    assert found.fasta.split()[::2] == [">odd-0", ">odd-1", ">odd-2"]
    alone = pipe(odd, design="A:2-5,B:10-20", generator=[torch.Generator().manual_seed(1)]).texts
    assert alone == found.texts[1:2]


def test_coordinates_do_as_well_as_a_file(pipe):
    backbone = read_backbone(REAL)
    seed = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    by_file = pipe(REAL, num_designs=2, generator=seed(), output_type="seq", return_dict=False)
    by_numbers = pipe(
        backbone.coordinates, num_designs=2, generator=seed(), output_type="seq", return_dict=False
    )
    assert torch.equal(by_file[0], by_numbers[0]) and by_file[0].shape == (2, 68)
    chosen = torch.zeros(68, dtype=torch.bool)
    chosen[10:20] = True
    letters = backbone.text(backbone.tokens)
    kept = pipe(backbone.coordinates, design=chosen, letters=letters).texts[0]
    assert kept[:10] + kept[20:] == letters[:10] + letters[20:] and len(kept) == 68


def test_the_backbone_is_encoded_once(pipe, monkeypatch):
    calls = []
    encode = pipe.denoiser.encode
    monkeypatch.setattr(pipe.denoiser, "encode", lambda *a: calls.append(1) or encode(*a))
    pipe(REAL, num_designs=2, num_inference_steps=5)
    assert len(calls) == 1


def test_steps_can_be_watched_and_changed(pipe):
    seen = []

    def watch(_, i, timestep, tensors):
        seen.append((i, timestep, int((tensors["sequences"] == MASK_ID).sum())))
        return {"sequences": torch.zeros_like(tensors["sequences"])} if i == 3 else {}

    found = pipe(REAL, num_inference_steps=4, callback_on_step_end=watch)
    assert [s[:2] for s in seen] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert seen[0][2] > seen[2][2] > seen[3][2] == 0 and set(found.texts[0]) == {"A"}


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"backbone": torch.zeros(3, 4)}, r"is not \[length, 4, 3\]"),
        ({"backbone": torch.zeros(3, 4, 3), "letters": "AC"}, "3 residues, .* 2 letters"),
        ({"backbone": torch.zeros(2, 4, 3), "letters": "A?"}, "are not among"),
        ({"backbone": REAL, "letters": "AC"}, "belong to coordinates"),
        ({"backbone": REAL, "design": "C"}, "no chain 'C'"),
        ({"backbone": REAL, "design": "A:7-99"}, "no such residues"),
        ({"backbone": REAL, "num_designs": 0}, "not positive"),
        ({"backbone": REAL, "output_type": "pil"}, "not one of text, seq"),
        ({"backbone": REAL, "num_designs": 2, "generator": [torch.Generator()]}, "1 given for 2"),
    ],
)
def test_what_cannot_be_is_refused(pipe, call, word):
    with pytest.raises(ValueError, match=word):
        pipe(**call)
