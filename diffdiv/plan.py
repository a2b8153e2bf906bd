"""What a distillation will need on one GPU, without a GPU and without weights.

One cycle of train/f_distill.py runs on fake tensors (shapes without data): see rehearsal.py. What
no operator shows is a declared margin: CUDA context, workspaces of cuDNN and cuBLAS, NCCL buffers,
fragmentation of the allocator. Time is FLOPs / (peak rate of the card x an assumed utilisation).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffdiv.counters import Counters, cuda_autocast
from diffdiv.rehearsal import PlanSpec, Rehearsal, build_networks

GIB = 2**30
#: one byte a value and a float32 scale every 256, instead of four bytes
_EIGHT_BITS = (1 + 4 / 256) / 4


@dataclass(frozen=True)
class Gpu:
    """A card: its name, memory in bytes, and dense bfloat16 matrix rate in FLOP/s if known."""

    name: str
    bytes: int
    rate: float | None = None


#: name -> GiB, vendor's peak of dense bfloat16 with float32 accumulation, TFLOP/s
_CARDS: Mapping[str, tuple[int, float]] = {
    "3090": (24, 71),
    "4080": (16, 97.5),
    "4090": (24, 165),
    "5090": (32, 209.5),
    "A10": (24, 125),
    "L4": (24, 121),
    "L40S": (48, 362),
    "A100-40": (40, 312),
    "A100-80": (80, 312),
    "H100": (80, 989),
    "H200": (141, 989),
}


def parse_gpu(text: str) -> Gpu:
    """A card by name ("4090", "A100-80", "RTX 3090") or by memory ("24GB", "24 GiB": both 2^30).

    Raises:
        ValueError: for anything else.
    """
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*Gi?B", text.strip(), re.IGNORECASE):
        return Gpu(f"a {size[1]} GB card", int(float(size[1]) * GIB))
    name = re.sub(r"nvidia|rtx|\s", "", text, flags=re.IGNORECASE).upper()
    if name not in _CARDS:
        known = ", ".join(_CARDS)
        raise ValueError(f"gpu {text!r} is neither a memory size ('24GB') nor one of {known}")
    gib, tflops = _CARDS[name]
    return Gpu(name, gib * GIB, tflops * 1e12)


@dataclass(frozen=True)
class Assumptions:
    """What is assumed, not computed; measure it once on the card in question.

    Attributes:
        fixed_bytes: context and workspaces.
        fragmentation: share of the peak that the allocator loses.
        utilisation: share of the card's peak rate that is reached.
    """

    fixed_bytes: int = GIB
    fragmentation: float = 0.08
    utilisation: float = 0.4

    def needed(self, peak: int) -> int:
        """Bytes a card must have for this peak."""
        return int(peak * (1 + self.fragmentation)) + self.fixed_bytes


@dataclass(frozen=True)
class Plan:
    """Result of :func:`plan_cycle`.

    Attributes:
        spec: what was planned.
        peaks: phase -> kind -> bytes live at that phase's peak; operators' own scratch excluded.
        flops: phase -> FLOPs of a cycle, all critic updates included; one multiply-add = 2.
        trained: network -> number of trained weights.
    """

    spec: PlanSpec
    peaks: Mapping[str, Mapping[str, int]]
    flops: Mapping[str, int]
    trained: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Most bytes live at once."""
        return self.peak_with({})

    def peak_with(self, factors: Mapping[str, float]) -> int:
        """The peak if each of these kinds took that many times its bytes."""
        return max(
            sum(int(size * factors.get(kind, 1)) for kind, size in kinds.items())
            for kinds in self.peaks.values()
        )


def plan_cycle(spec: PlanSpec) -> Plan:
    """Memory and FLOPs of one cycle on one GPU, after the first.

    Raises:
        ValueError: if the specification does not fit its architecture (size, name of a block).
    """
    step = spec.architecture.pixels_per_latent
    if spec.size % step or min(spec.size, spec.batch) < 1:
        raise ValueError(
            f"size {spec.size} is no multiple of {step}, or batch {spec.batch} below 1"
        )
    nets, counters = build_networks(spec), Counters()
    with FakeTensorMode(), cuda_autocast(), counters:
        rehearsal = Rehearsal(spec, nets, torch.device("cpu"), counters)
        rehearsal.cycle(critic_updates=1)
    trained = {
        name: sum(value.numel() for value in network.parameters.values())
        for name, network in rehearsal.networks.items()
    }
    per_cycle = dict.fromkeys(("fake score", "discriminator"), spec.critic_updates)
    flops = {phase: count * per_cycle.get(phase, 1) for phase, count in counters.flops.items()}
    factors: dict[str, float] = {}
    if spec.optimizer_bits == 8:
        factors["optimiser"] = _EIGHT_BITS
    if spec.base_dtype == "int8":
        factors["frozen weights"] = _int8_share(nets["base"])
    if spec.shards > 1 and not (spec.student_rank or spec.fake_rank):
        kinds = ("frozen weights", "trained weights", "gradients", "optimiser", "EMA")
        factors |= {kind: factors.get(kind, 1) / spec.shards for kind in kinds}
    peaks = {
        phase: {kind: int(size * factors.get(kind, 1)) for kind, size in kinds.items()}
        for phase, kinds in counters.peaks.items()
    }
    return Plan(spec, peaks, flops, trained)


