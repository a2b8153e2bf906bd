"""States of a run on disk: safetensors and JSON, never pickle.

A state is a folder ``state/step-00000200``; one saved between two updates of the main network has
the count of all updates behind its name (``step-00000200-u0001003``), so that names sort by age.
It is staged beside its place, synced, given a manifest (size and sha256 of every file; safetensors
itself has no checksum, one flipped bit would load silently) and moved there by one rename.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffdiv.runtime.launch import CheckpointError

SCHEMA = 1
MANIFEST = "manifest.json"


Tensors = Mapping[str, Mapping[str, Tensor]]  # file stem -> tensor name -> tensor
Values = Mapping[str, object]


def save_state(state: Path, *, tensors: Tensors, values: Values, facts: Values, keep: int) -> None:
    """Write one state, verify it, then delete all but the newest ``keep`` states.

    Args:
        state: RUN/state/NAME; the name sorts after those of all older states.
        tensors: file stem -> tensor name -> tensor, on any device.
        values: JSON-clean, written to ``state.json``.
        facts: JSON-clean, written into the manifest (step, versions, ...).
        keep: number of states to keep, at least 1.

    Raises:
        CheckpointError: if it could not be written; older states are then untouched.
    """
    staging = state.with_name(f".tmp-{state.name}-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        for stem, group in tensors.items():
            _write_tensors(staging / f"{stem}.safetensors", group)
        _write_json(staging / "state.json", values)
        files = {file.name: _fingerprint(file) for file in sorted(staging.iterdir())}
        manifest = {**facts, "schema": SCHEMA, "files": files}
        _write_json(staging / MANIFEST, {**manifest, "sha256": _digest(manifest)})
        _sync(staging)
        os.replace(staging, state)
        _sync(state.parent)
        verify(state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"the state {state.name} was not saved, older states are intact ({error})"
        ) from error
    for old in [*_states(state.parent.parent)[keep:], *state.parent.glob(".damaged-*")]:
        shutil.rmtree(old, ignore_errors=True)


def verify(state: Path) -> None:
    """Compare every file of a state with its manifest.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    name = MANIFEST
    try:
        manifest = json.loads((state / MANIFEST).read_bytes())
        if manifest.pop("sha256") != _digest(manifest):
            raise ValueError("its own sha256 differs")
        if manifest["schema"] != SCHEMA:
            found = f"{state.name} has schema {manifest['schema']}"
            raise CheckpointError(f"{found}, this version reads schema {SCHEMA}")
        for name, wanted in manifest["files"].items():
            if _fingerprint(state / name) != wanted:
                raise ValueError("sha256 or size is not that of the manifest")
    except FileNotFoundError:
        raise CheckpointError(f"{state.name}/{name} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{state.name}/{name} is damaged ({error})") from None


def scan(run_folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest valid state, and every newer one with the reason why it is not valid."""
    damaged = []
    for state in _states(run_folder):
        try:
            verify(state)
        except CheckpointError as error:
            damaged.append((state, str(error)))
        else:
            return state, damaged
    return None, damaged


def newest_valid(run_folder: Path) -> Path | None:
    """The newest state of a run whose files all agree with its manifest."""
    return scan(Path(run_folder))[0]


def load_weights(run_folder: Path, network: str, ema: int | None = None) -> dict[str, Tensor]:
    """Weights of one network from the newest valid state of a run, on the CPU.

    Args:
        run_folder: the run.
        network: its name in the run ("student").
        ema: half-life in images of the average to take; None for the last weights. Buffers
            always come from the last weights.

    Raises:
        CheckpointError: if the run has no valid state.
        ValueError: if the state has no such network or average; the message lists what it has.
    """
    state = newest_valid(run_folder)
    if state is None:
        raise CheckpointError(f"{run_folder} holds no valid state")
    weights: dict[str, Tensor] = {}
    for stem in [network] if ema is None else [network, f"{network}.ema-{ema}"]:
        if not (state / f"{stem}.safetensors").is_file():
            have = sorted(file.stem for file in state.glob("*.safetensors"))
            raise ValueError(f"{state} has no {stem!r}; it has {', '.join(have)}")
        weights |= read_tensors(state, stem)
    return weights


def read_tensors(state: Path, stem: str) -> dict[str, Tensor]:
    """One group of tensors of a state, on the CPU, tied ones under all their names."""
    with safe_open(state / f"{stem}.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        aliases = file.metadata() or {}
    return tensors | {alias: tensors[name] for alias, name in aliases.items() if name in tensors}


def remove_leftovers(run_folder: Path) -> None:
    """Delete what saves that were killed have left behind."""
    for staging in (run_folder / "state").glob(".tmp-*"):
        shutil.rmtree(staging, ignore_errors=True)


def _states(run_folder: Path) -> list[Path]:
    return sorted((run_folder / "state").glob("step-*"), reverse=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # safetensors refuses tensors that share memory: a tied one is written once, under its first
    # name, and the file's metadata tells the other names.
    first: dict[tuple[object, ...], str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in tensors.items():
        where = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
        owner = first.setdefault(where, name)
        if owner == name:
            kept[name] = value.detach().to("cpu", copy=True).contiguous()
        else:
            aliases[name] = owner
    # an empty mapping of metadata makes safetensors 0.8 write a file it cannot read
    save_file(kept, path, metadata=aliases or None)
    _sync(path)


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
