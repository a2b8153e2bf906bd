"""One contract over every diffusers backbone: ``denoiser(x_t, t, cond) -> x0``.

    x_t      noised sample [B, C, H, W]        t       time [B], float64 (see core/schedule.py)
    cond     what the network is told          raw     what the network returns

EDM preconditioning (arXiv 2206.00364, table 1) is a property of a denoiser:
    x0 = c_skip x_t + c_out F(c_in x_t, c_noise).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from diffdiv.core.prediction import PredictionKind, coefficients, convert
from diffdiv.core.schedule import Schedule
from diffdiv.core.tensor import expand_like


@dataclass(frozen=True)
class Condition:
    """What a network is told besides x_t and t; None = the network has no such input.

    Attributes:
        text: text embeddings [B, L, D].
        text_mask: 1 where text holds a token, 0 for padding [B, L], int64 (PixArt, SANA).
        pooled: pooled text embedding [B, D] (SDXL, SD3, FLUX).
        time_ids: original size, crop and target size in pixels [B, 6] (SDXL).
        label: class index [B], int64.
    """

    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    label: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """The condition with ``function`` applied to every field that is set."""
        values = vars(self).items()
        return Condition(**{k: None if v is None else function(v) for k, v in values})

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Condition":
        """Move; floating-point fields also change dtype."""
        return self.map(lambda v: v.to(device, dtype if v.is_floating_point() else None))

    def expand(self, batch: int) -> "Condition":
        """A condition of batch 1 repeated ``batch`` times without copying."""
        return self.map(lambda v: v.expand(batch, *v.shape[1:]))

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        return self.map(lambda v: v[rows])


def concatenate(parts: Sequence[Condition]) -> Condition:
    """Conditions joined along the batch; all must set the same fields."""
    joined = {}
    for name in vars(parts[0]):
        values = [vars(part)[name] for part in parts if vars(part)[name] is not None]
        if values and len(values) != len(parts):
            raise ValueError(f"condition field {name!r} is set in some parts only")
        joined[name] = torch.cat(values) if values else None
    return Condition(**joined)


def dropped(cond: Condition, uncond: Condition | None, rows: Tensor) -> Condition:
    """``cond`` with the unconditional one in the ``rows`` [B] that are true.

    Without an unconditional condition there is nothing to put there: ``cond`` itself.
    """
    if uncond is None:
        return cond
    blank = uncond.expand(len(rows)).tensors()
    mixed = {}
    for name, value in cond.tensors().items():
        is_dropped = rows.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
        mixed[name] = torch.where(is_dropped, blank[name].to(value), value)
    return Condition(**mixed)


#: ``call(net, x_in, net_time, cond) -> raw``: one short function per family, models/backbones.py
Call = Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class Denoiser:
    """A network with its schedule and the meaning of its output.

    Attributes:
        net: backbone; may be wrapped (DDP), feature taps then need the raw module.
        call: how the family is called.
        schedule: forward process the network was trained for.
        prediction: kind of the raw output (ignored when ``sigma_data`` is set).
        sigma_data: standard deviation of the data for EDM preconditioning; None = none.
    """

    net: nn.Module
    call: Call
    schedule: Schedule
    prediction: PredictionKind
    sigma_data: float | None = None

    def with_net(self, net: nn.Module) -> "Denoiser":
        """The same denoiser around another (copy of the, or wrapped) network."""
        return replace(self, net=net)

    def raw(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Network output in its own prediction space, shape of x_t."""
        if self.sigma_data is not None:
            c_in, _, _ = _preconditioning(self.schedule.sigma(t), self.sigma_data)
            x_t = expand_like(c_in, x_t) * x_t
        return self.call(self.net, x_t, self.schedule.net_time(t), cond)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What ``raw`` should be for this x0 and eps (denoising score matching)."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if self.sigma_data is None:
            a, b = coefficients(self.prediction, alpha, sigma)
        else:
            _, c_skip, c_out = _preconditioning(sigma, self.sigma_data)
            a, b = (1 - c_skip * alpha) / c_out, -c_skip * sigma / c_out
        return expand_like(a, x0) * x0 + expand_like(b, x0) * eps

    def x0_from_raw(self, raw: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 in float32 (or better) from the network's output."""
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if self.sigma_data is None:
            return convert(raw, self.prediction, "x0", x_t.to(raw.dtype), alpha, sigma)
        _, c_skip, c_out = _preconditioning(sigma, self.sigma_data)
        return expand_like(c_skip, raw) * x_t + expand_like(c_out, raw) * raw

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Posterior mean of x0 given x_t, shape of x_t."""
        return self.x0_from_raw(self.raw(x_t, t, cond), x_t, t)

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition, *, as_: PredictionKind) -> Tensor:
        """The prediction as another kind ("eps", "v", "score", ...)."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return convert(self(x_t, t, cond), "x0", as_, x_t, alpha, sigma)

    def with_features(
        self, x_t: Tensor, t: Tensor, cond: Condition, names: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        """x0, without graph, and the outputs of the named blocks, with theirs; one forward."""
        with tap(self.net, names) as features:
            x0 = self(x_t, t, cond).detach()
        return x0, [_as_map(features[name], x_t) for name in names]

    def features(
        self, x_t: Tensor, t: Tensor, cond: Condition, names: Sequence[str]
    ) -> list[Tensor]:
        """Outputs of the named blocks; the forward stops when the last of them is known."""
        with tap(self.net, names, stop=True) as features:
            self.raw(x_t, t, cond)
        return [_as_map(features[name], x_t) for name in names]


def _preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """EDM's c_in, c_skip and c_out."""
    total = sigma**2 + sigma_data**2
    return total.rsqrt(), sigma_data**2 / total, sigma * sigma_data * total.rsqrt()


@dataclass(frozen=True)
class GuidedDenoiser:
    """Classifier-free guidance (arXiv 2207.12598): x0 = uncond + w (cond - uncond).

    Attributes:
        denoiser: the conditional denoiser.
        scale: guidance scale w; 1 would be no guidance (use the denoiser itself).
        uncond: condition of batch 1 for the unconditional branch.
    """

    denoiser: Denoiser
    scale: float
    uncond: Condition

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Guided x0; both branches in one batched forward."""
        x0_both = self.denoiser(*self._both(x_t, t, cond))
        return self._combine(*x0_both.chunk(2))

    def with_features(
        self, x_t: Tensor, t: Tensor, cond: Condition, names: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        """Guided x0 and the conditional branch's features.

        When x_t carries gradient (GAN loss through the frozen trunk) the branches run apart: the
        unconditional one needs no graph, so its activations and its share of the backward vanish.
        """
        if torch.is_grad_enabled() and x_t.requires_grad:
            x0_cond, features = self.denoiser.with_features(x_t, t, cond, names)
            with torch.no_grad():
                x0_uncond = self.denoiser(x_t, t, self.uncond.expand(len(x_t)))
            return self._combine(x0_cond, x0_uncond), features
        x0_both, features = self.denoiser.with_features(*self._both(x_t, t, cond), names)
        return self._combine(*x0_both.chunk(2)), [f[: len(x_t)] for f in features]

    def _both(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Condition]:
        both = concatenate([cond, self.uncond.expand(len(x_t))])
        return torch.cat([x_t, x_t]), torch.cat([t, t]), both

    def _combine(self, x0_cond: Tensor, x0_uncond: Tensor) -> Tensor:
        return x0_uncond + self.scale * (x0_cond - x0_uncond)


def guided(
    denoiser: Denoiser, scale: float | None, uncond: Condition | None
) -> Denoiser | GuidedDenoiser:
    """``denoiser`` under guidance of that scale; None or 1 gives the denoiser itself.

    Raises:
        ValueError: if there is no unconditional branch to guide by.
    """
    if scale is None or scale == 1.0:
        return denoiser
    if uncond is None:
        raise ValueError(f"guidance {scale:g}: this teacher has no unconditional branch")
    return GuidedDenoiser(denoiser, scale, uncond)


class _AllTappedError(Exception):
    """Leaves a forward early: every requested feature is known."""


@contextmanager
def tap(net: nn.Module, names: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of named sub-modules by forward hooks.

    Behind the last of them no graph is built: a loss on features needs none of the decoder's
    activations.

    Args:
        net: raw backbone.
        names: dotted sub-module names ("mid_block", "down_blocks.2").
        stop: end the forward inside the ``with`` block once all names were seen, so what lies
            behind them (the decoder) is not computed.

    Yields:
        Mapping name -> tensor, filled by the forward; of a block's tuple the image's part.

    Raises:
        ValueError: if a name is no sub-module of ``net``.
    """
    seen: dict[str, Tensor] = {}
    with_graph = torch.is_grad_enabled()

    def record(name: str, _module: nn.Module, _args: object, output: object) -> None:
        seen[name] = _image_part(output)
        if len(seen) == len(names):
            if stop:
                raise _AllTappedError
            torch.set_grad_enabled(False)

    with ExitStack() as hooks:
        hooks.callback(torch.set_grad_enabled, with_graph)
        for name in names:
            hook = _block(net, name).register_forward_hook(partial(record, name))
            hooks.callback(hook.remove)
        with suppress(_AllTappedError):
            yield seen


def _image_part(output: object) -> Tensor:
    """The image's feature from a block that may return several tensors."""
    parts = output if isinstance(output, tuple) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    # convolutional blocks return it before their skips, joint transformer blocks behind the text
    return tensors[0] if tensors[0].ndim == 4 else tensors[-1]


def _as_map(feature: Tensor, x_t: Tensor) -> Tensor:
    """Tokens of an image [B, N, C], row by row, as a map [B, C, h, w] of the shape of x_t."""
    if feature.ndim == 4:
        return feature
    rows = round((feature.shape[1] * x_t.shape[-2] / x_t.shape[-1]) ** 0.5)
    return feature.transpose(1, 2).unflatten(2, (rows, -1))


def _block(net: nn.Module, name: str) -> nn.Module:
    try:
        return net.get_submodule(name)
    except AttributeError:
        blocks = [n for n, _ in net.named_modules() if n.count(".") < 2 and "block" in n]
        known = f"{type(net).__name__}; blocks: {', '.join(blocks)}"
        raise ValueError(f"no block {name!r} in {known}") from None
