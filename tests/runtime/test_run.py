"""The training loop: resuming, faults, learning rates, averages, what is written."""

import json
import math
import os
import signal

import pytest
import torch
import toy_recipe
from toy_recipe import RecipeConfig

from diffdiv.runtime.checkpoint import CheckpointError, newest_valid, read_tensors
from diffdiv.runtime.config import OptimizerConfig, dump_yaml
from diffdiv.runtime.launch import launch
from diffdiv.runtime.network import learning_rate_factor
from diffdiv.runtime.run import Run

TIMES = ("seconds", "images_per_second", "memory")


def config_for(folder, **values):
    run = {"folder": folder, "batch_size": 4, "steps": 6, "log_every": 2, "trackers": []}
    other = {key: values.pop(key) for key in list(values) if key in RecipeConfig.model_fields}
    return RecipeConfig.model_validate({"run": run | {"device": "cpu"} | values, **other})


def trained(folder, *, after_turn=None, **values):
    run = toy_recipe.make(config := config_for(folder, **values))
    toy_recipe.train(run, config, after_turn=after_turn)
    return run


def content(folder):
    """All tensors of the newest state, and the metrics without times."""
    state = newest_valid(folder)
    tensors = {
        f"{file.stem}/{name}": value
        for file in sorted(state.glob("*.safetensors"))
        for name, value in read_tensors(state, file.stem).items()
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def difference(a, b):
    """Largest difference between two states; NaN where they hold other tensors."""
    if a.keys() != b.keys():
        return math.nan
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel())


def stop_at(number, kind=signal.SIGTERM):
    """A callback that sends this process a signal after so many turns."""
    turns = iter(range(10**6))

    def after_turn(run):
        if next(turns) == number:
            os.kill(os.getpid(), kind)

    return after_turn


def interrupted(folder, turns, **values):
    with pytest.raises(SystemExit) as caught:
        trained(folder, after_turn=stop_at(turns), **values)
    assert caught.value.code == 75


@pytest.mark.parametrize("turns", [0, 5, 11, 14])
def test_interrupted_run_continues_bit_for_bit(tmp_path, turns):
    trained(tmp_path / "whole")
    interrupted(tmp_path / "parts", turns)
    middle = newest_valid(tmp_path / "parts")
    run = trained(tmp_path / "parts")
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert difference(whole[0], parts[0]) == 0
    assert whole[1] == parts[1] and len(whole[1]) == 3
    # 4 turns a step, and the turn after the signal is completed: 5 and 14 stop between critics
    assert ("-u" in middle.name) == (turns % 4 != 2)
    assert run.updates == {"student": 6, "fake": 18, "disc": 18}
    kinds = [json.loads(x)["kind"] for x in (run.folder / "events.jsonl").read_text().splitlines()]
    assert kinds == ["interrupted", "resume"]


@pytest.mark.parametrize("forgotten", ["optimizer", "ema", "phase"])
def test_control_a_part_of_the_state_that_is_not_restored_shows(tmp_path, forgotten):
    trained(tmp_path / "whole")
    interrupted(tmp_path / "parts", 18)  # late: averages forget in time
    run = toy_recipe.make(config := config_for(tmp_path / "parts"))
    net = run.networks["student"]
    if forgotten == "optimizer":
        net.optimizer.state.clear()
    elif forgotten == "ema":
        for ema in net.ema.values():
            ema.load({name: torch.zeros_like(value) for name, value in ema.weights.items()})
    else:
        run.networks["fake"].updates -= 1
    toy_recipe.train(run, config)
    moved = difference(content(tmp_path / "whole")[0], content(tmp_path / "parts")[0])
    assert not moved < 1e-4


def test_learning_rate_is_linear_in_warmup_and_tail():
    shape = OptimizerConfig(warmup_steps=4, decay_fraction=0.5)
    factors = [
        learning_rate_factor(shape, updates=k, progress=k / 10) for k in range(10)
    ]  # 10 steps: 4 of warm-up, 5 of decay
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert learning_rate_factor(OptimizerConfig(), updates=0, progress=0.99) == 1


