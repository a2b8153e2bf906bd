"""States on disk: every damage is found and named, and a valid state always remains."""

import resource
import shutil
import signal

import pytest
import torch

from diffdiv.runtime import checkpoint
from diffdiv.runtime.checkpoint import CheckpointError, load_weights, newest_valid, scan, verify

FILES = ("student.safetensors", "student.ema-500.safetensors", "state.json", "manifest.json")


def save(run_folder, step, *, keep=2, size=4):
    checkpoint.save_state(
        run_folder / "state" / f"step-{step:08d}",
        tensors={
            "student": {"weight": torch.full((size,), float(step)), "buffer": torch.ones(1)},
            "student.ema-500": {"weight": torch.full((size,), -float(step))},
        },
        values={"seconds": 1.5},
        facts={"step": step},
        keep=keep,
    )
    return run_folder / "state" / f"step-{step:08d}"


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def remove(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, zero, flip, remove, empty])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_named_and_passed_over(tmp_path, damage, name):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    damage(new / name)
    found, damaged = scan(tmp_path)
    assert found == old
    assert [path for path, _ in damaged] == [new] and f"{new.name}/{name}" in damaged[0][1]
    assert load_weights(tmp_path, "student")["weight"].tolist() == [1.0] * 4


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path):
    state = save(tmp_path, 1)
    good = (state / "manifest.json").read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        (state / "manifest.json").write_bytes(bad)
        with pytest.raises(CheckpointError):
            verify(state)
    (state / "manifest.json").write_bytes(good)
    verify(state)


def test_weights_and_averages(tmp_path):
    save(tmp_path, 3)
    averaged = load_weights(tmp_path, "student", ema=500)
    assert averaged["weight"].tolist() == [-3.0] * 4 and averaged["buffer"].tolist() == [1.0]
    with pytest.raises(ValueError, match=r"no 'student.ema-7'; it has student, student.ema-500"):
        load_weights(tmp_path, "student", ema=7)
    with pytest.raises(CheckpointError, match="no valid state"):
        load_weights(tmp_path / "elsewhere", "student")


@pytest.mark.parametrize("keep", [1, 3])
def test_old_states_go_only_after_the_new_one_verifies(tmp_path, keep, monkeypatch):
    for step in range(5):
        save(tmp_path, step, keep=keep)
    kept = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert kept == [f"step-{step:08d}" for step in range(5 - keep, 5)]

    def refuse(state):
        raise CheckpointError("read back wrong")

    monkeypatch.setattr(checkpoint, "verify", refuse)
    with pytest.raises(CheckpointError, match="read back wrong"):
        save(tmp_path, 9, keep=keep)
    monkeypatch.undo()
    verify(tmp_path / "state" / "step-00000004")


def test_tied_and_strided_tensors_come_back_under_their_names(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "tied": base, "column": base[:, 1], "turned": base.T, "none": base[:0]}
    path = tmp_path / "state" / "step-00000001"
    checkpoint.save_state(path, tensors={"net": tensors}, values={}, facts={}, keep=1)
    back = checkpoint.read_tensors(path, "net")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert back["tied"].data_ptr() == back["a"].data_ptr()


def test_full_disk_leaves_older_states_and_no_rubbish(tmp_path):
    old = save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(CheckpointError, match="step-00000002 was not saved, older states are"):
            save(tmp_path, 2, size=10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "state").iterdir()) == [old] and newest_valid(tmp_path) == old


def test_leftovers_are_removed_and_never_read(tmp_path):
    state = save(tmp_path, 1)
    shutil.copytree(state, tmp_path / "state" / ".tmp-step-00000002-77")
    assert newest_valid(tmp_path) == state
    checkpoint.remove_leftovers(tmp_path)
    assert list((tmp_path / "state").iterdir()) == [state]


def test_newer_schema_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SCHEMA", 2)
    state = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="schema 2, this version reads schema 1"):
        verify(state)
