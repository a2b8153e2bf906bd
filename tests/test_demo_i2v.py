"""`diffdiv demo i2v`: its page on two denoisers at hand, and (slow) what it reaches."""

import base64
import io
import json
import re

import pytest
import torch
from PIL import Image
from rich.console import Console

from diffdiv.core.schedule import from_diffusers
from diffdiv.data.moving_digits import MovingDigits, strip_world
from diffdiv.demo_i2v import CURED, IDEAL, LEAKS, NOISED, REAL, cure_leakage, leakage_table, sampled
from diffdiv.demo_i2v_report import filmstrip, write_page
from diffdiv.metrics.moving_digits import Trial
from diffdiv.models.clip_net import clip_scheduler


def picture(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_a_filmstrip_shows_every_frame_once_still_and_moving() -> None:
    clips = torch.full((2, 6, 16), -1.0)
    clips[0, torch.arange(6), torch.arange(6)] = 1.0  # moves one cell a frame
    still, moving = (picture(address) for address in filmstrip(clips))
    cell = still.height // 6
    assert still.width == 2 * 16 * cell + 5 and moving.size == still.size
    for frame in range(6):
        assert still.getpixel((frame * cell + 1, frame * cell + 1)) == 255
        assert still.getpixel(((frame + 1) * cell + 1, frame * cell + 1)) == 0
        moving.seek(frame)
        row = [moving.convert("L").getpixel((x * cell + 1, still.height // 2)) for x in range(16)]
        assert row[frame] > 250 and sum(row) < 300
    assert moving.n_frames == 6


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Page and evaluation with the ideal denoiser in the place of both models."""
    data = MovingDigits(strip_world(), num_pairs=64, seed=0)
    trial = Trial.of(data, from_diffusers(clip_scheduler()), num_images=6, seeds=5)
    models = {LEAKS: trial.bayes, CURED: trial.bayes}
    rows = sampled(trial, models, {"a remedy": trial.bayes})
    leakage = trial.leakage(models, [900.0, 700.0], draws=1)
    card = {"n": 30, "samples_per_image": 5, "resize": "none", "versions": {"torch": "2"}}
    page = tmp_path_factory.mktemp("page") / "report.html"
    columns = dict.fromkeys(rows[0].figures, "what it says")
    write_page(page, trial, rows, leakage, columns=columns, card=card)
    evaluation = {
        "rows": [{"name": r.name, "network_evaluations": 25, "metrics": r.figures} for r in rows],
        "card": card,
    }
    return page.read_text(encoding="utf-8"), evaluation


def test_the_page_stands_alone(shown) -> None:
    page, _ = shown
    assert not re.search(r'(src|href|srcset)="(?!data:)', page) and "<script" not in page
    assert "prefers-reduced-motion" in page and "More motion is not better motion" in page
    for address in re.findall(r'(?:src|srcset)="(data:[^"]+)"', page):
        picture(address).verify()
    assert "none" not in re.findall(r"<dd>(.*?)</dd>", page)
    assert all(name in page for name in (REAL, IDEAL, LEAKS, CURED))
    assert len(re.findall("<img", page)) == len(re.findall(r'<img[^>]* alt="[^"]', page))


def test_the_table_fits_a_terminal_of_80_columns(shown) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(leakage_table(shown[1]))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in capture.get()
    assert sum(name in line for line in lines for name in (IDEAL, LEAKS, CURED)) == 3


@pytest.mark.slow
def test_the_leak_and_its_cure(tmp_path) -> None:
    """The bounds of the project's plan, on one seed, as a newcomer runs it."""
    said: list[str] = []
    evaluation = cure_leakage(tmp_path, said.append)
    figures = {row["name"]: row["metrics"] for row in evaluation["rows"]}
    leaks, cured, real = figures[LEAKS], figures[CURED], figures[REAL]
    rows = json.loads((tmp_path / "leakage.json").read_text())
    over = {(r["model"], r["set"]): r["over_bayes"] for r in rows if r["t"] == 900}
    assert over[LEAKS, "seen"] < 0.3 and over[LEAKS, "unseen"] > 1.5
    assert over[CURED, "unseen"] <= 1.25
    assert cured["image_law_distance"] <= real["image_law_distance"] + 0.1
    noised = figures[NOISED]
    assert noised["image_law_distance"] <= real["image_law_distance"] + 0.1
    assert noised["frechet_distance"] <= 0.6 * leaks["frechet_distance"]
    assert leaks["image_law_distance"] > real["image_law_distance"] + 0.25
    assert cured["frechet_distance"] <= 0.6 * leaks["frechet_distance"]
    assert said and (tmp_path / "report.html").stat().st_size > 100_000