def test_average_and_clip_agree_with_hand_computation(tmp_path):
    config = config_for(tmp_path, steps=1, batch_size=4)
    run = Run(config.run, main="net", resolved={})
    net = torch.nn.Linear(1, 1, bias=False).double()
    start = net.weight.detach().clone()
    shape = OptimizerConfig(weight_decay=0.0, clip=1e-9)
    run.add("net", net, lr=0.1, optimizer=shape, ema_half_lives=(8,))
    with run, run.turn("net"):
        for indices in run.micro_batches("net"):
            assert indices == [0, 1, 2, 3] and net.weight.requires_grad
            run.update("net", 5 * net(torch.ones(4, 1, dtype=torch.float64)).mean())
    # one AdamW step is lr g / (|g| + 1e-8): the gradient is 5, clipped to 1e-9 (less 1e-6 / 5)
    clipped = 5 * 1e-9 / (5 + 1e-6)
    assert (start - net.weight).item() == pytest.approx(0.1 * clipped / (clipped + 1e-8), rel=1e-6)
    decay = 0.5 ** (4 / min(8, 4 / 5))  # the ramp-up: a fifth of the 4 images seen
    wanted = decay * start + (1 - decay) * net.weight
    assert torch.allclose(run.ema_weights("net", 8)["weight"], wanted, rtol=0, atol=1e-15)
    assert net.weight.grad is None


def test_turn_trains_only_its_networks(tmp_path):
    run = toy_recipe.make(config_for(tmp_path))
    with run.turn("fake"):
        flags = {name: net.module[0].weight.requires_grad for name, net in run.networks.items()
                 if name != "disc"}  # fmt: skip
        assert flags == {"student": False, "fake": True}
        with pytest.raises(ValueError, match="belongs in its turn"):
            run.update("student", torch.zeros(()))
        with pytest.raises(ValueError, match="nested"), run.turn("disc"):
            pass


def test_accumulation_does_not_change_the_result(tmp_path):
    for name, accumulation in (("one", 1), ("eight", 8)):
        trained(tmp_path / name, batch_size=8, accumulation=accumulation, double=True, steps=4)
    one, eight = content(tmp_path / "one"), content(tmp_path / "eight")
    assert difference(one[0], eight[0]) < 1e-13
    losses = [[line["student_loss"] for line in lines] for _, lines in (one, eight)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-13)


def test_not_finite_loss_stops_before_any_weight_changes(tmp_path):
    run = toy_recipe.make(config := config_for(tmp_path, fault="nan", log_every=1))
    seen = {}

    def remember(run):
        seen.update({k: v.clone() for k, v in run.networks["fake"].module.state_dict().items()})

    wanted = "fake update 4, student_step 1: the loss of rank 0 is not finite"
    with pytest.raises(FloatingPointError, match=wanted):
        toy_recipe.train(run, config, after_turn=remember)
    assert all(torch.equal(seen[k], v) for k, v in run.networks["fake"].module.state_dict().items())
    event = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert event["kind"] == "error" and "FloatingPointError" in event["message"]
    assert '"student_step": 1' in event["message"]  # the last metrics


def test_skip_goes_on_with_the_next_samples(tmp_path):
    run = trained(tmp_path, fault="nan", non_finite="skip")
    assert run.updates["fake"] == 18
    (event,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(event)["kind"] == "skip"
    moments = read_tensors(newest_valid(tmp_path), "fake.optimizer")
    assert moments["0.weight|step"].item() == 17


def test_ten_skips_in_a_row_stop_the_run(tmp_path):
    config = config_for(tmp_path, non_finite="skip", steps=20)
    run = Run(config.run, main="net", resolved={})
    net = run.add("net", torch.nn.Linear(1, 1), lr=0.1, optimizer=OptimizerConfig())
    start = net.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="10 in a row"), run:
        while run.step < 20:
            with run.turn("net"):
                for _ in run.micro_batches("net"):
                    run.update("net", net(torch.full((1, 1), math.inf)).sum())
    assert torch.equal(net.weight, start) and run.step == 9


def test_fp16_scaler_is_saved(tmp_path):
    run = trained(tmp_path, precision="fp16", steps=2)
    again = toy_recipe.make(config_for(tmp_path, precision="fp16", steps=2))
    scalers = [r.networks["fake"].scaler.state_dict() for r in (run, again)]
    assert scalers[0] == scalers[1] and scalers[0]["_growth_tracker"] + scalers[0]["scale"] > 1


