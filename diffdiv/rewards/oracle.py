"""Trained oracles: networks that predict activities from sequences, and rewards made of them.

x         one-hot or soft sequences [B, L, 4]
D         outputs: activities, or the logit of one class against another
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

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
        both = torch.cat([x, x.flip(1, 2)]).to(self.head.weight.dtype)
        features = relu(self.conv1(both.transpose(1, 2).unsqueeze(2)))
        features = relu(self.conv2(max_pool2d(features, (1, 4)))).squeeze(2)
        pooled = torch.cat([features.amax(2), features.mean(2)], 1)
        forward, backward = self.head(self.drop(pooled)).chunk(2)
        mean = (forward + backward) / 2
        return mean.new_tensor(self._shift) + mean.new_tensor(self._scale) * mean


def load_oracle(folder: Path) -> SequenceOracle:
    """The frozen oracle of a folder that train/oracle.py wrote.

    Raises:
        ValueError: if there is none.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there, so it is no oracle (train/oracle.py)")
    oracle = SequenceOracle.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return oracle.eval().requires_grad_(False)


def oracle_reward(
    oracle: SequenceOracle, *, output: int = 0, bound: float | None = None, name: str = "oracle"
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
