"""One-step, TiUE and K-step generation with real U-Nets and random weights: time, memory, FLOPs.

    python benchmarks/tiue_latency.py --flops                            # from shapes alone
    python benchmarks/tiue_latency.py --model sdxl --batches 1 4 16 64   # on a GPU

U-Net only: text encoders and VAE cost all three the same. Rows are printed as they come.
"""

import argparse
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from diffdiv.models.architectures import ARCHITECTURES
from diffdiv.models.shared_encoder import SharedEncoder

TIMES = (999, 749, 499, 249)


def inputs(net: UNet2DConditionModel, batch: int, device: torch.device) -> dict[str, object]:
    """Random inputs of a forward but for the time, in the network's dtype."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=net.dtype)

    size = net.config.sample_size
    found: dict[str, object] = {
        "sample": draw(batch, net.config.in_channels, size, size),
        "encoder_hidden_states": draw(batch, 77, net.config.cross_attention_dim),
    }
    if net.config.addition_embed_type == "text_time":
        width = net.config.projection_class_embeddings_input_dim
        pooled = draw(batch, width - 6 * net.config.addition_time_embed_dim)
        ids = draw(batch, 6)
        found["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    return found


def samplers(net: UNet2DConditionModel) -> dict[str, Callable[[dict[str, object]], object]]:
    """What is compared, by name."""
    student = SharedEncoder(net, TIMES)
    return {
        "one step": lambda given: net(timestep=999, **given),
        f"TiUE, K = {len(TIMES)}": lambda given: student(timestep=999, **given),
        f"{len(TIMES)} steps": lambda given: [net(timestep=t, **given) for t in TIMES],
    }


@torch.no_grad()
def count_flops(name: str) -> dict[str, float]:
    """GFLOP of one image (two a multiplication), by sampler, from shapes alone."""
    with torch.device("meta"):
        net = UNet2DConditionModel.from_config(dict(ARCHITECTURES[name].unet)).half()
        given = inputs(net, 1, torch.device("meta"))
        found = {}
        for label, sample in samplers(net).items():
            with FlopCounterMode(display=False) as counter:
                sample(given)
            found[label] = counter.get_total_flops() / 1e9
    return found


@torch.no_grad()
def measure(
    sample: Callable[[dict[str, object]], object],
    given: dict[str, object],
    repeats: int,
    device: torch.device,
) -> tuple[float, float]:
    """Best time of a call in seconds, and peak memory in GiB (0 on a CPU)."""
    is_gpu, best = device.type == "cuda", float("inf")
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 1):  # the first warms up
        began = time.perf_counter()
        sample(given)
        if is_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best, torch.cuda.max_memory_allocated() / 2**30 if is_gpu else 0.0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["sd15", "sd21", "sdxl"], default="sd15")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flops", action="store_true", help="count only, for all models")
    args = parser.parse_args()
    if args.flops:
        print(
            "| U-Net | forward | TiUE, K = 4 | TiUE / forward | TiUE / 4 forwards |\n" + "|---" * 5
        )
        for name in ("sd15", "sd21", "sdxl"):
            one, tiue, several = count_flops(name).values()
            size = 8 * int(str(ARCHITECTURES[name].unet["sample_size"]))
            row = f"{one:.1f} GFLOP | {tiue:.1f} GFLOP | {tiue / one:.2f} | {tiue / several:.3f}"
            print(f"| {name} at {size} | {row} |")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    net = UNet2DConditionModel.from_config(dict(ARCHITECTURES[args.model].unet))
    net = net.to(device, dtype, memory_format=torch.channels_last).eval()
    print(f"{args.model}, {dtype}, {device}, torch {torch.__version__}")
    print("| batch | sampler | ms | images/s | peak GiB |\n|---|---|---|---|---|")
    for batch in args.batches:
        given = inputs(net, batch, device)
        for label, sample in samplers(net).items():
            seconds, memory = measure(sample, given, args.repeats, device)
            figures = f"{1e3 * seconds:.1f} | {batch / seconds:.2f} | {memory:.2f}"
            print(f"| {batch} | {label} | {figures} |")


if __name__ == "__main__":
    main()
