"""Time and peak memory of one distillation cycle at real size; used by sd_step.py, sdxl_step.py.

Weights are random: speed and memory do not depend on their values. A cycle is train/f_distill.py's
(diffdiv/rehearsal.py): samples, critic updates, student update, with optimisers and an average.

    usual    three full copies, the two guidance branches in two passes, eager
    full     three full copies, guidance in one batch (compiled with --compile)
    shared   one frozen base; student and fake score are LoRA adapters on it

MFU: FLOPs without recomputation / time / the card's rate in a large matrix product, measured here.
On a CPU only a tiny network is run (--tiny), to see that the program works.
"""

import argparse
import datetime
import gc
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import diffusers
import torch
from torch import Tensor

from diffdiv.counters import Counters
from diffdiv.models.architectures import ARCHITECTURES, Architecture
from diffdiv.models.denoiser import Condition, GuidedDenoiser
from diffdiv.plan import GIB, plan_cycle
from diffdiv.rehearsal import PlanSpec, Rehearsal, build_networks

VARIANTS = ("usual", "full", "shared")


class TwoPasses(GuidedDenoiser):
    """Guidance the usual way."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        x0_cond = self.denoiser(x_t, t, cond)
        return self._combine(x0_cond, self.denoiser(x_t, t, self.uncond.expand(len(x_t))))


class Quiet(Counters):
    """No phases: they collect garbage, which would be timed."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Row:
    """One variant's measurement; peaks in bytes, None where the device has no such count."""

    variant: str
    seconds: tuple[float, ...]
    allocated: int
    reserved: int | None
    flops: int


def tiny(architecture: Architecture) -> Architecture:
    """The same kinds of blocks, a few thousand weights."""
    levels = architecture.unet["block_out_channels"]
    assert isinstance(levels, list)
    unet = {
        **architecture.unet,
        "block_out_channels": [8 * 2**i for i in range(len(levels))],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "transformer_layers_per_block": 1,
    }
    if "addition_embed_type" in unet:
        unet |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48 + 16}
    return replace(architecture, unet=unet)


def options(architecture: str, size: int, description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="pixels")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--critic-updates", type=int, default=5)
    parser.add_argument("--no-gan", action="store_true", help="plain reverse KL")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="repeated blocks; not of 'usual'")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--cycles", type=int, default=10, help="timed, after two others")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--tiny", action="store_true", help="a tiny network of the same kind")
    chosen = parser.parse_args()
    if chosen.device == "cpu" and not chosen.tiny:
        parser.error("on a CPU use --tiny")
    if chosen.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"no device {chosen.device!r} here; use --device cpu --tiny")
    chosen.architecture = architecture
    chosen.size = chosen.size or (64 if chosen.tiny else size)
    return chosen


def specification(chosen: argparse.Namespace, variant: str) -> PlanSpec:
    """What that variant runs."""
    architecture = ARCHITECTURES[chosen.architecture]
    rank = chosen.rank if variant == "shared" else None
    return PlanSpec(
        tiny(architecture) if chosen.tiny else architecture,
        size=chosen.size,
        batch=chosen.batch,
        guidance_scale=chosen.guidance,
        student_rank=rank,
        fake_rank=rank,
        checkpointing=chosen.checkpointing,
        base_dtype=chosen.dtype,
        precision=chosen.dtype,
        critic_updates=chosen.critic_updates,
        gan_blocks=None if chosen.no_gan else ("mid_block",),
    )


def measure(chosen: argparse.Namespace, variant: str) -> Row:
    """Build, warm up, time."""
    spec, device = specification(chosen, variant), torch.device(chosen.device)
    cuda = device.type == "cuda"
    # on the CPU, operators are counted: the times of a tiny network mean nothing anyway
    counters = Quiet() if cuda else Counters()
    nets = build_networks(spec)
    with nullcontext() if cuda else counters:
        rehearsal = Rehearsal(spec, nets, device, counters)
        teacher = rehearsal.critic.teacher
        if variant == "usual" and isinstance(teacher, GuidedDenoiser):
            two = TwoPasses(teacher.denoiser, teacher.scale, teacher.uncond)
            rehearsal.critic = replace(rehearsal.critic, teacher=two)
        elif chosen.compile:
            for net in {nets["base"], nets["student"], nets["fake"]}:
                if isinstance(net, diffusers.ModelMixin):
                    net.compile_repeated_blocks()
        seconds = []
        for index in range(2 + chosen.cycles):
            if cuda:
                torch.cuda.synchronize()
            if cuda and index == 2:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            rehearsal.cycle(critic_updates=chosen.critic_updates)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    plain = plan_cycle(replace(spec, checkpointing=False))
    counted = max((sum(kinds.values()) for kinds in counters.peaks.values()), default=0)
    return Row(
        variant,
        tuple(seconds[2:]),
        torch.cuda.max_memory_allocated() if cuda else counted,
        torch.cuda.max_memory_reserved() if cuda else None,
        sum(plain.flops.values()),
    )


def matrix_rate(device: torch.device, dtype: str) -> float:
    """FLOP/s of a large matrix product, the best of twenty."""
    cuda = device.type == "cuda"
    side = 8192 if cuda else 256
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def table(chosen: argparse.Namespace, rows: list[Row | str], rate: float) -> str:
    """Markdown: where, when, how, and the figures."""
    cuda = chosen.device != "cpu"
    card = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})"
    lines = [
        f"{card}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"{datetime.date.today()}; matrix product in {chosen.dtype}: {rate / 1e12:.4g} TFLOP/s",
        "",
        f"`{shlex.join(['python', *sys.argv])}`",
        "",
        "| variant | s/cycle (min..max) | images/s | peak GiB | reserved | TFLOP | MFU |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if isinstance(row, str):
            lines.append(f"| {row} | out of memory | | | | | |")
            continue
        middle = statistics.median(row.seconds)
        reserved = "" if row.reserved is None else f"{row.reserved / GIB:.2f}"
        lines.append(
            f"| {row.variant} | {middle:.3f} ({min(row.seconds):.3f}..{max(row.seconds):.3f}) "
            f"| {chosen.batch / middle:.3g} | {row.allocated / GIB:.3f} | {reserved} "
            f"| {row.flops / 1e12:.4g} | {row.flops / middle / rate:.1%} |"
        )
    return "\n".join(lines)


def main(architecture: str, size: int, description: str | None) -> None:
    """Measure every variant and print the table."""
    chosen = options(architecture, size, description)
    rows: list[Row | str] = []
    for variant in chosen.variants:
        try:
            rows.append(measure(chosen, variant))
        except torch.OutOfMemoryError:
            rows.append(variant)
        gc.collect()
        if chosen.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    print(table(chosen, rows, matrix_rate(torch.device(chosen.device), chosen.dtype)))
