"""The options of every recipe are a promise: the set changes on purpose or not at all.

After a change on purpose, write the new set to tests/options/NAME.txt, one name a line.
"""

import re
from pathlib import Path

import pytest

import diffdiv
from diffdiv.runtime.config import leaves, load_config
from diffdiv.runtime.launch import load_recipe
from diffdiv.runtime.yaml_io import read_yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "train").glob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MAX_OPTIONS = 52  # f_distill: pixels to SDXL, copies or adapters, one or a few steps
MAX_COLUMNS = 12  # of a reward


@pytest.mark.parametrize("name", RECIPES)
def test_options_are_frozen(name: str) -> None:
    options = leaves(load_recipe(name).config_class)
    frozen = ROOT / "tests" / "options" / f"{name}.txt"
    assert frozen.is_file(), f"write {frozen.name}:\n" + "\n".join(options)
    assert options == frozen.read_text(encoding="utf-8").split()
    # a table that the user fills row by row (rewards.NAME.scale) counts once, and is bounded itself
    columns = [option for option in options if ".NAME." in option]
    assert len({option.partition(".NAME.")[0] for option in options}) <= MAX_OPTIONS
    assert len(columns) <= MAX_COLUMNS


def test_no_options_of_a_recipe_that_is_gone() -> None:
    assert {path.stem for path in (ROOT / "tests" / "options").glob("*.txt")} <= set(RECIPES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_names_a_recipe_and_only_its_options(path: Path) -> None:
    """Paths of weights a user has to bring may be missing; nothing else may be wrong."""
    mapping = read_yaml(path)
    name = mapping["recipe"]
    assert name in RECIPES
    assert path.read_text(encoding="utf-8").startswith("# "), "first line: what it does"
    try:
        load_config(path, [], load_recipe(str(name)).config_class)
    except diffdiv.ConfigError as error:
        # "teacher.path: there is no folder ...", "data: path 'None' must be a folder of images"
        assert not [m for m in error.messages if not re.match(r"[\w.]*path: |\w+: path ", m)]


def test_the_demo_brings_all_it_needs() -> None:
    config = load_config("configs/demo/f_distill.yaml", [], load_recipe("f_distill").config_class)
    assert config.teacher.path.is_dir()


def test_public_names() -> None:
    names = {"ConfigError", "RunHandle", "__version__", "load", "train", "write_report"}
    assert set(dir(diffdiv)) == names == set(diffdiv.__all__)
    for name in names - {"write_report"}:  # the report needs matplotlib; see test_report.py
        assert vars(diffdiv).get(name, diffdiv.__getattr__(name) if name[0] != "_" else 1)
    with pytest.raises(AttributeError, match="trian"):
        diffdiv.__getattr__("trian")
