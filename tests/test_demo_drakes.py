"""The DRAKES demo: what it shows is right, and it can be stopped and started again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from diffdiv import demo_drakes_figures as figures
from diffdiv import demo_drakes_laws as laws
from diffdiv.data.dna_world import dna_world, world_motifs
from diffdiv.data.motifs import MotifScan
from diffdiv.data.sequences import decode, encode
from diffdiv.rewards.dna_world import read_front, score, world_reward
from diffdiv.sequence_figures import information

DIFFDIV = Path(sys.executable).with_name("diffdiv")


def test_best_windows_are_those_of_a_search_letter_by_letter():
    word = world_motifs()[0]
    tokens = torch.randint(0, 4, (5, 30), generator=torch.Generator().manual_seed(0))
    table, width = word.probabilities.log().tolist(), len(word.probabilities)
    for found, row in zip(
        figures.best_windows(word, tokens).tolist(), tokens.tolist(), strict=True
    ):
        strands = [row, [3 - letter for letter in reversed(row)]]
        windows = [s[i : i + width] for s in strands for i in range(30 - width + 1)]
        values = [sum(p[t] for p, t in zip(table, w, strict=True)) for w in windows]
        assert sum(p[t] for p, t in zip(table, found, strict=True)) == pytest.approx(max(values))
        assert found in windows


def test_sites_are_marked_where_they_were_planted():
    letters = "C" * 20 + "GTTAATGATTAAC" + "G" * 20 + "TGTGCCA" + "CAAAGTCCA" + "C" * 10
    backwards = encode([letters]).flip(1).mul(-1).add(3)
    for tokens, words in (
        (encode([letters]), ["GTTAATGATTAAC", "CAAAGTCCA"]),
        (backwards, ["TGGACTTTG", "GTTAATCATTAAC"]),
    ):
        (text,) = figures.marked_texts(tokens)
        assert "".join(part for part, _ in text.parts) == decode(tokens)[0]
        assert [part for part, name in text.parts if name] == words
    assert text.head == f"reward {float(score(world_reward(), tokens)):.2f}"


def test_marked_letters_are_those_of_the_scan():
    tokens = dna_world().sample(range(20), seed=3)
    scan = MotifScan(world_motifs(), pseudo=0.0)
    sites = int(scan.counts(tokens, threshold=figures.SITE).sum())
    marked = [part for text in figures.marked_texts(tokens) for part in text.parts if part[1]]
    assert 0.5 * sites <= len(marked) <= sites


def test_information_of_logos():
    places = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]])
    entropy = -(0.7 * np.log2(0.7) + 0.3 * np.log2(0.1))
    np.testing.assert_allclose(information(places), [2, 1, 0, 2 - entropy], atol=1e-12)


def law(name, **changes):
    tokens = dna_world().sample(range(64), seed=1)
    return laws.Law(**{"name": name, "tokens": tokens, "kl": 0.0, "kl_error": 0.0, "calls": 20,
                       "cpu_seconds": 90.0} | changes)  # fmt: skip


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    found = [law("pretrained"), law("policy gradient, alpha 0.3", kl=19.3), law("x", kl=0.5)]
    return folder, laws.judge(folder, found, shown="x")


def test_samples_of_the_world_lie_on_its_front_and_have_no_excess(judged):
    row = judged[1]["rows"][0]["metrics"]
    front = read_front().rows[0]
    assert row["below_front"] == pytest.approx(front.reward - row["reward"])
    assert abs(row["below_front"]) < 4 * row["reward_error"]
    assert abs(row["excess_bits"]) < 0.1
    assert row["three_mer"] > 0.9 and row["distinct"] == 1


def test_beyond_the_table_a_bound_stands_for_the_front(judged):
    row, front = judged[1]["rows"][1]["metrics"], read_front()
    assert row["path_kl"] > front.rows[-1].kl
    assert row["below_front"] == pytest.approx(front.bound_at(19.3) - row["reward"])


def test_the_summary_names_who_is_nearest(judged):
    rows = judged[1]["rows"]
    assert "Nearest to the exact front is x: " in laws.summary(rows, "x")
    assert "at 0.50 nats" in laws.summary(rows, "x")


def test_the_table_fits_a_terminal_of_80_columns(judged):
    console = Console(width=80)
    with console.capture() as capture:
        console.print(laws.front_table(judged[1]))
    text = capture.get()
    for word in ("policy gradient, alpha 0.3", "19.30", "reward", "twin", "excess", "CPU s"):
        assert word in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_laws_are_sampled_once(tmp_path, monkeypatch):
    monkeypatch.setattr(laws, "POOL", 16)
    monkeypatch.setattr(laws, "PARTICLES", 4)
    found = laws.sampled_laws(tmp_path, 2)
    assert [len(each.tokens) for each in found] == [16, 4, 1, 16, 16]
    assert found[1].kl == pytest.approx(torch.tensor(4.0).log().item() - 0.75)
    best = score(world_reward(), found[0].tokens).view(4, 4).amax(1)
    assert torch.equal(score(world_reward(), found[1].tokens), best)
    monkeypatch.setattr(laws, "_sample_all", None)
    for a, b in zip(found, laws.sampled_laws(tmp_path, 2), strict=True):
        assert torch.equal(a.tokens, b.tokens) and a.kl == b.kl and a.cpu_seconds == b.cpu_seconds


SMALL = """
import sys
from pathlib import Path
from diffdiv import demo, demo_drakes as runs, demo_drakes_laws as laws
laws.POOL, laws.PARTICLES = 32, 8
items = ("run.steps=6", "run.save_every=1", "run.log_every=1", "run.sample_every=null",
         "run.batch_size=4", "run.accumulation=1", "objective.num_steps=3", "objective.num_soft=2",
         "num_evaluated=16", "run.trackers=[]")
