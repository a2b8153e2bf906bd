"""The image that networks see while sampling, blurred early and sharp late."""

import pytest
import torch
from diffusers import DiffusionPipeline
from scipy.ndimage import gaussian_filter
from test_video_start import call
from tiny_video_pipelines import tiny_cogvideox, tiny_svd, tiny_wan
from torch import Tensor

from diffdiv.low_pass import low_pass_image
from diffdiv.models.video import VideoCodec

SIZES = {"svd": (3, 16, 16), "wan": (5, 32, 32), "cogvideox": (5, 64, 64)}
MAKE = {"svd": tiny_svd, "wan": tiny_wan, "cogvideox": tiny_cogvideox}


def images_seen(pipe: DiffusionPipeline, name: str, width: float | None) -> list[Tensor]:
    """The image channels of every step, frames first, of the conditional branch."""
    seen: list[Tensor] = []

    def look(_net: object, given: tuple, named: dict) -> None:
        x_in = given[0] if given else named["hidden_states"]
        x_in = x_in.transpose(1, 2) if name == "wan" else x_in
        seen.append(x_in[-1, :, -VideoCodec(pipe.vae).channels :].float())

    num_frames, height, size = SIZES[name]
    options = {"num_frames": num_frames, "height": height, "width": size}
    net = pipe.unet if name == "svd" else pipe.transformer
    if width is None:
        hook = net.register_forward_pre_hook(look, with_kwargs=True)
        call(pipe, name, num_inference_steps=3, **options)
    else:
        with low_pass_image(pipe, width):
            hook = net.register_forward_pre_hook(look, with_kwargs=True)  # behind the blur
            call(pipe, name, num_inference_steps=3, **options)
    hook.remove()
    return seen


@pytest.mark.parametrize("name", MAKE)
def test_images_are_blurred_early_and_sharp_late(name: str) -> None:
    pipe = MAKE[name]()
    pipe.set_progress_bar_config(disable=True)
    plain, blurred = images_seen(pipe, name, None), images_seen(pipe, name, 1.7)
    assert len(plain) == len(blurred)
    distance = [float((a - b).norm() / a.norm()) for a, b in zip(plain, blurred, strict=True)]
    assert 0 <= distance[-1] < distance[0]
    if name == "svd":  # ends at tau = 0
        assert distance[-1] < 1e-5
    tau = {"svd": 1.0}.get(name, 0.999)  # the first time, an index of 1000
    image = plain[0].numpy()
    wanted = gaussian_filter(image, 1.7 * tau**2, axes=(-2, -1), mode="reflect", truncate=8)
    torch.testing.assert_close(blurred[0], torch.from_numpy(wanted), rtol=0, atol=1e-4)
    assert distance[0] > 0.02, "something was there to be blurred"
    after = images_seen(pipe, name, None)
    assert torch.equal(after[0], plain[0]), "nothing is left behind"
    assert torch.equal(images_seen(pipe, name, 0.0)[0], plain[0])


def test_other_pipelines_and_bad_widths_are_told() -> None:
    with pytest.raises(ValueError, match="DiffusionPipeline: the image of Stable"):
        with low_pass_image(DiffusionPipeline()):
            pass
    with pytest.raises(ValueError, match="width -1"):
        with low_pass_image(tiny_svd(), -1.0):
            pass
