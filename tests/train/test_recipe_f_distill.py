"""The f-distill recipe itself: resume, accumulation, options, bad input, on tiny networks."""

import json
import os
import signal

import pytest
import torch
from builders import losses_of, state_of, tiny_stable_diffusion, tiny_unet2d
from diffusers import EDMEulerScheduler

from diffdiv.api import prepare
from diffdiv.core.divergence import DIVERGENCES
from diffdiv.resources import resource
from diffdiv.runtime.checkpoint import newest_valid
from diffdiv.runtime.launch import launch
from diffdiv.runtime.run import Run

COMMON = [
    "run.batch_size=8", "run.steps=3", "run.save_every=1", "run.log_every=1",
    "run.sample_every=null", "run.trackers=[]", "run.device=cpu",
    "student.ema_half_lives=[20, 200]", "critic_updates=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return tiny_unet2d(folder, EDMEulerScheduler(sigma_max=10.0), num_classes=10)


def train(folder, teacher, *overrides):
    items = [*COMMON, f"run.folder={folder}", f"teacher.path={teacher}", *overrides]
    recipe, config = prepare("configs/demo/digits.yaml", items)
    recipe.main(config)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(teacher, tmp_path_factory):
    return train(tmp_path_factory.mktemp("uninterrupted"), teacher)


@pytest.mark.parametrize("fake_update", [1, 3])
def test_a_run_stopped_in_a_critic_phase_resumes_bitwise(
    teacher, uninterrupted, tmp_path, monkeypatch, fake_update
):
    update = Run.update

    def stopping(self, name, loss):
        update(self, name, loss)
        if name == "fake" and self.updates["fake"] == fake_update:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, teacher)
    assert stopped.value.code == 75
    assert "u0" in newest_valid(tmp_path).name, "the state lies between two main updates"
    monkeypatch.undo()
    train(tmp_path, teacher)
    expected, got = state_of(uninterrupted), state_of(tmp_path)
    assert expected.keys() == got.keys()
    different = [key for key in expected if not torch.equal(expected[key], got[key])]
    assert not different
    assert losses_of(tmp_path) == losses_of(uninterrupted)


