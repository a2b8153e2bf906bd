"""Exports are loaded by stock diffusers in a process that cannot import diffdiv, and give x0."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders import stable_diffusion_scheduler, tiny_stable_diffusion, tiny_unet2d
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from diffdiv import export, generate
from diffdiv.core.schedule import schedule_from_config
from diffdiv.models.backbones import PromptEncoder, load_denoiser
from diffdiv.models.denoiser import Condition
from diffdiv.models.generator import Generator
from diffdiv.runtime import student as student_module
from diffdiv.schedulers import truncated_scheduler

PROMPT = "a red seven on white"
TIMES, CONVENTIONS = (399, 625, 999), ("unit", "ve")
CASES = [("eps", convention, t_init) for convention in CONVENTIONS for t_init in TIMES]
CASES += [("v", "unit", 999), ("v", "ve", 625), ("linear", "unit", 399), ("linear", "ve", 999)]
UNETS = [("edm", "ve", 80.0, 5), ("linear", "unit", 999, None), ("flow", "unit", 1.0, None)]
READER = """
import json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffdiv":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from safetensors.torch import load_file, save_file

root, prompt = Path(sys.argv[1]), sys.argv[2]
z = load_file(root / "z.safetensors")
out, facts = {}, {}
for folder in sorted((root / "exports").iterdir()):
    name = folder.name
    if name.startswith("unet"):
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        labels = [1, 2] if pipe.unet.config.num_class_embeds else None
        out[name] = pipe(class_labels=labels, latents=z["unet"], output_type="x0").images
        try:
            DiffusionPipeline.from_pretrained(folder)
            facts[name] = "loaded without trust"
        except ValueError as error:
            facts[name] = str(error)
        continue
    for loader in (AutoPipelineForText2Image, DiffusionPipeline):
        pipe = loader.from_pretrained(folder)
        call = {"prompt": [prompt] * 2, "latents": z["sd"], "guidance_scale": 0}
        images = pipe(**call, num_inference_steps=1, output_type="latent").images
        out[f"{name}/{loader.__name__}"] = images
    facts[name] = {"timesteps": [int(t) for t in pipe.scheduler.timesteps], "refused": []}
    for steps in (2, 4, 50):
        try:
            pipe(**call, num_inference_steps=steps, output_type="latent")
        except ValueError:
            facts[name]["refused"].append(steps)
facts["modules"] = [name for name in sys.modules if name.partition(".")[0] == "diffdiv"]
save_file(out, root / "x0.safetensors")
(root / "facts.json").write_text(json.dumps(facts))
"""


def moved(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's network, every weight a little away from the teacher's."""
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}


def student_x0(teacher: Path, t_init: float, convention: str, z: torch.Tensor, cond: Condition):
    """The trainer's own output."""
    denoiser = load_denoiser(teacher)
    denoiser.net.load_state_dict(moved(teacher))
    with torch.no_grad():
        return Generator(denoiser, t_init, convention)(z, cond)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Teachers, their exports, and what a fresh process without diffdiv makes of the exports."""
    root = tmp_path_factory.mktemp("world")
    generator = torch.Generator().manual_seed(2)
    sd = torch.randn(2, 4, 8, 8, generator=generator)
    save_file(
        {"sd": sd, "unet": torch.randn(2, 1, 8, 8, generator=generator)}, root / "z.safetensors"
    )
    schedulers = {
        "eps": stable_diffusion_scheduler(),
        "v": stable_diffusion_scheduler(prediction_type="v_prediction"),
        "linear": DDPMScheduler(),
        "edm": EDMEulerScheduler(sigma_max=80.0),
        "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    for name in ("eps", "v", "linear"):
        tiny_stable_diffusion(root / name, schedulers[name])
    for name, convention, t_init in CASES:
        export.export_pipeline(
            root / name / "teacher",
            moved(root / name / "teacher"),
            root / "exports" / f"{name}-{convention}-{t_init}",
            t_init=t_init,
            input_convention=convention,
            card={},
        )
    for name, convention, t_init, classes in UNETS:
        teacher = tiny_unet2d(root / f"unet-{name}", schedulers[name], classes)
        export.export_unet2d(
            teacher,
            moved(teacher),
            root / "exports" / f"unet-{name}",
            t_init=t_init,
            input_convention=convention,
            card={},
        )
    (root / "reader.py").write_text(READER)
    subprocess.run([sys.executable, "-I", root / "reader.py", root, PROMPT], check=True)
    return root


@pytest.mark.parametrize(("kind", "convention", "t_init"), CASES)
def test_plain_call_in_a_fresh_process_gives_x0(world, kind, convention, t_init):
    """x0 = (x_t - sigma eps)/alpha or alpha x_t - sigma v, by hand from the teacher's betas."""
    teacher, z = world / kind / "teacher", load_file(world / "z.safetensors")["sd"]
    cond = PromptEncoder(teacher)([PROMPT] * 2)
    betas = {"linear": DDPMScheduler().betas}.get(kind, stable_diffusion_scheduler().betas)
    alpha_bar = float((1 - betas.double()).cumprod(0)[t_init])
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x_t = z * sigma if convention == "ve" else z
    denoiser = load_denoiser(teacher)
    denoiser.net.load_state_dict(moved(teacher))
    with torch.no_grad():
        out = denoiser.net(x_t, torch.tensor([t_init]), cond.text).sample
    by_hand = alpha * x_t - sigma * out if kind == "v" else (x_t - sigma * out) / alpha
    trained = student_x0(teacher, t_init, convention, z, cond)
    found = load_file(world / "x0.safetensors")
    name = f"{kind}-{convention}-{t_init}"
    for loader in ("AutoPipelineForText2Image", "DiffusionPipeline"):
        x0 = found[f"{name}/{loader}"]
        assert float((x0 - by_hand).abs().max() / by_hand.abs().max()) < 1e-4
        assert float((x0 - trained).abs().max() / trained.abs().max()) < 1e-4
    facts = json.loads((world / "facts.json").read_text())[name]
    assert facts["timesteps"] == [t_init]
    if convention == "unit":
        assert facts["refused"] == [2, 4, 50]


