"""Networks whose weights are spread over all processes: torch's FSDP2, and what it asks of a run.

    unit     modules that are gathered together, used, and let go again: one per repeated block
    shard    this process's rows of a parameter (a DTensor); gradients, moments and averages too

Several networks take turns here, and their features are read in the middle of a forward. Hence:
every parameter lies in a unit smaller than the network (the gradient of a feature never passes the
end of the network, where FSDP would gather what the root owns); nothing stays gathered behind a
forward (a flag set on a gathered parameter is lost); and an exception leaves a unit only when FSDP
has closed it.
"""

import os
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# Of diffusers' backbones: what is repeated, and what is recomputed under checkpointing. A unit must
# not be smaller than that: recomputation finds it gathered.
REPEATED = frozenset(
    "BasicTransformerBlock ResnetBlock2D Attention JointTransformerBlock SanaTransformerBlock "
    "FluxTransformerBlock FluxSingleTransformerBlock".split()
)


def processes_mesh(device: torch.device) -> DeviceMesh:
    """All processes; of several equal machines each holds the whole, spread over its own processes.

    Weights are then gathered inside a machine, and only gradients travel between machines.
    """
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if 1 < local < world and world % local == 0:
        names = ("machines", "processes")
        return init_device_mesh(device.type, (world // local, local), mesh_dim_names=names)
    return init_device_mesh(device.type, (world,), mesh_dim_names=("processes",))


def shard(net: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype | None) -> None:
    """Spread the parameters of ``net`` over the mesh, in place; it is called as before.

    Gradients are averaged over all processes in float32 at least, after every backward.

    Args:
        net: on any device; its parameters become DTensors, its buffers stay whole.
        mesh: of :func:`processes_mesh`.
        dtype: that parameters are gathered in: the one that autocast would use; None = their own.
    """
    net.to(memory_format=torch.contiguous_format)  # rows of a channels-last weight are no block
    # Inputs are left to autocast: a time rounded to bfloat16 is another time.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False
    )
    for unit in list(_units(net)):
        # said for the root as well, which would stay gathered by default
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        _leave_in_order(unit)


def _units(net: nn.Module) -> Iterator[nn.Module]:
    """The largest modules without a repeated block inside, those blocks, and at last ``net``."""

    def holds_blocks(module: nn.Module) -> bool:
        return any(type(inner).__name__ in REPEATED for inner in module.modules())

    def below(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            is_block = type(child).__name__ in REPEATED
            if is_block or not (holds_blocks(child) or isinstance(child, nn.ModuleList)):
                if any(True for _ in child.parameters()):
                    yield child
            else:
                yield from below(child)

    yield from below(net)
    yield net


def _leave_in_order(unit: nn.Module) -> None:
    """Let an exception out of ``unit`` behind FSDP's own hook, which it would skip.

    Reading a feature may end a forward by an exception; without its hook a unit stays gathered, and
    the root goes on as if it had never returned.
    """
    forward, caught = unit.forward, list[Exception]()

    def returning(*args: object, **kwargs: object) -> object:
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            caught.append(error)
            return ()

    def raising(_unit: nn.Module, _args: object, _output: object) -> None:
        if caught:
            raise caught.pop()

    unit.forward = returning  # type: ignore[method-assign]  # under FSDP's hooks, for this one
    unit.register_forward_hook(raising)


def is_sharded(net: nn.Module) -> bool:
    """Whether :func:`shard` was called on it."""
    return isinstance(net, FSDPModule)


def reshard(net: nn.Module) -> None:
    """Let go of what is gathered, so that ``net.parameters()`` are the shards."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(value: Tensor) -> Tensor:
    """This process's part, sharing memory; of a tensor that is no shard, the whole."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """The tensor put together from the shards of all processes; a collective."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in place of shards, on the CPU; on ranks but 0 they are missing. Collective."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        full = whole(value)
        if full is value:
            found[name] = value
        elif dist.get_rank() == 0:
            found[name] = full.cpu()
    return found


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, placed as ``target`` is; no communication.

    It also lies in memory as the target does (channels last): fused AdamW walks memory.
    """
    if value.ndim == 0:
        return value.to(target.device)
    if not isinstance(target, DTensor):
        return torch.empty_like(target, dtype=value.dtype).copy_(value)
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
