"""From which state a run continues, whether it may, and what each rank must find again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from accelerate.utils import gather  # type: ignore[import-untyped]  # ships no types
from torch import Tensor

from diffdiv.core.tensor import sum_over_ranks
from diffdiv.runtime.checkpoint import CheckpointError, scan

# What may differ between a run and its continuation.
FREE_KEYS = {
    f"run.{key}"
    for key in "folder device sharding steps save_every log_every sample_every keep_states "
    "trackers".split()
}


class Stateful(Protocol):
    """Something besides the networks that a run must remember."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor], /) -> object: ...


def any_rank(claim: bool, device: torch.device) -> bool:
    """Whether it holds on any rank; a collective."""
    return bool(sum_over_ranks(torch.tensor(float(claim), device=device)))


def choose_state(
    run_folder: Path, *, is_main: bool, device: torch.device
) -> tuple[Path | None, list[str]]:
    """The state that rank 0 takes for the newest valid one, and what is wrong with newer ones.

    Those are set aside, for the run will write states of their names again. A collective.

    Raises:
        CheckpointError: on all ranks, if there are states but no valid one.
    """
    name, reasons = "", []
    if is_main:
        state, damaged = scan(run_folder)
        reasons = [reason for _, reason in damaged]
        name = state.name if state else "none" if damaged else ""
        for path, _ in damaged if state else ():
            path.rename(path.with_name(f".damaged-{path.name}"))
    letters = torch.tensor(list(name.ljust(32).encode()), device=device)
    letters = sum_over_ranks(letters if is_main else torch.zeros_like(letters))
    name = bytes(letters.tolist()).decode().strip()
    if name == "none":
        raise CheckpointError(f"no valid state in {run_folder} ({'; '.join(reasons)})")
    return run_folder / "state" / name if name else None, reasons


def check_config(saved: Mapping[str, object], resolved: Mapping[str, object]) -> None:
    """CheckpointError naming the keys that differ and change the mathematics."""
    old, new = _flat(saved), _flat(resolved)
    changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)} - FREE_KEYS
    if changed:
        pairs = (f"{key} was {old.get(key)}, is {new.get(key)}" for key in sorted(changed))
        raise CheckpointError(f"the run was begun with another configuration: {', '.join(pairs)}")


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mapping as one with dotted keys."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def gather_ranks(pending: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Random states and unwritten metrics of all ranks, [world_size, ...] each; a collective."""
    mine = {"cpu": torch.get_rng_state(), "metrics": pending}
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    gathered: dict[str, Tensor] = gather({key: v[None].to(device) for key, v in mine.items()})
    return gathered


def restore_rng(ranks: Mapping[str, Tensor], *, rank: int, device: torch.device) -> None:
    """Continue the random numbers of this rank, where :func:`gather_ranks` found them."""
    # torch 2.15 reads the memory of a state from its start, so a row must be a copy
    torch.set_rng_state(ranks["cpu"][rank].clone())
    if "cuda" in ranks and device.type == "cuda":
        torch.cuda.set_rng_state(ranks["cuda"][rank].clone(), device)