def test_the_two_conventions_are_different_students(world):
    found = load_file(world / "x0.safetensors")
    unit, ve = (found[f"eps-{c}-399/DiffusionPipeline"] for c in CONVENTIONS)
    assert float((unit - ve).abs().max() / unit.abs().max()) > 0.05


@pytest.mark.parametrize(("name", "convention", "t_init", "classes"), UNETS)
def test_unet_export_gives_the_trainers_x0(world, name, convention, t_init, classes):
    z = load_file(world / "z.safetensors")["unet"]
    cond = Condition(label=torch.tensor([1, 2]) if classes else None)
    trained = student_x0(world / f"unet-{name}", t_init, convention, z, cond)
    x0 = load_file(world / "x0.safetensors")[f"unet-{name}"]
    assert float((x0 - trained).abs().max() / trained.abs().max()) < 1e-4
    refusal = json.loads((world / "facts.json").read_text())[f"unet-{name}"]
    assert "trust_remote_code" in refusal


def test_diffdiv_was_not_imported_and_no_local_path_was_written(world):
    assert json.loads((world / "facts.json").read_text())["modules"] == []
    for path in (world / "exports").rglob("*"):
        assert path.is_dir() or str(world).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("t_init", TIMES)
def test_truncated_schedule_is_the_head_of_the_full_one(t_init):
    """beta_end values as computed once for t = 399 and 625 from the closed form."""
    full = DDPMScheduler.from_config(stable_diffusion_scheduler().config)
    short = truncated_scheduler(full, t_init, "unit")
    known = {399: 0.0037530789767896075, 625: 0.006312087729390821, 999: 0.012}[t_init]
    assert short.config.beta_end == pytest.approx(known, rel=1e-12)
    torch.testing.assert_close(
        short.alphas_cumprod, full.alphas_cumprod[: t_init + 1], rtol=1e-6, atol=0
    )


def test_half_precision_is_written_and_read(world, tmp_path):
    teacher = world / "v" / "teacher"
    settings = {"t_init": 625, "input_convention": "unit", "card": {}, "dtype": torch.float16}
    export.export_pipeline(teacher, moved(teacher), tmp_path / "half", **settings)
    stored = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}


def test_card_names_the_call_and_lets_nothing_through(world, tmp_path):
    teacher = world / "eps" / "teacher"
    (teacher / "README.md").write_text("---\nlicense: openrail\n---\n")
    evil = "<script>x</script> ![b](http://e/x.png)\n---\nlicense: mit\n```{{ 7*7 }}"
    rows = [
        {"name": evil, "network_evaluations": 40, "metrics": {"a | b": 1.23456}},
        {"name": "student", "network_evaluations": 1, "metrics": {"c": 0.5}},
    ]
    card = {"prompt": evil, "facts": {evil: evil}}
    card["evaluation"] = {"rows": rows, "card": {"n": 1000, "resize": None, evil: 1}}
    settings = {"t_init": 399, "input_convention": "unit", "card": card}
    out = export.export_pipeline(teacher, moved(teacher), tmp_path / "out", **settings)
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "openrail" and front["pipeline_tag"] == "text-to-image"
    assert text.index("guidance_scale=0") < text.index("What it is")
    for bad in ("<script", "](http", "\nlicense: mit", "49"):
        assert bad not in text
    assert text.count("```") == 2 and "| 1.235 |" in text and "n: 1000" in text


def a_run(world: Path, folder: Path, kind: str, weights: dict, monkeypatch) -> Path:
    """A run folder whose state is stood in for by ``weights``."""
    teacher = world / kind if kind.startswith("unet") else world / kind / "teacher"
    student = {"t_init": 80.0 if kind == "unet-edm" else 399.0, "input_convention": "unit"}
    student["ema_half_lives"] = [half_life for half_life in weights if half_life]
    student |= {"num_steps": 1, "lora": None}
    config = {"recipe": "f_distill", "teacher": {"path": str(teacher)}, "student": student}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def load_weights(run, network, ema):
        assert (run, network) == (folder, "student")
        return weights[ema]

    monkeypatch.setattr(student_module, "load_weights", load_weights)
    return folder


