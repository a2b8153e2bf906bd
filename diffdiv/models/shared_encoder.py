"""One pass through a U-Net whose decoder runs at K times in one batch (TiUE, arXiv 2505.21960).

The encoder (all before the up blocks) sees pure noise once, at one time; its features are repeated
K times along the batch, output row k B + b, and every up block is told the embedding of its row's
time. Nothing of diffusers is patched: keyword hooks on the up blocks live for one forward, so
ControlNet residuals, adapters, attention masks, LoRA scales and odd sizes come along, and the
network stays an ordinary one to save and load. Features are repeated block by block, so only one
block's K-fold copy exists at a time.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from diffdiv.core.parallel_steps import ParallelSteps
from diffdiv.models.denoiser import Condition, Denoiser

_TILED = (
    "res_hidden_states_tuple", "encoder_hidden_states", "attention_mask", "encoder_attention_mask",
    "cross_attention_kwargs",
)  # fmt: skip
_NOT_PER_SAMPLE = "ip_adapter_masks"  # belong to the adapter's images; diffusers repeats them


def tile(value: object, count: int, batch: int) -> object:
    """``value`` with every tensor of leading size ``batch`` repeated ``count`` times, row by row.

    Lists, tuples and mappings are gone through; anything else is returned as it is.
    """
    if isinstance(value, Tensor):
        # cat keeps the memory format, repeat does not
        return torch.cat([value] * count) if value.ndim and len(value) == batch else value
    if isinstance(value, tuple | list):
        return type(value)(tile(part, count, batch) for part in value)
    if isinstance(value, dict):
        return {
            key: part if key == _NOT_PER_SAMPLE else tile(part, count, batch)
            for key, part in value.items()
        }
    return value


class SharedEncoder(nn.Module):
    """A UNet2DConditionModel called once for K decoder times.

    Wrap this module, not its U-Net, in DDP: gradients then pass through one ordinary forward.

    Args:
        unet: saves and loads as before; ``self.unet``.
        decoder_times: K times.

    Raises:
        ValueError: for a network whose embedding depends on an image hint.
    """

    def __init__(self, unet: UNet2DConditionModel, decoder_times: Sequence[float]) -> None:
        super().__init__()
        if unet.config.get("addition_embed_type") == "image_hint":
            raise ValueError("this UNet2DConditionModel takes an image hint: not supported")
        self.unet = unet
        times = torch.tensor(decoder_times, dtype=torch.float64)
        self.register_buffer("decoder_times", times, persistent=False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        **conditions: object,
    ) -> tuple[Tensor]:
        """Outputs at all decoder times.

        Args:
            sample: input of the encoder [B, C, H, W].
            timestep: of the encoder, [B] or one for all.
            encoder_hidden_states: text [B, L, D].
            conditions: any other keyword of ``UNet2DConditionModel.forward``, for batch B.

        Returns:
            One tensor [K B, C, H, W], row k B + b.
        """
        batch, times = len(sample), cast(Tensor, self.decoder_times)
        count = len(times)
        adapters = conditions.get("down_intrablock_additional_residuals")
        if isinstance(adapters, list):  # the network empties the list it is given
            conditions = {**conditions, "down_intrablock_additional_residuals": list(adapters)}
        rows = times.to(sample.device).repeat_interleave(batch)
        embedding = self._embedding(sample, rows, encoder_hidden_states, conditions)
        with ExitStack() as hooks:
            for number, block in enumerate(self.unet.up_blocks):
                names = (*_TILED, "hidden_states") if number == 0 else _TILED
                hook = partial(_widen, count=count, batch=batch, embedding=embedding, names=names)
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            return self.unet(
                sample, timestep, encoder_hidden_states, **{**conditions, "return_dict": False}
            )

    def _embedding(
        self, sample: Tensor, rows: Tensor, text: Tensor, conditions: dict[str, object]
    ) -> Tensor:
        """Time, class and added embeddings of the K B decoder rows, [K B, D]."""
        unet, batch = self.unet, len(sample)
        count = len(rows) // batch
        names = ("class_labels", "timestep_cond", "added_cond_kwargs")
        labels, guidance, added = (tile(conditions.get(name), count, batch) for name in names)
        like = sample[:1].expand(len(rows), *sample.shape[1:])  # for its size, dtype and device
        embedding = unet.time_embedding(unet.get_time_embed(sample=like, timestep=rows), guidance)
        of_class = unet.get_class_embed(sample=like, class_labels=cast("Tensor | None", labels))
        if of_class is not None and unet.config["class_embeddings_concat"]:
            embedding = torch.cat([embedding, of_class], dim=-1)
        elif of_class is not None:
            embedding = embedding + of_class
        extra = unet.get_aug_embed(
            emb=embedding,
            encoder_hidden_states=cast(Tensor, tile(text, count, batch)),
            added_cond_kwargs=cast("dict[str, Tensor]", added),
        )
        embedding = embedding if extra is None else embedding + extra
        return embedding if unet.time_embed_act is None else unet.time_embed_act(embedding)


def _widen(
    _block: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    *,
    count: int,
    batch: int,
    embedding: Tensor,
    names: Sequence[str],
) -> tuple[tuple[object, ...], dict[str, object]]:
    """What an up block is given, for K B rows in place of B."""
    wide = {name: tile(kwargs[name], count, batch) for name in names if name in kwargs}
    return args, {**kwargs, **wide, "temb": embedding}


@dataclass(frozen=True)
class ParallelGenerator:
    """The TiUE student: one encoder pass, K decoder passes in a batch, x0 by K fixed DDIM steps.

    Attributes:
        denoiser: whose network is a :class:`SharedEncoder` (it may be wrapped).
        encoder_time: what the encoder is told, an index of the schedule.
        steps: times and combination of the decoder's outputs.
    """

    denoiser: Denoiser
    encoder_time: float
    steps: ParallelSteps

    @property
    def description(self) -> str:
        """In words, for tables."""
        return f"1 pass, {len(self.steps.times)} decoder times"

    num_steps = 1  # one call of the network
    convention = "unit"  # its input is z itself

    @property
    def times(self) -> tuple[float, ...]:
        """The decoder's times."""
        return tuple(float(t) for t in self.steps.times)

    def noise_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of the noise for samples of ``shape``: the same."""
        return shape

    def outputs(self, z: Tensor, cond: Condition) -> Tensor:
        """Network outputs [K, B, C, H, W] for standard normal noise z [B, C, H, W]."""
        t = torch.full((len(z),), self.encoder_time, dtype=torch.float64, device=z.device)
        return self.denoiser.raw(z, t, cond).unflatten(0, (len(self.steps.times), len(z)))

    def __call__(self, z: Tensor, cond: Condition) -> Tensor:
        """Samples x0 [B, C, H, W], float32, from standard normal noise of that shape."""
        return self.steps.combine(z, self.outputs(z, cond))

    def with_net(self, net: nn.Module) -> "ParallelGenerator":
        """The same generator around another :class:`SharedEncoder`."""
        return replace(self, denoiser=self.denoiser.with_net(net))


def parallel_generator(
    teacher: Denoiser,
    unet: nn.Module,
    decoder_times: Sequence[int],
    encoder_time: int | None,
) -> ParallelGenerator:
    """The student made of ``unet``, with the noise schedule of its teacher.

    The last step lands at the schedule's index 0, as Stable Diffusion's scheduler does.

    Args:
        teacher: gives schedule, prediction kind and how the family is called.
        unet: the student's network, of the teacher's shape.
        decoder_times: falling indices of the schedule.
        encoder_time: what the encoder is told; None = the first of the decoder's.

    Raises:
        ValueError: if the network is no UNet2DConditionModel, the schedule is not
            variance-preserving, or the times do not fit it.
    """
    schedule = teacher.schedule
    if not isinstance(unet, UNet2DConditionModel) or schedule.family != "vp":
        kind = f"a {type(unet).__name__} with a {schedule.family} schedule"
        raise ValueError(f"the teacher is {kind}; wanted is a UNet2DConditionModel with vp")
    indices = torch.arange(int(schedule.t_max) + 1, dtype=torch.float64)
    table = schedule.alpha(indices).square()
    steps = ParallelSteps.listed(teacher.prediction, decoder_times, table, float(table[0]))
    first = decoder_times[0] if encoder_time is None else encoder_time
    if not 0 <= first < len(table):
        raise ValueError(f"encoder_time {first} lies outside 0..{len(table) - 1}")
    denoiser = teacher.with_net(SharedEncoder(unet, decoder_times))
    return ParallelGenerator(denoiser, float(first), steps)
