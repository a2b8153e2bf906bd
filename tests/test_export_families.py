"""Students of several steps, adapters, SDXL and flow models, run by stock diffusers alone.

One process that cannot import diffdiv loads every export and writes down x0, the noise it took,
the times it ran and the step counts it refused.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from builders import (
    stable_diffusion_scheduler,
    tiny_stable_diffusion,
    tiny_unet2d,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock_reader import check_export, distance, read_exports, trained_student
from tiny_pipelines import PIPELINES, write_pipeline
from torch import Tensor

from diffdiv.evaluate import evaluate_path
from diffdiv.export import export_lora, export_run, export_unet2d
from diffdiv.generate import sample_path
from diffdiv.models.adapters import SharedBase
from diffdiv.models.backbones import load_denoiser
from diffdiv.models.families import lora_targets
from diffdiv.models.generator import Generator
from diffdiv.runtime.checkpoint import save_state
from diffdiv.runtime.student import open_run
from diffdiv.schedulers import flow_scheduler, student_scheduler
from diffdiv.verify import verify_export

PROMPTS = ["a red seven", "two on white"]
CPU = torch.device("cpu")
LORA = {"rank": 2, "alpha": 6, "targets": None}  # alpha != rank: losing it must show
# name of the export: teacher, t_init, convention, steps, adapter settings
CASES = {
    **{f"sdxl-{t}": ("sdxl", t, "unit", 1, None) for t in (399, 625, 999)},
    **{f"sdxl-{t}-ve": ("sdxl", t, "ve", 1, None) for t in (399, 999)},
    **{f"{kind}-{t}-4": (kind, t, "unit", 4, None) for kind in ("sd", "sdxl") for t in (399, 999)},
    "sd-625-2": ("sd", 625, "unit", 2, None),
    "sd-399-lora": ("sd", 399, "unit", 1, LORA),
    "sd-625-ve-lora": ("sd", 625, "ve", 1, LORA),
    "sdxl-999-4-lora": ("sdxl", 999, "unit", 4, LORA),
    "pixart-999-4": ("pixart", 999, "unit", 4, None),
    **{kind: (kind, 1.0, "unit", 1, None) for kind in ("sd3", "flux", "sana")},
    **{f"{kind}-4": (kind, 1.0, "unit", 4, None) for kind in ("sd3", "flux", "sana")},
    "sd3-3-lora": ("sd3", 1.0, "unit", 3, LORA),
}


def moved(weights: dict[str, Tensor], scale: float = 0.05) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(1)
    return {k: v + scale * torch.randn(v.shape, generator=noise) for k, v in weights.items()}


def write_run(folder: Path, teacher: Path, case: tuple, data: str = "prompts") -> Path:
    """A run folder with one state, in which the student has left the teacher."""
    keys = ("t_init", "input_convention", "num_steps", "lora")
    net = load_denoiser(teacher).net
    lora, module = case[-1], net
    if lora is not None:
        options = {"rank": lora["rank"], "alpha": lora["alpha"], "seed": 0}
        module = SharedBase(net).add("student", targets=lora_targets(net), **options)
    weights = moved(module.state_dict(), 0.2 if lora else 0.05)
    stems = {"student": module.state_dict(), "student.ema-500": weights}
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    config = {
        "recipe": "f_distill",
        "run": {"seed": 0},
        "teacher": {"path": str(teacher), "guidance_scale": None},
        "student": dict(zip(keys, case, strict=True)) | {"ema_half_lives": [500]},
        "data": {"kind": data, "path": str(folder / "prompts.txt"), "cache": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    save_state(folder / "state/step-00000001", tensors=stems, values={}, facts={}, keep=1)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, their exports, and what stock diffusers makes of these."""
    root = tmp_path_factory.mktemp("world")
    tiny_stable_diffusion(root / "sd")
    for kind in PIPELINES:
        write_pipeline(kind, root / kind)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    save_file({"z": z}, root / "z.safetensors")
    (root / "adapters").mkdir()
    for name, (kind, *student) in CASES.items():
        teacher = root / kind / "teacher"
        run = write_run(root / "runs" / name, teacher, tuple(student))
        export_run(run, root / "exports" / name)
        if student[-1]:
            export_lora(run, root / "adapters" / name)
            (root / f"{name}.txt").write_text(str(teacher))
    read_exports(root, PROMPTS)
    return root


def trained(world: Path, name: str) -> Generator:
    """The student of a run, an adapter not merged."""
    weights = world / "runs" / name / "state/step-00000001/student.ema-500.safetensors"
    return trained_student(world / CASES[name][0] / "teacher", load_file(weights), *CASES[name][1:])


