"""Files that travel with the library: recipes, configs, pipelines and small embedded models.

An installed wheel carries them in ``diffdiv/_bundled``; in a checkout they lie beside the package.
"""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOTS = (_PACKAGE / "_bundled", _PACKAGE.parent)
FOLDERS = frozenset({"train", "configs", "pipelines", "assets"})


def find(path: str | Path) -> Path | None:
    """The bundled copy of ``path`` (a relative path such as ``configs/demo/x.yaml``), or None.

    Only what ships is found: the path must begin with one of ``FOLDERS`` and stay inside it.
    """
    path = Path(path)
    if path.is_absolute() or ".." in path.parts or not FOLDERS.intersection(path.parts[:1]):
        return None
    return next((root / path for root in _ROOTS if os.path.exists(root / path)), None)


def resource(relative: str | Path) -> Path:
    """Path of a bundled file or folder.

    Args:
        relative: path below the checkout, e.g. ``train/f_distill.py``.

    Raises:
        FileNotFoundError: nothing bundled has this name.
    """
    found = find(relative)
    if found is None:
        raise FileNotFoundError(f"{str(relative)!r} is not among the files bundled with diffdiv")
    return found
