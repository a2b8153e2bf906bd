"""TimeNoise from the command line on tiny pipelines: kill, resume, two processes, stock export."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import losses_of, state_of
from PIL import Image
from safetensors.torch import load_file
from tiny_video_pipelines import saved, tiny_cogvideox, tiny_svd, tiny_wan

from diffdiv.api import prepare
from diffdiv.resources import resource
from diffdiv.runtime.checkpoint import load_weights, newest_valid
from diffdiv.runtime.config import ConfigError
from diffdiv.runtime.launch import launch
from diffdiv.runtime.run import Run

SIZES = {"svd": (3, 16, 16), "wan": (5, 16, 16), "cogvideox": (5, 64, 64)}
CONFIG = "configs/timenoise/svd.yaml"
COMMON = [
    "run.batch_size=4", "run.accumulation=1", "run.steps=4", "run.save_every=2", "run.log_every=1",
    "run.trackers=[]", "run.device=cpu", "run.precision=fp32", "model.dtype=fp32",
    "model.checkpointing=false", "model.lora.rank=4", "model.lora.alpha=8", "ema_half_life=8",
    "lr=1.0e-3", "optimizer.warmup_steps=0", "condition_dropout=0.3",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipelines and four videos of moving noise."""
    root = tmp_path_factory.mktemp("world")
    for name, make in {"svd": tiny_svd, "wan": tiny_wan, "cogvideox": tiny_cogvideox}.items():
        saved(make(), root / name)
    for number in range(4):
        draw = np.random.default_rng(number)
        still = draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        for frame in range(7):
            file = root / f"videos/{number}/{frame}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(still, frame * (number + 1), 1)).save(file)
    (root / "videos/0.txt").write_text("a cat")
    return root


def items(world: Path, folder: Path, name: str = "svd", *more: str) -> list[str]:
    num_frames, height, width = SIZES[name]
    return [
        *COMMON, f"run.folder={folder}", f"model.path={world / name}",
        f"videos.path={world / 'videos'}", f"videos.num_frames={num_frames}",
        f"videos.height={height}", f"videos.width={width}", *more,
    ]  # fmt: skip


def train(world: Path, folder: Path, name: str = "svd", *more: str) -> Path:
    recipe, config = prepare(CONFIG, items(world, folder, name, *more))
    recipe.main(config)
    return folder


def different(one: Path, other: Path) -> list[str]:
    a, b = state_of(one), state_of(other)
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def network(folder: Path) -> dict[str, torch.Tensor]:
    part = "transformer" if (folder / "transformer").is_dir() else "unet"
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def test_a_stopped_run_resumes_bitwise_and_exports(world, tmp_path, monkeypatch) -> None:
    whole = train(world, tmp_path / "whole")
    update = Run.update

    def stopping(self: Run, name: str, loss: torch.Tensor) -> None:
        update(self, name, loss)
        if self.updates[name] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(SystemExit) as stopped:
        train(world, tmp_path / "cut")
    assert stopped.value.code == 75
    monkeypatch.undo()
    train(world, tmp_path / "cut")
    assert not different(whole, tmp_path / "cut")
    assert losses_of(whole) == losses_of(tmp_path / "cut")
    before, after = network(world / "svd"), network(whole / "export")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.endswith("weight") for key in changed)
    # alpha / rank B A by hand, on one of the layers
    averaged = load_weights(whole, "model", 8)
    layer = next(key for key in changed if "to_q" in key).removesuffix(".weight")
    a, b = (averaged[f"{layer}.lora_{part}.weight"] for part in "AB")
    wanted = before[f"{layer}.weight"] + 2 * b @ a
    torch.testing.assert_close(after[f"{layer}.weight"], wanted, rtol=1e-5, atol=1e-7)


