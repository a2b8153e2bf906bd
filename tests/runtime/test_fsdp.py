"""A tiny SDXL through the real recipe: copies, adapters and shards in two gloo processes."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import sdxl_recipe
import torch
from builders import losses_of, state_of, tiny_unet2d
from diffusers import EDMEulerScheduler, UNet2DConditionModel, UNet2DModel
from processes import CODE
from safetensors.torch import load_file
from tiny_pipelines import tiny_sdxl
from torch import nn
from torchvision.utils import save_image

from diffdiv.runtime.fsdp import _units

LORA = [f"{key}={size}" for key, size in {
    "student.lora.rank": 2, "student.lora.alpha": 2, "fake_lora.rank": 2, "fake_lora.alpha": 2,
}.items()]  # fmt: skip
SHARDED = ["run.sharding=fsdp2"]
TRUNK = ["gan.trunk=fake", "gan.r1_gamma=1.0", "run.accumulation=2"]
# name: overrides
TWO = {
    "full": [],
    "lora": LORA,
    "mixed": [*LORA[2:], *SHARDED],
    "fsdp2": SHARDED,
    "trunk": TRUNK,
    "fsdp2 trunk": [*TRUNK, *SHARDED],
}
BOUND = 1e-10  # of the movement; measured: 5e-13


@dataclass(frozen=True)
class World:
    """A folder with runs of one process (``one``) and of two."""

    folder: Path
    start: dict[str, torch.Tensor]

    def case(self, place: str, *more: str, **rest: object) -> sdxl_recipe.Case:
        paths = {"run.folder": place, "teacher.path": "teacher", "data.path": "data"}
        items = [f"{key}={self.folder / name}" for key, name in paths.items()]
        return {"items": [*sdxl_recipe.COMMON, *items, *more], **rest}

    def run(self, processes: int, cases: list[sdxl_recipe.Case]) -> None:
        file = self.folder / f"cases-{processes}.json"
        file.write_text(json.dumps(cases))
        start = ["-c", CODE] if processes > 1 else []
        with (self.folder / "log").open("a") as log:
            done = subprocess.run(
                [sys.executable, *start, sdxl_recipe.__file__, file],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240, stdout=log, stderr=log,
            )  # fmt: skip
        assert done.returncode == 0, (self.folder / "log").read_text()[-5000:]

    def apart(self, one: str, other: str) -> float:
        """Largest difference of a network between two runs, relative to how far it moved."""
        a, b = state_of(self.folder / one), state_of(self.folder / other)
        assert a.keys() == b.keys()
        found = []
        for net in ("student", "fake", "disc", "student.ema-8"):
            keys = [key for key in a if key.startswith(f"{net}/")]
            # heads and adapters have no start in the teacher: their first average stands for it
            starts = [self.start.get(key.partition("/")[2], torch.zeros(())) for key in keys]
            moved = torch.stack([(a[k] - s).norm() for k, s in zip(keys, starts, strict=True)])
            away = torch.stack([(a[k] - b[k]).norm() for k in keys])
            found.append(float(away.norm() / moved.norm()))
        return max(found)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    tiny_sdxl(folder / "scratch").save_pretrained(folder / "teacher")
    (folder / "data").mkdir()
    for number, letter in enumerate("abcdef"):
        save_image(torch.rand(3, 16, 16), folder / "data" / f"{letter}.png")
        (folder / "data" / f"{letter}.txt").write_text(f"picture {letter} {number}")
    weights = load_file(folder / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    world = World(folder, {name: value.double() for name, value in weights.items()})
    half = ["run.steps=1"]
    world.run(
        2,
        [
            *(world.case(f"two/{name}", *more) for name, more in TWO.items()),
            world.case("two/apart", is_averaged=False),
            world.case("two/stopped", *SHARDED, stop_after=3),
            world.case("two/from copies", *half),
            world.case("two/from copies", *SHARDED),
            world.case("one/from shards", *half, *SHARDED),
        ],
    )
    names = ["full", "lora", "mixed"]
    again = [world.case("one/from shards"), *(world.case(f"one/{n}", *TWO[n]) for n in names)]
    world.run(1, again)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora", "mixed", "fsdp2"])
def test_two_processes_end_where_one_ends(world, name):
    one = "full" if name == "fsdp2" else name
    assert world.apart(f"one/{one}", f"two/{name}") < BOUND


@pytest.mark.slow
def test_control_gradients_that_are_not_averaged_show(world):
    assert world.apart("one/full", "two/apart") > 1e-3


@pytest.mark.slow
def test_shards_are_copies_when_features_of_a_sharded_network_are_read(world):
    """R1 by finite differences (two forwards, one backward), accumulation, forwards cut short."""
    assert world.apart("two/trunk", "two/fsdp2 trunk") < BOUND


@pytest.mark.slow
def test_a_sharded_run_told_to_stop_continues_bit_for_bit(world):
    whole, stopped = (world.folder / "two" / name for name in ("fsdp2", "stopped"))
    a, b = state_of(whole), state_of(stopped)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert losses_of(whole) == losses_of(stopped)
    events = (stopped / "events.jsonl").read_text()
    assert "interrupted" in events and "resume" in events


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two/from copies", "one/from shards"])
def test_a_state_knows_neither_shards_nor_processes(world, name):
    assert world.apart("one/full", name) < BOUND
    assert "resume" in (world.folder / name / "events.jsonl").read_text()


@pytest.mark.slow
def test_all_ranks_draw_the_same_pictures(world):
    for picture in ("teacher.png", "step-00000000.png", "step-00000002.png"):
        one, two = (world.folder / run / "samples" / picture for run in ("one/full", "two/fsdp2"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("kind", ["sdxl", "unet2d"])
def test_units_hold_every_parameter_once_and_none_is_left_to_the_root(tmp_path, kind):
    """The gradient of a feature never passes the root's end, so nothing may wait for that."""
    if kind == "sdxl":
        net: nn.Module = tiny_sdxl(tmp_path).unet
        assert isinstance(net, UNet2DConditionModel)
    else:
        net = UNet2DModel.from_pretrained(tiny_unet2d(tmp_path, EDMEulerScheduler()) / "unet")
    *units, root = _units(net)
    assert root is net
    held = [parameter for unit in units for parameter in unit.parameters()]
    assert len(held) == len(set(held)) and set(held) == set(net.parameters())
    kinds = [type(unit).__name__ for unit in units]
    assert kinds.count("ResnetBlock2D") == sum(
        type(module).__name__ == "ResnetBlock2D" for module in net.modules()
    )
