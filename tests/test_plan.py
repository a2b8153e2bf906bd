"""The plan against real runs, the allocator's own record, torch's FLOP counter, closed forms."""

import gc
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from itertools import islice
from pathlib import Path

import builders
import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffdiv.counters import Counters, cuda_autocast
from diffdiv.models import architectures
from diffdiv.models.architectures import ARCHITECTURES, Architecture, read_architecture
from diffdiv.plan import GIB, Assumptions, Plan, knobs, parse_gpu, plan_cycle, render
from diffdiv.rehearsal import PlanSpec, Rehearsal, build_networks

CPU = torch.device("cpu")
UNET = {
    "sample_size": 16,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}
VAE = {
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
}
TINY = PlanSpec(
    Architecture(UNET, VAE, ()),
    size=64,
    batch=4,
    guidance_scale=2.0,
    base_dtype="fp32",
    precision="fp32",
    critic_updates=1,
)
LORA = replace(TINY, architecture=Architecture(UNET | SDXL, VAE, ()), student_rank=4, fake_rank=4)


def rehearse(spec: PlanSpec, counters: Counters) -> None:
    Rehearsal(spec, build_networks(spec), CPU, counters).cycle(critic_updates=1)


@pytest.mark.parametrize(
    ("name", "unet", "text"),
    [
        ("sd15", 859_520_964, [123_060_480]),
        ("sd21", 865_910_724, [340_387_840]),
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
    ],
)
def test_architectures_have_the_released_sizes(name: str, unet: int, text: list[int]) -> None:
    def size(module: torch.nn.Module) -> int:
        return sum(value.numel() for value in module.parameters())

    architecture = ARCHITECTURES[name]
    assert size(architectures.build_unet(architecture, torch.bfloat16)) == unet
    assert size(architectures.build_vae(architecture)) == 83_653_863
    encoders = architectures.build_text_encoders(architecture, torch.bfloat16)
    assert [size(encoder) for encoder in encoders] == text
    assert architecture.pixels_per_latent == 8
    assert name != "sdxl" or architecture.pooled_width == 1280


def test_architecture_of_a_folder(tmp_path: Path) -> None:
    folder = builders.tiny_stable_diffusion(tmp_path / "sd")
    architecture = read_architecture(folder)
    assert architecture.unet["cross_attention_dim"] == 16
    assert len(architecture.text) == 1
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    spec = replace(TINY, architecture=architecture, size=16, batch=1, text_on_gpu=True)
    assert plan_cycle(spec).peak > 0
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"vae.config\.json"):
        read_architecture(folder)


def test_gpu_names_and_sizes() -> None:
    assert parse_gpu("24GB").bytes == parse_gpu(" 24 gib ").bytes == 24 * GIB
    assert parse_gpu("24GB").rate is None
    assert parse_gpu("RTX 4090") == parse_gpu("4090")
    assert parse_gpu("a100-80").bytes == 80 * GIB
    assert parse_gpu("A100-80").rate == 312e12
    for wrong in ("A100", "24", "GB", "-3GB"):
        with pytest.raises(ValueError, match="gpu"):
            parse_gpu(wrong)


def test_counters_on_tensors_of_known_size() -> None:
    with Counters() as counters:
        with counters.kind("weights"):
            kept = torch.empty(100)  # 400 bytes: one block of 512
        with counters.phase("first"):
            gone = torch.empty(1024)
            view = gone[:10].reshape(2, 5)
            del gone
            two = torch.empty(2048)
            counters.tag(two, "features")
            del view
        with counters.phase("second"):
            torch.empty(256)
    assert counters.peaks["first"] == {"weights": 512, "activations": 4096 + 8192}
    assert counters.peaks["second"] == {"weights": 512, "features": 8192, "activations": 1024}
    assert kept.shape == (100,)


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        replace(TINY, checkpointing=False, vae_images=1),
        LORA,
        replace(LORA, fake_rank=None, gan_trunk="fake", checkpointing=False),
        pytest.param(replace(LORA, gan_blocks=None, num_ema=0), marks=pytest.mark.slow),
    ],
    ids=["full", "no checkpoints, VAE", "SDXL, LoRA", "mixed, fake trunk", "no GAN"],
)
def test_plan_equals_a_real_run(spec: PlanSpec) -> None:
    # an oracle that knows nothing of dispatch modes: every allocation, scratch of kernels included
    counters = Counters()
    gc.collect()  # what earlier tests have left must not be freed under the profiler
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, counters:
        rehearse(spec, counters)
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    plan = plan_cycle(spec)
    assert plan.peak == pytest.approx(peak, rel=0.15)
    counted = {phase: sum(kinds.values()) for phase, kinds in counters.peaks.items()}
    planned = {phase: sum(kinds.values()) for phase, kinds in plan.peaks.items()}
    assert planned == pytest.approx(counted, rel=0.02)


def test_bf16_plan_equals_a_real_run_with_the_dtypes_of_cuda() -> None:
    spec = replace(LORA, size=64, batch=1, base_dtype="bf16", precision="bf16")
    with cuda_autocast(), Counters() as counters:
        rehearse(spec, counters)
    peak = max(sum(kinds.values()) for kinds in counters.peaks.values())
    assert plan_cycle(spec).peak == pytest.approx(peak, rel=0.02)


