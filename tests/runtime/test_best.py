"""The best state of a run, kept as a run folder of its own."""

import json

import toy_recipe
from test_run import config_for

from diffdiv.runtime.best import KeepBest
from diffdiv.runtime.checkpoint import load_weights, newest_valid


def test_only_the_best_state_is_kept(tmp_path):
    config = config_for(tmp_path / "run", batch_size=4, steps=2)
    run = toy_recipe.make(config)
    best, folder = KeepBest(run, "score"), tmp_path / "run/best"
    run.attach("best", best)
    with run:
        best.observe(1.5)
        best.keep()
        first = newest_valid(folder)
        assert first is not None and first.name == "step-00000000"
        assert json.loads((folder / "best.json").read_text()) == {"score": 1.5, "step": 0}
        inodes = [(path / "state.json").stat().st_ino for path in (first, run.save())]
        assert inodes[0] == inodes[1]  # linked, not copied
        best.keep()  # once more, as after a restore: nothing changes
        best.observe(1.0)
        assert float(best.state_dict()["best"]) == 1.5
    name = next(iter(run.networks))
    weights = load_weights(folder, name)
    assert weights.keys() == run.networks[name].module.state_dict().keys()
    again = KeepBest(run, "score")
    again.load_state_dict(best.state_dict())
    again.observe(1.2)
    assert float(again.state_dict()["best"]) == 1.5 and int(again.state_dict()["step"]) == 0
    assert [path.name for path in (folder / "state").iterdir()] == ["step-00000000"]
