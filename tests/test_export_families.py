"""Students of several steps, adapters, SDXL and flow models, run by stock diffusers alone.

One process that cannot import diffdiv loads every export and writes down x0, the noise it took,
the times it ran and the step counts it refused.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from builders import (
    stable_diffusion_scheduler,
    tiny_stable_diffusion,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet2d,
)
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffdiv.evaluate import evaluate_path
from diffdiv.export import export_lora, export_run, export_unet2d
from diffdiv.generate import sample_path
from diffdiv.models.adapters import SharedBase
from diffdiv.models.backbones import PromptEncoder, load_denoiser
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
READER = """
import inspect, json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffdiv":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
import diffusers, torch
from safetensors.torch import load_file, save_file

root = Path(sys.argv[1])
found, facts = {}, {}

def pipelines():
    for folder in sorted((root / "exports").iterdir()):
        yield folder.name, diffusers.AutoPipelineForText2Image.from_pretrained(folder), folder
    for folder in sorted((root / "adapters").iterdir()):
        teacher = (root / f"{folder.name}.txt").read_text()
        base = diffusers.AutoPipelineForText2Image.from_pretrained(teacher)
        kind = json.loads((folder / "scheduler/scheduler_config.json").read_text())["_class_name"]
        base.scheduler = getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler")
        base.load_lora_weights(folder)
        yield f"{folder.name}/adapter", base, folder

for name, pipe, folder in pipelines():
    pipe.set_progress_bar_config(disable=True)
    z = load_file(root / "z.safetensors")["z"]
    call = json.loads((folder / "export.json").read_text())["call"]
    steps = call.pop("num_inference_steps")
    call |= {"prompt": sys.argv[2:], "output_type": "latent"}
    if "use_resolution_binning" in inspect.signature(type(pipe).__call__).parameters:
        call["use_resolution_binning"] = False
    flux = isinstance(pipe, diffusers.FluxPipeline)
    if flux:
        z = pipe._pack_latents(z, *z.shape)
        call |= {"height": 8 * pipe.vae_scale_factor, "width": 8 * pipe.vae_scale_factor}
    torch.manual_seed(5)
    call |= {"latents": z, "generator": torch.Generator().manual_seed(5)}
    x0 = pipe(num_inference_steps=steps, **call).images
    again = torch.Generator().manual_seed(5)
    draws = [x0, z] + [torch.randn(z.shape, generator=again) for _ in range(steps - 1)]
    if flux:
        size = 8 * pipe.vae_scale_factor
        draws = [pipe._unpack_latents(d, size, size, pipe.vae_scale_factor) for d in draws]
    found[f"{name}/x0"], found[f"{name}/z"] = draws[0], torch.cat(draws[1:], 1)
    facts[name] = {"times": pipe.scheduler.timesteps.tolist(), "refused": []}
    for other in {1, steps - 1, steps + 1} - {0, steps}:
        try:
            pipe(num_inference_steps=other, **call)
        except ValueError:
            facts[name]["refused"].append(other)