SHIPPED = ["run.precision=bf16", "model.dtype=bf16", "model.checkpointing=true"]
CASES = {
    "wan": ("wan", ["noise.strength=3"]),
    "cogvideox": ("cogvideox", ["noise.kind=low_pass", "noise.strength=2"]),
    "constant": ("svd", ["noise.kind=constant", "noise.time=log_snr"]),
    "none": ("svd", ["noise.kind=none"]),
    "pixel": ("svd", ["noise.space=pixel", "noise.strength=0.5", "videos.flip=true"]),
    "as shipped": ("svd", [*SHIPPED, "run.accumulation=4"]),
    "wan as shipped": ("wan", SHIPPED),
    "cogvideox as shipped": ("cogvideox", SHIPPED),
    "wan, whole": ("wan", ["model.lora=null", "model.checkpointing=true"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_host_and_noise_trains(world: Path, tmp_path: Path, case: str) -> None:
    name, more = CASES[case]
    folder = train(world, tmp_path, name, *more)
    before, after = network(world / name), network(folder / "export")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    levels = [line["image/level"] for line in losses_of(folder)]
    assert all(line["model/loss"] > 0 for line in losses_of(folder))
    assert (max(levels) == 0) is (case == "none")


@pytest.mark.slow
def test_it_learns_the_clips(world: Path, tmp_path: Path) -> None:
    """A Wan of 20,000 weights on 4 clips, its latents cached; against itself, hardly trained.

    Both see the same samples, times and noise, so the losses differ by what was learned alone.
    """
    losses = {}
    for lr in ("1.0e-2", "1.0e-9"):
        more = ["run.steps=100", "run.save_every=null", f"lr={lr}", "model.lora=null",
                f"videos.cache={tmp_path / 'cache'}", "noise.strength=3"]  # fmt: skip
        run = train(world, tmp_path / lr, "wan", *more)
        losses[lr] = [line["model/loss"] for line in losses_of(run)]
    learned, before = (np.array(values[-30:]) for values in losses.values())
    assert learned.mean() < 0.8 * before.mean()
    assert (learned < before).mean() > 0.9


@pytest.mark.slow
def test_a_killed_program_resumes_bitwise(world: Path, tmp_path: Path) -> None:
    """`diffdiv train`, SIGKILL after the first state, the same command again."""
    whole, folder = train(world, tmp_path / "whole"), tmp_path / "killed"
    code = (
        "import os, signal, sys; from diffdiv import cli; from diffdiv.runtime.run import Run\n"
        "import torch; torch.set_num_threads(1); update = Run.update\n"
        "def dying(run, name, loss):\n"
        "    update(run, name, loss)\n"
        "    if run.updates[name] == int(os.environ['KILL_AFTER']): os.kill(os.getpid(), 9)\n"
        "Run.update = dying; sys.argv[0] = 'diffdiv'; cli.main()"
    )
    command = [sys.executable, "-c", code, "train", CONFIG, *items(world, folder)]
    for kill_after, status in ((3, -signal.SIGKILL), (0, 0)):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "KILL_AFTER": str(kill_after)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr[-2000:]
        assert newest_valid(folder)
    assert not different(whole, folder)
    assert losses_of(whole) == losses_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "sharded"])
def test_two_processes_log_what_one_logs(world: Path, tmp_path: Path, case: str) -> None:
    more = ["lr=1.0e-7", "optimizer.clip=null", "run.steps=2"]
    more += [] if case == "lora" else ["model.lora=null"]
    lines = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        sharding = ["run.sharding=fsdp2"] if (case, processes) == ("sharded", 2) else []
        arguments = [str(resource(CONFIG)), *items(world, folder, "svd", *more, *sharding)]
        recipe, _ = prepare(CONFIG, arguments[1:])
        assert launch(recipe.path, arguments, processes) == 0
        lines[processes] = losses_of(folder)
    assert len(lines[1]) == len(lines[2]) == 2
    for one, two in zip(lines[1], lines[2], strict=True):
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7), key
    one, two = (network(tmp_path / str(n) / "export") for n in (1, 2))
    assert all(torch.allclose(one[key], two[key], rtol=1e-4, atol=1e-5) for key in one)


READER = """
import json, sys, torch

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffdiv":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
folder, image, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
call = json.load(open(folder + "/export.json"))["call"]
frames = pipe(Image.open(image).resize((16, 16)), num_inference_steps=2, height=16, width=16,
              num_frames=3, output_type="latent", generator=torch.Generator().manual_seed(0),
              **call).frames
save_file({"frames": frames.contiguous()}, out)
print(type(pipe).__name__, sum(name.startswith("diffdiv") for name in sys.modules))
"""


@pytest.mark.slow
def test_stock_diffusers_runs_the_export(world: Path, tmp_path: Path) -> None:
    """In a process without diffdiv; the same latents as the base with the merged weights here."""
    from diffusers import StableVideoDiffusionPipeline

    folder = train(world, tmp_path / "run")
    image = world / "videos/0/0.png"
    command = [sys.executable, "-I", "-c", READER, str(folder / "export"), str(image)]
    done = subprocess.run(
        [*command, str(tmp_path / "found")], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["StableVideoDiffusionPipeline", "0"]
    pipe = StableVideoDiffusionPipeline.from_pretrained(world / "svd")
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.load_state_dict(network(folder / "export"))
    frames = pipe(
        Image.open(image).resize((16, 16)), num_inference_steps=2, height=16, width=16,
        num_frames=3, output_type="latent", noise_aug_strength=0.0,
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    torch.testing.assert_close(load_file(tmp_path / "found")["frames"], frames)
    assert json.loads((folder / "export/export.json").read_text())["kind"] == "time_noise"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora=null", "model.dtype=bf16"], "dtype 'bf16' cannot be trained whole"),
        (["noise.space=pixel", "videos.cache=c"], "videos.cache holds no pixels"),
        (["videos.flip=true", "videos.cache=c"], "cannot be mirrored"),
        (["run.sample_every=1"], "draws no samples"),
        (["model.dtype=bf16"], "needs run.precision 'bf16'"),
        (["noise.kind=timenoise"], "time_noise"),
        (["videos.path=/nowhere"], "must be a folder of videos"),
    ],
)
def test_what_cannot_be_had_is_told(world: Path, tmp_path: Path, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(CONFIG, items(world, tmp_path, "svd", *overrides))


def test_a_model_or_folder_that_does_not_fit_is_told(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index.json there"):
        train(world, tmp_path / "a", "svd", f"model.path={world / 'videos'}")
    with pytest.raises(ValueError, match=r"fewer than the 8 that a clip spans"):
        train(world, tmp_path / "b", "svd", "videos.num_frames=8")
