"""AdamW with 8-bit moments: close to AdamW, saved and resumed bit for bit."""

import builtins

import pytest
import torch
from test_run import content, difference, interrupted, trained
from torch import nn
from torch.nn.functional import mse_loss

from diffdiv.runtime.config import OptimizerConfig
from diffdiv.runtime.optimizer import make_optimizer


@pytest.fixture
def eager(monkeypatch):
    """torchao compiles its step; without a compiler at work the same sums are made one by one."""
    pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def fit(config: OptimizerConfig) -> tuple[list[float], torch.optim.Optimizer, nn.Module]:
    """Losses of 60 steps on a fixed regression with two layers of 64 x 64 weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    x = torch.randn(256, 64)
    y = torch.tanh(x @ torch.randn(64, 64) / 8)
    optimizer, losses = make_optimizer(net.parameters(), 3e-3, config), []
    for _ in range(60):
        loss = mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer, net


@pytest.mark.filterwarnings("ignore")
def test_its_trajectory_stays_near_that_of_adamw(eager):
    full, _, net = fit(OptimizerConfig())
    small, optimizer, other = fit(OptimizerConfig(eight_bit=True))
    assert full[-1] < 0.2 * full[0]
    assert small == pytest.approx(full, rel=0.1)
    codes = [optimizer.state[p]["exp_avg"].codes for p in other.parameters() if p.ndim == 2]
    assert all(c.dtype == torch.uint8 for c in codes)
    assert not torch.equal(net[0].weight, other[0].weight)


@pytest.mark.filterwarnings("ignore")
def test_interrupted_run_continues_bit_for_bit(eager, tmp_path):
    shape = {"width": 1024, "optimizer": {"eight_bit": True}, "steps": 3}
    trained(tmp_path / "whole", **shape)
    interrupted(tmp_path / "parts", 5, **shape)
    trained(tmp_path / "parts", **shape)
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert difference(whole[0], parts[0]) == 0 and whole[1] == parts[1]
    assert whole[0]["disc.optimizer/0.2.weight|exp_avg.codes"].dtype == torch.uint8


def test_a_missing_package_is_one_sentence(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"torchao is not installed \(pip install 'diffdiv\[mem"):
        make_optimizer(nn.Linear(2, 2).parameters(), 1e-3, OptimizerConfig(eight_bit=True))
