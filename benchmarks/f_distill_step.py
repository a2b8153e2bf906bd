"""Time and memory of one f-distill cycle: this library against the same step written plainly.

    python benchmarks/f_distill_step.py                      # CPU, 32x32, 0.88 M parameters
    python benchmarks/f_distill_step.py --device cuda --dtype bf16 --compile

A cycle is one student update and ``--critic-updates`` updates of fake score and discriminator
(three heads), Jensen-Shannon, guidance 1.5, GAN loss. "plain" composes the same mathematics the
usual way: the unconditional branch in a pass of its own, a second teacher pass for the features,
whole forwards where an encoder would do, the student's samples made anew for every update. Both
start from the same weights and draw the same noise; the student's gradient of the first cycle must
agree. Each variant runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffdiv.core.divergence import get_divergence
from diffdiv.core.schedule import Noising, edm
from diffdiv.models.backbones import build_unet2d, call_unet2d
from diffdiv.models.denoiser import Condition, Denoiser, guided
from diffdiv.models.discriminator import DiscriminatorHeads
from diffdiv.models.generator import Generator
from diffdiv.objectives.f_distill import (
    Critic,
    RatioStatistics,
    Real,
    density_ratio_loss,
    fake_score_loss,
    student_loss,
)

SHAPE, CLASSES, GUIDANCE, GAN_WEIGHT, SIGMA = (3, 32, 32), 10, 1.5, 1e-3, 80.0
BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block"]
CHANNELS = (32, 40, 64)  # 0.88 M parameters, 0.36 GFLOP a forward and image
SCHEDULE = edm()


@dataclass
class Bench:
    """Networks, optimisers and draws of one variant."""

    options: argparse.Namespace

    def __post_init__(self) -> None:
        device = torch.device(self.options.device)
        self.device, self.batch = device, self.options.batch

        def network(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            net = build_unet2d(
                SHAPE, channels=CHANNELS, layers=1, attention=[2], num_labels=CLASSES + 1
            )
            net = net.to(device).eval()
            if self.options.variant == "ours":
                net = net.to(memory_format=torch.channels_last)
            if self.options.compile:
                net.compile()
            return net

        self.student, self.fake, self.teacher = network(0), network(0), network(0)
        self.teacher.requires_grad_(False)
        torch.manual_seed(1)
        self.disc = DiscriminatorHeads(CHANNELS, width=32).to(device)
        adamw = partial(torch.optim.AdamW, lr=1e-4, fused=self.options.variant == "ours")
        self.optimizers = {
            name: adamw(net.parameters())
            for name, net in (("student", self.student), ("fake", self.fake), ("disc", self.disc))
        }
        self.ratio = RatioStatistics(get_divergence("jensen_shannon"))
        self.base = Denoiser(self.teacher, call_unet2d, SCHEDULE, "x0", 0.5)
        self.uncond = Condition(label=torch.full((1,), CLASSES, device=device))
        self.generator = torch.Generator().manual_seed(2)
        self.gradient: Tensor | None = None

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.options.dtype == "bf16"
        )

    def normal(self) -> Tensor:
        return torch.randn(self.batch, *SHAPE, generator=self.generator).to(self.device)

    def noising(self) -> Noising:
        u = torch.rand(self.batch, generator=self.generator, dtype=torch.float64)
        return Noising(SCHEDULE.sample_t(u).to(self.device), u, self.normal())

    def cond(self) -> Condition:
        label = torch.randint(CLASSES, (self.batch,), generator=self.generator)
        return Condition(label=label.to(self.device))

    def update(self, name: str, loss: Tensor) -> None:
        loss.backward()
        if name == "student" and self.gradient is None:
            grads = [p.grad.flatten() for p in self.student.parameters() if p.grad is not None]
            self.gradient = torch.cat(grads).cpu()
        self.optimizers[name].step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def turn(self, name: str) -> None:
        nets = {"student": self.student, "fake": self.fake, "disc": self.disc}
        for key, net in nets.items():
            net.requires_grad_(key == name)


def cycle_ours(b: Bench) -> None:
    """As in train/f_distill.py."""
    fake = b.base.with_net(b.fake)
    critic = Critic(guided(b.base, GUIDANCE, b.uncond), fake, b.disc, BLOCKS, "teacher")
    generator = Generator(b.base.with_net(b.student), SIGMA, "ve")
    cond, z = b.cond(), b.normal()
    with torch.no_grad(), b.autocast():
        x0 = generator(z, cond)
    for _ in range(b.options.critic_updates):
        at, real = b.noising(), Real(0.5 * b.normal(), b.cond(), b.noising())
        b.turn("fake")
        with b.autocast():
            loss, _ = fake_score_loss(fake, x0, cond, at)
        b.update("fake", loss)
        b.turn("disc")
        with b.autocast():
            loss, _ = density_ratio_loss(x0, cond, at, real, critic=critic, ratio=b.ratio)
        b.update("disc", loss)
        b.ratio.commit()
    b.turn("student")
    cond, z = b.cond(), b.normal()
    with b.autocast():
        x0 = generator(z, cond)
        loss, _ = student_loss(
            x0, cond, b.noising(), critic=critic, ratio=b.ratio, gan_weight=GAN_WEIGHT
        )
    b.update("student", loss)
    b.ratio.commit()


def cycle_plain(b: Bench) -> None:
    """The same step as a direct composition of forwards."""
    fake, generator = b.base.with_net(b.fake), Generator(b.base.with_net(b.student), SIGMA, "ve")
    cond, z = b.cond(), b.normal()

    def logits(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return b.disc(b.base.with_features(x_t, t, c, BLOCKS)[1])

    for _ in range(b.options.critic_updates):
        with torch.no_grad(), b.autocast():
            x0 = generator(z, cond)
        at, real = b.noising(), Real(0.5 * b.normal(), b.cond(), b.noising())
        x_t = SCHEDULE.add_noise(x0, at.eps, at.t)
        with b.autocast():
            error = fake.raw(x_t, at.t, cond).float() - fake.target(x0, at.eps, at.t)
        b.update("fake", error.square().mean())
        with b.autocast():
            log_fake = logits(x_t, at.t, cond)
            x_t_real = SCHEDULE.add_noise(real.x0, real.at.eps, real.at.t)
            log_real = logits(x_t_real, real.at.t, real.cond)
        b.ratio.observe(log_fake, at.u)
        b.update("disc", softplus(log_fake).mean() + softplus(-log_real).mean())
        b.ratio.commit()
    cond, z, at = b.cond(), b.normal(), b.noising()
    with b.autocast():
        x0 = generator(z, cond)
        x_t = SCHEDULE.add_noise(x0, at.eps, at.t)
        with torch.no_grad():
            x0_cond = b.base(x_t, at.t, cond)
            x0_uncond = b.base(x_t, at.t, b.uncond.expand(b.batch))
            teacher_x0 = x0_uncond + GUIDANCE * (x0_cond - x0_uncond)
            fake_x0 = fake(x_t, at.t, cond)
        log_r = logits(x_t, at.t, cond)
    with torch.no_grad():
        weight = b.ratio.weights(log_r, at.u)[:, None, None, None]
        scale = (x0 - teacher_x0).abs().mean((1, 2, 3), keepdim=True)
        grad = weight * (fake_x0 - teacher_x0) / scale
    b.ratio.observe(log_r, at.u)
    # 0.5 ||x0 - (x0 - grad)||^2 averaged over elements has the gradient grad / numel
    vsd = 0.5 * (x0 - (x0 - grad).detach()).square().mean()
    b.update("student", vsd + GAN_WEIGHT * softplus(-log_r).mean())
    b.ratio.commit()


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Times of one variant, in this process."""
    b = Bench(options)
    cycle = cycle_ours if options.variant == "ours" else cycle_plain

    def timed(function) -> float:
        if b.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if b.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def forward() -> None:
        with torch.no_grad(), b.autocast():
            b.base(b.normal(), b.noising().t, b.cond())

    for _ in range(options.warmup):
        cycle(b)
    forward()
    base_memory = _memory(b.device)
    began = time.process_time()
    seconds = [timed(lambda: cycle(b)) for _ in range(options.cycles)]
    cpu = (time.process_time() - began) / options.cycles
    one_forward = statistics.median(timed(forward) for _ in range(3 * options.cycles))
    assert b.gradient is not None
    return {
        "seconds": statistics.median(seconds), "fastest": min(seconds), "cpu_seconds": cpu,
        "forward": one_forward, "memory_mib": base_memory, "gradient": b.gradient.tolist(),
        "parameters": sum(p.numel() for p in b.teacher.parameters()),
    }  # fmt: skip


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=["both", "ours", "plain"], default="both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--critic-updates", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the variants")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.variant != "both":
        print(json.dumps(measure(options)))
        return
    results: dict[str, list[dict]] = {"plain": [], "ours": []}
    for _ in range(options.rounds):  # alternating, so a drifting machine hits both alike
        for variant, rows in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            rows.append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
    plain, ours = (torch.tensor(results[v][0]["gradient"]) for v in ("plain", "ours"))
    difference = float((plain - ours).norm() / plain.norm())
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {options.threads} threads, batch {options.batch}, "
        f"{ours.numel() / 1e6:.2f} M parameters, "
        f"1 student + {options.critic_updates} critic updates, "
        f"{options.dtype}{', compiled' if options.compile else ''}"
    )
    print(f"relative difference of the student's first gradient: {difference:.1e}\n")
    print("| variant | s per cycle (median) | CPU s | forwards per cycle | peak memory, MiB |")
    print("|---|---|---|---|---|")
    median = {}
    for variant, rows in results.items():
        mid = {k: statistics.median(r[k] for r in rows) for k in rows[0] if k != "gradient"}
        median[variant] = mid["seconds"]
        forwards = mid["seconds"] / mid["forward"]
        print(
            f"| {variant} | {mid['seconds']:.3f} | {mid['cpu_seconds']:.3f} | {forwards:.1f} | "
            f"{mid['memory_mib']:.0f} |"
        )
    ratios = [p["seconds"] / o["seconds"] for p, o in zip(*results.values(), strict=True)]
    print(f"\nplain / ours, round by round: {', '.join(f'{r:.2f}' for r in ratios)}")
    if difference > (1e-2 if options.dtype == "bf16" else 1e-4):
        raise SystemExit("the two variants do not compute the same gradient")


if __name__ == "__main__":
    main()
