"""One cycle of train/f_distill.py on networks with random weights, and what it costs.

A rehearsal needs shapes only. On fake tensors (shapes without data) it is how ``diffdiv plan``
knows memory and FLOPs; on a device it is what benchmarks time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffdiv.core.divergence import get_divergence
from diffdiv.core.schedule import Noising, vp_from_betas
from diffdiv.counters import Counters
from diffdiv.models.adapters import AdapterView, SharedBase, enable_checkpointing
from diffdiv.models.architectures import (
    Architecture,
    build_text_encoders,
    build_unet,
    build_vae,
)
from diffdiv.models.denoiser import Condition, Denoiser, guided
from diffdiv.models.discriminator import heads_for
from diffdiv.models.families import FAMILIES, lora_targets
from diffdiv.models.generator import Generator
from diffdiv.objectives.f_distill import (
    Critic,
    RatioStatistics,
    Real,
    density_ratio_loss,
    fake_score_loss,
    student_loss,
)
from diffdiv.runtime.config import OptimizerConfig
from diffdiv.runtime.network import Network

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class PlanSpec:
    """One GPU's share of a distillation.

    Attributes:
        architecture: shapes of the networks.
        size: side of an image, pixels.
        batch: images of a micro-batch.
        guidance_scale: of the teacher, both branches in one batch; None = one branch.
        student_rank: LoRA rank of the student on the shared base; None = a full copy.
        fake_rank: likewise of the fake score.
        checkpointing: activations inside U-Net blocks are computed again in the backward.
        base_dtype: of the frozen weights; int8 = linear layers, planned as bf16 and scaled.
        trained_dtype: of full copies; adapters and heads are float32.
        precision: of autocast; fp32 = off.
        critic_updates: per student update.
        gan_blocks: tapped blocks of the discriminator; None = plain reverse KL without one.
        gan_trunk: whose features the heads read.
        optimizer_bits: of each AdamW moment; 8 = blocks of 256 values with one float32 scale.
        shards: processes that share full networks among them (fsdp2).
        num_ema: averages of the student's trained weights, float32.
        text_on_gpu: the text encoders stay there, in ``base_dtype``.
        vae_images: images that the float32 VAE decodes at once there; None = it is elsewhere.
    """

    architecture: Architecture
    size: int
    batch: int
    guidance_scale: float | None = None
    student_rank: int | None = None
    fake_rank: int | None = None
    checkpointing: bool = True
    base_dtype: Literal["fp32", "bf16", "int8"] = "bf16"
    trained_dtype: Precision = "fp32"
    precision: Precision = "bf16"
    critic_updates: int = 5
    gan_blocks: tuple[str, ...] | None = ("mid_block",)
    gan_trunk: Literal["teacher", "fake"] = "teacher"
    optimizer_bits: Literal[8, 32] = 32
    shards: int = 1
    num_ema: int = 1
    text_on_gpu: bool = False
    vae_images: int | None = None


def build_networks(spec: PlanSpec) -> dict[str, nn.Module]:
    """Frozen base, student, fake score, and VAE and text encoders if wanted; meta device."""
    base_dtype = torch.float32 if spec.base_dtype == "fp32" else torch.bfloat16
    base = build_unet(spec.architecture, base_dtype)
    shared, targets = SharedBase(base), lora_targets(base)
    nets: dict[str, nn.Module] = {"base": base}
    for role, rank in (("student", spec.student_rank), ("fake", spec.fake_rank)):
        if rank is None:
            nets[role] = build_unet(spec.architecture, DTYPES[spec.trained_dtype])
            if spec.checkpointing:
                enable_checkpointing(nets[role])
        else:
            with torch.device("meta"):
                nets[role] = shared.add(role, rank=rank, alpha=rank, targets=targets, seed=0)
    if spec.checkpointing:
        enable_checkpointing(shared)
    if spec.text_on_gpu:
        nets["text"] = build_text_encoders(spec.architecture, base_dtype)
    if spec.vae_images is not None:
        nets["VAE"] = build_vae(spec.architecture)
    return nets


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give parameters (small random values) and buffers (zeros) new storage on ``device``.

    In place of ``module.to_empty``, which cannot swap parameters under a FakeTensorMode.
    """
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            fresh = torch.empty(value.shape, dtype=value.dtype, device=device).normal_(std=0.02)
            setattr(part, name, nn.Parameter(fresh, requires_grad=value.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))


def trained_network(name: str, net: nn.Module, counters: Counters, num_ema: int) -> Network:
    """A network with its optimiser and so many averages, after a step with zero gradients.

    So the first cycle finds the optimiser's states as later ones do.
    """
    for parameter in net.parameters():
        counters.tag(parameter, "trained weights")
        parameter.register_post_accumulate_grad_hook(lambda p: counters.tag(p.grad, "gradients"))
    with counters.kind("EMA"):
        network = Network(
            name,
            net.requires_grad_(True),
            trained=net,
            lr=1e-5,
            config=OptimizerConfig.model_validate({"clip": 1.0}),
            ema_half_lives=range(1000, 1000 + num_ema),
            scaler=None,
        )
    with counters.kind("optimiser"):
        for parameter in network.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        network.optimizer.step()
        network.optimizer.zero_grad()
    return network


def update(network: Network, loss: Tensor, images: int) -> None:
    """Backward and one step, as the runtime makes it in one process."""
    network.backward(loss, share=1)
    norm = network.gradient_norm()
    network.not_finite(norm, rank=0, world_size=1)
    network.step(norm, lr=1e-5, images=images)
    network.updates += 1


