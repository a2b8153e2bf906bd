"""One Diff-Instruct* cycle on SDXL at 1024 pixels with a PickScore-size reward; random weights.

    python benchmarks/di_star_step.py --plan                          # bytes, without a GPU
    python benchmarks/di_star_step.py --cycles 10                     # time and peak, on a GPU
    python benchmarks/di_star_step.py --plan --tiny --size 64         # does the program work?

A cycle is train/di_star.py's (diffdiv/rehearsal_reward.py): samples, updates of the fake score, one
of the student with the guided reference inside a pseudo-Huber score divergence (both frozen roles
differentiated with respect to their inputs), VAE decode and reward in float32. Student and fake
score are adapters on the reference's network; activations of U-Net blocks and of the decoder's are
made again in the backward.

`diffdiv plan configs/di_star/sdxl_lora_24gb.yaml --like sdxl` does --plan for a configuration. What
operators allocate for themselves and the allocator's losses are not in its bytes.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

from diffdiv.counters import Counters
from diffdiv.gpus import GIB
from diffdiv.models.architectures import ARCHITECTURES
from diffdiv.plan import plan_cycle
from diffdiv.rehearsal_reward import (
    CLIP_H,
    RewardRehearsal,
    RewardShape,
    RewardSpec,
    build_reward_networks,
)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
TINY_CLIP = {
    "vision_config": {**SMALL, "image_size": 32, "patch_size": 16},
    "text_config": SMALL,
    "projection_dim": 16,
}


def planned(_chosen: argparse.Namespace, spec: RewardSpec) -> None:
    """Peaks by phase and kind, GiB."""
    peaks = plan_cycle(spec).peaks
    kinds = list(dict.fromkeys(kind for sizes in peaks.values() for kind in sizes))
    print(f"| phase | {' | '.join(kinds)} | total GiB |\n|{'---|' * (len(kinds) + 2)}")
    for phase, sizes in peaks.items():
        cells = " | ".join(f"{sizes.get(kind, 0) / GIB:.2f}" for kind in kinds)
        print(f"| {phase} | {cells} | {sum(sizes.values()) / GIB:.2f} |")


def timed(chosen: argparse.Namespace, spec: RewardSpec) -> None:
    """Seconds and peak of a cycle on a GPU, after two others."""
    nets, device = build_reward_networks(spec), torch.device("cuda")
    rehearsal = RewardRehearsal(spec, nets, device, Counters())
    seconds = []
    for index in range(2 + chosen.cycles):
        torch.cuda.synchronize()
        if index == 2:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        rehearsal.cycle(critic_updates=chosen.critic_updates)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / GIB
    print(f"{torch.cuda.get_device_name()}: {statistics.median(seconds[2:]):.3f} s a cycle of ")
    print(f"{chosen.batch} images, {chosen.critic_updates} critic updates; peak {peak:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="count bytes, without a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny networks of the same kinds")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--critic-updates", type=int, default=5)
    parser.add_argument("--accumulates", action="store_true", help="not the first micro-batch")
    parser.add_argument("--cycles", type=int, default=10, help="timed, after two others")
    chosen = parser.parse_args()
    architecture, clip = ARCHITECTURES["sdxl"], CLIP_H
    if chosen.tiny:
        from step_bench import tiny

        architecture, clip = tiny(architecture), TINY_CLIP
        channels = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
        architecture = replace(architecture, vae={**architecture.vae, **channels})
    spec = RewardSpec(
        architecture, size=chosen.size, batch=chosen.batch, guidance_scale=7.5,
        student_rank=chosen.rank, fake_rank=chosen.rank, critic_updates=chosen.critic_updates,
        accumulates=chosen.accumulates, rewards=(RewardShape("pickscore", clip),),
    )  # fmt: skip
    (planned if chosen.plan else timed)(chosen, spec)


if __name__ == "__main__":
    main()
