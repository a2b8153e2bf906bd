"""What Analytic-Init, TimeNoise and the statistics cost, in process CPU seconds and memory.

    python benchmarks/i2v.py
    python benchmarks/i2v.py --real    # memory and work of steps of the real one, on fake tensors

Latents of Stable Video Diffusion's size (14 frames of 4x40x64: 320x512 pixels); its U-Net a
tenth as wide or less, so that a CPU can run it. The real one does at least 100 times the work on
the same latents, so shares of a step are upper bounds. Peak memory is that of a fresh process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNetSpatioTemporalConditionModel

from diffdiv.core.leakage import (
    ConditionDraw,
    ConditionNoise,
    ConstantNoise,
    LatentMoments,
    LatentSpace,
    LatentStats,
    LowPass,
    TimeNoise,
    analytic_init,
    time_map,
)
from diffdiv.core.schedule import Noising, edm
from diffdiv.models.denoiser import Condition, Denoiser
from diffdiv.models.video_calls import call_svd, svd_schedule
from diffdiv.objectives.denoising import denoising_loss
from diffdiv.plan import GIB, Assumptions, plan_cycle
from diffdiv.plan_timenoise import timenoise_spec

SPACE = LatentSpace("AutoencoderKLTemporalDecoder", 4, 14, 40, 64, (0.18215,))
CPU = torch.device("cpu")
LAW = svd_schedule()


def cpu_milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median process CPU time of a call, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


def peak() -> float:
    """Largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def noises() -> dict[str, ConditionNoise]:
    tau = time_map(LAW)
    return {
        "TimeNoise": TimeNoise(tau, 15.0),
        "constant": ConstantNoise(15.0),
        "low-pass": LowPass(tau, 4.0),
    }


def degrade(noise: ConditionNoise, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All that a training step does for one image: draw, level, noise."""
    t = LAW.sample_t(torch.rand(1))
    draw = ConditionDraw.draw((1, 4, 40, 64), [index], seed=0)
    return noise(torch.zeros(1, 1, 4, 40, 64), t, draw)


def small_unet() -> UNetSpatioTemporalConditionModel:
    torch.manual_seed(0)
    return UNetSpatioTemporalConditionModel(
        sample_size=64, block_out_channels=(32, 32, 64, 64), num_attention_heads=(1, 1, 2, 2),
        cross_attention_dim=64, addition_time_embed_dim=32, num_frames=14,
        projection_class_embeddings_input_dim=96,
    )  # fmt: skip


def training_steps(noise: ConditionNoise | None, steps: int) -> None:
    """So many steps without an optimiser; prints CPU milliseconds of one, and peak MiB."""
    net, y = small_unet(), torch.zeros(1, 1, 4, 40, 64)
    x0 = torch.randn(1, *SPACE.shape)

    def step() -> None:
        level = torch.zeros(1)
        image = y
        if noise is not None:
            image, level = degrade(noise, 0)
        at = Noising.draw(LAW, SPACE.shape, [0], seed=0, purpose="model", device=CPU)
        told = torch.stack([level + 6, level + 127, level], 1)
        cond = Condition(text=torch.zeros(1, 1, 64), time_ids=told)
        denoiser = Denoiser(net, lambda n, x, t, c: call_svd(n, x, t, c, y=image), LAW, "x0", 1.0)
        denoising_loss(denoiser, x0, cond, at).backward()
        net.zero_grad()

    print(json.dumps([cpu_milliseconds(step, steps), peak()]))


def statistics_of(count: int) -> None:
    """Stream so many clips; prints CPU seconds, and peak MiB after 10 and after all."""
    moments, clip, after_ten = LatentMoments(SPACE), torch.randn(1, *SPACE.shape), 0.0
    start = time.process_time()
    for number in range(count):
        moments.add(clip)
        after_ten = peak() if number == 9 else after_ten
    moments.stats("shrunk")
    print(json.dumps([time.process_time() - start, after_ten, peak()]))


def child(*arguments: str) -> list[float]:
    """What this program prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    )
    values: list[float] = json.loads(done.stdout.splitlines()[-1])
    return values


def start_costs() -> tuple[float, float]:
    """CPU milliseconds of plain initial noise, and of Analytic-Init from a file of statistics."""
    moments = LatentMoments(SPACE)
    moments.add(torch.randn(4, *SPACE.shape))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stats.safetensors"
        moments.stats("shrunk").save(file)
        plain = cpu_milliseconds(lambda: torch.randn(1, *SPACE.shape), 20)

        def begin() -> torch.Tensor:
            law = analytic_init(LatentStats.load(file), edm(), 100.0)
            return law.draw(torch.randn(1, *SPACE.shape))

        return plain, cpu_milliseconds(begin, 20)


def real_steps() -> None:
    """The shipped configuration and its neighbours at real size, by the plan; no weights."""
    shipped = timenoise_spec("configs/timenoise/svd.yaml", [], "svd")
    whole = replace(shipped, rank=None, base_dtype="fp32")
    variants = {
        "as shipped: LoRA 64, 14x320x512, live": shipped,
        "latents cached": replace(shipped, live=False),
        "checkpointing off": replace(shipped, checkpointing=False),
        "14x576x1024": replace(shipped, height=576, width=1024),
        "25x576x1024": replace(shipped, frames=25, height=576, width=1024),
        "whole network in float32": whole,
        "whole, no checkpointing, fsdp2 of 8": replace(whole, checkpointing=False, shards=8),
    }
    for name, spec in variants.items():
        start, planned = time.process_time(), plan_cycle(spec)
        needed, work = Assumptions().needed(planned.peak), sum(planned.flops.values())
        figures = f"needs {needed / GIB:.1f} GiB, {work / 1e12:.0f} TFLOP"
        row(
            name, f"{planned.peak / GIB:.2f} GiB", f"{figures}; {time.process_time() - start:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="of training that are timed")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--real", action="store_true", help="plan steps of the real network")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        what, name = options.child
        if what == "stats":
            return statistics_of(int(name))
        return training_steps(noises().get(name), options.steps)
    if options.real:
        return real_steps()
    steps = ["--steps", str(options.steps)]
    step, memory = child(*steps, "--child", "step", "none")
    noised, noised_memory = child(*steps, "--child", "step", "TimeNoise")
    row("training step, clean image", f"{step:.0f} ms", f"peak {memory:.0f} MiB")
    row("training step, TimeNoise", f"{noised:.0f} ms", f"peak {noised_memory:.0f} MiB")
    for name, noise in noises().items():
        cost = cpu_milliseconds(lambda noise=noise: degrade(noise, 0), 50)
        row(f"  {name} by itself", f"{cost:.2f} ms", f"{cost / step:.3%} of a step")
    plain, analytic = start_costs()
    sampling = 25 * 2 * step / 3  # 25 guided steps; forward and backward: three forwards' work
    row("initial noise", f"{plain:.2f} ms", "")
    share = f"+{(analytic - plain) / sampling:.4%} of 25 guided steps"
    row("initial noise by Analytic-Init", f"{analytic:.2f} ms", share)
    seconds, ten, whole = child("--child", "stats", str(options.clips))
    row(f"statistics of {options.clips} clips", f"{seconds:.1f} s", "")
    row("  peak memory after 10, after all", f"{ten:.1f} MiB", f"{whole:.1f} MiB")


def row(what: str, value: str, note: str) -> None:
    print(f"{what:38}{value:>12}   {note}", flush=True)


if __name__ == "__main__":
    main()
