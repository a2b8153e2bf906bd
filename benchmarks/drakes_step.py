"""Time and memory of one DRAKES step: this library against the step as the paper's code takes it.

    python benchmarks/drakes_step.py                       # CPU, width 64, batch 4, K = 32, T = 12
    python benchmarks/drakes_step.py --device cuda --width 128 --batch 32 --steps 128 --soft 50

A step is: sample a batch of trajectories, loss (reward and the KL term of the paper's code, which
both must compute to be comparable), backward. "released" was written from a description of that
code's arithmetic: a second call of the network for every KL term, graphs on all K steps, a time
path fed with zeros, normalisation through transposed copies, gradients into the frozen reference
and reward. "ours" calls ``drakes_loss``; "checkpointed" also recomputes each soft step.
All start from the same weights and draw the same noise. Their gradients are compared in double
precision on a short chain and in single precision on the timed one. Each variant runs in a process
of its own, so that its peak memory is its own. Memory is counted above what was held before the
step: of the process ("resident", with the allocator's gaps and the kernels' code; more where the
machine takes pages back meanwhile), and of tensors alone (the same at every run).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.profiler import ProfilerActivity, profile

from diffdiv.core.masking import Noise, gumbel_from_normal, log_linear
from diffdiv.models.token_networks import DilatedTokenNet
from diffdiv.models.tokens import token_denoiser
from diffdiv.objectives.drakes import SoftPath, drakes_loss

V, ALPHA, T_END, SHIFT = 4, 1e-3, 1e-5, 0.2
VARIANTS = ("released", "ours", "checkpointed")


class ReleasedNet(nn.Module):
    """The same function as DilatedTokenNet, laid out as in the released code."""

    def __init__(self, net: DilatedTokenNet) -> None:
        super().__init__()
        width = net.stem.out_channels

        def conv(source: nn.Conv2d) -> nn.Conv1d:
            kernel, pad, dilation = (pair[1] for pair in _sizes(source))
            out = nn.Conv1d(source.in_channels, width, kernel, padding=pad, dilation=dilation)
            out.weight.data, out.bias.data = source.weight.data[:, :, 0].clone(), _copy(source.bias)
            return out

        def pointwise(source: nn.Linear, extra: int = 0) -> nn.Conv1d:
            out = nn.Conv1d(source.in_features, source.out_features + extra, 1).to(source.weight)
            out.weight.data[: source.out_features, :, 0] = source.weight.data
            out.bias.data[: source.out_features] = source.bias.data
            return out

        self.stem = conv(net.stem)
        self.convs = nn.ModuleList(conv(block.conv) for block in net.blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in net.blocks)
        self.register_buffer("frequencies", torch.randn(width // 2) * 30)
        self.embed = nn.Linear(width, width)
        self.times = nn.ModuleList(nn.Linear(width, width) for _ in net.blocks)
        self.mix, self.head = pointwise(net.mix), pointwise(net.head, extra=1)
        self.dropout = nn.Dropout(0.0)
        self.to(net.stem.weight)
        embedding = self._embedding(torch.zeros(1).to(net.stem.weight))[0]
        for norm, linear, block in zip(self.norms, self.times, net.blocks, strict=True):
            norm.load_state_dict(block.norm.state_dict())
            linear.bias.data = (block.shift - linear.weight @ embedding).data

    def _embedding(self, t: Tensor) -> Tensor:
        angle = 2 * torch.pi * t[:, None] * self.frequencies
        return torch.relu(self.embed(torch.cat([angle.sin(), angle.cos()], -1)))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.stem(x.permute(0, 2, 1)))
        embedding = self._embedding(torch.zeros(len(x)).to(x))
        for conv, norm, linear in zip(self.convs, self.norms, self.times, strict=True):
            h = self.dropout(features.clone()) + linear(embedding)[:, :, None]
            h = norm(h.permute(0, 2, 1)).permute(0, 2, 1)
            features = features + torch.relu(conv(h))
        return self.head(torch.relu(self.mix(features))).permute(0, 2, 1)

    def shared_gradients(self) -> list[Tensor]:
        """In the order of DilatedTokenNet's parameters."""
        out = [self.stem.weight.grad, self.stem.bias.grad]
        for conv, norm, linear in zip(self.convs, self.norms, self.times, strict=True):
            out += [linear.bias.grad, norm.weight.grad, norm.bias.grad]
            out += [conv.weight.grad, conv.bias.grad]
        out += [self.mix.weight.grad, self.mix.bias.grad]
        return [*out, self.head.weight.grad[:V], self.head.bias.grad[:V]]