@pytest.mark.parametrize("name", CASES)
def test_a_plain_call_runs_the_trained_student(world: Path, name: str) -> None:
    found, facts = load_file(world / "found.safetensors"), read(world / "facts.json")
    kind, _, _, steps, lora = CASES[name]
    student, teacher = trained(world, name), world / kind / "teacher"
    for export in [name, f"{name}/adapter"] if lora else [name]:
        tensors = {key: found[f"{export}/{key}"] for key in ("x0", "z")}
        check_export(tensors, facts[export], student, teacher, PROMPTS)
        assert distance(tensors["x0"], found[f"{name}/x0"]) < 1e-4, "merged = adapter"
    call = read(world / "exports" / name / "export.json")["call"]
    assert call == {"num_inference_steps": steps, "guidance_scale": 3.5 if kind == "flux" else 0}
    assert facts["modules"] == []


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_adapter_folder_holds_alpha_the_times_and_the_call(world: Path) -> None:
    folder = world / "adapters" / "sdxl-999-4-lora"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    weights = "pytorch_lora_weights.safetensors"
    assert files == {weights, "scheduler/scheduler_config.json", "export.json", "README.md"}
    with safe_open(folder / weights, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (2, 6)
    card = (folder / "README.md").read_text()
    assert "load_lora_weights" in card and "num_inference_steps=4, guidance_scale=0)" in card
    assert card.index("load_lora_weights") < card.index("What it is")
    assert "teacher in 4 steps" in card and "LCMScheduler.from_pretrained" in card


def test_no_local_path_is_written(world: Path) -> None:
    for path in [*(world / "exports").rglob("*"), *(world / "adapters").rglob("*")]:
        assert path.is_dir() or str(world).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["sdxl-999-4-lora", "sd-399-4", "sd3-3-lora"])
def test_an_opened_run_is_the_trained_student(world: Path, name: str) -> None:
    opened = open_run(world / "runs" / name, CPU)
    assert opened.half_life == 500
    cond = opened.source.conditions(range(2))
    shape = opened.generator.noise_shape(opened.source.shape)
    z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert distance(opened.generator(z, cond), trained(world, name)(z, cond)) < 1e-5


def test_students_that_no_stock_scheduler_runs_are_refused(world: Path, tmp_path: Path) -> None:
    sd, flow = world / "sd" / "teacher", world / "sd3" / "teacher"
    with pytest.raises(ValueError, match="sigma z"):
        student_scheduler(sd, 999, "ve", 4)
    with pytest.raises(ValueError, match=r"num_steps: 3 does not divide t_init \+ 1 = 1000"):
        student_scheduler(sd, 999, "unit", 3)
    with pytest.raises(ValueError, match=r"t_init: 0\.5, but stock flow"):
        student_scheduler(flow, 0.5, "unit", 1)
    unet = tiny_unet2d(tmp_path / "unet", stable_diffusion_scheduler())
    options = {"t_init": 999, "input_convention": "unit", "num_steps": 4, "card": {}}
    with pytest.raises(ValueError, match="num_steps: 4, but UNet2DModel"):
        export_unet2d(unet, {}, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"student\.lora is null"):
        export_lora(world / "runs" / "sd-399-4", tmp_path / "out")
    run = write_run(tmp_path / "run", world / "pixart" / "teacher", (999, "unit", 1, LORA))
    with pytest.raises(ValueError, match="PixArtAlphaPipeline loads no adapters"):
        export_lora(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [2, 3, 4, 8])
@pytest.mark.parametrize("given", [True, False], ids=["sigmas", "own"])
def test_flow_times_are_even_whoever_makes_the_grid(steps: int, given: bool) -> None:
    """FLUX hands the scheduler a grid of sigmas, SD3 and SANA leave it to the scheduler."""
    scheduler = flow_scheduler(1000, 1, steps)
    sigmas = [1 - k / steps for k in range(steps)]
    scheduler.set_timesteps(steps, **({"sigmas": sigmas} if given else {}))
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * s for s in sigmas], rel=1e-6)


def test_evaluation_of_a_student_of_several_steps(tmp_path: Path) -> None:
    teacher = tiny_unet2d(tmp_path / "unet", stable_diffusion_scheduler())
    run = write_run(tmp_path / "run", teacher, (999, "unit", 4, None), "digits")
    rows = evaluate_path(run, num=20)["rows"]
    assert [row["name"] for row in rows[1:]] == ["teacher's weights, 4 steps", "student, 4 steps"]
    assert [row["network_evaluations"] for row in rows] == [20, 4, 4]


@pytest.mark.parametrize("name", ["sd3-4", "sd-999-4"])
def test_samples_of_several_steps_follow_the_seed(world: Path, tmp_path: Path, name: str) -> None:
    """SD3's pipeline keeps its generator from the scheduler; the noise must be seeded even so."""
    draw = partial(sample_path, world / "exports" / name, ["a red seven"], 1)
    images = [draw(seed, tmp_path / str(n))[0].read_bytes() for n, seed in enumerate((7, 7, 8))]
    assert images[0] == images[1] != images[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("sd-399-4", "sd-999-4"),
        ("sdxl-999-4-lora", "sdxl-999-4"),
        ("sd3-4", "sd3"),
        ("flux-4", "flux"),
    ],
)
def test_verification_proves_it_and_sees_a_wrong_export(world: Path, name: str, other: str) -> None:
    folder = world / ("adapters" if CASES[name][-1] else "exports") / name
    assert verify_export(world / "runs" / name, folder) < 1e-4
    with pytest.raises(RuntimeError, match=r"x0 differs|runs the times"):
        verify_export(world / "runs" / name, world / "exports" / other)
