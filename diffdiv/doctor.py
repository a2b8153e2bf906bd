"""What is wrong with this environment, if anything: one row a check."""

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from diffdiv.resources import find

MIN_FREE_GB = 5

Row = tuple[str, bool | None, str]  # what, fine (None: a remark only), in words


def examine() -> Iterator[Row]:
    """All checks, in order; a check that breaks is a failed row, never an exception."""
    for check in (_packages, _torch, _disk, _assets):
        try:
            yield from check()
        except Exception as error:  # whatever it is, the user wants to read it in the table
            yield check.__name__.strip("_"), False, f"{type(error).__name__}: {error}"


def _packages() -> Iterator[Row]:
    for requirement in map(Requirement, importlib.metadata.requires("diffdiv") or []):
        if requirement.marker is not None:  # an extra
            continue
        name, wanted = requirement.name, requirement.specifier
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, False, f"not installed, wants {wanted}"
            continue
        fine = wanted.contains(version, prereleases=True)
        if not fine or name in ("torch", "diffusers", "transformers", "accelerate"):
            yield name, fine, version if fine else f"{version}, wants {wanted}"


def _torch() -> Iterator[Row]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "device", True, ", ".join(devices) or "CPU only (the demos need no more)"
    yield "threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} cores"


def _disk() -> Iterator[Row]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield "disk", free > MIN_FREE_GB or None, f"{free:.0f} GB free in this folder"


def _assets() -> Iterator[Row]:
    """Compares the bundled models with assets/sha256.json, {file below assets/: sha256}."""
    listing = find("assets/sha256.json")
    if listing is None:
        raise FileNotFoundError("assets/sha256.json is missing: the installation is incomplete")
    for name, expected in json.loads(listing.read_text(encoding="utf-8")).items():
        if hashlib.sha256((listing.parent / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"assets/{name} is damaged (sha256)")
    yield "assets", True, "the bundled models are complete (sha256)"
