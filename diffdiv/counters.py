"""What a computation allocates and computes, counted operator by operator."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Counters(TorchDispatchMode):
    """Bytes of live storages by kind, their peak by phase, and FLOPs by phase.

    Sizes are rounded to 512 bytes, as CUDA's allocator does. FLOPs come from the formulas of
    torch's FlopCounterMode; the mode itself keeps checkpointed graphs alive by its module hooks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, dict[str, int]] = {}
        self.flops: Counter[str] = Counter()
        self._live: Counter[str] = Counter()
        self._total = self._peak = 0
        self._phase: str | None = None
        self._kind = "activations"
        self._storages: dict[int, tuple[int, str]] = {}
        self._formulas = FlopCounterMode(display=False).flop_registry

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count peak and FLOPs of what happens inside under this name."""
        gc.collect()  # checkpoints leave reference cycles
        self._phase, self._peak = name, -1
        self._note_peak()
        yield
        self._phase = None

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """What is allocated inside is of this kind."""
        before, self._kind = self._kind, name
        yield
        self._kind = before

    def tag(self, tensor: Tensor | None, kind: str) -> None:
        """Say of what kind a live tensor is after all."""
        key = None if tensor is None else tensor.untyped_storage()._cdata
        if key in self._storages:
            size, before = self._storages[key]
            self._storages[key] = size, kind
            self._live[before] -= size
            self._live[kind] += size

    def _note_peak(self) -> None:
        if self._phase and self._total > self._peak:
            self._peak = self._total
            self.peaks[self._phase] = {kind: size for kind, size in self._live.items() if size}

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = -(-storage.nbytes() // 512) * 512
            self._storages[key] = size, self._kind
            self._live[self._kind] += size
            self._total += size
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        size, kind = self._storages.pop(key)
        self._live[kind] -= size
        self._total -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two of three calls; the fake mode would be slow
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # checks of values ask whether something is wrong; a fake tensor answers 0
            return 0.0 if args[0].is_floating_point() else 0
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self._note_peak()
        if self._phase and (formula := self._formulas.get(func._overloadpacket)):
            self.flops[self._phase] += formula(*args, **kwargs, out_val=out)
        return out


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let autocast on the CPU compute in float32 what autocast on CUDA does.

    Of those operators the U-Nets use the norms and the nearest upsampling; on the CPU they would
    stay in bfloat16, and what they return would be half as large.
    """
    aten = torch.ops.aten
    with torch.library._scoped_library("aten", "IMPL") as library:
        for operator in (
            aten.group_norm.default,
            aten.layer_norm.default,
            aten.upsample_nearest2d.vec,
        ):
            library.impl(operator, partial(_in_float32, operator), "AutocastCPU")
        yield


def _in_float32(operator: OpOverload, *args: object) -> object:
    with torch.autocast("cpu", enabled=False):
        return operator(*(a.float() if isinstance(a, Tensor) else a for a in args))
