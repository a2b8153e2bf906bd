"""Configurations: sixty broken ones, each refused with its key; good ones survive a round trip."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from diffdiv.runtime.config import (
    Config,
    ConfigError,
    OptimizerConfig,
    RunConfig,
    dump_yaml,
    leaves,
    load_config,
    redact,
)
from diffdiv.runtime.launch import load_recipe
from diffdiv.runtime.yaml_io import parse_yaml, read_yaml

BASE = """\
recipe: f_distill
run:
  folder: runs/x
  batch_size: 8
  steps: 100
teacher:
  path: TEACHER
student:
  t_init: 399
  lr: 1e-5
fake_lr: 1e-5
divergence:
  name: jensen_shannon
gan:
  weight: 1.0e-3
data:
  kind: digits
"""

# (what is replaced in BASE, by what, overrides, what the message must hold)
BROKEN: dict[str, tuple[str, str, list[str], list[str]]] = {
    # unknown keys, with the nearest name
    "typo_in_section": ("weight:", "wieght:", [], ["gan.wieght", "did you mean 'weight'?"]),
    "typo_in_run": ("steps:", "stps:", [], ["run.stps", "'steps'", "run.steps: is missing"]),
    "typo_top_level": ("fake_lr", "fake_rl", [], ["fake_rl: unknown key", "'fake_lr'"]),
    "typo_of_section": ("gan:", "gann:", [], ["gann: unknown key", "'gan'"]),
    "key_elsewhere": ("fake_lr", "batch_size: 4\nfake_lr", [], ["did you mean 'run.batch_size'?"]),
    "override_typo": ("", "", ["run.bacth_size=4"], ["run.bacth_size", "'batch_size'"]),
    "override_new_section": ("", "", ["gann.weight=1"], ["gann: unknown key", "'gan'"]),
    "allowed_keys_listed": ("kind:", "knd:", [], ["allowed here: cache, kind, path, real"]),
    # choices
    "divergence_typo": (
        "jensen_shannon",
        "klll",
        [],
        ["divergence.name", "klll", "forward_kl'?"],
    ),
    "divergence_number": ("jensen_shannon", "3", [], ["divergence.name: wants text, got 3"]),
    "kind_typo": ("digits", "digts", [], ["data.kind: 'digts' is not one of", "'digits'"]),
    "device": ("", "", ["run.device=gpu"], ["run.device: 'gpu' is not one of auto, cpu, cuda"]),
    "precision": ("", "", ["run.precision=fp8"], ["run.precision", "did you mean 'fp"]),
    "tracker": ("", "", ["run.trackers=[wandbb]"], ["run.trackers.0", "did you mean 'wandb'?"]),
    "tracker_no_list": ("", "", ["run.trackers=wandb"], ["run.trackers: wants a list"]),
    "non_finite": ("", "", ["run.non_finite=ignore"], ["stop, skip"]),
    "convention": ("", "", ["student.input_convention=vee"], ["did you mean 've'?"]),
    "word_no_is_text": ("", "", ["gan.balance=no"], ["gan.balance: wants true or false, got 'no'"]),
    # types
    "text_for_number": ("399", "abc", [], ["student.t_init: wants a number, got 'abc'"]),
    "quoted_number": ("lr: 1e-5", "lr: '1e-5'", [], ["student.lr: wants a number, got '1e-5'"]),
    "fraction_for_count": (
        "steps: 100",
        "steps: 1.5",
        [],
        ["wants a whole number, got 1.5"],
    ),
    "true_for_count": (
        "steps: 100",
        "steps: true",
        [],
        ["wants a whole number, got true"],
    ),
    "true_for_rate": ("fake_lr: 1e-5", "fake_lr: true", [], ["fake_lr: wants a number"]),
    "nothing_for_rate": ("fake_lr: 1e-5", "fake_lr:", [], ["fake_lr: wants a number, got nothing"]),
    "list_for_number": ("399", "[399]", [], ["student.t_init: wants a number, got [399]"]),
    "section_for_number": ("399", "{a: 1}", [], ["student.t_init", "got a section"]),
    "number_for_section": (
        "gan:\n  weight: 1.0e-3",
        "gan: 3",
        [],
        ["gan: wants a section"],
    ),
    "list_for_section": (
        "gan:\n  weight: 1.0e-3",
        "gan: [1]",
        [],
        ["gan: wants a section"],
    ),
    "number_for_path": ("TEACHER", "3", [], ["teacher.path: wants text, got 3"]),
    "hexadecimal": (
        "steps: 100",
        "steps: 0x10",
        [],
        ["wants a whole number, got '0x10'"],
    ),
    "sexagesimal": ("steps: 100", "steps: 1:30", [], ["run.steps: wants a whole number"]),
    # bounds
    "negative_rate": ("lr: 1e-5", "lr: -1e-5", [], ["student.lr: must be more than 0, got -1e-05"]),
    "zero_batch": ("batch_size: 8", "batch_size: 0", [], ["run.batch_size: must be more than 0"]),
    "negative_weight": ("1.0e-3", "-1", [], ["gan.weight: must be at least 0, got -1"]),
    "beta": ("", "", ["optimizer.betas=[0.9,1.0]"], ["optimizer.betas.1: must be less than 1"]),
    "three_betas": ("", "", ["optimizer.betas=[0,0,0]"], ["optimizer.betas: wants at most 2"]),
    "one_beta": ("", "", ["optimizer.betas=[0.9]"], ["optimizer.betas.1: is missing"]),
    "fraction": ("", "", ["optimizer.decay_fraction=2"], ["must be at most 1, got 2"]),
    "not_a_number": ("399", ".nan", [], ["student.t_init: must be finite, got nan"]),
    "infinite": ("399", ".inf", [], ["student.t_init: must be"]),
    "seed_too_large": ("", "", [f"run.seed={10**30}"], ["run.seed"]),
    "accumulation": ("", "", ["run.accumulation=3"], ["run: batch_size 8 is not a multiple of"]),
    "clip_order": ("", "", ["divergence.clip=[2,1]"], ["divergence: clip [2.0, 1.0] is not"]),
    # missing keys and files
    "missing_key": ("fake_lr: 1e-5\n", "", [], ["fake_lr: is missing, and has no default"]),
    "missing_section": ("data:\n  kind: digits\n", "", [], ["data: is missing"]),
    "missing_folder": ("TEACHER", "no/such", [], ["teacher.path: there is no folder 'no/such'"]),
    "file_for_folder": ("TEACHER", "config.yaml", [], ["teacher.path: there is no folder"]),
    "nul_in_path": ("TEACHER", '"a\\0b"', [], ["teacher.path: there is no folder"]),
    "long_path": ("TEACHER", "a" * 5000, [], ["teacher.path: there is no folder"]),
    "no_recipe": ("recipe: f_distill\n", "", [], ["recipe: is missing"]),
    "recipe_number": ("recipe: f_distill", "recipe: 3", [], ["recipe: wants a name, got 3"]),
    # YAML
    "duplicate_key": ("fake_lr", "fake_lr: 1\nfake_lr", [], ["line 12: duplicate key 'fake_lr'"]),
    "duplicate_inside": (
        "steps: 100",
        "steps: 1\n  steps: 2",
        [],
        ["line 6: duplicate key"],
    ),
    "alias": ("399", "*x", [], ["line 9: anchors and aliases"]),
    "cyclic_anchor": ("gan:", "gan: &x\n  y: *x", [], ["anchors and aliases"]),
    "tag": ("399", "!!python/object/apply:os.system [id]", [], ["line 9: tags"]),
    "open_list": ("digits", "[digits", [], ["line "]),
    "tab": ("  lr:", "\tlr:", [], ["line 10"]),
    "two_documents": ("gan:", "---\ngan:", [], ["single document"]),
    "control_character": ("digits", "\x01", [], ["special characters"]),
    "half_character": ("digits", '"\\ud800"', [], ["surrogate"]),
    "deep": ("digits", "[" * 5000, [], ["nested deeper than"]),
    "huge": ("digits", "d" * 2_000_000, [], ["a config has at most"]),
    "long_number": ("399", "9" * 10_000, [], ["more than 400 digits"]),
    "key_is_list": ("gan:", "? [a]\n: 1\ngan:", [], ["a key must be text"]),
    # overrides
    "no_equals": ("", "", ["fake_lr"], ["'fake_lr': an override is written"]),
    "empty_key": ("", "", ["=3"], ["an override is written section.key=value"]),
    "empty_part": ("", "", ["gan..weight=3"], ["an override is written section.key=value"]),
    "value_is_no_section": ("", "", ["fake_lr.x=3"], ["'fake_lr' is a value, not a section"]),
    "mapping": ("", "", ["gan={weight: 1}"], ["gan: override one value at a time"]),
    "override_recipe": ("", "", ["recipe=x"], ["recipe: cannot be overridden"]),
    "override_bad_yaml": ("", "", ["fake_lr=[1"], ["the value of fake_lr"]),
}


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    return tmp_path / "teacher"


def write(folder: Path, old: str = "", new: str = "") -> Path:
    assert old in BASE
    path = folder.parent / "config.yaml"
    text = BASE.replace(old, new, 1).replace("TEACHER", str(folder))
    path.write_text(text, encoding="utf-8")
    return path


def recipe_class() -> type[Config]:
    return load_recipe("f_distill").config_class


def test_the_unbroken_config_is_accepted(teacher: Path) -> None:
    load_config(write(teacher), [], recipe_class())
    assert len(BROKEN) >= 60


@pytest.mark.parametrize("name", BROKEN)
def test_broken_config(name: str, teacher: Path) -> None:
    old, new, overrides, expected = BROKEN[name]
    path = write(teacher, old, new)
    started = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, recipe_class())
    assert time.perf_counter() - started < 2
    text = "\n".join(caught.value.messages)
    for fragment in expected:
        assert fragment in text
    assert all("\n" not in message and message.isprintable() for message in caught.value.messages)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"- a\n", b"text"])
def test_files_that_are_no_configs(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(path, [], recipe_class())
    with pytest.raises(ConfigError, match="there is no file"):
        load_config(tmp_path / "absent.yaml", [], recipe_class())
    with pytest.raises(ConfigError, match="there is no file"):
        load_config(tmp_path, [], recipe_class())


def test_all_mistakes_at_once(teacher: Path) -> None:
    path = write(teacher, "digits", "digts")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["run.steps=x", "gan.a.b=1", "oops", "fake_lr=-1"], recipe_class())
    keys = {message.split(":")[0] for message in caught.value.messages}
    assert keys == {"'oops'", "run.steps", "gan.a", "data.kind", "fake_lr"}


@pytest.mark.parametrize("name", ["typo_in_section", "divergence_typo", "duplicate_key"])
def test_command_line_refuses_in_two_seconds(name: str, teacher: Path) -> None:
    old, new, overrides, expected = BROKEN[name]
    path = write(teacher, old, new)
    command = [sys.executable, "-m", "diffdiv.cli", "train", str(path), *overrides]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    after = os.times()  # processor time: what a machine with nothing else to do takes
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 2
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and not done.stdout
    assert all(fragment in done.stderr for fragment in expected)


def test_overrides_and_order(teacher: Path) -> None:
    class Recipe(Config):
        run: RunConfig
        teacher: dict[str, str]
        student: dict[str, float]
        fake_lr: float
        divergence: dict[str, str]
        gan: dict[str, float | None]
        data: dict[str, str]
        optimizer: OptimizerConfig = OptimizerConfig()

    items = ["run.steps=1e3", "run.steps=2000", "optimizer.clip=null", "optimizer.betas=[0, 0.99]"]
    config = load_config(write(teacher), [*items, "fake_lr=2e-6"], Recipe)
    assert config.run.steps == 2000
    assert config.optimizer.clip is None
    assert config.optimizer.betas == (0.0, 0.99)
    assert config.fake_lr == 2e-6
    assert config.run.batch_size == 8
    with pytest.raises(ValueError, match="frozen"):
        config.fake_lr = 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-6", 1e-6), (".5", 0.5), ("-1.5E+3", -1500.0), ("010", 10), ("1e5", 100000)],
        *[("no", "no"), ("on", "on"), ("True", True), ("~", None), ("", None)],
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value and type(parsed) is type(value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = {
        "text": ["1e-6", "no", "null", "", "a: b #c", "two\nlines", "ü 🙂", "'", "[x", "*x", " s"],
        "numbers": [1e-6, 1e300, 0.1, 3, -2],
        "rest": [None, True, False, [], [[1], [2]]],
        "section": {"key": {"deeper": 1}},
    }
    dump_yaml(written, tmp_path / "a.yaml")
    assert read_yaml(tmp_path / "a.yaml") == written
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


SECRETS = [
    "hf_abcdefghijklmnopqrst",
    "sk-abcdefghijklmnop1234",
    "ghp_abcdefghijklmnop1234",
    "0123456789abcdef0123456789abcdef01234567",
    "swordfish",
    "AKIAIOSFODNN7EXAMPLE",
]


def test_secrets_are_never_written(tmp_path: Path) -> None:
    planted = {
        "a": f"use {SECRETS[0]} here",
        "b": [SECRETS[1], {"c": SECRETS[2]}],
        "wandb_api_key": SECRETS[3],
        "hub_token": SECRETS[4],
        "url": f"https://me:{SECRETS[4]}@host/x",
        "call": f"--token={SECRETS[4]} api_key: {SECRETS[5]}",
        "tokenizer": "kept",
    }
    dump_yaml(planted, tmp_path / "a.yaml")
    text = (tmp_path / "a.yaml").read_text()
    assert not [secret for secret in SECRETS if secret in text]
    assert "tokenizer: kept" in text and "host/x" in text
    assert redact("nothing here: 12 tokens, step 3") == "nothing here: 12 tokens, step 3"


def test_bundled_paths_are_found_from_anywhere(teacher: Path) -> None:
    assert not Path("configs").exists()
    name = load_config(
        "configs/pretrain/embedded_sd.yaml", [], load_recipe("embedded_sd").config_class
    )
    assert name.model_dump()["recipe"] == "embedded_sd"
    with pytest.raises(ConfigError):
        load_config("configs/../pyproject.toml", [], recipe_class())


def test_leaves() -> None:
    class Inner(Config):
        a: int
        b: tuple[int, int] | None = None

    class Outer(Config):
        recipe: str
        inner: Inner | None = None
        c: float

    assert leaves(Outer) == ["c", "inner.a", "inner.b"]


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, diffdiv.cli, diffdiv.api; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "diffusers", "transformers", "numpy", "matplotlib", "sklearn"}


@pytest.mark.parametrize("recipe", ["pretrain", "masked_pretrain", "oracle", "drakes"])
def test_recipes_that_keep_whole_networks_refuse_to_share_them(recipe):
    section = load_recipe(recipe).config_class.model_fields["run"].annotation
    values = {"folder": "runs/a", "batch_size": 2, "steps": 1}
    assert section.model_validate_json(json.dumps(values)).sharding == "none"
    with pytest.raises(ValidationError, match="this recipe keeps whole networks"):
        section.model_validate_json(json.dumps({**values, "sharding": "fsdp2"}))
