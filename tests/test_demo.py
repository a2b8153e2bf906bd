"""The demos, as a newcomer runs them, reach what the README says (slow: minutes each)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from diffdiv.demo import SYSTEMS, results_table, run_demo

DIFFDIV = Path(sys.executable).with_name("diffdiv")


def demo(system, folder):
    done = subprocess.run(
        [DIFFDIV, "demo", system, "--out", folder / "run"],
        capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("report", "export", "from diffusers import", "student, 1 step"):
        assert word in done.stdout
    assert (folder / "run" / "report.html").stat().st_size > 50_000
    rows = json.loads((folder / "run" / "evaluation.json").read_text())["rows"]
    return rows[0]["metrics"], rows[1]["metrics"], rows[2]["metrics"]


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory):
    return demo("f-distill", tmp_path_factory.mktemp("demo"))


@pytest.mark.slow
@pytest.mark.xfail(reason="the aim; 1.13 to 1.21 times reached: docs/f_distill.md", strict=False)
def test_the_student_is_as_near_to_real_images_as_its_teacher(text_to_image):
    teacher, _, student = text_to_image
    assert student["frechet_judge"] <= teacher["frechet_judge"]


@pytest.mark.slow
def test_text_to_image(text_to_image):
    teacher, before, student = text_to_image
    # A guard against regressions, not the aim (above).
    assert student["frechet_judge"] <= 1.25 * teacher["frechet_judge"]
    assert student["frechet_judge"] < before["frechet_judge"]
    assert student["digit"] >= 0.95
    assert min(student[name] for name in ("colour", "background", "stroke")) >= 0.97


@pytest.mark.slow
def test_digits(tmp_path):
    teacher, _, student = demo("digits", tmp_path)
    assert student["frechet_judge"] <= 1.5 * teacher["frechet_judge"]
    assert student["digit"] >= 0.97


def test_an_unknown_demo_is_refused():
    with pytest.raises(
        ValueError, match=r"'sdxl' is not one of f-distill, digits, tiue, di-star, drakes, i2v"
    ):
        run_demo("sdxl", None)
    assert set(SYSTEMS) == {"f-distill", "digits", "tiue", "di-star", "drakes", "i2v"}


def test_the_table_fits_a_terminal_of_80_columns():
    names = ["teacher, 20 DDIM steps, guidance 1.5", "teacher's weights, 1 step", "student, 1 step"]
    metrics = {"frechet_judge": 1.664, "digit": 0.984, "background": 1.0}
    rows = [{"name": name, "network_evaluations": 40, "metrics": metrics} for name in names]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(results_table({"rows": rows, "card": {"n": 500}}))
    text = capture.get()
    for word in ("student, 1 step", "frechet_judge", "background", "1.664", "0.984"):
        assert word in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
