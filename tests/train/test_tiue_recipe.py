"""The TiUE recipe: tiny SD and SDXL, killed and resumed, on two processes, exported."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sdxl_recipe
import torch
from builders import (
    losses_of,
    stable_diffusion_scheduler,
    state_of,
    tiny_stable_diffusion,
    tiny_unet2d,
)
from diffusers import DDPMScheduler
from processes import CODE
from safetensors.torch import load_file
from test_families_through_cli import PRELOAD, command_lines
from tiny_clip import write_clip
from tiny_pipelines import tiny_sdxl
from torchvision.utils import save_image

from diffdiv.api import prepare
from diffdiv.export import export_lora, export_run
from diffdiv.objectives.tiue import moment_kl
from diffdiv.runtime.checkpoint import newest_valid
from diffdiv.runtime.config import ConfigError
from diffdiv.verify import verify_export

COMMON = [
    "run.batch_size=2", "run.accumulation=1", "run.steps=8", "run.save_every=3", "run.log_every=1",
    "run.trackers=[]", "run.device=cpu", "run.precision=fp32", "run.sample_every=null",
    "teacher.dtype=fp32", "teacher.guidance_scale=2.0", "student.ema_half_lives=[8]",
    "student.lr=3.0e-3", "fake_lr=3.0e-3", "fake_lora.rank=4", "fake_lora.alpha=4",
]  # fmt: skip
F_DISTILL = ["objective.name=f_distill", "objective.gan.weight=0.1"]
# name: teacher, config, data, more
CASES = {
    "vsd": ("sd", "sd21", "prompts", []),
    "v-prediction": ("v", "sd21", "prompts", ["fake_lora=null", "run.accumulation=2"]),
    "sdxl": ("sdxl", "sdxl", "prompts", ["student.encoder_time=749"]),
    "f-distill": ("sd", "sd15", "captions", F_DISTILL),
}


class World:
    """Teachers and data in a folder, and the runs on them."""

    def __init__(self, root: Path) -> None:
        self.root, self.context = root, multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*PRELOAD, "diffdiv.models.shared_encoder"])
        tiny_stable_diffusion(root / "sd")
        tiny_stable_diffusion(
            root / "v", stable_diffusion_scheduler(prediction_type="v_prediction")
        )
        torch.manual_seed(0)
        tiny_sdxl(root / "sdxl/scratch").save_pretrained(root / "sdxl/teacher")
        (root / "prompts.txt").write_text("a red seven\ntwo on white\na cat\n")
        (root / "captions").mkdir()
        for number, letter in enumerate("abcdefgh"):
            save_image(torch.rand(3, 16, 16), root / f"captions/{letter}.png")
            (root / f"captions/{letter}.txt").write_text(f"picture {letter} {number}")

    def arguments(self, name: str, folder: Path) -> list[str]:
        teacher, config, data, more = CASES[name]
        real = "data" if data == "captions" else "teacher"
        file = "prompts.txt" if data == "prompts" else data
        cache = self.root / f"cache-{teacher}" if data == "prompts" else "null"
        return [
            "train", f"configs/tiue/{config}.yaml", *COMMON, f"run.folder={folder}",
            f"teacher.path={self.root / teacher / 'teacher'}", f"data.kind={data}",
            f"data.path={self.root / file}", f"data.real={real}", f"data.cache={cache}", *more,
        ]  # fmt: skip

    def run(self, arguments: list[str], kill_after: int | None = None) -> int:
        options = {"target": command_lines, "args": ([arguments], kill_after)}
        process = self.context.Process(**options)
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("tiue"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_resumed_exported(world, tmp_path, name):
    """SIGKILL within a turn and between two, bitwise resume, stock diffusers on the export."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert world.run(world.arguments(name, whole)) == 0
    networks = 3 if "f_distill" in " ".join(CASES[name][3]) else 2
    for after in (3 * networks + 1, 4 * networks + networks - 1):
        assert world.run(world.arguments(name, killed), after) == -signal.SIGKILL
        assert newest_valid(killed)
    assert world.run(world.arguments(name, killed)) == 0
    a, b = state_of(whole), state_of(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert losses_of(whole) == losses_of(killed) and len(losses_of(whole)) == 8
    # the student moved, and so did the fake score
    first, last = losses_of(whole)[0], losses_of(whole)[-1]
    assert first["fake/loss"] != last["fake/loss"] and first["student/moment_kl"] > 0

    export = export_run(whole, tmp_path / "export")
    assert verify_export(whole, export) < 1e-4
    index = json.loads((export / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    student = load_file(export / "unet/diffusion_pytorch_model.safetensors")
    teacher = load_file(
        world.root / CASES[name][0] / "teacher/unet/diffusion_pytorch_model.safetensors"
    )
    assert student.keys() == teacher.keys()
    card = (export / "README.md").read_text()
    assert card.index("trust_remote_code=True") < card.index("## What it is")
    with pytest.raises(ValueError, match="without --lora"):
        export_lora(whole, tmp_path / "lora")


@pytest.mark.slow
def test_the_clip_loss_fades_and_its_run_resumes(world, tmp_path):
    """Through the VAE; weight 0 from update 4 on, when nothing is decoded any more."""
    clip = write_clip(tmp_path / "clip")
    more = [f"rewards.clip_score.path={clip}", "rewards.clip_score.scale=0.1"]
    more += ["rewards.clip_score.decay_steps=4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert world.run([*world.arguments("vsd", whole), *more]) == 0
    assert world.run([*world.arguments("vsd", killed), *more], 3 * 2 + 1) == -signal.SIGKILL
    assert world.run([*world.arguments("vsd", killed), *more]) == 0
    a, b = state_of(whole), state_of(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    lines = losses_of(whole)
    assert lines == losses_of(killed)
    assert ["reward/clip_score" in line for line in lines] == [True] * 4 + [False] * 4
    norms = [line["reward_gradient/clip_score"] for line in lines[:4]]
    assert norms[0] > norms[1] > norms[2] > norms[3] > 0


@pytest.mark.slow
def test_two_processes_end_where_one_ends(world, tmp_path):
    """Tiny SDXL in float64; the control leaves the gradients of each process to itself."""

    def cases(place, *names):
        items = [item for item in world.arguments("sdxl", tmp_path)[2:] if "run." not in item]
        run = ["run.batch_size=4", "run.steps=2", "run.trackers=[]", "run.device=cpu"]
        run += ["run.precision=fp32", "run.sample_every=null", "run.accumulation=1"]
        found = []
        for name in names:
            folder = [f"run.folder={tmp_path / place / name}", f"data.cache={tmp_path / 'cache'}"]
            case = {"items": [*items, *run, *folder], "config": "configs/tiue/sdxl.yaml"}
            found.append(case | ({"is_averaged": False} if name == "apart" else {}))
        return found

    for processes, place, names in ((1, "one", ["full"]), (2, "two", ["full", "apart"])):
        file = tmp_path / f"{place}.json"
        file.write_text(json.dumps(cases(place, *names)))
        start = ["-c", CODE] if processes > 1 else []
        done = subprocess.run(
            [sys.executable, *start, sdxl_recipe.__file__, file],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    start = load_file(world.root / "sdxl/teacher/unet/diffusion_pytorch_model.safetensors")
    one = state_of(tmp_path / "one/full")

    def apart(name):
        other = state_of(tmp_path / "two" / name)
        keys = [key for key in one if key.startswith("student/")]
        moved = torch.stack(
            [(one[k] - start[k.removeprefix("student/unet.")].double()).norm() for k in keys]
        )
        return float(torch.stack([(one[k] - other[k]).norm() for k in keys]).norm() / moved.norm())

    assert apart("full") < 1e-10
    assert apart("apart") > 1e-3


def test_moment_kl_is_that_of_torch_and_does_not_depend_on_the_batch():
    eps = 1.7 * torch.randn(4, 6, 3, 8, 8, dtype=torch.float64) + 0.3
    flat = eps.float().flatten(2)
    normal = torch.distributions.Normal(flat.mean(2), flat.std(2))
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, standard)
    torch.testing.assert_close(moment_kl(eps), expected.sum(0).mean())
    halves = (moment_kl(eps[:, :3]) + moment_kl(eps[:, 3:])) / 2
    torch.testing.assert_close(moment_kl(eps), halves)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("student.decoder_times=[1, 751]", "do not fall"),
        ("student.decoder_times=[]", "do not fall"),
        ("objective.name=drakes", "objective.name"),
        ("run.sharding=fsdp2", "keeps whole networks"),
        ("objective.divergence.name=jensen", "jensen_shannon"),
        ("rewards.clip.path=assets/embedded_sd", "did you mean 'clip_score'"),
        ("rewards.clip_score.path=nowhere", "there is no folder 'nowhere'"),
    ],
)
def test_mistakes_in_the_configuration(item, message):
    with pytest.raises(ConfigError, match=message):
        prepare("configs/demo/tiue.yaml", [item])


def test_a_teacher_without_an_encoder_is_refused(tmp_path):
    teacher = tiny_unet2d(tmp_path / "teacher", DDPMScheduler())
    items = [f"run.folder={tmp_path / 'run'}", f"teacher.path={teacher}", "data.kind=digits"]
    recipe, config = prepare("configs/demo/tiue.yaml", [*items, "teacher.guidance_scale=null"])
    with pytest.raises(ValueError, match="wanted is a UNet2DConditionModel"):
        recipe.main(config)


@pytest.mark.parametrize("time", ["student.encoder_time=1000", "student.decoder_times=[1000, 1]"])
def test_times_outside_the_schedule_are_refused(tmp_path, time):
    items = [f"run.folder={tmp_path / 'run'}", time]
    recipe, config = prepare("configs/demo/tiue.yaml", items)
    with pytest.raises(ValueError, match=r"1000.*999|0\.\.999"):
        recipe.main(config)