def test_accumulation_does_not_change_any_gradient(teacher, tmp_path, monkeypatch):
    """1 x 8 = 8 x 1, update by update (gan.balance is the exception: a norm per micro-batch).

    Gradients are compared, not weights: Adam divides a gradient that is zero but for rounding (a
    bias before a group norm) by its own size. They are recorded and the weights left alone.
    """
    recorded = []

    def record(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        recorded.append(torch.cat([p.grad.flatten().clone() for p in parameters]))

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    for accumulation in (1, 8):
        train(
            tmp_path / str(accumulation), teacher, f"run.accumulation={accumulation}",
            "gan.balance=false", "gan.weight=0.01", "optimizer.clip=null",
        )  # fmt: skip
    whole, split = recorded[: len(recorded) // 2], recorded[len(recorded) // 2 :]
    assert len(whole) == len(split) == 3 * (2 * 2 + 1)
    for a, b in zip(whole, split, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-5


@pytest.mark.slow
def test_two_processes_log_what_one_logs(teacher, tmp_path):
    """Losses, ratio statistics and gradient norms of 1 x 8 and 2 x 4, three steps."""
    lines = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        items = [
            *COMMON, f"run.folder={folder}", f"teacher.path={teacher}", "student.lr=1e-7",
            "fake_lr=1e-7", "gan.lr=1e-7", "optimizer.clip=null",
        ]  # fmt: skip
        recipe, _ = prepare("configs/demo/digits.yaml", items)
        config = str(resource("configs/demo/digits.yaml"))
        assert launch(recipe.path, [config, *items], processes) == 0
        lines[processes] = losses_of(folder)
    assert len(lines[1]) == len(lines[2]) == 3
    for one, two in zip(lines[1], lines[2], strict=True):
        # a maximum, or the norm over one rank's share of x0, is logged as a mean over ranks
        local = {"ratio/weight_max", "student/vsd_gradient_norm", "student/gan_gradient_norm"}
        for key in one.keys() - local:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7), key


@pytest.mark.parametrize(
    "overrides",
    [
        [f"divergence.name={d.name}"] for d in DIVERGENCES
    ] + [
        ["divergence.name=reverse_kl", "gan.weight=null"],
        ["gan.weight=null"],
        ["gan.trunk=fake", "gan.blocks=[down_blocks.0, mid_block]"],
        ["gan.r1_gamma=1.0", "gan.r1=exact"],
        ["gan.r1_gamma=1.0", "gan.r1=approximate"],
        ["data.real=teacher"],
        ["run.precision=bf16"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_option_moves_the_student(teacher, tmp_path, overrides):
    state = state_of(train(tmp_path, teacher, "run.steps=1", *overrides))
    before = tiny_weights(teacher)
    moved = [k for k, v in before.items() if not torch.equal(state[f"student/{k}"], v)]
    assert len(moved) > len(before) // 2
    assert all(bool(torch.isfinite(v.float()).all()) for v in state.values())
    has_disc = any(key.startswith("disc/") for key in state)
    assert has_disc == (overrides != ["divergence.name=reverse_kl", "gan.weight=null"])


def tiny_weights(teacher):
    from safetensors.torch import load_file

    return load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors")


def test_reverse_kl_with_a_discriminator_is_plain_vsd_in_training_too(teacher, tmp_path):
    """The discriminator only watches: the student's weights are the same bits."""
    plain, watched = (
        state_of(train(tmp_path / name, teacher, "divergence.name=rkl", *more))
        for name, more in (("plain", ["gan.weight=null"]), ("watched", ["gan.weight=0"]))
    )
    keys = [k for k in plain if k.startswith("student/")]
    assert keys and all(torch.equal(plain[k], watched[k]) for k in keys)


@pytest.mark.slow
def test_stable_diffusion_data_free(tmp_path):
    sd = tiny_stable_diffusion(tmp_path / "sd")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red seven\na seven on white\n")
    overrides = [
        "data.kind=prompts", f"data.path={prompts}", "data.real=teacher", "student.t_init=399",
        "student.input_convention=unit", "teacher.guidance_scale=2.0", "run.steps=1",
        "run.sample_every=1",
    ]  # fmt: skip
    folder = train(tmp_path / "run", sd, *overrides)
    assert (folder / "teacher_samples.safetensors").is_file()
    assert (folder / "samples" / "teacher.png").is_file()
    assert json.loads((folder / "samples" / "captions.json").read_text())["prompts"][0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.t_init=11"], r"t_init must lie in \(0, 10\], not 11"),
        (["gan.blocks=[middle]"], r"no block 'middle' in UNet2DModel"),
        (["teacher.guidance_scale=2"], r"guidance 2: this teacher has no unconditional branch"),
        (["data.kind=prompted_digits"], r"model_index.json: cannot be read"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(teacher, tmp_path, overrides, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(tmp_path, teacher, *overrides)


def test_a_class_count_that_does_not_match(tmp_path):
    other = tiny_unet2d(tmp_path / "t", EDMEulerScheduler(sigma_max=10.0), num_classes=7)
    with pytest.raises(ValueError, match=r"digits: 10 classes for a teacher .* of size 7"):
        train(tmp_path / "run", other)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_teacher_that_says_nan_moves_no_weight(teacher, tmp_path, monkeypatch, policy):
    from diffdiv.objectives import f_distill

    direction, calls = f_distill.vsd_direction, []

    def broken_once(x0, teacher_x0, fake_x0):
        calls.append(1)
        return direction(x0, teacher_x0 * (float("nan") if len(calls) == 1 else 1), fake_x0)

    monkeypatch.setattr(f_distill, "vsd_direction", broken_once)
    overrides = [f"run.non_finite={policy}", "run.steps=1"]
    if policy == "stop":
        with pytest.raises(FloatingPointError, match=r"student update 0, student_step 0: the loss"):
            train(tmp_path, teacher, *overrides)
        return
    state = state_of(train(tmp_path, teacher, *overrides))
    assert all(torch.equal(state[f"student/{k}"], v) for k, v in tiny_weights(teacher).items())
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["kind"] for e in events] == ["skip"]
    assert "student update 0" in events[0]["message"]
