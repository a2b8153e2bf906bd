"""Every family through the command line: train, be killed, resume, export, run by stock diffusers.

Tiny random teachers, the shipped configurations, 20 steps. Commands run in processes forked from a
server that has imported the libraries; one run is killed and resumed as a program of its own.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from builders import losses_of, stable_diffusion_scheduler, state_of, tiny_stable_diffusion
from safetensors.torch import load_file, save_file
from stock_reader import check_export, read_exports, trained_student
from tiny_pipelines import write_pipeline
from torchvision.utils import save_image

from diffdiv.runtime.checkpoint import load_weights, newest_valid

PRELOAD = [
    "diffdiv.api", "diffdiv.cli", "diffdiv.export", "diffdiv.models.discriminator",
    "diffdiv.objectives.f_distill", "diffdiv.runtime.preview", "diffdiv.runtime.run",
    "diffdiv.samplers", "diffdiv.sources", "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.sana.pipeline_sana",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
]  # fmt: skip
PROMPTS = ["a red seven", "two on white", "a cat"]
RANK = {"rank": 4, "alpha": 8}
CRITIC = 2
CYCLE = 2 * CRITIC + 1  # updates: fake and disc by turns, then one of the student
COMMON = [
    "run.batch_size=2", "run.accumulation=1", "run.steps=20", "run.save_every=3",
    "run.log_every=1", "run.trackers=[]", "run.device=cpu", "run.precision=fp32",
    "run.sample_every=null", "teacher.dtype=fp32", "student.ema_half_lives=[8]",
    "student.lr=3.0e-3", "fake_lr=3.0e-3", "gan.lr=1.0e-3",
]  # fmt: skip
LORA = [
    f"{who}.{key}={value}" for who in ("student.lora", "fake_lora") for key, value in RANK.items()
]


@dataclass(frozen=True)
class Case:
    """A distillation; ``kills``: "any" instant, in the "critic" phase, or none."""

    teacher: str
    config: str
    t_init: float
    steps: int = 1
    options: tuple[str, ...] = ()
    data: str = "prompts"
    kills: tuple[str, ...] = ()

    @property
    def lora(self) -> dict[str, int] | None:
        return RANK if set(LORA) <= set(self.options) else None


GUIDED, PLAIN = "teacher.guidance_scale=2.0", "teacher.guidance_scale=null"
BOTH = ("any", "critic")
WARM_UP = "student.ode_warm_up=2"
CASES = {
    "sd-399": Case("sd", "sd", 399, data="captions", kills=BOTH),
    "sd-625": Case("sd", "sd15_lora_8gb", 625, 1, LORA),
    "sd-999-4": Case("sd", "sd15_4step_lora", 999, 4, LORA),
    "sd21-999": Case("sd21", "sd21_lora", 999, 1, LORA, kills=("critic",)),
    "sdxl-399": Case("sdxl", "sdxl_lora_24gb", 399, 1, (*LORA, WARM_UP)),
    "sdxl-625": Case("sdxl", "sd", 625, data="captions"),
    "sdxl-999-4": Case("sdxl", "sdxl_4step_lora_24gb", 999, 4, LORA, kills=BOTH),
    "sd3": Case("sd3", "sd", 1.0, 1, (*LORA, GUIDED), "captions"),
    "sd3-4": Case("sd3", "sd", 1.0, 4, (GUIDED,), kills=BOTH),
    "flux": Case("flux", "sd", 1.0, 1, (PLAIN,), "captions", ("critic",)),
    "flux-4": Case("flux", "sd", 1.0, 4, (*LORA, PLAIN)),
    "sana": Case("sana", "sd", 1.0, 1, (*LORA, GUIDED), "captions", ("any",)),
    "sana-4": Case("sana", "sd", 1.0, 4, (GUIDED,)),
}
KILLED = [name for name, case in CASES.items() if case.kills]


def command_lines(commands: Sequence[Sequence[str]], kill_after: int | None) -> None:
    """``diffdiv`` so often in this process, which dies after so many updates of all networks."""
    from diffdiv import cli, sources
    from diffdiv.runtime import preview
    from diffdiv.runtime.run import Run

    torch.set_num_threads(1)
    update = Run.update

    def counted(run: Run, name: str, loss: torch.Tensor) -> None:
        update(run, name, loss)
        if sum(run.updates.values()) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    # fewer samples of the teacher: they would take more time than all the rest
    Run.update, sources._POOL_SIZE, preview._INDICES = counted, 64, range(10**9, 10**9 + 8)
    for arguments in commands:
        sys.argv = ["diffdiv", *arguments]
        try:
            cli.main()
        except SystemExit as error:
            if error.code:
                raise


class World:
    """Teachers and data in a folder, and the commands on them."""

    def __init__(self, root: Path) -> None:
        self.root, self.draw = root, random.Random(0)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        scheduler = stable_diffusion_scheduler(prediction_type="v_prediction")
        tiny_stable_diffusion(root / "sd")
        tiny_stable_diffusion(root / "sd21", scheduler, use_linear_projection=True)
        for kind in ("sdxl", "sd3", "flux", "sana"):
            write_pipeline(kind, root / kind)
        (root / "prompts.txt").write_text("\n".join(PROMPTS))
        (root / "captions").mkdir()
        noise = torch.Generator().manual_seed(0)
        for number in range(10):
            file = root / f"captions/{number}.png"
            save_image(torch.rand(3, 20, 16, generator=noise), file)
            file.with_suffix(".txt").write_text(f"picture {'abcdefghij'[number]}")

    def arguments(self, name: str, folder: Path) -> list[str]:
        case = CASES[name]
        data = self.root / ("prompts.txt" if case.data == "prompts" else "captions")
        real = "data" if case.data == "captions" else "teacher"
        cache = self.root / "caches" / case.teacher if case.data == "prompts" else "null"
        return [
            "train", f"configs/f_distill/{case.config}.yaml", *COMMON, f"run.folder={folder}",
            f"teacher.path={self.root / case.teacher / 'teacher'}", f"data.kind={case.data}",
            f"data.path={data}", f"data.real={real}", f"data.cache={cache}",
            f"student.t_init={case.t_init}", f"student.num_steps={case.steps}", *case.options,
            f"critic_updates={CRITIC if case.kills else 1}",
        ]  # fmt: skip

    def run(self, *commands: Sequence[str], kill_after: int | None = None) -> int:
        process = self.context.Process(target=command_lines, args=(commands, kill_after))
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def train(self, name: str, folder: Path, kills: Sequence[str] = ()) -> Path:
        """A whole run, killed first after its first state: inside a critic phase, or anywhere."""
        arguments, cycle = self.arguments(name, folder), 4
        for kill in kills:
            cycle += self.draw.randrange(1, 6)
            within = self.draw.randrange(1, CYCLE - 1) if kill == "critic" else 0
            after = cycle * CYCLE + (within or self.draw.randrange(CYCLE))
            assert self.run(arguments, kill_after=after) == -signal.SIGKILL
            assert newest_valid(folder)
        assert self.run(arguments) == 0
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Every run from beginning to end, and its exports as stock diffusers sees them."""
    world = World(tmp_path_factory.mktemp("world"))
    root = world.root
    for name, case in CASES.items():
        run = world.train(name, root / "runs" / name)
        commands = [["export", str(run), str(root / "exports" / name)]]
        if case.lora:
            commands.append(["export", str(run), str(root / "adapters" / name), "--lora"])
        assert world.run(*commands) == 0
        if case.lora:
            (root / f"{name}.txt").write_text(str(root / case.teacher / "teacher"))
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    save_file({"z": z}, root / "z.safetensors")
    read_exports(root, PROMPTS)
    return world