def test_log_averages_over_micro_batches_and_steps(tmp_path):
    run = Run(config_for(tmp_path, accumulation=2).run, main="net", resolved={})
    net = run.add("net", torch.nn.Linear(1, 1), lr=0.1, optimizer=OptimizerConfig())
    values = iter(range(100))
    with run:
        while run.step < 4:
            with run.turn("net"):
                for indices in run.micro_batches("net"):
                    run.update("net", net(torch.ones(len(indices), 1)).mean())
                    run.log({"value": next(values), "bad": torch.tensor(math.nan)})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines] == [1.5, 5.5]
    assert [line["images_seen"] for line in lines] == [8, 16]
    assert lines[0]["bad"] is None and {"grad_norm/net", "lr/net", *TIMES} < lines[0].keys()
    with pytest.raises(ValueError, match=r"'pair' has shape \[2\]"):
        run.log({"pair": torch.zeros(2)})


def test_other_configuration_is_refused_and_named(tmp_path):
    trained(tmp_path, steps=2)
    written = (tmp_path / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"run\.batch_size was 4, is 8, student_lr was 0.002"):
        toy_recipe.make(config_for(tmp_path, batch_size=8, student_lr=0.5))
    assert (tmp_path / "config.yaml").read_text() == written
    run = trained(tmp_path, steps=3, log_every=1, keep_states=1)
    assert run.step == 3


def test_damaged_state_is_passed_over_and_named(tmp_path):
    trained(tmp_path / "whole")
    trained(tmp_path / "parts", steps=4, save_every=2)
    file = tmp_path / "parts" / "state" / "step-00000004" / "fake.optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    run = trained(tmp_path / "parts")
    lines = [json.loads(x) for x in (run.folder / "events.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["damaged", "resume"]
    assert "step-00000004/fake.optimizer.safetensors is damaged (sha256" in lines[0]["message"]
    assert lines[1]["message"] == "from step-00000002"
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert difference(whole[0], parts[0]) == 0 and whole[1] == parts[1]
    for manifest in (run.folder / "state").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match=r"no valid state .*manifest\.json is missing"):
        toy_recipe.make(config_for(tmp_path / "parts"))


def test_samples_of_an_earlier_turn_carry_their_gradient(tmp_path):
    for name in ("late", "early"):
        trained(tmp_path / name, early=name == "early")
    assert difference(content(tmp_path / "late")[0], content(tmp_path / "early")[0]) == 0


def test_launcher_in_this_process_tells_how_it_ended(tmp_path, capsys):
    config = config_for(tmp_path / "run", steps=2).model_dump(mode="json")
    dump_yaml({"recipe": "toy", **config}, path := tmp_path / "run.yaml")
    argv = [toy_recipe.__file__, [str(path), "fault=term"], 1]
    assert launch(*argv) == 75
    assert launch(toy_recipe.__file__, [str(path), "run.step=3"], 1) == 2
    assert "run.step" in capsys.readouterr().err
    assert launch(toy_recipe.__file__, [str(path), "student_lr=1.0"], 1) == 1
    assert "student_lr was 0.002, is 1.0" in capsys.readouterr().err
    assert launch(*argv) == 0
    assert content(tmp_path / "run")[0]["student.optimizer/0.weight|step"] == 2


def test_states_are_not_overlooked(tmp_path):
    trained(tmp_path, steps=1)
    run = toy_recipe.make(config_for(tmp_path, steps=1), restore=False)
    with pytest.raises(CheckpointError, match="call restore"), run:
        pass


def test_attached_statistics_and_torch_rng_continue(tmp_path):
    class Count:
        value = torch.zeros(2)

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    def make():
        run = Run(config_for(tmp_path).run, main="net", resolved={})
        run.add("net", torch.nn.Linear(1, 1), lr=0.1, optimizer=OptimizerConfig())
        run.attach("count", count := Count())
        return run, count

    run, count = make()
    count.value = torch.tensor([3.0, 4.0])
    torch.rand(7)
    run.save()
    wanted = torch.rand(3)
    run, count = make()
    assert run.restore() and count.value.tolist() == [3, 4]
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_other_kinds_of_distribution_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"cannot train under {name}"):
        toy_recipe.make(config_for(tmp_path))


def test_batch_that_does_not_divide_is_refused(tmp_path):
    run = config_for(tmp_path).run.model_copy(update={"batch_size": 5, "accumulation": 2})
    with pytest.raises(ValueError, match=r"batch_size 5 .* 1 processes x run.accumulation 2"):
        Run(run, main="net", resolved={})