runs.TRAINED = tuple(
    method._replace(items=(*items, f"objective.alpha={i}"))
    for i, method in enumerate(runs.TRAINED[:2])
)
demo.run_demo("drakes", Path(sys.argv[1]))
"""


def small(folder):
    return subprocess.Popen(
        [sys.executable, "-c", SMALL, folder], text=True, cwd=folder.parent,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
def test_told_to_stop_it_goes_on_where_it_was_and_finished_it_only_reports(tmp_path):
    run = tmp_path / "run"
    process = small(run)
    while not list(run.glob("state/step-*/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 75, said
    left = [p for p in run.rglob("log.txt") if "policy_step 6/6" in p.read_text()]
    again = small(run)
    said = again.communicate(timeout=600)[0]
    assert again.returncode == 0, said
    assert "resume" in (run / "events.jsonl").read_text() or run / "log.txt" in left
    for words in ("Reward against KL", "predictions as in training", "DRAKES, alpha 0.1"):
        assert words in said
    report = (run / "report.html").read_text()
    assert "exact front of the world" in report and "sites a sequence" in report
    logs = {path: path.stat().st_mtime_ns for path in run.rglob("log.txt")}
    assert len(logs) == 2
    third = small(run)
    said = third.communicate(timeout=600)[0]
    assert third.returncode == 0 and "trained in" not in said, said
    assert logs == {path: path.stat().st_mtime_ns for path in run.rglob("log.txt")}


@pytest.mark.nightly
def test_as_a_newcomer_runs_it(tmp_path):
    """Held-out reward and twin rise together; nobody passes the front; no KL means no brake."""
    done = subprocess.run(
        [DIFFDIV, "demo", "drakes", "--out", tmp_path / "run"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    found = {row["name"]: row["metrics"] for row in rows}
    first, ours = found["pretrained"], found["DRAKES, alpha 0.05"]
    for key in ("reward", "twin"):
        assert ours[key] > first[key] + 5 * ours[f"{key}_error"]
    assert found["DRAKES, alpha 0.1"]["path_kl"] < 0.5 * ours["path_kl"]
    assert ours["path_kl"] < 0.5 * found["DRAKES without KL"]["path_kl"]
    assert all(row["below_front"] > -3 * row["reward_error"] for row in found.values())
