"""The hacking diagnostics of a real, short run on the embedded world."""

import json
import math

import pytest
import torch

from diffdiv import api
from diffdiv.core.noise import normal
from diffdiv.evaluate_alignment import HELD_OUT, evaluate_alignment
from diffdiv.metrics.judge import load_judge
from diffdiv.resources import resource
from diffdiv.rewards.zoo import open_image_rewards
from diffdiv.runtime.reward_config import RewardConfig
from diffdiv.runtime.student import open_run

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_every_sign_stands_beside_that_of_the_start(tmp_path, adapter):
    teacher = resource("assets/embedded_sd")
    values = {
        "run.folder": tmp_path, "run.steps": 3, "run.batch_size": 8, "run.sample_every": None,
        "run.save_every": None, "run.trackers": [], "student.path": teacher, "student.lr": 1e-3,
        "optimizer.warmup_steps": 0, "rewards.judge.scale": 1.0, "optimizer.decay_fraction": 0.0,
    }  # fmt: skip
    text = resource("configs/demo/di_star.yaml").read_text(encoding="utf-8")
    if adapter:
        text = text.replace("fake_lora: null", "fake_lora: {rank: 4, alpha: 4}")
    (tmp_path / "demo.yaml").write_text(text, encoding="utf-8")
    api.train(tmp_path / "demo.yaml", values)
    opened = open_run(tmp_path, CPU)
    settings = RewardConfig(path=resource("assets/embedded_judge"), colour="red")
    rewards = open_image_rewards({"judge": settings}, CPU)
    found = evaluate_alignment(tmp_path, opened, rewards, num=24, seed=0)
    assert json.loads((tmp_path / "alignment.json").read_text()) == found

    rows = {row["name"]: row for row in found["findings"]}
    wanted = {"judge", "second judge, held out", "judge under JPEG", "judge under blur"}
    wanted |= {"prompt: own less exchanged prompts", "distance within a prompt", "saturation"}
    assert wanted <= rows.keys() and all(row["help"] for row in found["findings"])
    assert all(math.isfinite(row["before"] + row["after"]) for row in rows.values())
    assert rows["judge"]["after"] > rows["judge"]["before"]  # a strong reward, and three steps
    assert rows["prompt: own less exchanged prompts"]["before"] > 10  # nats: prompts are obeyed

    # the second judge's figure, by hand: log p(red) where the prompt names no colour
    indices = [HELD_OUT + i for i in range(24)]
    z = normal((4, 8, 8), seed=0, purpose="alignment", indices=range(24))
    with torch.no_grad():
        images = opened.source.decode(opened.untrained(z, opened.source.conditions(indices)))
        log_p = load_judge(resource("assets/embedded_second_judge"))(images)["colour"]
    names = ("red", "green", "blue", "yellow", "purple", "cyan")
    is_open = [
        not any(n in text.split() for n in names) for text in opened.source.captions(indices)
    ]
    value = (log_p.log_softmax(1)[:, 0] * torch.tensor(is_open)).mean()
    assert rows["second judge, held out"]["before"] == pytest.approx(float(value), abs=1e-4)

    times = [row["t"] for row in found["times"]]
    assert times == sorted(times) and len(times) == 5 and times[0] > 0
    assert all(min(row.values()) > 0 for row in found["times"])
    # a harder guess the more noise there is
    assert found["times"][0]["fake_loss"] < found["times"][-1]["fake_loss"]
