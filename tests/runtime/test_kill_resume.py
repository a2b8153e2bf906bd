"""f-distill itself, killed again and again, ends bit for bit where the uninterrupted run ends.

The controls show that the comparison fails when any part of the state is not restored.
"""

import json
import multiprocessing
import random
import shutil
import signal
from collections import Counter
from itertools import chain, cycle

import pytest
from builders import tiny_unet2d
from diffusers import EDMEulerScheduler
from real_recipe import CRITIC, CYCLE, PRELOAD, items, train, watched
from test_run import content

from diffdiv.objectives.f_distill import RatioStatistics
from diffdiv.runtime.checkpoint import newest_valid
from diffdiv.runtime.run import Run

STEPS = 100
# How long after the instant that a kill aims at it comes, in seconds.
DELAYS = {"start": 1.0, "any": 0.3, "save": 0.05, "critic": 0.02}
AIMS = ["start"] * 2 + ["any"] * 10 + ["save"] * 4 + ["critic"] * 4
PARTS = {
    "student", "student.ema-20", "student.ema-200", "student.optimizer", "fake", "fake.optimizer",
    "disc", "disc.optimizer", "attached.ratio", "ranks",
}  # fmt: skip
LOGGED = {
    "fake/loss", "disc/loss", "disc/accuracy", "ratio/log_r_mean", "ratio/weight_max",
    "student/gan_loss", "student/gan_gradient_norm", "student/vsd_gradient_norm",
    "grad_norm/student", "grad_norm/fake", "grad_norm/disc", "lr/student",
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return tiny_unet2d(folder, EDMEulerScheduler(sigma_max=10.0), num_classes=10)


def counters(state):
    """Updates and skips of every network, and whatever else a state knows but times and paths."""
    values = json.loads((state / "state.json").read_bytes())
    return {key: value for key, value in values.items() if key not in ("config", "seconds")}


def differing(a, b):
    """What differs in the newest states and the logs of two runs: tensors in any bit."""
    (tensors_a, lines_a), (tensors_b, lines_b) = content(a), content(b)
    assert {name.partition("/")[0] for name in tensors_a} == PARTS
    assert all(line.keys() > LOGGED and None not in line.values() for line in lines_a)
    names = {
        name
        for name in tensors_a.keys() | tensors_b.keys()
        if bits(tensors_a.get(name)) != bits(tensors_b.get(name))
    }
    if lines_a != lines_b:
        names.add("metrics.jsonl")
    if counters(newest_valid(a)) != counters(newest_valid(b)):
        names.add("state.json")
    return names


def bits(tensor):
    return tensor if tensor is None else (tensor.dtype, tensor.shape, tensor.numpy().tobytes())


def events(folder, kind):
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line["message"] for line in lines if line["kind"] == kind]


def leftovers(folder):
    """What unfinished saves have left."""
    return set((folder / "state").glob(".tmp-*"))


def in_critic_phase(updates):
    """Whether at least one update of the phase is made and at least one is not."""
    return updates > 0 and 0 < updates % CYCLE < 2 * CRITIC


class Processes:
    """Runs in processes forked from a server that imports torch once."""

    def __init__(self, teacher):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.teacher = teacher

    def start(self, folder, save_every, **more):
        """The process, and the number of updates it has made so far (-1 before the first)."""
        overrides = items(
            folder, self.teacher, f"run.steps={STEPS}", f"run.save_every={save_every}",
            "run.keep_states=1",
        )  # fmt: skip
        updates = self.context.RawArray("l", [-1])
        process = self.context.Process(
            target=watched, args=(overrides, updates), kwargs=more, daemon=True
        )
        process.start()
        return process, updates

    def kill(self, folder, after, aim, draw):
        """Kill a run by SIGKILL after so many updates; returns in what it was hit."""
        before = leftovers(folder)
        process, updates = self.start(folder, 1, slow=0.005)

        def is_near():
            there = {"critic": in_critic_phase(updates[0]), "save": leftovers(folder) - before}
            return aim == "start" or (updates[0] >= after and there.get(aim, True))

        while process.is_alive() and not is_near():
            process.join(0.002)
        process.join(draw.uniform(0, DELAYS[aim]))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended by itself"
        if leftovers(folder) - before:
            return "save"
        return "critic" if in_critic_phase(updates[0]) else "start" if updates[0] < 0 else "any"

    def stop_in_a_critic_phase(self, folder, draw):
        """Tell a run to stop by SIGTERM, so that its state holds an unfinished critic phase."""
        process, _ = self.start(folder, 1, stop_after=draw.randrange(1, CRITIC))
        process.join()
        assert process.exitcode == 75
        networks = counters(newest_valid(folder))["networks"]
        assert networks["fake"]["updates"] % CRITIC != 0