def _sizes(conv: nn.Conv2d) -> tuple[tuple[int, ...], ...]:
    return conv.kernel_size, tuple(int(p) for p in conv.padding), conv.dilation


def _copy(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias.data.clone()


def released_log_probs(net: ReleasedNet, x: Tensor) -> Tensor:
    """SUBS log-probabilities over V + 1 outcomes, as there."""
    impossible = one_hot(torch.tensor(V, device=x.device), V + 1) * -1e6
    log_p = torch.log_softmax(net(x) + impossible, -1)
    shown = one_hot(x.argmax(-1), V + 1)
    kept = (1 - shown) * -1e6
    return torch.where((x.argmax(-1) != V)[..., None], kept.to(log_p), log_p)


def released_loss(
    policy: ReleasedNet, reference: ReleasedNet, reward: nn.Module, x: Tensor, noise: Noise,
    options: argparse.Namespace,
) -> Tensor:  # fmt: skip
    """The loss as the released code forms it: sampling, then a pass over all states for the KL."""
    chain = log_linear().chain(options.steps, t_end=T_END)
    states = []
    for k in range(options.steps):
        before, after = chain.mask_rates[k : k + 2]
        states.append(x)
        p = released_log_probs(policy, x)[..., :V].exp()
        q = torch.cat([p * (before - after), torch.full_like(p[..., :1], after)], -1)
        scores = (q + 1e-30).log() + noise(k)
        kept = 1 - x[..., -1:]
        if k < options.steps - options.soft:
            x = (kept * x + (1 - kept) * one_hot(scores.argmax(-1), V + 1)).detach()
        else:
            x = kept * x + (1 - kept) * torch.softmax(scores, -1)
    soft = x[..., :V]
    hard = one_hot(soft.argmax(-1), V).to(soft)
    score = reward(soft + (hard - soft).detach())
    reward(hard)  # for the log, with a graph
    total = torch.zeros_like(score)
    for k, state in enumerate(states):
        log_p = released_log_probs(policy, state)[..., :V]
        log_ref = released_log_probs(reference, state)[..., :V]
        p = log_p.exp()
        kl = log_ref.exp() - p + p * (log_p - log_ref)
        weight = (1 - state[..., -1:]) * state[..., :V] / chain.mask_rates[k]
        total = total + (weight * kl).sum((1, 2))
    return (ALPHA * total - score).mean()


class ConvReward(nn.Module):
    """A small scan for motifs; [B, L, V] -> [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.scan, self.out = nn.Conv1d(V, 32, 12), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.scan(x.transpose(1, 2))).mean(2))[:, 0]


class Bench:
    """Networks and draws of one variant; ``step`` leaves the gradient in ``gradient``."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        self.options, self.dtype = options, dtype
        self.device = torch.device(options.device)
        torch.manual_seed(0)
        policy = nn.Module.to(DilatedTokenNet(V, width=options.width), dtype)
        for block in policy.blocks:
            nn.init.normal_(block.shift, std=0.1)
        reference = nn.Module.to(DilatedTokenNet(V, width=options.width), dtype)
        reference.load_state_dict(policy.state_dict())
        with torch.no_grad():  # away from the reference, so that the KL term is not zero
            for p in policy.parameters():
                p.add_(SHIFT * p.std(correction=0) * torch.randn_like(p))
        self.reward = ConvReward().to(self.device, dtype)
        self.released = options.variant == "released"
        self.policy: nn.Module = ReleasedNet(policy) if self.released else policy
        self.reference: nn.Module = ReleasedNet(reference) if self.released else reference
        for net in (self.policy, self.reference):
            net.to(self.device)
        if not self.released:
            self.reference.requires_grad_(False)
            self.reward.requires_grad_(False)
            self.policy.to(memory_format=torch.channels_last)
            self.reference.to(memory_format=torch.channels_last)

    def noise(self, k: int) -> Tensor:
        """Gumbel noise of step k."""
        shape = (self.options.batch, self.options.length, V + 1)
        generator = torch.Generator().manual_seed(k)
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        return gumbel_from_normal(z).to(self.device, self.dtype)

    def step(self) -> None:
        """Loss and backward."""
        options = self.options
        start = torch.full((options.batch, options.length), V, device=self.device)
        self.policy.zero_grad(set_to_none=True)
        if self.released:
            x = one_hot(start, V + 1).to(self.dtype)
            loss = released_loss(self.policy, self.reference, self.reward, x, self.noise, options)
        else:
            chain = log_linear().chain(options.steps, t_end=T_END)
            path = SoftPath(chain, options.soft, checkpointing=options.variant == "checkpointed")
            loss, _ = drakes_loss(
                token_denoiser(self.policy), token_denoiser(self.reference), self.reward, start,
                self.noise, path=path, alpha=ALPHA, kl="legacy",
            )  # fmt: skip
        loss.backward()

    def gradient(self) -> Tensor:
        """Of the shared parameters, in one vector."""
        if self.released:
            grads = self.policy.shared_gradients()
        else:
            grads = [p.grad for p in self.policy.parameters()]
        return torch.cat([g.flatten().double().cpu() for g in grads])


def _held(device: torch.device) -> float:
    """MiB in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _peak(device: torch.device) -> float:
    """MiB at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tensor_peak(bench: Bench) -> float:
    """MiB of the CPU tensors alive at most during one step, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        bench.step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        found.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    events = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
    events.sort(key=lambda e: e["ts"])
    return max(accumulate(e["args"]["Bytes"] for e in events)) / 2**20


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Times, memory and gradient of one variant, in this process."""
    small = argparse.Namespace(**{**vars(options), "steps": 2, "soft": 1, "batch": 1, "length": 40})
    Bench(small, torch.float32).step()  # libraries and kernels are loaded
    bench = Bench(options, torch.float32)
    before = _held(bench.device)

    def timed() -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        bench.step()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, time.process_time() - cpu

    timed()
    memory = _peak(bench.device) - before
    wall, cpu = zip(*(timed() for _ in range(options.repeats)), strict=True)
    return {"wall": wall, "cpu": cpu, "resident": [memory], "gradient": bench.gradient().tolist()}


def double_precision_difference(options: argparse.Namespace) -> tuple[float, float]:
    """(largest difference of the gradients, largest gradient) on a short chain, all variants."""
    settings = {**vars(options), "steps": 8, "soft": 3, "batch": 2, "device": "cpu"}
    gradients = []
    for variant in VARIANTS:
        bench = Bench(argparse.Namespace(**{**settings, "variant": variant}), torch.float64)
        bench.step()
        gradients.append(bench.gradient())
    difference = max(float((g - gradients[0]).abs().max()) for g in gradients[1:])
    return difference, float(gradients[0].abs().max())


def report(options: argparse.Namespace, results: dict[str, list[dict]]) -> None:
    """The table, the ratios of its columns, and whether the gradients agree."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {options.threads} threads, width {options.width}, "
        f"batch {options.batch}, length {options.length}, K = {options.steps}, T = {options.soft}"
    )
    first = {v: torch.tensor(rows[0]["gradient"]) for v, rows in results.items()}
    for variant in VARIANTS[1:]:
        gap = (first[variant] - first["released"]).norm() / first["released"].norm()
        print(f"float32 gradient, {variant}: relative difference {float(gap):.1e}")
    print("\n| variant | CPU s, least | CPU s, median | wall s, median | resident, MiB, least |")
    print("|---|---|---|---|---|")
    found = {}
    for variant, rows in results.items():
        cpu, wall, held = ([x for r in rows for x in r[k]] for k in ("cpu", "wall", "resident"))
        found[variant] = min(cpu), statistics.median(cpu), statistics.median(wall), min(held)
        seconds = " | ".join(f"{x:.2f}" for x in found[variant][:3])
        print(f"| {variant} | {seconds} | {found[variant][3]:.0f} |")
    for variant in VARIANTS[1:]:
        ratios = [a / b for a, b in zip(found["released"], found[variant], strict=True)]
        print(f"released / {variant}, column by column: " + ", ".join(f"{r:.2f}" for r in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=["all", *VARIANTS], default="all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--steps", type=int, default=32, help="K")
    parser.add_argument("--soft", type=int, default=12, help="T")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the variants")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.variant != "all":
        print(json.dumps(measure(options)))
        return
    results: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):  # alternating, so a drifting machine hits all alike
        for variant, rows in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            rows.append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
    report(options, results)
    if options.device == "cpu":
        for variant in VARIANTS:
            bench = Bench(
                argparse.Namespace(**{**vars(options), "variant": variant}), torch.float32
            )
            print(f"tensors alive at most, {variant}: {tensor_peak(bench):.1f} MiB")
    difference, largest = double_precision_difference(options)
    print(f"float64 gradients, K = 8, T = 3: differ by at most {difference:.1e} of {largest:.1e}")
    if difference > 1e-8:
        raise SystemExit("the variants do not compute the same gradient")


if __name__ == "__main__":
    main()
