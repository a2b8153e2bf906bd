"""The report: one file, nothing fetched, nothing of the run interpreted, every picture drawn."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from diffdiv.curves import panels
from diffdiv.report import write_report

HOSTILE = "<script>alert(1)</script><img src=http://host/x.png>{{ 7 * 191 }}"


def make_run(folder: Path, *, offset: float = 0.0) -> Path:
    """A run folder as training leaves it, with a torn last line and hostile texts."""
    for name in ("samples", "export", "state/step-00000300"):
        (folder / name).mkdir(parents=True)
    lines = [
        {
            "student_step": 10 * i,
            "images_seen": 320 * i,
            "seconds": 2.0 * i,
            "loss/student": 1 / i + offset,
            "grad_norm/student": 10.0 ** (i % 4),
            "ratio/log_r": -0.1 * i,
            "h/max": float("nan") if i == 3 else 2.0,
            "lr/student": 1e-5,
        }
        for i in range(1, 31)
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"student_st'
    (folder / "metrics.jsonl").write_text(text)
    event = {"time": "2026-01-01T00:00:00+00:00", "kind": "skip", "message": HOSTILE}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    (folder / "config.yaml").write_text(
        f"recipe: f_distill\nnote: '{HOSTILE}'\nhub_token: hf_abcdefghijklmnop\n"
    )
    for i, name in enumerate(["teacher", "step-00000000", "step-00000100", "step-00000300"]):
        Image.new("RGB", (64, 32), (80 * i, 10, 200)).save(folder / "samples" / f"{name}.png")
    captions = {"prompts": [HOSTILE, "a red seven"], "rows": 1, "columns": 2}
    (folder / "samples" / "captions.json").write_text(json.dumps(captions))
    manifest = {"step": 300, "versions": {"torch": "2.15.0"}, "threads": 1, "files": {"secret": 1}}
    (folder / "state" / "step-00000300" / "manifest.json").write_text(json.dumps(manifest))
    scores = [("teacher, 20 steps", 40, 1.93, 0.95), ("student, step 0", 1, 61.2, 0.13)]
    scores.append(("student, step 300", 1, 3.07 + offset, 0.97))
    rows = [
        {
            "name": name,
            "network_evaluations": calls,
            "metrics": {"frechet_judge": distance, "digit_accuracy": accuracy},
        }
        for name, calls, distance, accuracy in scores
    ]
    rows.insert(0, {"name": "held-out images", "metrics": {"frechet_judge": 0.5}})
    card = {"n": 1000, "features": "embedded judge, not Inception", "weights_sha256": "ab" * 32}
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows, "card": card}))
    finding = {"name": f"judge under JPEG {HOSTILE}", "before": -5.76, "after": -0.1315}
    alignment = {
        "findings": [finding | {"help": HOSTILE}],
        "times": [
            {"t": t, "regulariser": 0.0412, "fake_loss": loss, "reference_loss": 0.03}
            for t, loss in ((100.0, 0.02), (900.0, 0.04))
        ],
        "card": {"n": 200, "seed": 0},
    }
    (folder / "alignment.json").write_text(json.dumps(alignment))
    return folder


def make_sequence_run(folder: Path) -> Path:
    """What train/drakes.py leaves, and the figures of the demo, with hostile names."""
    (folder / "samples").mkdir(parents=True)
    (folder / "export").mkdir()
    (folder / "export" / "export.json").write_text('{"call": {"num_inference_steps": 20}}')
    (folder / "config.yaml").write_text("recipe: drakes\n")
    rows = [
        {
            "name": name,
            "network_evaluations": 20,
            "metrics": {
                "reward": 1.25 + kl, "reward_error": 0.046, "twin": 0.5 + kl / 2, "path_kl": kl,
                "path_kl_error": kl / 10, "distinct": 1.0,
            },
        }
        for name, kl in [("reference", 0.0), ("policy", 2.0)]
    ]  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows, "card": {"n": 256}}))
    for name in ("reference", "policy"):
        text = "".join(f">s-{i} reward={i} {HOSTILE}\n{'ACGT' * 25}\n" for i in range(9))
        (folder / "samples" / f"{name}.fa").write_text(text)
    place = [0.7, 0.1, 0.1, 0.1]
    stacks = [{"name": f"{HOSTILE} 1.25 sites", "places": [place] * 14}] * 3
    parts = [["ACGT" * 25, None], ["TATA", "HNF1"]]
    drawn = {
        "lines": [{"name": HOSTILE, "values": {"kl": [0, 1, 90], "reward": [1, 3, 5]}}],
        "motifs": [{"name": HOSTILE, "stacks": stacks}, {"name": "HNF1", "stacks": stacks}],
        "texts": {"pretrained": [{"head": HOSTILE, "parts": parts}]},
        "note": HOSTILE,
    }  # fmt: skip
    (folder / "sequences.json").write_text(json.dumps(drawn))
    return folder


class Reader(HTMLParser):
    """Collects tags with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path) -> tuple[str, Reader]:
    text = write_report([make_run(tmp_path / "run")], tmp_path / "r.html").read_text("utf-8")
    return text, Reader(text)


