"""The command line: instant help, one sentence for a failure, nothing of the user's interpreted."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import diffdiv
from diffdiv import api, cli, doctor, resources
from diffdiv.runtime import launch
from diffdiv.runtime.config import Config, RunConfig

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["copy", "demo", "doctor", "evaluate", "export", "list", "report", "sample", "train"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["diffdiv", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_help_takes_less_than_a_second() -> None:
    before = os.times()
    command = [sys.executable, "-m", "diffdiv.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()  # processor time: what a machine with nothing else to do takes
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 1
    assert all(command in done.stdout for command in COMMANDS)


def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "list") == 0
    text = capsys.readouterr().out
    for expected in ("f_distill", "configs/demo/f_distill.yaml", "jensen_shannon", "embedded_sd"):
        assert expected in text


def test_dry_run_prints_the_resolved_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    text = (ROOT / "configs" / "pretrain" / "embedded_sd.yaml").read_text(encoding="utf-8")
    config.write_text(text, encoding="utf-8")
    assert run(monkeypatch, "train", str(config), "seed=7", "--dry-run") == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["recipe"] == "embedded_sd"
    assert resolved["seed"] == 7
    assert not (tmp_path / "runs").exists()


def test_dry_run_checks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = {"batch_size": 8, "steps": 1, "trackers": ()}
    fine = RunConfig(folder=tmp_path / "new" / "run", **settings)
    assert list(fine.problems(2)) == []
    assert "not a multiple" in next(fine.problems(3))
    blocked = RunConfig(folder=tmp_path / "file" / "run", **settings)
    assert "cannot be written" in next(blocked.problems(1))
    missing = fine.model_copy(update={"trackers": ("no_such_tracker",)})
    assert "not installed" in next(missing.problems(1))


def test_unknown_recipe_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("recipe: f_distil\n")
    assert run(monkeypatch, "train", str(config)) == 2
    assert "did you mean 'f_distill'?" in capsys.readouterr().err
    (tmp_path / "evil.py").write_text("raise SystemExit(99)")
    for name in (tmp_path / "evil.py", "../evil", "evil.py"):
        config.write_text(f"recipe: {name}\n")
        assert run(monkeypatch, "train", str(config)) == 2


def _raises(error: BaseException) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise error

    return fail


def _checkpoint_error() -> Exception:
    from diffdiv.runtime.checkpoint import CheckpointError

    return CheckpointError("no valid state")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (diffdiv.ConfigError(["a: wrong", "b: wrong"]), 2),
        (FloatingPointError("student, step 3"), 1),
        (OSError("disk full [/bold] hf_abcdefghijkl"), 1),
        (ValueError("prompts: none given"), 1),
        (_checkpoint_error(), 1),
        (SystemExit(75), 75),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_are_sentences(
    error: BaseException,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "launch", _raises(error))
    monkeypatch.delenv("DIFFDIV_TRACEBACK", raising=False)
    config = str(ROOT / "configs" / "pretrain" / "embedded_sd.yaml")
    assert run(monkeypatch, "train", config) == status
    lines = capsys.readouterr().err.splitlines()
    if status != 75:
        expected = str(error).replace("hf_abcdefghijkl", "***").splitlines()
        assert lines == [f"error: {line}" for line in expected]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", _raises(KeyError("bug")))
    with pytest.raises(KeyError):
        run(monkeypatch, "train", str(ROOT / "configs" / "pretrain" / "embedded_sd.yaml"))
    monkeypatch.setattr(launch, "launch", _raises(OSError("x")))
    monkeypatch.setenv("DIFFDIV_TRACEBACK", "1")
    with pytest.raises(OSError, match="x"):
        run(monkeypatch, "train", str(ROOT / "configs" / "pretrain" / "embedded_sd.yaml"))


def test_exit_status_of_the_run_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def launched(path: Path, arguments: list[str], processes: int) -> int:
        seen.extend([path.name, arguments[1:], processes])
        return 75

    monkeypatch.setattr(launch, "launch", launched)
    config = str(ROOT / "configs" / "pretrain" / "embedded_sd.yaml")
    assert run(monkeypatch, "train", config, "seed=1", "--processes", "2") == 75
    assert seen == ["embedded_sd.py", ["seed=1"], 2]


@pytest.mark.parametrize("command", ["sample", "evaluate", "report"])
def test_missing_path(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "no/such/[red]place") == 2
    assert "no/such/[red]place" in capsys.readouterr().err


def test_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, "copy", "f_distill", str(tmp_path / "mine")) == 0
    copied = (tmp_path / "mine" / "f_distill.py").read_bytes()
    assert copied == (ROOT / "train" / "f_distill.py").read_bytes()
    (tmp_path / "mine" / "f_distill.py").write_text("edited")
    assert run(monkeypatch, "copy", "f_distill", str(tmp_path / "mine")) == 1
    assert (tmp_path / "mine" / "f_distill.py").read_text() == "edited"
    assert run(monkeypatch, "copy", "no_such", str(tmp_path)) == 1


def test_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "weights").write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180, "abc"
    listing = tmp_path / "sha256.json"
    listing.write_text(json.dumps({"weights": sha256}))
    monkeypatch.setattr(doctor, "find", lambda _: listing)
    assert run(monkeypatch, "doctor") == 0
    assert "torch" in capsys.readouterr().out
    (tmp_path / "weights").write_bytes(b"abd")
    assert run(monkeypatch, "doctor") == 1
    assert "damaged" in capsys.readouterr().out

    def broken() -> Iterator[doctor.Row]:
        raise RuntimeError("libcudart.so.12")

    monkeypatch.setattr(doctor, "_torch", broken)
    assert ("broken", False, "RuntimeError: libcudart.so.12") in list(doctor.examine())


def test_bundled_models_are_listed() -> None:
    """`diffdiv doctor` checks against assets/sha256.json; here it is checked itself."""
    assets = ROOT / "assets"
    models = [path for folder in assets.glob("embedded_*") for path in folder.rglob("*")]
    expected = {
        path.relative_to(assets).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(models)
        if path.is_file()
    }
    listed = json.loads((assets / "sha256.json").read_text())
    assert listed == expected, "assets/sha256.json must be:\n" + json.dumps(expected, indent=1)


def test_train_from_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    received: list[Config] = []

    def prepared(name: str) -> launch.Recipe:
        recipe = launch.load_recipe(name)
        return launch.Recipe(recipe.name, recipe.path, recipe.config_class, received.append)

    monkeypatch.setattr(api, "load_recipe", prepared)
    out = tmp_path / "out"
    run = diffdiv.train("configs/pretrain/embedded_sd.yaml", {"folder": out}, seed=3)
    assert run.folder == out
    assert received[0].model_dump()["seed"] == 3
    (out / "samples").mkdir(parents=True)
    (out / "samples" / "step-00000010.png").touch()
    (out / "metrics.jsonl").write_text('{"student_step": 1}\n{"student_step": 2}\n')
    assert [line["student_step"] for line in run.metrics()] == [1, 2]
    assert [path.name for path in run.samples()] == ["step-00000010.png"]
    with pytest.raises(diffdiv.ConfigError, match="did you mean 'seed'"):
        diffdiv.train("configs/pretrain/embedded_sd.yaml", sed=3)


def test_resources() -> None:
    assert resources.resource("train/f_distill.py").is_file()
    for outside in (
        "pyproject.toml",
        "../x",
        "train/../../x",
        "/etc/passwd",
        "train/no",
        "configs/\0",
    ):
        assert resources.find(outside) is None
    with pytest.raises(FileNotFoundError, match="not among the files bundled"):
        resources.resource("train/no_such.py")


def test_plan_needs_neither_weights_nor_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shapes are those of a folder when there is one, else of a named kind."""
    assert run(monkeypatch, "plan", "configs/demo/lora.yaml", "--gpu", "12GB") == 0
    text = capsys.readouterr().out
    assert "fits on a 12 GB card" in text and "1 critic updates a cycle" in text
    missing = ("plan", "configs/f_distill/sdxl_lora_12gb.yaml", "--like", "sdxxl")
    assert run(monkeypatch, *missing) != 0
    sentence = capsys.readouterr().err
    assert "there is no folder stable-diffusion-xl-base-1.0" in sentence
    assert "sd15, sd21, sdxl" in sentence
    assert run(monkeypatch, "plan", "configs/demo/lora.yaml", "--gpu", "big") != 0
    assert "gpu 'big' is neither a memory size" in capsys.readouterr().err
