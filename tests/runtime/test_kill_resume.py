"""A run that is killed again and again ends where the uninterrupted one ends."""

import json
import multiprocessing
import random
import time

import pytest
import toy_recipe
from test_run import config_for, content, difference

from diffdiv.runtime.checkpoint import newest_valid

KILLS = 20


@pytest.mark.slow
def test_killed_at_random_instants(tmp_path):
    # the server imports torch once; every run is forked from it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_recipe", "diffdiv.runtime.run", "diffdiv.core.noise"])
    shape = {"steps": 120, "save_every": 1, "keep_states": 1, "batch_size": 2}

    def start(folder):
        values = config_for(folder, **shape).model_dump(mode="json")
        process = context.Process(target=toy_recipe.slow_saving, args=(values,))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    draw, inside, alive, saved = random.Random(0), 0, 0, []
    folder = tmp_path / "killed"
    for _ in range(KILLS):
        process = start(folder)
        known = newest_valid(folder)
        while process.is_alive() and newest_valid(folder) == known:  # it has resumed and saved
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        alive += process.is_alive()
        process.kill()
        process.join()
        inside += any((folder / "state").glob(".tmp-*"))
        saved.append(newest_valid(folder).name)
    last = start(folder)
    for process in (whole, last):
        process.join()
        assert process.exitcode == 0
    assert alive >= KILLS // 2 and inside >= 3, (alive, inside, saved)
    assert saved == sorted(saved)
    a, b = content(tmp_path / "whole"), content(folder)
    assert difference(a[0], b[0]) == 0 and a[1] == b[1] and len(b[1]) == 60
    events = [json.loads(x)["kind"] for x in (folder / "events.jsonl").read_text().splitlines()]
    assert set(events) == {"resume"}
    assert len(list((folder / "state").iterdir())) == 1
