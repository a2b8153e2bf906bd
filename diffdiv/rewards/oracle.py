"""Trained oracles: networks that predict activities from sequences, and rewards made of them.

x         one-hot or soft sequences [B, L, 4]
D         outputs: activities, or the logit of one class against another
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from diffdiv.models.enformer import EnformerTrunk
from diffdiv.rewards.sequences import SequenceReward


class SequenceOracle(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' bases disagree
    """Two convolutions, maximum and mean over places, one linear layer; the same for both strands.

    No batch normalisation, so a sequence's value does not depend on its neighbours. Sequences of
    any length from 4 on.

    Args:
        num_outputs: D.
        width: filters of the first layer; the second has half as many.
        kernel: odd size of the first filters, about a motif long.
        dropout: in training, before the linear layer.
        classes: (what a low output means, a high one), or None for measured activities.
        shift, scale: outputs are shift + scale * (linear layer), [D] each; None = 0 and 1.
    """

    @register_to_config
    def __init__(
        self,
        num_outputs: int = 1,
        width: int = 96,
        kernel: int = 15,
        dropout: float = 0.0,
        classes: Sequence[str] | None = None,
        shift: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel: {kernel} is not odd")
        self.conv1 = nn.Conv2d(4, width, (1, kernel), padding=(0, kernel // 2))
        self.conv2 = nn.Conv2d(width, width // 2, (1, 5), padding=(0, 2))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * (width // 2), num_outputs)
        # not buffers: loading by way of the meta device would lose what is in no file
        self._shift, self._scale = shift or [0.0] * num_outputs, scale or [1.0] * num_outputs

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, D]; the mean of both strands."""
        both = _both_strands(x).to(self.head.weight.dtype)
        features = relu(self.conv1(both.transpose(1, 2).unsqueeze(2)))
        features = relu(self.conv2(max_pool2d(features, (1, 4)))).squeeze(2)
        pooled = torch.cat([features.amax(2), features.mean(2)], 1)
        return _in_unit(self.head(self.drop(pooled)), self._shift, self._scale)


class EnformerOracle(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as above
    """Mean over the places of an Enformer trunk, one linear layer; the same for both strands.

    DRAKES' oracle of enhancer activity (arXiv 2410.13643) with the mean of both strands, which the
    trunk by itself tells apart. A sequence's value does not depend on its neighbours.

    Args:
        num_outputs: D.
        channels, num_conv, num_transformer, heads, key_size, divisor, dropout: of the trunk.
        classes, shift, scale: as of :class:`SequenceOracle`.
    """

    @register_to_config
    def __init__(
        self,
        num_outputs: int = 1,
        channels: int = 1536,
        num_conv: int = 7,
        num_transformer: int = 11,
        heads: int = 8,
        key_size: int = 64,
        divisor: int = 128,
        dropout: float = 0.0,
        classes: Sequence[str] | None = None,
        shift: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.trunk = EnformerTrunk(
            channels, num_conv, num_transformer, heads, key_size, divisor, dropout
        )
        self.head = nn.Linear(2 * channels, num_outputs)
        self._shift, self._scale = shift or [0.0] * num_outputs, scale or [1.0] * num_outputs

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, D]; the mean of both strands."""
        features = self.trunk(_both_strands(x)).mean(1)
        return _in_unit(self.head(features), self._shift, self._scale)


#: what train/oracle.py makes
Oracle = SequenceOracle | EnformerOracle


def _both_strands(x: Tensor) -> Tensor:
    """[B, L, 4] -> [2 B, L, 4], the reverse complements last."""
    return torch.cat([x, x.flip(1, 2)])


def _in_unit(outputs: Tensor, shift: Sequence[float], scale: Sequence[float]) -> Tensor:
    """Linear outputs [2 B, D] of both strands -> [B, D] in the unit of the measurements."""
    forward, backward = outputs.chunk(2)
    mean = (forward + backward) / 2
    return mean.new_tensor(shift) + mean.new_tensor(scale) * mean


def load_oracle(folder: Path) -> Oracle:
    """The frozen oracle of a folder that train/oracle.py wrote.

    Raises:
        ValueError: if there is none.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no config.json there, so it is no oracle (train/oracle.py)")
    name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    kind = {one.__name__: one for one in (SequenceOracle, EnformerOracle)}.get(name)
    if kind is None:
        raise ValueError(f"{folder}: holds a {name}, which is no oracle (train/oracle.py)")
    oracle: Oracle = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return oracle.eval().requires_grad_(False)


def oracle_reward(
    oracle: Oracle, *, output: int = 0, bound: float | None = None, name: str = "oracle"
) -> SequenceReward:
    """One output of an oracle as a reward.

    Args:
        oracle: frozen, on the device of the sequences.
        output: which one, 0..D-1.
        bound: None, or the reward is bound * tanh(output / bound): a logit that has been driven far
            out of the data counts no more than ``bound``.
        name: in reports and errors.

    Raises:
        ValueError: if there is no such output, or ``bound`` is not positive.
    """
    count = int(oracle.config["num_outputs"])
    if not 0 <= output < count or (bound is not None and not bound > 0):
        raise ValueError(f"output, bound: {output}, {bound} are not in 0..{count - 1} and positive")

    def reward(x: Tensor) -> Tensor:
        value: Tensor = oracle(x)[:, output]
        return value if bound is None else bound * (value / bound).tanh()

    return SequenceReward(name, reward, bounds=None if bound is None else (-bound, bound))
