"""One frozen base network played in several roles: teacher, student and fake score.

    role None      the base as it was loaded (the teacher); its resting state
    role "name"    the base with the LoRA adapter of that name (arXiv 2106.09685) on it:
                   W x + (alpha / rank) B A x, A [rank, in], B [out, rank], B = 0 at the start

peft's own switches (``set_adapter``, ``disable_adapters``) also flip ``requires_grad`` of every
adapter. Autograd looks at that flag when it accumulates, so a switch between forward and backward
stops training without an error. Here a role writes peft's two flags on a cached list of layers and
nothing else. Gradient checkpointing recomputes at backward time, when another role may be on: the
checkpoints made here re-enter the role of their forward.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import sqrt
from typing import Protocol, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffdiv.models.families import lora_targets

LoraLayer = Linear | Conv2d
_ADAPTABLE = (nn.Linear, nn.Conv2d, Linear, Conv2d)


class SharedBase:
    """A frozen network that lends itself to named adapters.

    Called by itself, ``net`` is the teacher: adapters rest switched off. Everything that trains
    happens through the views that :meth:`add` returns.

    Args:
        net: backbone without adapters; its parameters are frozen here.

    Raises:
        ValueError: if it already carries adapters.
    """

    def __init__(self, net: nn.Module) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in net.modules()):
            raise ValueError(
                f"this {type(net).__name__} already carries adapters; merge them first"
            )
        self.net = net.requires_grad_(False)
        self.views: dict[str, AdapterView] = {}
        self._layers: list[BaseTunerLayer] = []
        self._role: str | None = None

    def add(
        self, name: str, *, rank: int, alpha: int, targets: Sequence[str], seed: int
    ) -> "AdapterView":
        """Put a new LoRA adapter on the base; at the start it changes nothing (B = 0).

        Weights are at least float32 whatever the base's dtype (run bfloat16 bases under autocast),
        drawn on the CPU from ``seed`` alone, so that all ranks and devices agree. No dropout: it
        would draw from the global generator.

        Args:
            name: of the adapter, a role of the base from now on.
            rank: of the update of each weight.
            alpha: the update is scaled by alpha / rank.
            targets: ends of dotted names of Linear and Conv2d layers ("to_q", "ff.net.2").
            seed: of the initial A, uniform in +-1/sqrt(fan_in).

        Raises:
            ValueError: for a name in use, a rank below 1, or a target that matches no such layer.
        """
        if name in self.views or not name.isidentifier():
            raise ValueError(f"adapter name {name!r} is in use or no identifier")
        if rank < 1 or alpha <= 0 or not targets:
            settings = f"rank {rank}, alpha {alpha} and {len(targets)} targets"
            raise ValueError(f"adapter {name!r}: {settings}; all must be positive")
        self._check_targets(targets)
        self._inject(name, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
        layers = dict(lora_layers(self.net, name))
        _initialise(name, layers.values(), seed)
        saved = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(targets)}
        self.views[name] = AdapterView(self, name, layers, saved)
        return self.views[name]

    def _check_targets(self, targets: Sequence[str]) -> None:
        """peft forgives a target that matches nothing, and adapts layers of other kinds."""
        for target in targets:
            found = [m for n, m in self.net.named_modules() if f".{n}".endswith(f".{target}")]
            if not found or not all(isinstance(m, _ADAPTABLE) for m in found):
                problem = f"{type(found[0]).__name__} layers" if found else "no layer"
                kinds = f"in this {type(self.net).__name__}; wanted are Linear or Conv2d layers"
                raise ValueError(f"adapter target {target!r} matches {problem} {kinds}")

    def _inject(self, name: str, config: LoraConfig) -> None:
        trains = {parameter: parameter.requires_grad for parameter in self.net.parameters()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several: intended
            warnings.filterwarnings("ignore", "TorchaoLoraLinear")  # nothing is merged into int8
            # on the meta device: no time spent on, and no global random numbers for, its own values
            inject_adapter_in_model(config, self.net, name, low_cpu_mem_usage=True)
        for parameter in self.net.parameters():
            parameter.requires_grad_(trains.get(parameter, True))
        self._layers = [m for m in self.net.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self._layers:
            assert vars(layer).keys() >= {"_disable_adapters", "_active_adapter"}, "peft changed"
        self._write(None)

    @contextmanager
    def role(self, name: str | None) -> Iterator[None]:
        """The base in a role; the former one comes back at the end, also after an exception."""
        before = self._role
        self._write(name)
        try:
            yield
        finally:
            self._write(before)

    def _write(self, name: str | None) -> None:
        # past nn.Module.__setattr__, which costs more than all the rest at 700 layers
        flags: dict[str, object] = {"_disable_adapters": name is None}
        if name is not None:
            flags["_active_adapter"] = [name]
        for layer in self._layers:
            vars(layer).update(flags)
        self._role = name

    def present_role(self) -> AbstractContextManager[None]:
        """A context that will re-enter the role of this moment."""
        return self.role(self._role)


class AdapterView(nn.Module):
    """The base in the role of one adapter, as a module whose only weights are the adapter's.

    Parameters and state dict hold ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` with the
    layers' names in a plain base: stable, and the keys of diffusers' LoRA files. Optimiser, DDP,
    averages and ``torch.func.functional_call`` therefore concern the adapter alone.

    Made by :meth:`SharedBase.add`.
    """

    def __init__(
        self,
        shared: SharedBase,
        name: str,
        layers: Mapping[str, LoraLayer],
        settings: Mapping[str, object],
    ) -> None:
        super().__init__()
        # SharedBase is no module, so the base is not registered here
        self.shared, self.name, self.settings = shared, name, dict(settings)
        for path, layer in layers.items():
            place: nn.Module = self
            for part in path.split("."):
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = cast(nn.Module, place._modules[part])
            place.add_module("lora_A", layer.lora_A[name])
            place.add_module("lora_B", layer.lora_B[name])

    def forward(self, *args: object, **kwargs: object) -> object:
        """What the base returns in this role."""
        with self.shared.role(self.name):
            return self.shared.net(*args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """A block of the base, so that features can be tapped through a view."""
        return self.shared.net.get_submodule(target)

    @property
    def config(self) -> Mapping[str, object]:
        """The base's configuration."""
        return cast("Mapping[str, object]", self.shared.net.config)


def lora_layers(net: nn.Module, name: str) -> Iterator[tuple[str, LoraLayer]]:
    """Layers that carry the adapter ``name``, with their dotted names in a plain network."""
    for path, module in net.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            yield path, module


@torch.no_grad()
def _initialise(name: str, layers: Iterable[LoraLayer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        weight = layer.get_base_layer().get_parameter("weight")
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        for part in (layer.lora_A[name], layer.lora_B[name]):
            part.to_empty(device=weight.device).to(torch.promote_types(dtype, torch.float32))
        a, b = (part[name].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
        bound = 1 / sqrt(a[0].numel())
        a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        b.zero_()


def enable_checkpointing(network: nn.Module | SharedBase) -> None:
    """Gradient checkpointing of a diffusers backbone; of a shared base, with roles kept.

    Raises:
        ValueError: if the backbone cannot be checkpointed.
    """
    again: Callable[[], AbstractContextManager[None]] = nullcontext
    if isinstance(network, SharedBase):
        net, again = network.net, network.present_role
    else:
        net = network
    if not isinstance(net, ModelMixin):
        raise ValueError(f"{type(net).__name__} is no diffusers backbone: cannot be checkpointed")

    def run(function: Callable[..., object], *args: object) -> object:
        return checkpoint(
            function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again())
        )

    net.enable_gradient_checkpointing(gradient_checkpointing_func=run)


def compile_blocks(net: nn.Module, *, backend: str = "inductor") -> None:
    """torch.compile of a diffusers backbone's repeated blocks: one compilation serves them all.

    A block is compiled anew for each role, with and without gradient, for each batch size; past
    torch's limit of eight it would run uncompiled without a word, so the limit is raised.

    Raises:
        ValueError: if diffusers names no repeated block of this network (UNet2DModel has none).
    """
    if not (isinstance(net, ModelMixin) and net._repeated_blocks):
        raise ValueError(f"diffusers names no blocks of {type(net).__name__} to be compiled")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    net.compile_repeated_blocks(backend=backend)


def quantise_linears(net: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Hold the weights of a frozen network's linear layers as int8, one scale a row (torchao).

    They are read in ``dtype``; gradient passes to their inputs, never to them. Autocast does not
    reach them, so what they are given is cast here.
    """
    from torchao.quantization import (  # type: ignore[import-not-found]  # an extra
        Int8WeightOnlyConfig,
        quantize_,
    )

    quantize_(net, Int8WeightOnlyConfig())
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))


@torch.no_grad()
def merged_state_dict(view: AdapterView) -> dict[str, Tensor]:
    """Weights of a plain network equal to the base with this adapter on.

    Names, shapes and dtypes are those of the base before any adapter; sums are taken in the
    adapter's precision and rounded to the base's dtype: merge into a float32 base, since bfloat16
    loses small updates. Untouched weights are not copied.
    """
    layers = dict(lora_layers(view.shared.net, view.name))
    merged: dict[str, Tensor] = {}
    for key, value in view.shared.net.state_dict().items():
        if ".lora_" in key:
            continue
        plain = key.replace(".base_layer.", ".")
        path, _, kind = plain.rpartition(".")
        if kind == "weight" and path in layers:
            delta = layers[path].get_delta_weight(view.name)
            value = (value.to(delta.dtype) + delta).to(value.dtype)
        merged[plain] = value
    return merged


class Lora(Protocol):
    """Settings of an adapter: rank and alpha (the update is scaled by alpha / rank)."""

    rank: int
    alpha: int


def trained_copies(
    net: nn.Module,
    roles: Mapping[str, Lora | None],
    *,
    seed: int,
    checkpointing: bool,
    compiled: bool = False,
) -> dict[str, nn.Module]:
    """Networks to train that start as ``net``: full float32 copies, or adapters on ``net`` itself.

    Args:
        net: frozen here; it stays the teacher.
        roles: name -> adapter settings, or None for a full copy.
        seed: of the adapters' initial weights.
        checkpointing: recompute activations in every backward.
        compiled: repeated blocks go through torch.compile, of ``net`` too.
    """
    net.requires_grad_(False)
    names = [name for name, lora in roles.items() if lora is None]
    found: dict[str, nn.Module] = {
        name: copy.deepcopy(net).float().requires_grad_(True) for name in names
    }
    shared = SharedBase(net)
    for number, (name, lora) in enumerate(roles.items()):
        if lora is not None:
            found[name] = shared.add(
                name,
                rank=lora.rank,
                alpha=lora.alpha,
                targets=lora_targets(net),
                seed=seed + number,
            )
    if checkpointing:
        enable_checkpointing(shared)
        for name in names:
            enable_checkpointing(found[name])
    if compiled:
        for network in (net, *(found[name] for name in names)):
            compile_blocks(network)
    return found
