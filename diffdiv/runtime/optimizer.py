"""AdamW for a network's parameters, and its moments as plain tensors that a file can hold.

parameter|key                            a moment in full, or the step count
parameter|key.codes, parameter|key.scale an 8-bit one: codes [shape], one scale a block
"""

from collections.abc import Iterable, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffdiv.runtime import fsdp
from diffdiv.runtime.config import OptimizerConfig


class EightBit(Protocol):
    """A moment of torchao's AdamW8bit."""

    codes: Tensor
    scale: Tensor


def make_optimizer(
    parameters: Iterable[nn.Parameter], lr: float, config: OptimizerConfig
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) fused into one kernel; or torchao's, whose moments have 8 bits.

    The latter (arXiv 2110.02861) holds a moment in full where it has fewer than 4,096 values or
    does not divide into blocks of 256, as its authors do.

    Raises:
        ValueError: if torchao is asked for and missing, or for sharded parameters.
    """
    parameters, betas, decay = list(parameters), config.betas, config.weight_decay
    if not config.eight_bit:
        return torch.optim.AdamW(parameters, lr, betas, weight_decay=decay, fused=True)
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ValueError("optimizer.eight_bit: not for sharded weights (run.sharding fsdp2)")
    try:
        from torchao.optim import (  # type: ignore[import-not-found,import-untyped]  # an extra
            AdamW8bit,
        )
    except ImportError:
        raise ValueError(
            "optimizer.eight_bit: torchao is not installed (pip install 'diffdiv[memory]')"
        ) from None
    # its learning rate is a tensor, so that a compiled step need not be compiled again
    return AdamW8bit(parameters, lr, betas, weight_decay=decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr`` from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of an optimiser by the names above; shards where the parameters are."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
                packed = cast(EightBit, value)
                parts = {f"{key}.codes": packed.codes, f"{key}.scale": packed.scale}
            else:
                parts = {key: value}
            found |= {f"{name}|{part}": tensor for part, tensor in parts.items()}
    return found


def load_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
) -> None:
    """Take over what :func:`moments` found, whole tensors, in place of the present state."""
    is_eight_bit = not isinstance(optimizer, torch.optim.AdamW)
    optimizer.state.clear()
    for full_key, value in saved.items():
        name, _, key = full_key.rpartition("|")
        key, _, part = key.partition(".")
        parameter = parameters[name]
        if part == "scale":
            continue  # together with its codes
        if part == "codes":
            scale = saved[full_key.removesuffix(part) + "scale"]
            value = _packed(value, scale, parameter, is_signed=key == "exp_avg")
        elif not (is_eight_bit and key == "step"):  # torchao counts on the CPU
            value = fsdp.like(value, parameter)
        optimizer.state[parameter][key] = value


def _packed(codes: Tensor, scale: Tensor, parameter: Tensor, *, is_signed: bool) -> Tensor:
    from torchao.optim.subclass_8bit import (  # type: ignore[import-not-found,import-untyped]
        OptimState8bit,
    )

    block, dtype = codes.numel() // scale.numel(), parameter.dtype
    moment = OptimState8bit.zeros(parameter.shape, is_signed, block, parameter.device, dtype)
    moment.codes.copy_(codes)
    moment.scale.copy_(scale)
    return cast(Tensor, moment)