def events(folder: Path, kind: str) -> list[str]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line["message"] for line in lines if line["kind"] == kind]


def check_equal(folder: Path, whole: Path) -> None:
    """Bitwise: weights, averages, moments, statistics, random states; logged losses; counters."""
    a, b = state_of(whole), state_of(folder)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert {"student", "student.ema-8", "student.optimizer", "fake", "fake.optimizer"} <= {
        key.partition("/")[0] for key in a
    }
    assert losses_of(whole) == losses_of(folder) and len(losses_of(whole)) == 20
    counts = [json.loads((newest_valid(f) / "state.json").read_bytes()) for f in (whole, folder)]
    assert counts[0]["networks"] == counts[1]["networks"]


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_it_ends_bitwise_equal(world: World, tmp_path: Path, name: str) -> None:
    folder = world.train(name, tmp_path / "killed", CASES[name].kills)
    assert len(events(folder, "resume")) == len(CASES[name].kills)
    check_equal(folder, world.root / "runs" / name)


@pytest.mark.slow
def test_a_program_killed_from_outside_resumes_bitwise(world: World, tmp_path: Path) -> None:
    """`diffdiv train` itself, at an instant that nobody in it knows."""
    folder, draw = tmp_path / "killed", random.Random()  # any instant must do
    command = [sys.executable, "-m", "diffdiv.cli", *world.arguments("sd-399", folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"env": environment, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, **options)
    while process.poll() is None and not any((folder / "state").glob("step-*")):
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, **options)
    assert len(events(folder, "resume")) == 1
    check_equal(folder, world.root / "runs" / "sd-399")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_stock_diffusers_runs_the_export(world: World, name: str) -> None:
    found = load_file(world.root / "found.safetensors")
    facts = json.loads((world.root / "facts.json").read_text())
    case, teacher = CASES[name], world.root / CASES[name].teacher / "teacher"
    weights = load_weights(world.root / "runs" / name, "student", 8)
    student = trained_student(teacher, weights, case.t_init, "unit", case.steps, case.lora)
    for export in [name, f"{name}/adapter"] if case.lora else [name]:
        tensors = {key: found[f"{export}/{key}"] for key in ("x0", "z")}
        check_export(tensors, facts[export], student, teacher, PROMPTS)
    assert facts["modules"] == []
