"""What a run will need on one GPU, without a GPU and without weights.

One cycle of train/f_distill.py or train/di_star.py, or one step of train/timenoise.py, runs on fake
tensors (shapes without data): see rehearsal.py, rehearsal_reward.py and rehearsal_video.py. What
no operator shows is a declared margin: CUDA context, workspaces of cuDNN and cuBLAS, NCCL buffers,
fragmentation of the allocator. Time is FLOPs / (peak rate of the card x an assumed utilisation).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffdiv.counters import Counters, cuda_autocast
from diffdiv.gpus import GIB as GIB
from diffdiv.gpus import Assumptions as Assumptions
from diffdiv.gpus import Gpu as Gpu
from diffdiv.gpus import parse_gpu as parse_gpu
from diffdiv.rehearsal import PlanSpec, Rehearsal, build_networks
from diffdiv.rehearsal_reward import RewardRehearsal, RewardSpec, build_reward_networks
from diffdiv.rehearsal_video import VideoRehearsal, VideoSpec, build_video_networks
from diffdiv.runtime.network import Network

#: one byte a value and a float32 scale every 256, instead of four bytes
_EIGHT_BITS = (1 + 4 / 256) / 4


@dataclass(frozen=True)
class Plan:
    """Result of :func:`plan_cycle`.

    Attributes:
        spec: what was planned.
        peaks: phase -> kind -> bytes live at that phase's peak; operators' own scratch excluded.
        flops: phase -> FLOPs of a cycle, all critic updates included; one multiply-add = 2.
        trained: network -> number of trained weights.
    """

    spec: PlanSpec | VideoSpec
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


def plan_cycle(spec: PlanSpec | VideoSpec) -> Plan:
    """Memory and FLOPs of one cycle, or of one step of a fine-tuning, on one GPU after the first.

    Raises:
        ValueError: if the specification does not fit its architecture (size, name of a block).
    """
    factors: dict[str, float] = {}
    if isinstance(spec, VideoSpec):
        networks, counters = _rehearse_step(spec)
        per_cycle, is_full = dict[str, int](), spec.rank is None
    else:
        networks, counters = _rehearse_cycle(spec)
        per_cycle = dict.fromkeys(("fake score", "discriminator"), spec.critic_updates)
        is_full = not (spec.student_rank or spec.fake_rank)
        if spec.base_dtype == "int8":
            factors["frozen weights"] = _int8_share(build_networks(spec)["base"])
    trained = {
        name: sum(value.numel() for value in network.parameters.values())
        for name, network in networks.items()
    }
    flops = {phase: count * per_cycle.get(phase, 1) for phase, count in counters.flops.items()}
    if spec.optimizer_bits == 8:
        factors["optimiser"] = _EIGHT_BITS
    if spec.shards > 1 and is_full:
        kinds = ("frozen weights", "trained weights", "gradients", "optimiser", "EMA")
        factors |= {kind: factors.get(kind, 1) / spec.shards for kind in kinds}
    peaks = {
        phase: {kind: int(size * factors.get(kind, 1)) for kind, size in kinds.items()}
        for phase, kinds in counters.peaks.items()
    }
    return Plan(spec, peaks, flops, trained)


def _rehearse_cycle(spec: PlanSpec) -> tuple[Mapping[str, Network], Counters]:
    step = spec.architecture.pixels_per_latent
    if spec.size % step or min(spec.size, spec.batch) < 1:
        raise ValueError(
            f"size {spec.size} is no multiple of {step}, or batch {spec.batch} below 1"
        )
    counters, device = Counters(), torch.device("cpu")
    nets = build_reward_networks(spec) if isinstance(spec, RewardSpec) else build_networks(spec)
    with FakeTensorMode(), cuda_autocast(), counters:
        if isinstance(spec, RewardSpec):
            rehearsal: Rehearsal = RewardRehearsal(spec, nets, device, counters)
        else:
            rehearsal = Rehearsal(spec, nets, device, counters)
        rehearsal.cycle(critic_updates=1)
    return rehearsal.networks, counters


def _rehearse_step(spec: VideoSpec) -> tuple[Mapping[str, Network], Counters]:
    if min(spec.batch, spec.frames) < 1:
        raise ValueError(f"batch {spec.batch} or frames {spec.frames} below 1")
    nets, counters = build_video_networks(spec), Counters()
    with FakeTensorMode(), cuda_autocast(), counters:
        rehearsal = VideoRehearsal(spec, nets, torch.device("cpu"), counters)
        rehearsal.step()
    return {"model": rehearsal.network}, counters


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
    spec = plan.spec
    if spec.optimizer_bits == 32:
        yield _scaled(plan, "8-bit optimiser moments", optimiser=_EIGHT_BITS)
    if spec.num_ema:
        yield _scaled(plan, "no EMA", EMA=0)
    if spec.base_dtype == "fp32" and not (isinstance(spec, VideoSpec) and spec.rank is None):
        yield _scaled(plan, "bf16 base", frozen_weights=0.5)
    if isinstance(spec, VideoSpec):
        changed = _video_changes(spec)
    else:
        yield from _lora_knobs(plan, spec)
        changed = _changes(spec)
    for name, other in changed.items():
        planned = plan_cycle(other)
        yield Knob(name, planned.peak, sum(planned.flops.values()))


def _scaled(plan: Plan, name: str, **factors: float) -> Knob:
    named = {kind.replace("_", " "): factor for kind, factor in factors.items()}
    return Knob(name, plan.peak_with(named), sum(plan.flops.values()))


def _lora_knobs(plan: Plan, spec: PlanSpec) -> Iterator[Knob]:
    if not (spec.student_rank and spec.fake_rank):
        return
    if spec.base_dtype == "bf16" and not isinstance(spec, RewardSpec):  # int8 has no gradient at x
        share = _int8_share(build_networks(spec)["base"])
        yield _scaled(plan, "int8 base (linear layers)", frozen_weights=share)
    heads = plan.trained.get("disc", 0) / sum(plan.trained.values())
    kinds = ("trained_weights", "gradients", "optimiser")
    halved = dict.fromkeys(kinds, (1 + heads) / 2)
    yield _scaled(plan, "LoRA rank halved", EMA=0.5, **halved)


def _changes(spec: PlanSpec) -> dict[str, PlanSpec | VideoSpec]:
    changed: dict[str, PlanSpec | VideoSpec] = {}
    is_rewarded = isinstance(spec, RewardSpec)  # by what the VAE decodes
    if spec.text_on_gpu or (spec.vae_images is not None and not is_rewarded):
        changed["text and VAE off the GPU"] = replace(spec, text_on_gpu=False, vae_images=None)
    if spec.batch > 1:
        changed["batch halved"] = replace(spec, batch=spec.batch // 2)
    if not (spec.student_rank and spec.fake_rank):
        changed["LoRA of rank 64, base shared"] = replace(spec, student_rank=64, fake_rank=64)
    off_on = "off" if spec.checkpointing else "on"
    changed[f"checkpointing {off_on}"] = replace(spec, checkpointing=not spec.checkpointing)
    return changed


def _video_changes(spec: VideoSpec) -> dict[str, PlanSpec | VideoSpec]:
    changed: dict[str, PlanSpec | VideoSpec] = {}
    if spec.live:
        changed["latents cached (videos.cache)"] = replace(spec, live=False)
    if spec.batch > 1:
        changed["batch halved"] = replace(spec, batch=spec.batch // 2)
    if spec.frames > 1:
        changed["frames halved"] = replace(spec, frames=spec.frames // 2)
    if spec.rank is None:
        changed["LoRA of rank 64"] = replace(spec, rank=64)
    off_on = "off" if spec.checkpointing else "on"
    changed[f"checkpointing {off_on}"] = replace(spec, checkpointing=not spec.checkpointing)
    return changed


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
    sentence = "one step; a step of the optimiser may take several of them (run.accumulation)"
    if isinstance(plan.spec, PlanSpec):
        sentence = f"{plan.spec.critic_updates} critic updates a cycle"
    if isinstance(plan.spec, RewardSpec):
        sentence += "".join(f"; {note}" for note in plan.spec.notes())
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
    unit = f"cycle of {batch} images"
    if isinstance(plan.spec, VideoSpec):
        unit = f"step on {batch} clip" + "s" * (batch > 1)
    rows.append((unit, f"{total / 1e12:.2f}", seconds))
    return _table("Work", ("phase", "TFLOP", "s"), rows)
