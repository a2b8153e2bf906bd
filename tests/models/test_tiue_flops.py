"""FLOPs of encoder and decoder of the real U-Nets, counted on shapes alone."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from diffdiv.models.architectures import ARCHITECTURES
from diffdiv.models.shared_encoder import SharedEncoder

# forward in GFLOP, share of the encoder, TiUE / forward and / 4 forwards, as docs/tiue.md has them;
# the shares were counted apart, module by module
TABLE = {
    "sd15": (803.3, 0.3255, 3.02, 0.756),
    "sd21": (804.3, 0.3256, 3.02, 0.756),
    "sdxl": (6761.2, 0.4338, 2.70, 0.675),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
@torch.no_grad()
def test_what_a_tiue_image_costs(name: str) -> None:
    with torch.device("meta"):
        net = UNet2DConditionModel.from_config(dict(ARCHITECTURES[name].unet)).half()
        size, width = net.config.sample_size, net.config.cross_attention_dim
        half = {"dtype": torch.half}
        given = {
            "sample": torch.empty(1, 4, size, size, **half),
            "encoder_hidden_states": torch.empty(1, 77, width, **half),
        }
        if name == "sdxl":
            pooled, ids = torch.empty(1, 1280, **half), torch.empty(1, 6, **half)
            given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        counts = []
        for network in (net, SharedEncoder(net, (999, 749, 499, 249))):
            with FlopCounterMode(display=False) as counter:
                network(timestep=999, **given)
            counts.append(counter.get_total_flops() / 1e9)
    forward, tiue = counts
    encoder = forward - (tiue - forward) / 3  # three decoders more than the forward has
    found = (forward, encoder / forward, tiue / forward, tiue / (4 * forward))
    assert found == pytest.approx(TABLE[name], rel=2e-3)
