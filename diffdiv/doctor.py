"""What is wrong with this environment, if anything: one row a check."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from diffdiv.resources import find

# Versions the tests were last run with; the floors come from the package's own metadata.
TESTED = {"torch": "2.15", "diffusers": "0.42", "transformers": "5.23", "accelerate": "1.15"}
MIN_FREE_GB = 5

Row = tuple[str, bool | None, str]  # what, fine (None: a remark only), in words


def examine() -> Iterator[Row]:
    """All checks, in order; a check that breaks is a failed row, never an exception."""
    for check in (_packages, _torch, _xformers, _disk, _assets):
        try:
            yield from check()
        except Exception as error:  # whatever it is, the user wants to read it in the table
            yield check.__name__.strip("_"), False, f"{type(error).__name__}: {error}"


def _packages() -> Iterator[Row]:
    for text in importlib.metadata.requires("diffdiv") or []:
        requirement = Requirement(text)
        if requirement.marker is not None:  # an extra
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield requirement.name, False, f"not installed, wants {requirement.specifier}"
            continue
        tested = TESTED.get(requirement.name, version)
        if not requirement.specifier.contains(version, prereleases=True):
            yield requirement.name, False, f"{version}, wants {requirement.specifier}"
        elif not version.startswith(tested):
            yield requirement.name, None, f"{version}; tested with {tested}"
        elif requirement.name in TESTED:
            yield requirement.name, True, version


def _torch() -> Iterator[Row]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "device", True, ", ".join(devices) or "CPU only (the demos need no more)"
    yield "threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} cores"


def _xformers() -> Iterator[Row]:
    if importlib.util.find_spec("xformers") is None:
        yield "xformers", None, "not installed; attention uses torch's own kernels"
        return
    importlib.import_module("xformers.ops")  # fails where its CUDA libraries are not torch's
    yield "xformers", True, importlib.metadata.version("xformers")


def _disk() -> Iterator[Row]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield "disk", free > MIN_FREE_GB or None, f"{free:.0f} GB free in this folder"
    with tempfile.TemporaryFile() as file:
        file.write(b"x")
    yield "temporary files", True, f"{tempfile.gettempdir()} is writable"


def _assets() -> Iterator[Row]:
    """Compares the bundled models with assets/sha256.json, {file below assets/: sha256}."""
    listing = find("assets/sha256.json")
    if listing is None:
        yield "assets", False, "assets/sha256.json is missing: the installation is incomplete"
        return
    for name, expected in json.loads(listing.read_text(encoding="utf-8")).items():
        file = listing.parent / name
        actual = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        if actual != expected:
            yield f"assets/{name}", False, "missing" if actual is None else "damaged (sha256)"
            return
    yield "assets", True, "the bundled models are complete (sha256)"