def _int8_share(base: nn.Module) -> float:
    """Bytes of a bfloat16 network with int8 linear layers, as a share of what it has now."""
    own = [(n, m) for n, m in base.named_modules() if ".lora_" not in n]
    linear = sum(m.weight.numel() for _, m in own if isinstance(m, nn.Linear))
    everything = sum(p.numel() for n, p in base.named_parameters() if ".lora_" not in n)
    return 1 - linear / (2 * everything)


@dataclass(frozen=True)
class Knob:
    """A change of the specification and the peak that it gives, bytes."""

    name: str
    peak: int
    flops: int


def knobs(plan: Plan) -> Iterator[Knob]:
    """Changes that move the peak: first those known by arithmetic, then those planned anew.

    The latter take as long as the plan itself, one by one.
    """
    spec, flops = plan.spec, sum(plan.flops.values())

    def scaled(name: str, **factors: float) -> Knob:
        named = {kind.replace("_", " "): factor for kind, factor in factors.items()}
        return Knob(name, plan.peak_with(named), flops)

    if spec.optimizer_bits == 32:
        yield scaled("8-bit optimiser moments", optimiser=_EIGHT_BITS)
    if spec.num_ema:
        yield scaled("no EMA", EMA=0)
    if spec.base_dtype == "fp32":
        yield scaled("bf16 base", frozen_weights=0.5)
    if spec.student_rank and spec.fake_rank:
        if spec.base_dtype == "bf16":
            share = _int8_share(build_networks(spec)["base"])
            yield scaled("int8 base (linear layers)", frozen_weights=share)
        heads = plan.trained.get("disc", 0) / sum(plan.trained.values())
        kinds = ("trained_weights", "gradients", "optimiser")
        yield scaled("LoRA rank halved", EMA=0.5, **dict.fromkeys(kinds, (1 + heads) / 2))
    changed: dict[str, PlanSpec] = {}
    if spec.text_on_gpu or spec.vae_images is not None:
        changed["text and VAE off the GPU"] = replace(spec, text_on_gpu=False, vae_images=None)
    if spec.batch > 1:
        changed["batch halved"] = replace(spec, batch=spec.batch // 2)
    if not (spec.student_rank and spec.fake_rank):
        changed["LoRA of rank 64, base shared"] = replace(spec, student_rank=64, fake_rank=64)
    off_on = "off" if spec.checkpointing else "on"
    changed[f"checkpointing {off_on}"] = replace(spec, checkpointing=not spec.checkpointing)
    for name, other in changed.items():
        planned = plan_cycle(other)
        yield Knob(name, planned.peak, sum(planned.flops.values()))


def render(
    plan: Plan, gpu: Gpu, *, assume: Assumptions | None = None, turned: Iterable[Knob] = ()
) -> Group:
    """Tables for a terminal: the verdict, memory by phase, work and time, and the knobs."""
    assume = assume or Assumptions()
    needed = assume.needed(plan.peak)
    verdict = "fits" if needed <= gpu.bytes else "does not fit"
    sentence = (
        f"{verdict} on {gpu.name}: peak {_gib(plan.peak)} + {assume.fragmentation:.0%} lost to "
        f"fragmentation + {_gib(assume.fixed_bytes)} for context and workspaces (both assumed) "
        f"= {_gib(needed)} of {_gib(gpu.bytes)} GiB"
    )
    parts: list[RenderableType] = [
        Text(sentence),
        _memory_table(plan),
        _work_table(plan, gpu, assume),
        Text(_basis(plan, gpu, assume)),
    ]
    rows = [
        (k.name, _gib(k.peak), _gib(k.peak - plan.peak), f"{k.flops / 1e12:.1f}",
         "yes" if assume.needed(k.peak) <= gpu.bytes else "no")
        for k in turned
    ]  # fmt: skip
    if rows:
        parts.append(_table("Knobs", ("", "peak", "change", "TFLOP", "fits"), rows))
    return Group(*parts)


def _basis(plan: Plan, gpu: Gpu, assume: Assumptions) -> str:
    sentence = f"{plan.spec.critic_updates} critic updates a cycle"
    if gpu.rate is not None:
        rate = f"{gpu.rate / 1e12:g} TFLOP/s (vendor) x {assume.utilisation:.0%} (assumed)"
        sentence += f"; time at {rate}"
    return sentence


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _memory_table(plan: Plan) -> Table:
    kinds = list(dict.fromkeys(kind for sizes in plan.peaks.values() for kind in sizes))
    rows = [
        (phase, *(_gib(sizes.get(kind, 0)) for kind in kinds), _gib(sum(sizes.values())))
        for phase, sizes in plan.peaks.items()
    ]
    return _table("Memory at the peak of each phase, GiB", ("phase", *kinds, "total"), rows)


def _work_table(plan: Plan, gpu: Gpu, assume: Assumptions) -> Table:
    total, batch = sum(plan.flops.values()), plan.spec.batch
    rows = [(phase, f"{count / 1e12:.2f}", "") for phase, count in plan.flops.items()]
    seconds = "card not named"
    if gpu.rate is not None:
        rate = gpu.rate * assume.utilisation
        seconds = f"{total / rate:.2f}"
        rows = [(p, f"{n / 1e12:.2f}", f"{n / rate:.2f}") for p, n in plan.flops.items()]
    rows.append((f"cycle of {batch} images", f"{total / 1e12:.2f}", seconds))
    return _table("Work of a cycle", ("phase", "TFLOP", "s"), rows)