def test_self_contained(page: tuple[str, Reader]) -> None:
    text, reader = page
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:image/png;base64,", "#")), value[:50]
    policy = [a["content"] for tag, a in reader.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(set(ids)) >= len(ids) / 2  # equal tick marks may share, their drawings are equal


def test_hostile_text_is_text(page: tuple[str, Reader]) -> None:
    text, reader = page
    assert HOSTILE in reader.text  # shown, letter by letter
    assert HOSTILE not in text
    assert html.escape("<script>") in text and "1337" not in text
    assert "hf_abcdefghijklmnop" not in text


def test_what_it_says(page: tuple[str, Reader]) -> None:
    _, reader = page
    said = " ".join(reader.text.split())
    assert "student 3.07 in 1 network evaluation, teacher 1.93 in 40 network evaluations" in said
    assert "1.93 (best)" in said and "0.97 (best)" in said and said.count("(best)") == 2
    assert "↓ lower is better" in said and "↑ higher is better" in said
    assert "embedded judge, not Inception" in said and "torch 2.15.0" in said
    assert "DiffusionPipeline.from_pretrained" in said and "recipe: f_distill" in said
    assert "Not in the run folder" not in said
    images = [a for tag, a in reader.tags if tag == "img"]
    assert [a["alt"] for a in images] == [
        f"grid of samples: {which}" for which in ("teacher", "student, step 0", "student, step 300")
    ]
    drawn = [a for tag, a in reader.tags if tag == "svg"]
    assert len(drawn) == 5 and all(a["role"] == "img" and a["aria-label"] for a in drawn)


def test_curves() -> None:
    lines = [{"step": i, "loss/a": 10.0**i, "n": "text", "flag": i} for i in range(1, 5)]
    found = panels([lines, [{"step": 1, "loss/a": 3.0}]], "step", ["flag"])
    assert list(found) == ["Losses"] and [panel.name for panel in found["Losses"]] == ["loss/a"]
    words = found["Losses"][0].words
    assert words == "from 10 to 1e+04; from 3 to 3, log axis"
    flat = panels([[{"step": i, "x": 1.0} for i in range(1000)]], "step", [])
    assert flat["Other quantities"][0].words == "from 1 to 1, means of 4 lines"
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", found["Losses"][0].svg)


def test_runs_that_lack_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    said = Reader(write_report([empty], tmp_path / "a.html").read_text("utf-8")).text
    for name in ("config.yaml", "metrics.jsonl", "evaluation.json", "samples/", "export/"):
        assert name in said
    broken = make_run(tmp_path / "broken")
    (broken / "samples" / "teacher.png").write_bytes(b"\x89PNG no")
    (broken / "evaluation.json").write_text('{"rows": [3, {"metrics": null}], "card": []}')
    (broken / "samples" / "captions.json").write_text("[")
    (broken / "events.jsonl").write_text("3\n{}\n")
    reader = Reader(write_report([broken], tmp_path / "b.html").read_text("utf-8"))
    assert len([tag for tag, _ in reader.tags if tag == "img"]) == 2
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        write_report([tmp_path / "absent"], tmp_path / "c.html")


@pytest.mark.parametrize(
    ("facts", "call"),
    [
        ({}, 'pipe("a prompt", guidance_scale=0, num_inference_steps=1)'),
        ({"classes": 10}, "pipe(class_labels=0, num_inference_steps=1)"),
        ({"classes": None}, "pipe(num_inference_steps=1)"),
    ],
)
def test_usage_is_a_call_the_export_accepts(facts: dict, call: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "export" / "export.json").write_text(json.dumps({"t_init": 1, **facts}))
    said = Reader(write_report([run], tmp_path / "r.html").read_text("utf-8")).text
    assert call in said and ("trust_remote_code=True" in said) == ("classes" in facts)
    assert "diffdiv export" not in said


def test_sequences(tmp_path: Path) -> None:
    run = make_sequence_run(tmp_path / "run")
    text = write_report([run], tmp_path / "r.html").read_text("utf-8")
    reader, said = Reader(text), " ".join(Reader(text).text.split())
    wanted = "reward 1.25 to 3.25; its twin, never trained on, 0.5 to 1.5, at a path KL of 2 nats."
    assert f"From reference to policy: {wanted}" in said
    assert "3.25 ± 0.046" in said and "reward error" not in said
    assert "(best)" not in said  # reward has a price: the highest is not the best
    figures = [a["aria-label"] or "" for tag, a in reader.tags if tag == "svg"]
    assert figures[0] == "reward against path KL: reference 1.25 at 0 nats; policy 3.25 at 2 nats"
    assert figures[1].startswith("twin against path KL") and len(figures) == 4
    assert [a for tag, a in reader.tags if tag == "mark" and a.get("title") == "HNF1"]
    assert "NNNNTTTACNNNN" in said and "student" not in said
    assert HOSTILE in reader.text and HOSTILE not in text and "<script>" not in text
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "img"}


