"""Configuration of rewards: names, nearest names, and code that may not be run unasked."""

import pytest

from diffdiv.resources import resource
from diffdiv.runtime.config import ConfigError, leaves, load_config
from diffdiv.runtime.launch import load_recipe

ASSETS = [
    f"{key}={resource(f'assets/{name}')}"
    for key, name in (
        ("student.path", "embedded_sd"), ("teacher.path", "embedded_sd"),
        ("rewards.pickscore.path", "embedded_judge"),
    )
] + ["data.kind=prompted_digits"]  # fmt: skip


def load(*overrides):
    recipe = load_recipe("di_star").config_class
    return load_config("configs/di_star/sdxl.yaml", [*ASSETS, *overrides], recipe)


def test_a_reward_is_added_and_switched_off_by_its_name():
    folder = resource("assets/embedded_judge")
    config = load(f"rewards.hpsv2.path={folder}", "rewards.hpsv2.scale=2", "rewards.pickscore=null")
    assert config.rewards["hpsv2"].scale == 2.0 and config.rewards["hpsv2"].path == folder
    assert config.rewards["pickscore"] is None
    more = load("rewards.pickscore.normalise=[20.5, 1.5]", "rewards.pickscore.ceiling=23")
    assert more.rewards["pickscore"].normalise == (20.5, 1.5)
    assert load("rewards.pickscore.normalise=running").rewards["pickscore"].ceiling is None


def test_options_of_a_named_section_are_listed_once():
    options = leaves(load_recipe("di_star").config_class)
    assert "rewards.NAME.scale" in options and "rewards.NAME.path" in options


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.pikscore.scale=1"], r"'pikscore' is unknown \(did you mean 'pickscore'\?\)"),
        (["rewards.pickscore.sclae=1"], r"rewards\.pickscore\.sclae: unknown key .*'?scale"),
        (["rewards.pickscore.scale=-1"], r"rewards\.pickscore\.scale: must be at least 0"),
        (["rewards.pickscore.copies=3"], r"rewards\.pickscore\.copies: .*multiple of 2"),
        (["rewards.pickscore.normalise=group"], "for black boxes"),
        (["rewards.pickscore.normalise=[1.0, 0.0]"], r"normalise\.1: must be more than 0"),
        (["rewards.pickscore.normalise=off"], r"pickscore\.normalise: .*not one of running, group"),
        (["rewards.pickscore=null"], "no reward is set"),
        (["rewards.hpsv2.scale=1"], "path of hpsv2 is missing"),
        (["rewards.judge.path=assets/embedded_judge"], "its colour is missing"),
        (["rewards.mine.file=train/di_star.py:main"], r"code that would be run; .*allow_code"),
        (["rewards.mine.file=nowhere.py:f", "rewards.mine.allow_code=true"], "there is no file"),
        (["rewards.pickscore.colour=red"], "only the judge takes a colour"),
        (
            ["rewards.pickscore.file=train/di_star.py:main", "rewards.pickscore.allow_code=true"],
            "pickscore: path is for diffdiv's own",
        ),
        (["rewards.mine.file=mine", "rewards.mine.allow_code=true"], "not of the form FILE.py:F"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


def test_an_allowed_file_is_kept_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(images, prompts): ...\n")
    config = load("rewards.mine.file=mine.py:f", "rewards.mine.allow_code=true")
    assert config.rewards["mine"].file == f"{tmp_path / 'mine.py'}:f"
