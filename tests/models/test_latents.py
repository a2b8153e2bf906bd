"""Images and latents: the VAEs of all families against diffusers' own image-to-image arithmetic."""

import json
from pathlib import Path

import pytest
import torch
from builders import tiny_stable_diffusion
from diffusers import AutoencoderDC, AutoencoderKL
from tiny_pipelines import write_pipeline
from torch import Tensor

from diffdiv.data.cache import fingerprint
from diffdiv.models.backbones import (
    LatentCodec,
    checkpoint_blocks,
    load_denoiser,
    stored_shape,
)

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sana_has_a_point_for_a_posterior(tmp_path: Path) -> None:
    folder = write_pipeline("sana", tmp_path)
    codec, vae = LatentCodec(folder, CPU), AutoencoderDC.from_pretrained(folder / "vae")
    images = draw(3, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        expected = vae.encode(images).latent * vae.config.scaling_factor
        found = [codec.encode(images, draw(3, 4, 8, 8, seed=seed)) for seed in (1, 2)]
        back = vae.decode(expected / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert vae.config.scaling_factor == 0.4 and codec.latent_shape(16) == (4, 8, 8)
    assert torch.allclose(found[0], expected, atol=1e-6) and torch.equal(*found)
    assert torch.allclose(codec.decode(expected), back, atol=1e-5)
    mean, std = codec.posterior(images)
    assert torch.allclose(codec.draw(mean, std, draw(3, 4, 8, 8)), expected, atol=1e-6)
    assert not std.any() and fingerprint(folder / "vae")


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_posteriors_are_shifted_and_scaled(kind: str, tmp_path: Path) -> None:
    folder = tiny_stable_diffusion(tmp_path) if kind == "sd" else write_pipeline(kind, tmp_path)
    codec, vae = LatentCodec(folder, CPU), AutoencoderKL.from_pretrained(folder / "vae")
    images, eps = draw(2, 3, 16, 16).clamp(-1, 1), draw(2, 4, 8, 8, seed=1)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    shift = vae.config.shift_factor or 0.0
    assert (shift > 0) == (kind == "sd3")
    expected = (posterior.mean + posterior.std * eps - shift) * vae.config.scaling_factor
    assert torch.allclose(codec.encode(images, eps), expected, atol=1e-6)


def test_another_vae_is_refused(tmp_path: Path) -> None:
    folder = tiny_stable_diffusion(tmp_path)
    (folder / "vae/config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="vae: VQModel is not one of AutoencoderKL, AutoencoderDC"):
        LatentCodec(folder, CPU)


def test_flux_is_as_large_as_its_vae_says(tmp_path: Path) -> None:
    """Its network names no size, and the schedule depends on the number of patches."""
    folder = write_pipeline("flux", tmp_path)
    small = load_denoiser(folder)
    assert stored_shape(folder) == (4, 8, 8)
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"sample_size": 256}))
    large = load_denoiser(folder)
    assert stored_shape(folder) == (4, 128, 128)
    middle = torch.tensor([0.5])
    assert float(large.schedule.sample_t(middle)) > float(small.schedule.sample_t(middle))
    assert stored_shape(write_pipeline("sd3", tmp_path / "sd3")) == (4, 8, 8)


def decoded(vae: AutoencoderKL) -> tuple[Tensor, Tensor, int]:
    """An image, the gradient of its square in the latent, and the bytes kept for it."""
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.nbytes)
        return x

    latent = draw(1, 4, 8, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        image = vae.decode(latent).sample
    (gradient,) = torch.autograd.grad(image.square().sum(), latent)
    return image.detach(), gradient, sum(kept)


def test_a_checkpointed_decoder_keeps_less_and_has_the_same_gradient(tmp_path: Path) -> None:
    folder = tiny_stable_diffusion(tmp_path)
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    image, gradient, much = decoded(vae)
    checkpoint_blocks(vae.decoder)
    again, same, little = decoded(vae)
    assert torch.equal(image, again) and torch.equal(gradient, same)
    assert little < 0.6 * much