class Rehearsal:
    """The networks of a run with their optimisers and averages, and one cycle.

    Args:
        spec: what is rehearsed.
        nets: of :func:`build_networks`; they get storage on ``device`` here.
        device: a real one, or the CPU under a FakeTensorMode.
        counters: told what is allocated for what; they count only while entered.
    """

    def __init__(
        self,
        spec: PlanSpec,
        nets: dict[str, nn.Module],
        device: torch.device,
        counters: Counters,
    ) -> None:
        self.spec, self.device, self.counters = spec, device, counters
        frozen = {"base": "frozen weights", "text": "text", "VAE": "VAE", "reward": "rewards"}
        for name, net in nets.items():
            if not isinstance(net, AdapterView):  # adapters get theirs with the base
                with counters.kind(frozen.get(name.partition("/")[0], "trained weights")):
                    materialise(net, device)
        base_net, self.vae = nets["base"], nets.get("VAE")
        trained = {role: nets[role] for role in ("student", "fake")}
        self.ratio = RatioStatistics(get_divergence("jensen_shannon"))
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        call = FAMILIES["UNet2DConditionModel"].bind(spec.architecture.unet)
        base = Denoiser(base_net, call, vp_from_betas(betas), "eps")
        side = spec.size // spec.architecture.pixels_per_latent
        self.shape = (4, side, side)
        disc = None
        if spec.gan_blocks is not None:
            with device, self.autocast():
                disc = heads_for(base, self.shape, self._cond(1), spec.gan_blocks, seed=0)
            disc.register_forward_pre_hook(self._tag_features)
            trained["disc"] = disc
        self.networks = {
            name: trained_network(name, net, counters, spec.num_ema if name == "student" else 0)
            for name, net in trained.items()
        }
        teacher = guided(base, spec.guidance_scale, self._cond(1))
        self.fake = base.with_net(trained["fake"])
        self.critic = Critic(teacher, self.fake, disc, spec.gan_blocks or (), spec.gan_trunk)
        self.generator = Generator(base.with_net(trained["student"]), 999, "unit")

    def _tag_features(self, _heads: nn.Module, args: tuple[Sequence[Tensor]]) -> None:
        for feature in args[0]:
            self.counters.tag(feature, "features")

    def autocast(self) -> torch.autocast:
        """In the precision of the specification."""
        name = self.spec.precision
        return torch.autocast(self.device.type, DTYPES[name], enabled=name != "fp32")

    def _cond(self, batch: int) -> Condition:
        def zeros(width: object, *length: int) -> Tensor:
            return torch.zeros(batch, *length, int(str(width)), device=self.device)

        unet = self.spec.architecture.unet
        text = zeros(unet["cross_attention_dim"], 77)
        if unet.get("addition_embed_type") is None:
            return Condition(text=text)
        pooled = zeros(self.spec.architecture.pooled_width)
        return Condition(text=text, pooled=pooled, time_ids=zeros(6))

    def _normal(self) -> Tensor:
        return torch.randn(self.spec.batch, *self.shape, device=self.device)

    def _noising(self) -> Noising:
        u = torch.rand(self.spec.batch, dtype=torch.float64)
        t = self.fake.schedule.sample_t(u).to(self.device)
        return Noising(t, u, self._normal())

    def _generate(self) -> tuple[Tensor, Condition]:
        cond = self._cond(self.spec.batch)
        with self.autocast():
            return self.generator(self._normal(), cond), cond

    @contextmanager
    def _turn(self, *names: str) -> Iterator[None]:
        for name, network in self.networks.items():
            for parameter in network.parameters.values():
                parameter.requires_grad_(name in names)
        yield
        for network in self.networks.values():
            network.module.zero_grad(set_to_none=True)

    def cycle(self, *, critic_updates: int) -> None:
        """Critic updates and one student update, as in train/f_distill.py; then a preview."""
        phase = self.counters.phase
        with phase("samples"), torch.no_grad():
            x0, cond = self._generate()
        for _ in range(critic_updates):
            self._critic_update(x0, cond)
        with phase("student"), self._turn("student"):
            x0, cond = self._generate()
            gan_weight = None if self.critic.disc is None else 1e-3
            with self.autocast():
                loss, _ = student_loss(
                    x0,
                    cond,
                    self._noising(),
                    critic=self.critic,
                    ratio=self.ratio,
                    gan_weight=gan_weight,
                )
            update(self.networks["student"], loss, self.spec.batch)
            self.ratio.commit()
        if self.vae is not None:
            with phase("preview"), torch.no_grad():
                latents = torch.zeros(self.spec.vae_images or 1, *self.shape, device=self.device)
                self.vae.decode(latents)  # type: ignore[operator]  # AutoencoderKL by construction

    def _critic_update(self, x0: Tensor, cond: Condition) -> None:
        heads = () if self.critic.disc is None else ("disc",)
        with self._turn("fake", *heads):
            at = self._noising()
            with self.counters.phase("fake score"):
                with self.autocast():
                    loss, _ = fake_score_loss(self.fake, x0, cond, at)
                update(self.networks["fake"], loss, self.spec.batch)
            if heads:
                with self.counters.phase("discriminator"):
                    real = Real(self._normal(), cond, self._noising())
                    with self.autocast():
                        loss, _ = density_ratio_loss(
                            x0, cond, at, real, critic=self.critic, ratio=self.ratio
                        )
                    update(self.networks["disc"], loss, self.spec.batch)
        self.ratio.commit()