def test_fronts_of_several_runs_say_whose_points_they_are(tmp_path: Path) -> None:
    runs = [make_sequence_run(tmp_path / name) for name in ("first", "second")]
    reader = Reader(write_report(runs, tmp_path / "r.html").read_text("utf-8"))
    labels = [a.get("aria-label") or "" for _, a in reader.tags]
    told = next(label for label in labels if "path KL" in label)
    assert "first: policy 3.25 at 2 nats" in told and "second: reference 1.25 at 0 nats" in told


def test_sequences_without_the_demos_figures(tmp_path: Path) -> None:
    run = make_sequence_run(tmp_path / "run")
    (run / "sequences.json").write_text('{"motifs": [{"name": "x", "stacks": [[2, 0, 0, 0]]}]}')
    reader = Reader(write_report([run], tmp_path / "r.html").read_text("utf-8"))
    assert "reference, the first 6" in reader.text and "ACGTACGT" in reader.text
    assert HOSTILE in reader.text and "s-5 reward=5" in reader.text and "s-6" not in reader.text
    assert len([tag for tag, _ in reader.tags if tag == "svg"]) == 2
    (run / "samples" / "policy.fa").write_bytes(b"\xff>x\nACGT\n")
    (run / "samples" / "reference.fa").write_text(">a\nAC<b>\n>b\n")
    said = Reader(write_report([run], tmp_path / "r.html").read_text("utf-8")).text
    assert "the first" not in said and "samples/" in said


def test_comparison(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", offset=-2.0)]
    reader = Reader(write_report(runs, tmp_path / "sub" / "r.html").read_text("utf-8"))
    said = " ".join(reader.text.split())
    assert "Comparison of 2 runs" in said
    assert "1.07 (best)" in said and "1.93 (best)" not in said
    assert "from 1 to 0.03333; from -1 to -1.967" in said


PROBE = """<script>onload = () => {
  const frame = document.querySelector("iframe").contentDocument, root = frame.documentElement;
  document.documentElement.dataset.result = JSON.stringify({
    width: root.clientWidth, needed: root.scrollWidth, images: frame.images.length,
    drawn: [...frame.images].filter((i) => i.complete && i.naturalWidth > 0).length,
    shown: [...frame.querySelectorAll("figure svg")].filter((s) => s.clientHeight > 40).length,
  });
}</script>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser(width: int, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", offset=1.0)]
    runs.append(make_sequence_run(tmp_path / "third"))
    report = write_report(runs, tmp_path / "r.html")
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
    chromium += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]

    plain = subprocess.run(
        [*chromium, "--dump-dom", report.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in plain.stderr

    # The page itself runs no script, so one around it looks into it, through a frame.
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{{}}"></iframe>'
    probe = tmp_path / "probe.html"
    inside = html.escape(report.read_text("utf-8"))
    probe.write_text(f"<!DOCTYPE html>{frame.format(inside)}{PROBE}", encoding="utf-8")
    looked = subprocess.run(
        [*chromium, "--window-size=1400,1000", "--dump-dom", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'data-result="([^"]*)"', looked.stdout)
    assert found is not None
    result = json.loads(html.unescape(found.group(1)))
    assert width - 20 <= result["width"] <= width
    assert result["needed"] <= result["width"]
    assert result["images"] == result["drawn"] == 6
    assert result["shown"] >= 8


def test_signs_of_hacking_are_shown_with_their_reading(tmp_path: Path) -> None:
    text = html.unescape(
        write_report([make_run(tmp_path / "run")], tmp_path / "r.html").read_text()
    )
    section = text[text.index("Was the reward hacked?") : text.index("<h2>Samples")]
    assert "-5.76" in section and "-0.1315" in section and "n 200" in section
    rows = re.findall(r"<td>(\d+)</td>.*?>(has followed|lags)<", section)
    assert rows == [("100", "has followed"), ("900", "lags")]
    (tmp_path / "run" / "alignment.json").write_text("{torn")
    again = write_report([tmp_path / "run"], tmp_path / "r.html").read_text()
    assert "Was the reward hacked?" not in again
