"""Starting recipes: loading a recipe file by its path, in this process or in several.

Nothing heavy is imported at the top: a wrong configuration is told before torch is loaded.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffdiv.resources import resource
from diffdiv.runtime.yaml_io import ConfigError, redact

if TYPE_CHECKING:
    from diffdiv.runtime.config import Config

INTERRUPTED = 75  # exit status of a run that was stopped by a signal and saved its state


class CheckpointError(RuntimeError):
    """A state cannot be written, or is damaged, missing or not of this run."""


@dataclass(frozen=True)
class Recipe:
    """A recipe file: its configuration class and its loop."""

    name: str
    path: Path
    config_class: "type[Config]"
    main: "Callable[[Config], None]"


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load ``train/NAME.py``, or the file at a path that ends in ``.py``.

    Raises:
        FileNotFoundError: if there is no such recipe.
        TypeError: if the file lacks ``RecipeConfig`` or ``main``.
    """
    from diffdiv.runtime.config import Config

    path = Path(name_or_path)
    path = path.resolve() if path.suffix == ".py" else resource(f"train/{name_or_path}.py")
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe file {path}")
    # Registered under its own name, for pydantic resolves annotations through sys.modules.
    module_name = f"diffdiv_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    config_class, main = vars(module).get("RecipeConfig"), vars(module).get("main")
    if not (isinstance(config_class, type) and issubclass(config_class, Config) and callable(main)):
        raise TypeError(f"{path} must define `class RecipeConfig(Config)` and `def main(config)`")
    return Recipe(name=path.stem, path=path, config_class=config_class, main=main)


def run_recipe_file(path: str | Path, argv: Sequence[str] | None = None) -> None:
    """What a recipe's ``if __name__ == "__main__"`` calls, under any launcher.

    Args:
        path: of the recipe file.
        argv: CONFIG key=value ...; the command line's by default.

    Raises:
        SystemExit: as in :func:`failures_as_sentences`; 75 for an interrupted run that saved its
            state. One process of several ends here, with the same status.
    """
    from diffdiv.runtime.config import load_config

    recipe, argv = load_recipe(path), sys.argv[1:] if argv is None else argv
    try:
        with failures_as_sentences():
            if not argv:
                raise ConfigError([f"usage: {recipe.path.name} CONFIG [key=value ...]"])
            recipe.main(load_config(argv[0], argv[1:], recipe.config_class))
    except SystemExit as error:
        leave_group(error.code if isinstance(error.code, int) else 1)
        raise
    leave_group(0)


def leave_group(status: int) -> None:
    """End this process here if it is one of a group; everything is saved and closed by now.

    DDP never frees its group, and a gloo thread that asks for the interpreter while that is torn
    down aborts the process (pytorch/pytorch#179291): a finished run would count as failed.
    """
    torch = sys.modules.get("torch")  # a wrong configuration is told without it
    if torch is None or not torch.distributed.is_initialized():
        return
    if status == 0:  # after a failure the other ranks may never come
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def failures_as_sentences() -> Iterator[None]:
    """Turn expected failures into a message on stderr: a bug keeps its traceback.

    Exit status 2: a mistake in the configuration; 1: a failure at work. Set DIFFDIV_TRACEBACK=1 to
    see where a failure came from.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, FloatingPointError, CheckpointError) as error:
        if isinstance(error, ImportError) and error.name is not None:
            raise  # of Python itself: a broken installation; ours say which extra is missing
        if os.environ.get("DIFFDIV_TRACEBACK"):
            raise
        status, messages = 1, [redact(str(error)) or type(error).__name__]
        if isinstance(error, ConfigError):
            status, messages = 2, list(error.messages)
        sys.stderr.writelines(f"error: {message}\n" for message in messages)
        raise SystemExit(status) from None


def launch(recipe_path: str | Path, argv: Sequence[str], processes: int) -> int:
    """Run a recipe in this process (1) or in several on this machine; returns the exit status."""
    if processes == 1:
        try:
            run_recipe_file(recipe_path, argv)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        return 0
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Of one machine's threads every process gets its share, unless the user has decided.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    run_id, endpoint = f"diffdiv-{os.getpid()}", "localhost:0"  # port 0: a free one
    config = LaunchConfig(
        1, 1, processes, run_id=run_id, rdzv_backend="c10d", rdzv_endpoint=endpoint, max_restarts=0
    )
    try:
        elastic_launch(config, sys.executable)(str(recipe_path), *argv)
    except SignalException:  # passed on to the children, who save a state and leave
        return INTERRUPTED
    except ChildFailedError as error:
        # A child killed by signal n has exit code -n; shells call that 128 + n.
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0