def test_run_is_exported_and_sampled(world, tmp_path, monkeypatch):
    teacher = world / "eps" / "teacher"
    plain = load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors")
    weights = {None: plain, 500: moved(teacher)}
    run = a_run(world, tmp_path / "run", "eps", weights, monkeypatch)
    row = {"name": "student", "network_evaluations": 1, "metrics": {"frechet_judge": 1.25}}
    evaluation = {"rows": [row], "card": {"ema_half_life": 500}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    for ema, expected in ((0, None), (None, 500)):
        out = export.export_run(run, run / "export", ema=ema, force=True)
        stored = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(stored[name], weights[expected][name]) for name in stored)
        # figures belong to the weights they were measured with
        assert ("frechet_judge" in (out / "README.md").read_text()) == (expected == 500)
    record = json.loads((out / "export.json").read_text())
    assert record["t_init"] == 399 and record["call"]["num_inference_steps"] == 1
    files = generate.sample_path(run, ["a red/../seven", "white"], 2, 7, tmp_path / "images")
    assert [file.name for file in files] == [
        "00000-a-red-seven.png",
        "00001-a-red-seven.png",
        "00002-white.png",
        "00003-white.png",
    ]
    (again,) = generate.sample_path(out, ["a red/../seven"], 1, 8, tmp_path / "again")
    assert again.read_bytes() == files[1].read_bytes() != files[0].read_bytes()
    with pytest.raises(ValueError, match="prompts: none"):
        generate.sample_path(out, [], 1, 0, tmp_path / "none")


def test_class_conditional_run(world, tmp_path, monkeypatch):
    weights = {None: moved(world / "unet-edm")}
    run = a_run(world, tmp_path / "run", "unet-edm", weights, monkeypatch)
    out = export.export_run(run, tmp_path / "out")
    files = generate.sample_path(out, ["3", "4"], 1, 0, tmp_path / "images")
    assert [file.name for file in files] == ["00000-3.png", "00001-4.png"]
    with pytest.raises(ValueError, match="class numbers"):
        generate.sample_path(out, ["cat"], 1, 0, tmp_path / "none")


def test_foreign_code_is_not_loaded(world, tmp_path):
    out = tmp_path / "out"
    settings = {"t_init": 80.0, "input_convention": "ve", "card": {}}
    export.export_unet2d(world / "unet-edm", moved(world / "unet-edm"), out, **settings)
    code = out / "one_step_unet.py"
    code.write_text(code.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="does not ship"):
        generate.load_pipeline(out)
    assert not (tmp_path / "ran").exists()


def test_folders_are_replaced_only_when_that_is_safe(world, tmp_path):
    teacher, out = world / "unet-edm", tmp_path / "out"
    call = (teacher, moved(teacher), out)
    settings = {"t_init": 80.0, "input_convention": "ve", "card": {}}
    export.export_unet2d(*call, **settings)
    with pytest.raises(ValueError, match="not empty"):
        export.export_unet2d(*call, **settings)
    (out / "stale.txt").touch()
    export.export_unet2d(*call, **settings, force=True)
    assert not (out / "stale.txt").exists() and (out / "export.json").is_file()
    broken = {name: value[:1] for name, value in moved(teacher).items()}
    with pytest.raises(RuntimeError):
        export.export_unet2d(teacher, broken, out, **settings, force=True)
    assert (out / "export.json").is_file() and [p.name for p in tmp_path.iterdir()] == ["out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    with pytest.raises(ValueError, match="only an export"):
        export.export_unet2d(*call[:2], precious, **settings, force=True)
    with pytest.raises(ValueError, match="teacher lies there"):
        export.export_unet2d(*call[:2], teacher, **settings, force=True)


@pytest.mark.parametrize("t_init", [0, 1000, 399.5])
def test_times_outside_the_schedule_are_refused(world, tmp_path, t_init):
    teacher = world / "eps" / "teacher"
    settings = {"t_init": t_init, "input_convention": "unit", "card": {}}
    with pytest.raises(ValueError, match=r"1\.\.999"):
        export.export_pipeline(teacher, {}, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.yaml"):
        export.export_run(tmp_path, tmp_path / "out")
    (tmp_path / "config.yaml").write_text("recipe: pretrain\nrun: {}\n")
    with pytest.raises(ValueError, match="no 'student'"):
        export.export_run(tmp_path, tmp_path / "out")


def test_schedules_agree_with_the_denoiser(world):
    """The network's time that the pipeline file records is the one the trainer used."""
    index = json.loads((world / "exports" / "unet-edm" / "model_index.json").read_text())
    config = json.loads((world / "unet-edm" / "scheduler" / "scheduler_config.json").read_text())
    schedule, _ = schedule_from_config("EDMEulerScheduler", config)
    time = schedule.net_time(torch.tensor([80.0], dtype=torch.float64))
    scale = torch.tensor(index["edm_time_scale"]) / 4
    assert float(time) == pytest.approx(float(scale * torch.tensor(80.0).double().log()))
