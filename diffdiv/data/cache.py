"""Text embeddings and image latents computed once, so that their networks leave the GPU.

A cache is a folder of ``shard-00000.safetensors`` ... and a ``manifest.json``, written last: the
key (what was computed from what), size and sha256 of every shard. ``shard-00000.json`` is such a
manifest of one shard; an interrupted build goes on from them. Beside each tensor NAME [N, ...] a
shard holds NAME.crc32 [N], checked whenever a row is read, so that a flipped bit is found without
hashing hundreds of gigabytes.

Latents belong in here as mean and std of the posterior, never as one draw: a draw per sample index
is then the same with the cache and without.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, JsonValue, ValidationError
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
MAX_OPEN = 8
WEIGHT_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model"})

Key = Mapping[str, JsonValue]
Compute = Callable[[Sequence[int]], Mapping[str, Tensor]]


class CacheError(RuntimeError):
    """A cache cannot be written, or is damaged or not finished."""


class _Shard(BaseModel, frozen=True, extra="forbid"):
    name: str
    size: int  # bytes
    sha256: str


class _Manifest(BaseModel, frozen=True, extra="forbid"):
    format: Literal[1] = 1
    key: dict[str, JsonValue]
    count: int
    shard_size: int
    tensors: dict[str, str]  # name -> dtype and shape of a row
    shards: list[_Shard]
    sha256: str = ""  # of all the rest

    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


def fingerprint(folder: Path) -> str:
    """sha256 over names and contents of the weights, configurations and vocabularies below.

    ValueError if there is none.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{folder}: there are no weights and no configuration to fingerprint")
    facts = [[file.relative_to(folder).as_posix(), _sha256(file)] for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def build_cache(
    folder: Path,
    *,
    key: Key,
    count: int,
    compute: Compute,
    shard_size: int = 1024,
    batch_size: int = 16,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], object] = lambda: None,
) -> None:
    """Compute and write the missing shards, then the manifest.

    Args:
        folder: of the cache, shared by all ranks.
        key: what the rows follow from: fingerprints of networks and data, image size, dtype.
        count: rows.
        compute: row numbers -> finite tensors [B, ...] by name, on any device; dtypes are kept.
        shard_size: rows a shard, held in memory while computed; a build goes on as it began.
        batch_size: most rows of one call of ``compute``.
        rank, world: of this process, which writes the shards rank, rank + world, ...
        barrier: returns once every process has called it.

    Raises:
        ValueError: if nothing is asked for, or the folder holds a cache of another key or count.
        CacheError: if a shard cannot be written (those before it are kept) or read.
        FloatingPointError: naming the tensor and the rows that are not finite.
    """
    if min(count, shard_size, batch_size) < 1:
        raise ValueError(f"{folder}: {count} rows in shards of {shard_size} by {batch_size}")
    key = _as_written(key)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        old = _read(path)
        _require_key(folder, {**old.key, "count": old.count}, {**key, "count": count})
        shard_size = old.shard_size
    base = _Manifest(key=key, count=count, shard_size=shard_size, tensors={}, shards=[])
    parts = [folder / f"shard-{n:05}.json" for n in range(-(-count // shard_size))]
    missing = [n for n in range(rank, len(parts), world) if not _is_done(parts[n])]
    console = Console(stderr=True, quiet=rank > 0)
    for n in track(missing, f"caching {folder.name}", console=console, disable=not missing):
        rows = range(n * shard_size, min((n + 1) * shard_size, count))
        tensors = _compute(compute, rows, batch_size)
        shard = _write_shard(parts[n].with_suffix(".safetensors"), tensors)
        kinds = {name: _kind(value[0]) for name, value in tensors.items()}
        _write_manifest(parts[n], base.model_copy(update={"tensors": kinds, "shards": [shard]}))
    barrier()
    if rank == 0:
        _merge(folder / MANIFEST, parts)
    barrier()


class Cache:
    """Rows of a finished cache, read through memory maps.

    Attributes:
        tensors: names -> dtype and shape of a row.
    """

    def __init__(self, folder: Path, key: Key, *, verify: bool = False) -> None:
        """Open a cache and compare the size of every shard, with ``verify`` its sha256 too.

        Raises:
            CacheError: if the cache is not finished, or naming the shard that is damaged.
            ValueError: naming the entry of its key that differs.
        """
        if not (folder / MANIFEST).is_file():
            raise CacheError(f"{folder}: there is no finished cache here; build it first")
        self._manifest = _read(folder / MANIFEST)
        _require_key(folder, self._manifest.key, _as_written(key))
        for shard in self._manifest.shards:
            path = folder / shard.name
            if (size := _size(path)) != shard.size:
                raise _damaged(path, f"{size} bytes, manifest {shard.size}")
            if verify and (digest := _sha256(path)) != shard.sha256:
                raise _damaged(path, f"sha256 {digest}, manifest {shard.sha256}")
        self.tensors, self._folder = self._manifest.tensors, folder
        self._file = lru_cache(MAX_OPEN)(partial(safe_open, framework="pt"))

    def __len__(self) -> int:
        """Number of rows."""
        return self._manifest.count

    def rows(self, indices: Sequence[int], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tensors [B, ...] of these rows, in the order asked, on the CPU.

        Args:
            indices: in [0, len), at least one.
            names: of the tensors wanted; None = all.

        Raises:
            IndexError, ValueError: for a row or a name that does not exist.
            CacheError: naming the shard whose bytes have changed.
        """
        names = list(self.tensors) if names is None else names
        if unknown := sorted(set(names) - self.tensors.keys()):
            raise ValueError(f"{self._folder}: no tensor {unknown[0]!r}, but {list(self.tensors)}")
        # in the order of the shards, so that each is opened once
        found = {index: self._row(index, names) for index in sorted(set(indices))}
        return {name: torch.stack([found[index][name] for index in indices]) for name in names}

    def _row(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._folder}: row {index} is not in 0..{len(self) - 1}")
        number, row = divmod(index, self._manifest.shard_size)
        path = self._folder / self._manifest.shards[number].name
        try:
            file = self._file(path)
            found: dict[str, Tensor] = {name: file.get_slice(name)[row] for name in names}
            sums = {name: int(file.get_slice(f"{name}.crc32")[row]) for name in names}
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error
        for name in names:
            if _crc(found[name]) != sums[name] or _kind(found[name]) != self.tensors[name]:
                raise _damaged(path, f"row {index} of {name} fails its checksum")
        return found


def _compute(compute: Compute, rows: range, batch_size: int) -> dict[str, Tensor]:
    batches = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        with torch.no_grad():
            found = compute(batch)
        for name, value in found.items():
            if len(value) != len(batch):
                raise ValueError(f"{name}: {len(value)} rows computed for {len(batch)}")
            if not value.isfinite().all():
                raise FloatingPointError(f"{name}: not finite in rows {batch[0]} to {batch[-1]}")
        batches.append({name: value.cpu() for name, value in found.items()})
    # a VAE's mean is a view in channels-last order, which safetensors refuses
    return {n: torch.cat([batch[n] for batch in batches]).contiguous() for n in batches[0]}


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> _Shard:
    sums = {f"{n}.crc32": torch.tensor([_crc(row) for row in t]) for n, t in tensors.items()}
    _replace(path, lambda staged: save_file({**tensors, **sums}, staged))
    return _Shard(name=path.name, size=path.stat().st_size, sha256=_sha256(path))


def _write_manifest(path: Path, manifest: _Manifest) -> None:
    signed = manifest.model_copy(update={"sha256": manifest.digest()})
    _replace(path, lambda staged: staged.write_text(signed.model_dump_json(indent=1), "utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside, sync, rename: what lies under its own name is whole."""
    staged = path.with_name(f".tmp-{path.name}")
    try:
        write(staged)
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        staged.unlink(missing_ok=True)
        raise CacheError(f"{path} was not written; earlier shards are kept ({error})") from error


def _merge(path: Path, parts: Sequence[Path]) -> None:
    found = [_read(part) for part in parts]
    for part, where in zip(found, parts, strict=True):
        if part.tensors != found[0].tensors:
            raise _damaged(where, f"tensors {part.tensors}, before {found[0].tensors}")
    shards = [shard for part in found for shard in part.shards]
    _write_manifest(path, found[0].model_copy(update={"shards": shards}))


def _read(path: Path) -> _Manifest:
    try:
        manifest = _Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None
    if manifest.sha256 != manifest.digest():
        raise _damaged(path, "its own sha256 differs")
    return manifest


def _is_done(part: Path) -> bool:
    return part.is_file() and _size(part.with_suffix(".safetensors")) == _read(part).shards[0].size


def _require_key(folder: Path, found: Key, wanted: Key) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder}: this cache was made with {name} = {found.get(name)!r}, wanted is "
                f"{wanted.get(name)!r}; delete it or name another folder"
            )


def _as_written(key: Key) -> dict[str, JsonValue]:
    plain: dict[str, JsonValue] = json.loads(json.dumps(dict(key)))  # tuples become lists
    return plain


def _damaged(path: Path, reason: str) -> CacheError:
    return CacheError(f"{path} is damaged ({reason}); delete this file and build the cache again")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crc(row: Tensor) -> int:
    return zlib.crc32(row.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _kind(row: Tensor) -> str:
    return f"{str(row.dtype)[6:]} {list(row.shape)}"
