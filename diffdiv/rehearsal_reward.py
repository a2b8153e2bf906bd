"""One cycle of train/di_star.py on networks with random weights: a Rehearsal with rewards.

Decoder and rewards are float32; their gradient in the samples is taken before the regulariser.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from diffdiv.core.score_distance import pseudo_huber, squared
from diffdiv.core.tensor import loss_with_gradient
from diffdiv.counters import Counters
from diffdiv.metrics.judge import Judge
from diffdiv.models.architectures import Config, build_vae
from diffdiv.models.backbones import LatentCodec, checkpoint_blocks
from diffdiv.models.denoiser import Condition
from diffdiv.objectives import diff_instruct
from diffdiv.rehearsal import PlanSpec, Rehearsal, build_networks, update
from diffdiv.rewards.images import ImageReward
from diffdiv.rewards.pixels import CLIP_MEAN, CLIP_STD, fitted, normalised
from diffdiv.rewards.weighted import WeightedReward, WeightedRewards

#: CLIP ViT-H/14 (arXiv 2212.07143), as PickScore and HPSv2 have it: its config.json
CLIP_H: Config = {
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "hidden_act": "gelu",
    },
    "projection_dim": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class RewardShape:
    """One reward as it is rehearsed.

    Attributes:
        name: of the reward.
        clip: config.json of its CLIP; None = the judge of the embedded world.
        is_assumed: whether that size is a guess.
        scale: 0 = only looked at.
        differentiable: False = estimated from ``copies`` perturbed copies of each sample.
        copies: even.
    """

    name: str
    clip: Config | None = None
    is_assumed: bool = False
    scale: float = 1.0
    differentiable: bool = True
    copies: int = 8


@dataclass(frozen=True)
class RewardSpec(PlanSpec):
    """One GPU's share of a Diff-Instruct* run: a distillation without discriminator, with rewards.

    Attributes:
        rewards: of decoded images, float32.
        regulariser: which divergence; "didr" differentiates the rewards inside of it once more.
        has_guidance_reward: guidance also acts outside, as a reward.
        accumulates: gradients of earlier micro-batches are there when a micro-batch begins.
        num_vaes: float32 autoencoders on the GPU: the rewards', and the previews' if no cache.
    """

    gan_blocks: tuple[str, ...] | None = None
    vae_images: int | None = 1
    rewards: tuple[RewardShape, ...] = ()
    regulariser: Literal["squared", "pseudo_huber", "ikl", "didr"] = "pseudo_huber"
    has_guidance_reward: bool = False
    accumulates: bool = False
    num_vaes: Literal[1, 2] = 1

    def notes(self) -> list[str]:
        """What is assumed of the rewards' sizes, in sentences."""
        guessed = ", ".join(shape.name for shape in self.rewards if shape.is_assumed)
        return [f"assumed to be of CLIP ViT-H/14's size: {guessed}"] if guessed else []


def build_reward_networks(spec: RewardSpec) -> dict[str, nn.Module]:
    """Those of a distillation, the decoder checkpointed, and "reward/NAME"; meta device."""
    nets = build_networks(spec)
    checkpoint_blocks(cast(AutoencoderKL, nets["VAE"]).decoder)
    if spec.num_vaes == 2:
        nets["VAE/previews"] = build_vae(spec.architecture)
    for shape in spec.rewards:
        with torch.device("meta"):
            net = (
                Judge() if shape.clip is None else CLIPModel(CLIPConfig.from_dict(dict(shape.clip)))
            )
        nets[f"reward/{shape.name}"] = net.eval().requires_grad_(False)
    return nets


class _Codec(LatentCodec):
    """The library's decoding, by a network that came from no folder."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae, self.scale, self.shift = cast(AutoencoderKL, vae), 1.0, 0.0


class _UncheckedReward(ImageReward):
    """Without the check for finite values: a fake tensor has none."""

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        return self.function(images, prompts)


def _scored_by(net: nn.Module) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Rewards [B] of images in [-1, 1] by a CLIP or by the judge."""

    def judged(images: Tensor, _prompts: Sequence[str]) -> Tensor:
        return torch.log_softmax(net(images)["colour"], 1)[:, 0]

    def clip(images: Tensor, prompts: Sequence[str]) -> Tensor:
        model = cast(CLIPModel, net)
        said, seen = model.text_model.embeddings, model.vision_model.embeddings
        shape = len(prompts), said.position_embedding.num_embeddings
        tokens = torch.zeros(shape, dtype=torch.long, device=images.device)
        pixels = normalised(fitted(images, int(seen.image_size)), CLIP_MEAN, CLIP_STD)
        out = net(input_ids=tokens, pixel_values=pixels)
        return cast(Tensor, (out.image_embeds * out.text_embeds).sum(1))

    return judged if isinstance(net, Judge) else clip