def test_autocast_as_on_cuda() -> None:
    x, norm = torch.randn(2, 4, 4, 4, dtype=torch.bfloat16), torch.nn.GroupNorm(2, 4)
    norm.to(torch.bfloat16)
    with cuda_autocast():
        assert norm(x).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == torch.float32  # the rule of CUDA's autocast, not of the CPU's
            assert torch.nn.functional.interpolate(x, scale_factor=2.0).dtype == torch.float32
            assert torch.nn.functional.conv2d(x, x).dtype == torch.bfloat16


def test_flops_equal_those_of_flop_counter_mode() -> None:
    spec = replace(LORA, checkpointing=False, critic_updates=2)
    rehearsal = Rehearsal(spec, build_networks(spec), CPU, Counters())
    with FlopCounterMode(display=False) as counter:
        rehearsal.cycle(critic_updates=2)
    assert sum(plan_cycle(spec).flops.values()) == counter.get_total_flops()


def test_the_first_cycle_is_like_later_ones() -> None:
    def peaks(cycles: int) -> dict[str, dict[str, int]]:
        nets, counters = build_networks(TINY), Counters()
        with FakeTensorMode(), counters:
            rehearsal = Rehearsal(TINY, nets, CPU, counters)
            for _ in range(cycles):
                rehearsal.cycle(critic_updates=1)
        return counters.peaks

    assert peaks(1) == peaks(2)


def test_static_bytes_are_those_of_the_weights() -> None:
    def rounded(net: torch.nn.Module) -> int:
        return sum(-(-4 * value.numel() // 512) * 512 for value in net.parameters())

    nets = build_networks(LORA)
    student, fake = rounded(nets["student"]), rounded(nets["fake"])
    plan = plan_cycle(LORA)
    kinds = plan.peaks["student"]
    assert kinds["frozen weights"] == rounded(nets["base"]) - student - fake
    assert kinds["EMA"] == student
    heads = kinds["trained weights"] - student - fake
    assert 4 * plan.trained["disc"] <= heads <= 4 * plan.trained["disc"] + 512 * 10  # ten tensors
    assert kinds["optimiser"] >= 2 * kinds["trained weights"]


@pytest.mark.slow
def test_knobs_agree_with_plans_made_anew() -> None:
    # ranks at which adapters are larger than the 512 bytes that sizes are rounded to
    spec = replace(LORA, student_rank=64, fake_rank=64, vae_images=1)
    plan = plan_cycle(spec)
    peaks = {knob.name: knob.peak for knob in knobs(plan)}
    assert peaks["no EMA"] == plan_cycle(replace(spec, num_ema=0)).peak
    halved = plan_cycle(replace(spec, student_rank=32, fake_rank=32)).peak
    assert peaks["LoRA rank halved"] == pytest.approx(halved, rel=0.1)
    assert peaks["8-bit optimiser moments"] == plan_cycle(replace(spec, optimizer_bits=8)).peak
    assert peaks["batch halved"] < plan.peak < peaks["checkpointing off"]
    half = replace(spec, base_dtype="bf16", precision="bf16")
    by_knob = {knob.name: knob.peak for knob in islice(knobs(plan_cycle(half)), 4)}
    assert by_knob["int8 base (linear layers)"] == plan_cycle(replace(half, base_dtype="int8")).peak


def test_verdict_and_tables() -> None:
    plan = plan_cycle(replace(TINY, gan_blocks=None))
    needed = Assumptions(fixed_bytes=0, fragmentation=0.5).needed(plan.peak)
    assert needed == pytest.approx(1.5 * plan.peak, abs=1)

    def text(plan: Plan, gpu: str, **assumed: float) -> str:
        console = Console(file=StringIO(), width=200)
        console.print(render(plan, parse_gpu(gpu), assume=Assumptions(**assumed)))
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()

    assert text(plan, "24GB").startswith("fits on a 24 GB card")
    assert "card not named" in text(plan, "24GB")
    assert text(plan, "1GB").startswith("does not fit")  # the margin alone is 1 GiB
    shown = text(plan, "4090", utilisation=0.5)
    assert "165 TFLOP/s (vendor) x 50% (assumed)" in shown


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        plan_cycle(replace(TINY, size=100))
    with pytest.raises(ValueError, match="no block 'middle'"):
        plan_cycle(replace(TINY, gan_blocks=("middle",)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch", "gib"), [("sd15", 1, 3.40), ("sd15", 8, 6.20), ("sdxl", 1, 10.29)]
)
def test_real_sizes_in_two_minutes(name: str, batch: int, gib: float) -> None:
    """Reference peaks: another program's plan of a cycle without discriminator and average."""
    spec = PlanSpec(
        ARCHITECTURES[name],
        size=1024 if name == "sdxl" else 512,
        batch=batch,
        guidance_scale=2.0,
        student_rank=64,
        fake_rank=64,
        gan_blocks=None,
        num_ema=0,
    )
    start = time.process_time()
    assert plan_cycle(spec).peak / GIB == pytest.approx(gib, rel=0.1)
    assert time.process_time() - start < 120


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd_step", "sdxl_step"])
def test_benchmarks_run_without_a_gpu(name: str) -> None:
    program = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    command = [sys.executable, str(program), "--device", "cpu", "--tiny", "--cycles", "1"]
    command += ["--dtype", "fp32", "--critic-updates", "1", "--checkpointing", "--rank", "2"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in output.splitlines()[-3:]] == ["usual", "full", "shared"]