facts["modules"] = [name for name in sys.modules if name.partition(".")[0] == "diffdiv"]
save_file({k: v.contiguous() for k, v in found.items()}, root / "found.safetensors")
(root / "facts.json").write_text(json.dumps(facts))
"""


def projected_encoder() -> CLIPTextModelWithProjection:
    config = tiny_text_encoder().config.to_dict() | {"projection_dim": 16}
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))


def t5(width: int = 8) -> tuple[T5EncoderModel, T5Tokenizer]:
    letters = [(f"{mark}{c}", -1.0) for c in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "▁")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    words = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(words), **sizes)
    return T5EncoderModel(config), words


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.0,
    )


def sdxl(folder: Path) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=4,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=tiny_text_encoder(),
        text_encoder_2=projected_encoder(),
        tokenizer=tiny_tokenizer(folder / "1"),
        tokenizer_2=tiny_tokenizer(folder / "2"),
        unet=unet,
        scheduler=stable_diffusion_scheduler(),
        add_watermarker=False,
    )


def sd3(folder: Path) -> StableDiffusion3Pipeline:
    encoder, words = t5(32)
    net = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=8,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=net,
        vae=vae(),
        text_encoder=projected_encoder(),
        text_encoder_2=projected_encoder(),
        text_encoder_3=encoder,
        tokenizer=tiny_tokenizer(folder / "1"),
        tokenizer_2=tiny_tokenizer(folder / "2"),
        tokenizer_3=words,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(folder: Path) -> FluxPipeline:
    encoder, words = t5()
    net = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=True,
    )
    return FluxPipeline(
        transformer=net,
        vae=vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(folder / "1"),
        text_encoder_2=encoder,
        tokenizer_2=words,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def pixart(folder: Path) -> PixArtAlphaPipeline:
    encoder, words = t5()
    net = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=12,
        caption_channels=8,
        sample_size=8,
        norm_num_groups=4,
    )
    parts = {"transformer": net, "vae": vae(), "scheduler": DDPMScheduler(clip_sample=False)}
    return PixArtAlphaPipeline(text_encoder=encoder, tokenizer=words, **parts)


def sana(folder: Path) -> SanaPipeline:
    _, words = t5()
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    net = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        patch_size=1,
        timestep_scale=2.0,
    )
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    codec = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    parts = {"transformer": net, "vae": codec, "scheduler": scheduler}
    return SanaPipeline(text_encoder=Gemma2Model(config), tokenizer=words, **parts)


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
    torch.manual_seed(0)
    tiny_stable_diffusion(root / "sd")
    for build in (sdxl, sd3, flux, pixart, sana):
        name = build.__name__
        build(root / "scratch" / name).save_pretrained(root / name / "teacher")
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
    subprocess.run([sys.executable, "-I", "-c", READER, root, *PROMPTS], check=True)
    return root


def trained(world: Path, name: str) -> Generator:
    """The student as it was trained: an adapter is on its base, not merged into it."""
    kind, t_init, convention, steps, lora = CASES[name]
    denoiser = load_denoiser(world / kind / "teacher")
    weights = load_file(world / "runs" / name / "state/step-00000001/student.ema-500.safetensors")
    net = denoiser.net
    if lora:
        options = {"rank": lora["rank"], "alpha": lora["alpha"], "seed": 0}
        net = SharedBase(net).add("student", targets=lora_targets(net), **options)
    net.load_state_dict(weights)
    return Generator(denoiser.with_net(net), t_init, convention, steps)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_a_plain_call_runs_the_trained_student(world: Path, name: str) -> None:
    found, facts = load_file(world / "found.safetensors"), read(world / "facts.json")
    kind, _, convention, steps, lora = CASES[name]
    student, cond = trained(world, name), PromptEncoder(world / kind / "teacher")(PROMPTS)
    t = torch.tensor(student.times, dtype=torch.float64)
    for export in [name, f"{name}/adapter"] if lora else [name]:
        z = found[f"{export}/z"]
        assert z.shape[1] == steps * 4
        with torch.no_grad():
            x0 = student(z, cond)
            untrained = student.with_net(load_denoiser(world / kind / "teacher").net)(z, cond)
        assert distance(found[f"{export}/x0"], x0) < 1e-4
        assert distance(found[f"{export}/x0"], found[f"{name}/x0"]) < 1e-4, "merged = adapter"
        assert distance(untrained, x0) > 1e-2, "the test would not see the student's weights"
        times = student.denoiser.schedule.net_time(t).tolist()
        assert facts[export]["times"] == pytest.approx(times, rel=1e-6)
        if student.denoiser.schedule.family == "flow":
            refused = {1, steps - 1, steps + 1} if steps > 1 else set()
        else:  # fewer steps stay among the times that were trained
            refused = {steps + 1} if convention == "unit" else set()
        assert set(facts[export]["refused"]) == refused
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
