"""One Diff-Instruct* cycle on SDXL at 1024 pixels with a PickScore-size reward; random weights.

    python benchmarks/di_star_step.py --plan                          # bytes, without a GPU
    python benchmarks/di_star_step.py --cycles 10                     # time and peak, on a GPU
    python benchmarks/di_star_step.py --plan --tiny --size 64         # does the program work?

A cycle is train/di_star.py's: samples, updates of the fake score, one of the student with the
guided reference inside a pseudo-Huber score divergence (both frozen roles differentiated with
respect to their inputs), VAE decode and reward in float32. Student and fake score are adapters on
the reference's network; activations of U-Net blocks are made again in the backward.

    --decoder whole     the decode is one checkpoint: in its backward all its activations are there
    --decoder blocks    and each of its blocks is one more, as in the library
    --reward bf16       the reward's weights in bfloat16 in place of float32

What operators allocate for themselves and the allocator's losses are not in the bytes of --plan.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPModel

from diffdiv.core.score_distance import pseudo_huber
from diffdiv.core.tensor import loss_with_gradient
from diffdiv.counters import Counters, cuda_autocast
from diffdiv.gpus import GIB
from diffdiv.models.architectures import ARCHITECTURES
from diffdiv.models.backbones import checkpoint_blocks
from diffdiv.models.denoiser import Condition
from diffdiv.objectives.diff_instruct import score_divergence_loss
from diffdiv.rehearsal import PlanSpec, Rehearsal, build_networks, materialise, update

#: CLIP ViT-H/14 as PickScore has it
VISION = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
}  # fmt: skip
TEXT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "hidden_act": "gelu",
}  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def build(chosen: argparse.Namespace, spec: PlanSpec) -> dict[str, nn.Module]:
    """All networks on the meta device; the reward's is "clip"."""
    vision, text = (part | (SMALL if chosen.tiny else {}) for part in (VISION, TEXT))
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=1024)
    dtype = torch.bfloat16 if chosen.reward == "bf16" else torch.float32
    nets = build_networks(spec)
    if chosen.decoder == "blocks":
        checkpoint_blocks(cast(AutoencoderKL, nets["VAE"]).decoder)
    with torch.device("meta"):
        nets["clip"] = CLIPModel(config).to(dtype).eval().requires_grad_(False)
    return nets


class Rewarded(Rehearsal):
    """A cycle with decoder and reward in place of a discriminator."""

    def __init__(
        self, spec: PlanSpec, nets: dict[str, nn.Module], device: torch.device, counters: Counters
    ) -> None:
        self.clip = nets.pop("clip")
        super().__init__(spec, nets, device, counters)
        with counters.kind("reward"):
            materialise(self.clip, device)

    def reward(self, images: Tensor) -> Tensor:
        """Cosines [B] of images [B, 3, H, W]."""
        clip = cast(CLIPModel, self.clip)
        tokens = torch.zeros(len(images), 77, dtype=torch.long, device=self.device)
        side = clip.config.vision_config.image_size
        pixels = interpolate(images, (side, side), mode="bicubic", antialias=True)
        out = clip(input_ids=tokens, pixel_values=pixels.to(clip.dtype))
        return (out.image_embeds * out.text_embeds).sum(1).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Images, one by one, activations made again in the backward."""
        vae = cast(AutoencoderKL, self.vae)

        def one(latent: Tensor) -> Tensor:
            return vae.decode(latent, return_dict=False)[0]

        parts = latents.float().split(1)
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([checkpoint(one, part, use_reentrant=False) for part in parts])

    def cycle(self, *, critic_updates: int) -> None:
        with self.counters.phase("samples"), torch.no_grad():
            x0, cond = self._generate()
        for _ in range(critic_updates):
            self._critic_update(x0, cond)
        with self._turn("student"):
            with self.counters.phase("student: sample"):
                x0, cond = self._generate()
                leaf = x0.detach().requires_grad_()
                images = self.decode(leaf)
            with self.counters.phase("student: reward"):
                with torch.autocast(self.device.type, enabled=False):
                    shown = images.detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(self.reward(shown).sum(), shown)
            with self.counters.phase("student: decoder backward"):
                (pull,) = torch.autograd.grad(images, leaf, gradient)
                del images, shown, gradient
            with self.counters.phase("student: regulariser"):
                loss = self._held(x0, cond) - loss_with_gradient(x0, pull)
            with self.counters.phase("student: backward"):
                update(self.networks["student"], loss, self.spec.batch)

    def _held(self, x0: Tensor, cond: Condition) -> Tensor:
        with self.autocast():
            loss, _ = score_divergence_loss(
                x0, cond, self._noising(), reference=self.critic.teacher, fake=self.fake,
                schedule=self.fake.schedule, distance=pseudo_huber(0.1),
            )  # fmt: skip
        return loss


def planned(chosen: argparse.Namespace, spec: PlanSpec) -> None:
    """Peaks by phase and kind, GiB."""
    counters, nets = Counters(), build(chosen, spec)
    with FakeTensorMode(), cuda_autocast(), counters:
        Rewarded(spec, nets, torch.device("cpu"), counters).cycle(critic_updates=1)
    kinds = list(dict.fromkeys(kind for sizes in counters.peaks.values() for kind in sizes))
    print(f"| phase | {' | '.join(kinds)} | total GiB |\n|{'---|' * (len(kinds) + 2)}")
    for phase, sizes in counters.peaks.items():
        cells = " | ".join(f"{sizes.get(kind, 0) / GIB:.2f}" for kind in kinds)
        print(f"| {phase} | {cells} | {sum(sizes.values()) / GIB:.2f} |")


def timed(chosen: argparse.Namespace, spec: PlanSpec) -> None:
    """Seconds and peak of a cycle on a GPU, after two others."""
    rehearsal = Rewarded(spec, build(chosen, spec), torch.device("cuda"), Counters())
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
    parser.add_argument("--decoder", choices=("whole", "blocks"), default="blocks")
    parser.add_argument("--reward", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--cycles", type=int, default=10, help="timed, after two others")
    chosen = parser.parse_args()
    architecture = ARCHITECTURES["sdxl"]
    if chosen.tiny:
        from step_bench import tiny

        architecture = tiny(architecture)
        channels = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
        architecture = replace(architecture, vae={**architecture.vae, **channels})
    spec = PlanSpec(
        architecture, size=chosen.size, batch=chosen.batch, guidance_scale=7.5,
        student_rank=chosen.rank, fake_rank=chosen.rank, gan_blocks=None, vae_images=1,
    )  # fmt: skip
    (planned if chosen.plan else timed)(chosen, spec)


if __name__ == "__main__":
    main()
