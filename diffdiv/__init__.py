"""diffdiv: distil and fine-tune diffusion models by divergence minimisation.

The names below are the public entry points, imported when first used; objectives, denoisers and
metrics are imported from their own modules.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "ConfigError": "diffdiv.runtime.config",
    "RunHandle": "diffdiv.api",
    "load": "diffdiv.api",
    "train": "diffdiv.api",
    "write_report": "diffdiv.report",
}
__all__ = ["ConfigError", "RunHandle", "__version__", "load", "train", "write_report"]

if TYPE_CHECKING:
    from diffdiv.api import RunHandle, load, train
    from diffdiv.report import write_report
    from diffdiv.runtime.config import ConfigError


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffdiv' has no attribute {name!r}")
    return vars(importlib.import_module(_HOMES[name]))[name]


def __dir__() -> list[str]:
    return sorted(__all__)
