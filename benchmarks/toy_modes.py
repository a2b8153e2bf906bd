"""Mode coverage of every divergence on a 2-D Gaussian mixture.

    python benchmarks/toy_modes.py --seeds 3 --out docs/toy_modes.json --figure toy.png

Data: eight modes on a ring, weights 1:2:3:4:1:2:3:4. The teacher's score is exact (closed form);
fake score, ratio (discriminator on x_t) and student are learned, as in train/f_distill.py but with
multilayer perceptrons. The student starts as a copy of a denoiser fitted to the data.
"""

import argparse
import copy
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdiv.core.divergence import DIVERGENCES, get_divergence
from diffdiv.core.noise import normal
from diffdiv.core.schedule import Noising, edm
from diffdiv.data.toy import GaussianMixture, gaussian_ring
from diffdiv.metrics.diversity import mode_metrics
from diffdiv.models.denoiser import Condition, Denoiser
from diffdiv.models.generator import Generator
from diffdiv.objectives.denoising import denoising_loss
from diffdiv.objectives.f_distill import (
    Critic,
    RatioStatistics,
    Real,
    density_ratio_loss,
    fake_score_loss,
    student_loss,
)

SIGMA_DATA, T_INIT, BATCH, CRITIC_UPDATES = 0.72, 1.0, 256, 2
SCHEDULE = edm(sigma_min=0.02, sigma_max=4.0, p_mean=-1.2, p_std=1.2)
NO_COND = Condition()


def draw(generator: torch.Generator) -> Noising:
    """Times and noise of one batch; one stream a run, since per-sample ones outweigh this net."""
    u = torch.rand(BATCH, generator=generator, dtype=torch.float64)
    return Noising(SCHEDULE.sample_t(u), u, torch.randn(BATCH, 2, generator=generator))


def sample(mixture: GaussianMixture, generator: torch.Generator) -> Tensor:
    """A batch of data [B, 2]."""
    mode = torch.multinomial(mixture.weights, BATCH, replacement=True, generator=generator)
    noise = mixture.std * torch.randn(BATCH, 2, generator=generator)
    return mixture.means[mode].float() + noise


class Perceptron(nn.Module):
    """(x, c_noise) [B, 3] -> [B, num_outputs]."""

    def __init__(self, num_outputs: int, width: int = 128) -> None:
        super().__init__()
        self.inputs = nn.Identity()  # what a discriminator on x_t taps
        self.body = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, num_outputs),
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.body(self.inputs(torch.cat([x, time[:, None].to(x.dtype) / 1000], 1)))


class ExactTeacher(nn.Module):
    """The posterior mean of the mixture, in the place of a network."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.inputs, self.mixture = nn.Identity(), mixture

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        self.inputs(torch.cat([x_t, time[:, None].to(x_t.dtype) / 1000], 1))
        return self.mixture.x0_mean(x_t, 1.0, (time / 250).exp())


class Heads(Perceptron):
    """Discriminator on the tapped (x_t, c_noise)."""

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.body(features[0])[:, 0]


def fit_denoiser(mixture: GaussianMixture, steps: int, seed: int) -> Denoiser:
    """A denoiser fitted to the data: where student and fake score start."""
    torch.manual_seed(seed)
    net = Perceptron(2)
    denoiser = Denoiser(net, lambda n, x, t, _: n(x, t), SCHEDULE, "x0", SIGMA_DATA)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = denoising_loss(denoiser, sample(mixture, generator), NO_COND, draw(generator))
        update(optimizer, loss)
    return denoiser


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def distil(
    name: str, mixture: GaussianMixture, start: Denoiser, steps: int, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """Student samples [20000, 2] and their mode metrics after training."""
    torch.manual_seed(seed)
    teacher = Denoiser(ExactTeacher(mixture), lambda n, x, t, _: n(x, t), SCHEDULE, "x0")
    student, fake = (start.with_net(copy.deepcopy(start.net)) for _ in range(2))
    generator, heads = Generator(student, T_INIT, "ve"), Heads(1)
    critic = Critic(teacher, fake, heads, ["inputs"], "teacher")
    ratio = RatioStatistics(get_divergence(name))
    adam = partial(torch.optim.AdamW, betas=(0.0, 0.99), weight_decay=0.0, fused=True)
    optimizers = [adam(n.parameters(), lr=4e-3) for n in (fake.net, heads)]
    student_optimizer = adam(student.net.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LambdaLR(
        student_optimizer, lambda step: min(1.0, 2.5 * (1 - step / steps))
    )
    noise = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x0 = generator(torch.randn(BATCH, 2, generator=noise), NO_COND)
        for _ in range(CRITIC_UPDATES):
            at = draw(noise)
            update(optimizers[0], fake_score_loss(fake, x0, NO_COND, at)[0])
            real = Real(sample(mixture, noise), NO_COND, draw(noise))
            loss, _ = density_ratio_loss(x0, NO_COND, at, real, critic=critic, ratio=ratio)
            update(optimizers[1], loss)
            ratio.commit()
        loss, _ = student_loss(x0, NO_COND, draw(noise), critic=critic, ratio=ratio)
        update(student_optimizer, loss)
        ratio.commit()
        decay.step()
    z = normal((2,), seed=seed, purpose="evaluation", indices=range(20_000))
    with torch.no_grad():
        samples = generator(z, NO_COND)
    return samples, mode_metrics(samples, mixture)


def figure(samples: dict[str, Tensor], mixture: GaussianMixture, path: Path) -> None:
    """One panel per divergence: student samples over the data's modes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    truth, _ = mixture.sample(range(4000), seed=0)
    panels = {"data": truth, **samples}
    rows = -(-len(panels) // 5)
    plot, axes = pyplot.subplots(rows, 5, figsize=(12, 2.5 * rows), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, x0) in zip(axes.flat, panels.items(), strict=False):
        axis.scatter(*x0[:4000].T, s=1, alpha=0.3, linewidths=0)
        axis.scatter(*mixture.means.T, s=40 * 8 * mixture.weights, marker="+", color="black")
        axis.set(title=name.replace("_", " "), xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    plot.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--divergences", nargs="*", default=[d.name for d in DIVERGENCES])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    mixture = gaussian_ring(8)
    table, pictures = {}, {}
    for seed in range(options.seeds):
        start = fit_denoiser(mixture, 1000, seed)
        for name in options.divergences:
            began = time.process_time()
            samples, metrics = distil(name, mixture, start, options.steps, seed)
            table.setdefault(name, []).append(metrics)
            pictures.setdefault(name, samples)
            shown = "  ".join(f"{k} {v:.3f}" for k, v in metrics.items())
            print(
                f"{name:20s} seed {seed}  {shown}  {time.process_time() - began:.0f} CPU s",
                flush=True,
            )
    print(f"\n| divergence | {' | '.join(next(iter(table.values()))[0])} |")
    for name, runs in table.items():
        cells = []
        for key in runs[0]:
            values = [run[key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")
    if options.out:
        content = {"steps": options.steps, "seeds": options.seeds, "runs": table}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    if options.figure:
        figure(pictures, mixture, options.figure)


if __name__ == "__main__":
    main()
