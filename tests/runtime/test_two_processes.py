"""Two gloo processes: the same result as one, the same decisions on both."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy_recipe
from processes import CODE
from test_run import config_for, content, difference, trained

from diffdiv.runtime.config import dump_yaml

TOY = str(Path(toy_recipe.__file__))
# name: values, processes
CASES = {
    "double": {"double": True},
    "float": {},
    "accumulated": {"double": True, "accumulation": 2},
    "early": {"double": True, "early": True},
    "global": {"double": True, "normaliser": "global"},
    "local": {"double": True, "normaliser": "local"},
    "nan": {"fault": "nan", "log_every": 1},
}
SHARDED = {"double": True, "sharding": "fsdp2"}
CASES |= {
    "sharded": SHARDED,
    "sharded, accumulated": SHARDED | {"accumulation": 2},
    "sharded, early": SHARDED | {"early": True},
    "sharded, continued": SHARDED,  # from the state of one process
    "sharded, fp16": {"precision": "fp16", "sharding": "fsdp2"},
    "sharded, nan": {"fault": "nan", "log_every": 1, "sharding": "fsdp2"},
}


def launched(log, *argv, **environment):
    """The toy in two processes; what they print goes to ``log``."""
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-c", CODE, TOY, *map(str, argv)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=output,
            stderr=output,
        )


def case(folder, **values):
    return config_for(folder, batch_size=8, steps=12, **values)


def configured(folder, **values):
    """A config file, as the launcher reads it."""
    config = config_for(folder, **values).model_dump(mode="json")
    dump_yaml({"recipe": "toy", **config}, folder.with_suffix(".yaml"))
    return folder.with_suffix(".yaml")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    cases = [case(folder / name, **values) for name, values in CASES.items()]
    trained(folder / "sharded, continued", batch_size=8, steps=4, double=True)
    (folder / "cases.json").write_text(json.dumps([c.model_dump(mode="json") for c in cases]))
    process = launched(folder / "log", "--cases", folder / "cases.json")
    assert process.wait(timeout=120) == 0, (folder / "log").read_text()
    return folder


def apart(two, name, tmp_path):
    """Distance of the results of two processes and of one, relative to the movement."""
    config = case(tmp_path / "one", **CASES[name])
    run = toy_recipe.make(config)
    start = {key: net.module.state_dict() for key, net in run.networks.items()}
    start = {f"{key}/{n}": v.clone() for key, net in start.items() for n, v in net.items()}
    toy_recipe.train(run, config)
    one, both = content(tmp_path / "one")[0], content(two / name)[0]

    def norm(a, b):
        return torch.stack([(a[key].double() - b[key].double()).norm() for key in start]).norm()

    return float(norm(one, both) / norm(one, start))


@pytest.mark.parametrize(
    ("name", "bound"),
    [("double", 1e-13), ("float", 1e-5)]
    + [(name, 1e-13) for name in ("accumulated", "early", "global")]
    + [(name, 1e-13) for name in ("sharded", "sharded, accumulated", "sharded, early")]
    + [("sharded, continued", 1e-13)]
    + [("sharded, fp16", 1e-3)],
)
def test_two_processes_end_where_one_ends(two, tmp_path, name, bound):
    assert apart(two, name, tmp_path) < bound


def test_control_a_normaliser_per_rank_shows(two, tmp_path):
    assert apart(two, "local", tmp_path) > 1e-6


def test_metrics_of_two_processes_are_those_of_one(two, tmp_path):
    apart(two, "double", tmp_path)
    ours, theirs = content(tmp_path / "one")[1], content(two / "double")[1]
    for line, other in zip(ours, theirs, strict=True):
        assert line == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("name", ["nan", "sharded, nan"])
def test_not_finite_on_one_rank_stops_both_before_any_change(two, name):
    for rank in (0, 1):
        raised = json.loads((two / name / f"raised-{rank}.json").read_text())
        assert (
            "fake update 4, student_step 1: the loss of rank 1 is not finite" in raised["message"]
        )
        assert not raised["changed"] and raised["updates"]["fake"] == 4
    assert (two / name / "events.jsonl").is_file()


@pytest.mark.slow
def test_interrupted_pair_continues_bit_for_bit(tmp_path):
    shape, log = {"batch_size": 4, "steps": 300, "log_every": 50}, tmp_path / "log"
    whole = launched(log, configured(tmp_path / "whole", **shape))
    assert whole.wait(timeout=120) == 0, log.read_text()
    pair = launched(log, config := configured(tmp_path / "parts", **shape))
    while not (tmp_path / "parts" / "metrics.jsonl").exists():
        assert pair.poll() is None, log.read_text()
        time.sleep(0.05)
    pair.send_signal(signal.SIGTERM)
    assert pair.wait(timeout=60) == 75, log.read_text()
    again = launched(log, config)
    assert again.wait(timeout=120) == 0, log.read_text()
    events = (tmp_path / "parts" / "events.jsonl").read_text()
    assert "interrupted" in events and "resume" in events
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert whole[0].keys() == parts[0].keys() and whole[1] == parts[1]
    assert all(torch.equal(whole[0][key], parts[0][key]) for key in whole[0])


def assert_ended_and_named(pair, run, log):
    """Within a minute of the other rank's last sign of life."""
    assert pair.wait(timeout=120) in (1, 137), log.read_text()
    sign = json.loads((run / "heartbeats" / "rank-1.json").read_text())
    assert time.time() - sign["time"] < 60
    events = (run / "events.jsonl").read_text()
    message = json.loads(events.splitlines()[0])["message"]
    assert "in fake update 4, student_step 1" in message and "rank-" in message, events


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die", "raise", "hang"])
def test_dead_rank_ends_the_run_and_is_named(tmp_path, fault):
    log, run = tmp_path / "log", tmp_path / "run"
    pair = launched(log, configured(run, batch_size=4, steps=50), TOY_FAULT=fault)
    assert_ended_and_named(pair, run, log)