class RewardRehearsal(Rehearsal):
    """The networks of a run with optimisers, averages, decoder and rewards, and one cycle.

    Args:
        spec: what is rehearsed.
        nets: of :func:`build_reward_networks`; they get storage on ``device`` here.
        device: a real one, or the CPU under a FakeTensorMode.
        counters: told what is allocated for what; they count only while entered.
    """

    def __init__(
        self,
        spec: RewardSpec,
        nets: Mapping[str, nn.Module],
        device: torch.device,
        counters: Counters,
    ) -> None:
        super().__init__(spec, dict(nets), device, counters)
        self.wanted, self.base = spec, self.fake.with_net(nets["base"])
        opened = [
            WeightedReward(
                _UncheckedReward(shape.name, _scored_by(nets[f"reward/{shape.name}"])),
                scale=shape.scale,
                differentiable=shape.differentiable,
                copies=shape.copies,
            )
            for shape in spec.rewards
        ]
        codec = _Codec(nets["VAE"])
        self.rewards = WeightedRewards(opened, codec.decode_with_gradient, seed=0)

    @contextmanager
    def _turn(self, *names: str) -> Iterator[None]:
        with super()._turn(*names):
            for name in names if self.wanted.accumulates else ():
                with self.counters.kind("gradients"):
                    for parameter in self.networks[name].parameters.values():
                        parameter.grad = torch.zeros_like(parameter)
            yield

    def cycle(self, *, critic_updates: int) -> None:
        """Critic updates and one student update, as in train/di_star.py."""
        phase, batch = self.counters.phase, self.spec.batch
        with phase("samples"), torch.no_grad():
            x0, cond = self._generate()
        for _ in range(critic_updates):
            self._critic_update(x0, cond)
        with self._turn("student"):
            with phase("student: sample"):
                x0, cond = self._generate()
            with phase("student: reward"):
                leaf = x0.detach().requires_grad_()
                reward, _ = self.rewards(leaf, [""] * batch, range(batch))
            with phase("student: decoder's backward"):
                (pull,) = torch.autograd.grad(reward.mean(), leaf)
            with phase("student: regulariser"):
                with self.autocast():
                    loss = self._held(x0, cond)
                if self.wanted.regulariser != "didr":
                    loss = loss - loss_with_gradient(x0, pull)
            with phase("student: backward"):
                update(self.networks["student"], loss, batch)

    def _held(self, x0: Tensor, cond: Condition) -> Tensor:
        """The regulariser's loss, with the guidance's."""
        name, schedule, reference = self.wanted.regulariser, self.base.schedule, self.critic.teacher
        ikl = partial(diff_instruct.ikl_loss, fake=self.fake, schedule=schedule)
        divergence = partial(
            diff_instruct.score_divergence_loss,
            reference=reference, fake=self.fake, schedule=schedule,
        )  # fmt: skip
        tilt = partial(
            diff_instruct.diffused_reward_score,
            reference=reference, reward=self._total, beta=1.0, schedule=schedule,
        )  # fmt: skip
        at = self._noising()
        match name:
            case "ikl":
                loss, _ = ikl(x0, cond, at, reference=reference)
            case "didr":
                tilted = diff_instruct.tilted_reference(reference, schedule, tilt)
                loss, _ = ikl(x0, cond, at, reference=tilted)
            case "squared":
                loss, _ = divergence(x0, cond, at, distance=squared())
            case "pseudo_huber":
                loss, _ = divergence(x0, cond, at, distance=pseudo_huber(0.1))
        if self.wanted.has_guidance_reward:
            loss = loss + diff_instruct.guidance_reward_loss(
                x0, cond, self._noising(), reference=self.base, uncond=self._cond(1),
                schedule=schedule,
            )  # fmt: skip
        return loss

    def _total(self, clean: Tensor) -> Tensor:
        return self.rewards.total(clean, [""] * len(clean), range(len(clean)))
