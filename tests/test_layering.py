"""Imports go only downwards, light modules stay light, exported pipelines stand alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffdiv"
MODULES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {"core": 1, "resources": 1, "models": 2, "data": 2, "objectives": 3, "metrics": 3}
LAYERS |= {"samplers": 3, "sources": 3, "rewards": 3, "runtime": 4}
TOP = 5  # every other module directly in diffdiv/
LIGHT = ["__init__", "cli", "api", "resources", "doctor", "core/names", "core/__init__"]
LIGHT += [f"runtime/{name}" for name in ("__init__", "config", "explain", "yaml_io", "launch")]
LIGHT += ["runtime/distillation_config", "sample_options"]
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "torchmetrics"}
HEAVY |= {"sklearn", "scipy", "matplotlib", "numpy", "PIL", "peft", "tensorboard"}


def imports(path: Path, *, at_top: bool = False) -> Iterator[str]:
    """Modules a file imports; with ``at_top`` only what happens when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif at_top and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        else:
            pending.extend(ast.iter_child_nodes(node))


def layer(dotted: str) -> int:
    parts = dotted.split(".")
    return LAYERS.get(parts[1], TOP) if len(parts) > 1 else TOP


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imports(path):
        assert name.split(".")[0] not in {"train", "pipelines", "tests", "configs"}
        if name.startswith("diffdiv."):
            assert layer(name) <= layer(own), f"{own} (layer {layer(own)}) imports {name}"


def test_the_test_sees_an_upward_import(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("def f():\n    from diffdiv.runtime.run import Run\nimport torch.nn as nn\n")
    assert set(imports(path)) == {"diffdiv.runtime.run.Run", "torch.nn"}
    assert set(imports(path, at_top=True)) == {"torch.nn"}
    assert layer("diffdiv.runtime.run.Run") > layer("diffdiv.core.noise")


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    light = {f"diffdiv.{module.removesuffix('/__init__').replace('/', '.')}" for module in LIGHT}
    for imported in imports(PACKAGE / f"{name}.py", at_top=True):
        assert imported.split(".")[0] not in HEAVY
        if imported.startswith("diffdiv."):
            assert imported in light or imported.rpartition(".")[0] in light


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda p: p.stem)
def test_pipelines_stand_alone(path: Path) -> None:
    allowed = {"torch", "diffusers", "transformers", "numpy", "PIL"}
    standard = {"math", "inspect", "typing", "collections", "contextlib", "dataclasses", "pathlib"}
    assert "gemmi" not in {name.split(".")[0] for name in imports(path, at_top=True)}
    allowed.add("gemmi")  # an extra: imported where a structure file is read
    assert {name.split(".")[0] for name in imports(path)} <= allowed | standard


@pytest.mark.parametrize("path", sorted((ROOT / "train").glob("*.py")), ids=lambda p: p.stem)
def test_recipes_are_light_at_the_top_and_do_not_share(path: Path) -> None:
    others = {other.stem for other in path.parent.glob("*.py")}
    assert not others & {name.split(".")[0] for name in imports(path)}
    assert not HEAVY & {name.split(".")[0] for name in imports(path, at_top=True)}


def test_no_pickle_and_no_torch_load() -> None:
    for path in [*MODULES, *(ROOT / "train").glob("*.py"), *(ROOT / "pipelines").glob("*.py")]:
        assert not {"pickle", "dill", "cloudpickle"} & {
            name.split(".")[0] for name in imports(path)
        }
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {
                    "torch.load",
                    "eval",
                    "exec",
                    "torch.jit.load",
                }


def test_no_top_level_package_but_diffdiv() -> None:
    assert not [p for p in ROOT.glob("*/__init__.py") if p.parent.name != "diffdiv"]