@pytest.mark.slow
def test_sharded_pair_that_was_killed_continues_bit_for_bit(two, tmp_path):
    log, run = tmp_path / "log", tmp_path / "run"
    config = configured(run, batch_size=8, steps=12, save_every=1, **SHARDED)
    assert_ended_and_named(launched(log, config, TOY_FAULT="die"), run, log)
    again = launched(log, config)
    assert again.wait(timeout=120) == 0, log.read_text()
    assert "resume" in (run / "events.jsonl").read_text()
    whole, parts = content(two / "sharded"), content(run)
    assert difference(whole[0], parts[0]) == 0 and whole[1] == parts[1]


@pytest.mark.slow
def test_two_machines_hold_the_weights_once_each(tmp_path):
    """Four processes, told that a machine has two of them."""
    log, run = tmp_path / "log", tmp_path / "run"
    config = configured(run, batch_size=8, steps=12, **SHARDED)
    four = launched(log, config, PROCESSES="4", TOY_LOCAL_WORLD_SIZE="2")
    assert four.wait(timeout=120) == 0, log.read_text()
    assert "machines=2, processes=2" in log.read_text()
    trained(tmp_path / "one", batch_size=8, steps=12, double=True)
    assert difference(content(run)[0], content(tmp_path / "one")[0]) < 1e-13


def accelerate_launch(config, *options):
    """The toy under `accelerate launch`: exit status and what it said."""
    plain = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    program = [sys.executable, "-m", "accelerate.commands.launch", *plain, *options]
    done = subprocess.run(
        [*program, TOY, str(config)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.slow
def test_accelerate_launches_it(two, tmp_path):
    config = configured(tmp_path / "run", batch_size=8, steps=12, **SHARDED)
    status, said = accelerate_launch(config, "--cpu")
    assert status == 0, said
    # its environment (threads, affinity) is another: equal to rounding only
    assert difference(content(two / "sharded")[0], content(tmp_path / "run")[0]) < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "megatron_lm"])
def test_what_ties_accelerate_to_one_network_is_refused(tmp_path, kind):
    """DeepSpeed must be installed to be launched; its flag is tested in test_run.py."""
    status, said = accelerate_launch(configured(tmp_path / "run"), f"--use_{kind}")
    assert status == 1
    assert f"error: several networks that take turns cannot train under {kind.upper()}" in said
