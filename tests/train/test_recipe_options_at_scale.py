"""The f-distill recipe with what real models need: adapters, several steps, warm-up, caches."""

import os
import signal

import pytest
import torch
from builders import losses_of, stable_diffusion_scheduler, state_of, tiny_stable_diffusion
from safetensors.torch import load_file
from torchvision.utils import save_image

from diffdiv.api import prepare
from diffdiv.export import export_run
from diffdiv.runtime.checkpoint import newest_valid
from diffdiv.runtime.run import Run
from diffdiv.verify import verify_export

FAKE_LORA = ["fake_lora.rank=2", "fake_lora.alpha=2"]
LORA = ["student.lora.rank=2", "student.lora.alpha=2", *FAKE_LORA]
COMMON = [
    "run.batch_size=4", "run.accumulation=1", "run.steps=4", "run.log_every=1", "run.trackers=[]",
    "run.device=cpu", "run.precision=fp32", "run.sample_every=null", "run.save_every=null",
    "student.ema_half_lives=[8]", "critic_updates=2", "gan.weight=0.1", "gan.r1_gamma=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_stable_diffusion(tmp_path_factory.mktemp("sd"), stable_diffusion_scheduler())


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Ten pictures of 20x16 pixels with their captions beside them."""
    folder = tmp_path_factory.mktemp("captioned")
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        save_image(torch.rand(3, 20, 16, generator=generator), folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {'abcdefghij'[number]}")
    return folder


def items(folder, teacher, data, *more):
    paths = [f"run.folder={folder}", f"teacher.path={teacher}", f"data.path={data}"]
    return [*COMMON, *paths, "data.kind=captions", "data.real=data", *more]


def train(folder, teacher, data, *more):
    recipe, config = prepare("configs/f_distill/sd.yaml", items(folder, teacher, data, *more))
    recipe.main(config)
    return folder


CHOICES = {
    "adapters": LORA,
    "mixed": FAKE_LORA,
    "adapters, checkpointed": [*LORA, "teacher.checkpointing=true"],
    "copies, four steps": ["student.num_steps=4"],
    "adapters, four steps, warm-up": [*LORA, "student.num_steps=4", "student.ode_warm_up=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_stopped_and_resumed_it_ends_bitwise_equal_and_exports(
    teacher, captioned, tmp_path, monkeypatch, name
):
    monkeypatch.setattr("diffdiv.sources._POOL_SIZE", 64)
    whole = train(tmp_path / "whole", teacher, captioned, *CHOICES[name])
    update = Run.update

    def stopping(self, net, loss):
        update(self, net, loss)
        if net == "fake" and self.updates["fake"] == 3:  # in the middle of a critic phase
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", teacher, captioned, *CHOICES[name])
    monkeypatch.setattr(Run, "update", update)
    train(tmp_path / "cut", teacher, captioned, *CHOICES[name])
    a, b = state_of(whole), state_of(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert losses_of(whole) == losses_of(tmp_path / "cut")

    export = export_run(whole, tmp_path / "export")
    assert verify_export(whole, export) < 1e-4


def test_checkpointing_changes_nothing(teacher, captioned, tmp_path):
    plain = train(tmp_path / "plain", teacher, captioned, *LORA)
    saving = train(tmp_path / "saving", teacher, captioned, *LORA, "teacher.checkpointing=true")
    a, b = state_of(plain), state_of(saving)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_adapters_leave_the_base_alone_and_are_small(teacher, captioned, tmp_path):
    state = newest_valid(train(tmp_path, teacher, captioned, *LORA))
    student = load_file(state / "student.safetensors")
    assert all(".lora_A." in key or ".lora_B." in key for key in student)
    assert any(value.abs().max() > 0 for key, value in student.items() if ".lora_B." in key)


def test_cached_data_gives_the_same_run(teacher, captioned, tmp_path):
    """Text bit for bit; latents up to the VAE's rounding, which depends on the batch."""
    free = train(tmp_path / "free", teacher, captioned, *LORA)
    cache = f"data.cache={tmp_path / 'cache'}"
    cached = train(tmp_path / "cached", teacher, captioned, *LORA, cache)
    again = train(tmp_path / "again", teacher, captioned, *LORA, cache)
    assert losses_of(cached) == losses_of(again)
    for one, other in zip(losses_of(free), losses_of(cached), strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert other[key] == pytest.approx(one[key], rel=2e-3, abs=1e-5), key


def test_a_prompt_file_is_cached_bit_for_bit(teacher, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na house by the sea\n")
    data = ["data.kind=prompts", "divergence.name=reverse_kl", "gan.weight=null"]
    data += ["data.real=teacher", *LORA]
    free = train(tmp_path / "free", teacher, prompts, *data)
    cached = train(tmp_path / "cached", teacher, prompts, *data, f"data.cache={tmp_path / 'c'}")
    a, b = state_of(free), state_of(cached)
    assert all(torch.equal(a[key], b[key]) for key in a) and losses_of(free) == losses_of(cached)
