"""The wheel: complete, alone at the top level, and working from any folder."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import diffdiv

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds the wheel; its dependencies are borrowed from this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    # As a line of a .pth file the folder comes last, and its own .pth files (an editable diffdiv)
    # are not read.
    borrowed = Path(found.stdout.strip()) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(installed / "bin" / "diffdiv"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_only_diffdiv_at_the_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "diffdiv",
        f"diffdiv-{diffdiv.__version__}.dist-info",
    }
    expected = [path for folder in ("train", "configs", "pipelines") for path in walk(folder)]
    missing = [path for path in expected if f"diffdiv/_bundled/{path}" not in names]
    assert expected and not missing
    for name in ("py.typed", "templates/report.html.j2", "_bundled/assets/README.md"):
        assert f"diffdiv/{name}" in names
    assert not [name for name in names if "__pycache__" in name]


def walk(folder: str) -> list[str]:
    files = (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml"))
    return sorted(str(path.relative_to(ROOT)) for path in files)


def test_it_is_the_installed_one_that_runs(installed: Path, tmp_path: Path) -> None:
    code = "import diffdiv, sys; print(diffdiv.__file__)"
    python = str(installed / "bin" / "python")
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(installed)
    (site,) = installed.glob("lib/python*/site-packages")
    for name in ("train", "pipelines", "tests", "configs", "assets", "benchmarks"):
        assert not (site / name).exists()


def test_commands_from_another_folder(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path, "list")
    assert listed.returncode == 0, listed.stderr
    assert "configs/demo/f_distill.yaml" in listed.stdout
    dry = run(installed, tmp_path, "train", "configs/demo/f_distill.yaml", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert str(installed) in dry.stdout  # the bundled teacher
    wrong = run(installed, tmp_path, "train", "configs/demo/f_distill.yaml", "run.stps=3")
    assert wrong.returncode == 2 and "did you mean 'steps'?" in wrong.stderr
    copied = run(installed, tmp_path, "copy", "f_distill", "mine")
    assert copied.returncode == 0 and (tmp_path / "mine" / "f_distill.py").is_file()
    assert not (tmp_path / "runs").exists()
