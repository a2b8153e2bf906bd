"""Exports of protein models: loaded with our own code only, sampled into FASTA with scores."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import gemmi
import pytest
import torch

import diffdiv
from diffdiv import cli, generate
from diffdiv.data.structures import read_backbone
from diffdiv.export_proteins import export_protein_design
from diffdiv.models.protein_networks import ProteinTokenNet
from diffdiv.rewards.protein import StabilityNet
from diffdiv.sample_options import check_options

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / "tests" / "data" / "6mrr_backbone.pdb"
DNA = ROOT / "assets" / "embedded_dna"
SIZES = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "neighbours": 8}
CODE = [
    "protein_inverse_folding.py", "denoiser/protein_networks.py", "scheduler/scheduling_masked.py"
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An untrained network, oracles, a table, and 6MRR twice, a residue of it without backbone."""
    folder = tmp_path_factory.mktemp("designs")
    torch.manual_seed(0)
    net = ProteinTokenNet(**SIZES)
    export_protein_design(
        net, net.state_dict(), folder / "protein", num_steps=6, title="small", facts={}
    )
    for name in ("finetune", "evaluation"):
        StabilityNet(**SIZES, scale=300.0).save_pretrained(folder / "oracle" / name)
    rows = "".join(f"A,{i},{k},{i / 8}\n" for i in (9, 10, 11) for k in "KEDRA")
    (folder / "e.csv").write_text("chain,position,amino_acid,value\n" + rows)
    (folder / "images").mkdir()
    (folder / "images" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    structure = gemmi.read_structure(str(REAL))
    second = structure[0]["A"].clone()
    second.name = "B"
    for residue in second:
        for atom in residue:
            atom.pos = gemmi.Position(atom.pos.x + 40, atom.pos.y, atom.pos.z)
    structure[0].add_chain(second)
    structure[0]["A"][3].remove_atom("O", "\0", gemmi.Element("O"))
    structure.write_pdb(str(folder / "pair.pdb"))
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["diffdiv", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as error:
        return error.code or 0
    return 0


def records(path):
    lines = path.read_text().splitlines()
    return lines[::2], lines[1::2]


def test_load_gives_the_exported_network(files):
    pipe = diffdiv.load(files / "protein")
    assert type(pipe).__name__ == "ProteinInverseFoldingPipeline"
    torch.manual_seed(0)
    ours, theirs = ProteinTokenNet(**SIZES).state_dict(), pipe.denoiser.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("file", CODE)
def test_code_that_is_not_ours_is_never_run(files, tmp_path, file):
    export = shutil.copytree(files / "protein", tmp_path / "protein")
    with (export / file).open("a") as code:
        code.write(f"from pathlib import Path\nPath({str(tmp_path / 'trap')!r}).touch()\n")
    with pytest.raises(ValueError, match="brings code that does not ship"):
        diffdiv.load(export)
    with pytest.raises(ValueError, match="brings code that does not ship"):
        generate.sample_path(export, [], 1, 0, tmp_path / "out", structure=REAL)
    assert not (tmp_path / "trap").exists()
    assert not (tmp_path / "out").exists()


def test_files_that_lack_are_taken_from_here(files, tmp_path):
    export = shutil.copytree(files / "protein", tmp_path / "protein")
    for file in CODE:
        (export / file).unlink()
    assert len(diffdiv.load(export)(REAL).texts[0]) == 68


def test_designs_are_the_pipelines_own_and_scored(files, tmp_path, monkeypatch, capsys):
    """Two chains, a residue that keeps its letter because an atom lacks; from a run folder."""
    folder, design = tmp_path / "run", "A:9-12,B"
    shutil.copytree(files / "protein", folder / "export")
    (folder / "config.yaml").write_text("recipe: drakes\n")
    flags = ["--structure", files / "pair.pdb", "--design", design, "--num", 3, "--seed", 5]
    flags += ["--reward", files / "e.csv", "--out", tmp_path / "out"]
    assert run(monkeypatch, "sample", folder, *flags) == 0
    file = tmp_path / "out" / "pair.fa"
    assert capsys.readouterr().out.split() == [str(file)]
    titles, texts = records(file)
    pipe = diffdiv.load(files / "protein")
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    stock = pipe(files / "pair.pdb", design=design, num_designs=3, generator=generators)
    assert texts == stock.texts and len(set(texts)) == 3
    native = read_backbone(REAL)
    letters = native.text(native.tokens)
    assert {text[:8] + text[12:69] for text in texts} == {letters[:8] + letters[12:] + "/"}
    found = [title.rpartition(" energies=") for title in titles]
    assert [name for name, _, _ in found] == [">pair-0", ">pair-1", ">pair-2"]
    expected = [sum((i + 1) / 8 for i in (8, 9, 10) if text[i] in "KEDRA") for text in texts]
    assert [float(score) for _, _, score in found] == pytest.approx(expected, rel=1e-5)


def test_a_design_is_a_function_of_its_seed_alone(files, tmp_path, monkeypatch):
    monkeypatch.setattr("diffdiv.generate_designs._RESIDUES_AT_ONCE", 2 * 68)
    path, oracle = files / "protein", str(files / "oracle")
    (many,) = generate.sample_path(path, [], 5, 3, tmp_path, oracle, structure=REAL)
    titles, texts = records(many)
    (one,) = generate.sample_path(path, [], 1, 7, tmp_path / "one", oracle, structure=REAL)
    names, again = records(one)
    assert again == texts[4:] and len(set(texts)) == 5
    assert again == diffdiv.load(path)(REAL, generator=torch.Generator().manual_seed(7)).texts
    assert names[0].removeprefix(">6mrr_backbone-0") == titles[4].removeprefix(">6mrr_backbone-4")
    # the oracle itself, without the library around it
    backbone, net = read_backbone(REAL), StabilityNet.from_pretrained(Path(oracle) / "finetune")
    facts = (backbone.coordinates, backbone.chains, backbone.residues, ~backbone.missing)
    with torch.no_grad():
        code = net.eval().encode(*(fact[None] for fact in facts))
        told = net(torch.stack([backbone.encode(text) for text in texts]), code)
    header = re.compile(r">6mrr_backbone-\d stability-finetune=(\S+) stability-evaluation=(\S+)")
    scores = [[float(value) for value in header.fullmatch(t).groups()] for t in titles]
    assert [a for a, _ in scores] == pytest.approx(told.tolist(), rel=1e-4)
    assert all(a != b for a, b in scores)


STRUCTURE = ["--structure", REAL]


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        ("protein", [], "structure: none given, and .*protein designs proteins"),
        ("protein", ["--design", "A"], "design: 'A' names positions of a structure, and none"),
        ("protein", ["--prompt", "ACDE", *STRUCTURE], "prompts: .* takes none"),
        ("protein", ["--reward", "dna_world", *STRUCTURE], "'dna_world' is not a CSV of energies"),
        (DNA, STRUCTURE, "structure: .* is for proteins; .* makes DNA sequences"),
        (DNA, ["--design", "A"], "design: 'A' names positions of a structure, and none"),
        (DNA, ["--reward", "{oracle}"], "reward: .*oracle' scores proteins; .* makes DNA"),
        ("images", STRUCTURE, "structure: .* is for proteins; .* makes images"),
        ("images", ["--reward", "dna_world"], "'dna_world' scores sequences, and this .* images"),
        ("oracle", STRUCTURE, "oracle: no model_index.json there"),
    ],
)
def test_wrong_combinations_are_one_sentence(
    files, tmp_path, monkeypatch, capsys, path, more, words
):
    """Told by the light module: what would load a pipeline is not reached."""
    monkeypatch.setattr(generate, "sample_path", lambda *_, **__: pytest.fail("too late"))
    more = [str(item).format(oracle=files / "oracle") for item in more]
    assert run(monkeypatch, "sample", files / path, *more, "--out", tmp_path / "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(words, lines[0])
    assert not (tmp_path / "out").exists()


def test_without_gemmi_the_sentence_says_what_to_install(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(ValueError, match=r"read by gemmi: pip install 'diffdiv\[bio\]'"):
        check_options(files / "protein", [], None, REAL, None)


def test_python_callers_get_the_same_sentences(files, tmp_path):
    with pytest.raises(ValueError, match="structure: none given"):
        generate.sample_path(files / "protein", [], 1, 0, tmp_path)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"design": "C:1-4"}, "no chain 'C'"),
        ({"reward": "bad.csv"}, r"line 2: there is no 6mrr_backbone A:900 K"),
    ],
)
def test_the_structure_and_the_table_are_read_before_the_weights(
    files, tmp_path, monkeypatch, more, words
):
    (tmp_path / "bad.csv").write_text("chain,position,amino_acid,value\nA,900,K,1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_pipeline", lambda _: pytest.fail("too late"))
    with pytest.raises(ValueError, match=words):
        generate.sample_path(files / "protein", [], 1, 0, tmp_path, structure=REAL, **more)


def test_a_mistake_is_told_without_torch(files):
    arguments = ["diffdiv", "sample", str(DNA), "--structure", str(REAL)]
    code = (
        f"import sys; sys.argv = {arguments!r}\nfrom diffdiv.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'diffusers', 'gemmi'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "1 []\n" and found.stderr.startswith("error: structure: ")