@pytest.mark.slow
def test_killed_at_random_instants(teacher, tmp_path):
    processes, draw, hit, saved = Processes(teacher), random.Random(0), Counter(), []
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    uninterrupted, _ = processes.start(whole, "null")
    instants = sorted(draw.randrange(STEPS * CYCLE * 85 // 100) for _ in AIMS)
    aims = draw.sample(AIMS, len(AIMS))
    # twenty kills, more if too few of them hit what they aimed at
    for after, aim in chain(zip(instants, aims, strict=True), cycle([(0, "save"), (0, "critic")])):
        if hit.total() >= len(AIMS) and min(hit["save"], hit["critic"]) >= 3:
            break
        hit[processes.kill(folder, after, aim, draw)] += 1
        if hit.total() % 3 == 0:
            processes.stop_in_a_critic_phase(folder, draw)
        if state := newest_valid(folder):
            saved.append(state.name)
    last, _ = processes.start(folder, 1)
    for process in (uninterrupted, last):
        process.join()
        assert process.exitcode == 0
    assert saved == sorted(saved)
    resumed = events(folder, "resume")
    assert sum("-u" in message for message in resumed) >= len(AIMS) // 3, (hit, resumed)
    assert not events(folder, "damaged")
    assert differing(whole, folder) == set()
    assert len(content(folder)[1]) == STEPS // 2
    assert len(list((folder / "state").iterdir())) == 1


SHORT = ("run.steps=6", "run.save_every=1")


@pytest.fixture(scope="module")
def short(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    train(items(folder, teacher, *SHORT))
    return folder


@pytest.fixture(scope="module")
def stopped(teacher, tmp_path_factory):
    """A run with four of six steps and one of three critic updates of the fifth."""
    folder, update = tmp_path_factory.mktemp("stopped"), Run.update

    def stopping(run, name, loss):
        update(run, name, loss)
        if name == "fake" and run.updates["fake"] == 4 * CRITIC + 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "update", stopping)
        train(items(folder, teacher, *SHORT))
    return folder


EVERYTHING = PARTS - {"ranks"} | {"metrics.jsonl"}  # ranks: random states, which stay equal


@pytest.mark.parametrize(
    ("forgotten", "wanted"),
    [
        ("nothing", set()),
        ("student optimizer", EVERYTHING),
        ("fake optimizer", EVERYTHING),
        ("disc optimizer", EVERYTHING),
        ("averages", {"student.ema-20", "student.ema-200"}),
        ("ratio statistics", EVERYTHING),
        ("phase, repeated", EVERYTHING | {"state.json"}),
        ("phase, skipped", EVERYTHING | {"state.json"}),
    ],
)
def test_control_what_is_not_restored_shows(
    teacher, short, stopped, tmp_path, monkeypatch, forgotten, wanted
):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    assert "-u" in newest_valid(tmp_path).name, "the state lies in a critic phase"
    restore = Run.restore

    def forgetting(run):
        averages = {
            half: {name: value.clone() for name, value in ema.weights.items()}
            for half, ema in run.networks["student"].ema.items()
        }
        assert restore(run)
        match forgotten.split():
            case network, "optimizer":
                run.networks[network].optimizer.state.clear()
            case ["averages"]:
                for half, ema in run.networks["student"].ema.items():
                    ema.load(averages[half])
            case "phase,", how:  # of the three updates one was made
                run.networks["fake"].updates += {"repeated": -1, "skipped": 2}[how]

    monkeypatch.setattr(Run, "restore", forgetting)
    if forgotten == "ratio statistics":
        monkeypatch.setattr(RatioStatistics, "load_state_dict", lambda ratio, state: None)
    train(items(tmp_path, teacher, *SHORT))
    assert {name.partition("/")[0] for name in differing(short, tmp_path)} == wanted
