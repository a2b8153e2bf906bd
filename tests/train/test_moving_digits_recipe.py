"""The recipe of moving digits: what the network is shown, resuming, its export."""

import os
import signal

import pytest
import torch
from builders import losses_of, state_of
from torch import Tensor

from diffdiv.api import prepare
from diffdiv.models.clip_net import ClipNet, load_clip_net
from diffdiv.runtime.config import ConfigError
from diffdiv.runtime.run import Run

SMALL = [
    "run.batch_size=16", "run.steps=6", "run.log_every=1", "run.trackers=[]", "run.save_every=2",
    "model.width=16", "model.num_blocks=1", "ema_half_life=40", "world.num_pairs=8",
]  # fmt: skip


def train(folder, *more):
    recipe, config = prepare("configs/demo/i2v.yaml", [*SMALL, f"run.folder={folder}", *more])
    recipe.main(config)
    return folder


def test_stopped_and_resumed_it_ends_bitwise_equal(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    update = Run.update

    def stopping(self, net, loss):
        update(self, net, loss)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut")
    monkeypatch.setattr(Run, "update", update)
    train(tmp_path / "cut")
    a, b = state_of(whole), state_of(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert losses_of(whole) == losses_of(tmp_path / "cut")
    averaged = {k.split("/", 1)[1]: v for k, v in a.items() if k.startswith("denoiser.ema-40/")}
    assert averaged
    exported = load_clip_net(whole / "export")[0].state_dict()
    assert all(torch.equal(exported[key], value.half().float()) for key, value in averaged.items())


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    one, four = (losses_of(train(tmp_path / str(n), f"run.accumulation={n}")) for n in (1, 4))
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("kind", ["clean", "constant", "timenoise"])
def test_what_the_network_is_shown(kind, tmp_path, monkeypatch):
    """Levels by kind, told to the network; the noise on the image has that standard deviation."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    forward = ClipNet.forward

    def spy(self, x_t, t, image, level):
        seen.append((t, image, level))
        return forward(self, x_t, t, image, level)

    monkeypatch.setattr(ClipNet, "forward", spy)
    train(tmp_path, f"condition.kind={kind}", "run.batch_size=64", "condition.beta_m=2",
          "condition.a=1", "condition.clean_probability=0.1", "world.num_pairs=4")  # fmt: skip
    t, image, level = (torch.cat(part) for part in zip(*seen, strict=True))
    margin = image[:, :4]  # background everywhere in a clean image
    if kind == "clean":
        assert (level == 0).all() and (margin == -1).all()
        return
    clean = (level == 0).double().mean()
    assert abs(clean - 0.1) < 5 * (0.09 / len(level)) ** 0.5
    assert (margin[level == 0] == -1).all()
    noised = level > 0
    ratio = (margin[noised] + 1) / level[noised, None]
    assert abs(ratio.var() - 1) < 5 * (2 / ratio.numel()) ** 0.5
    if kind == "constant":
        assert (level[noised] == 2).all()
    else:
        assert level.max() < 2 and level[noised].std() > 0.1
        assert level[noised & (t > 800)].mean() > 5 * level[noised & (t < 200)].mean()


def test_it_learns(tmp_path):
    """An untrained network explains nothing of v; ten in the end explain two fifths of it."""
    run = train(tmp_path, "run.steps=100", "run.save_every=null", "run.batch_size=64",
                "model.width=64", "lr=3e-3")  # fmt: skip
    losses = [line["denoiser/loss"] for line in losses_of(run)]
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]


def test_mistakes_are_told_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError) as caught:
        prepare("configs/demo/i2v.yaml", ["condition.kind=naive", "world.num_pairs=2000"])
    assert len(caught.value.messages) == 2
    assert any("clean" in message for message in caught.value.messages)
