"""Rewards of images on a tiny random CLIP and on the embedded judge."""

from itertools import pairwise

import pytest
import torch
from builders import tiny_stable_diffusion
from safetensors.torch import load_file, save_file
from tiny_clip import write_clip
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPModel, CLIPProcessor

from diffdiv.data.digits import PromptedDigits
from diffdiv.metrics.judge import load_judge
from diffdiv.models.backbones import LatentCodec
from diffdiv.resources import resource
from diffdiv.rewards.clip import (
    aesthetic_reward,
    clip_score_reward,
    hpsv2_reward,
    pickscore_reward,
)
from diffdiv.rewards.images import ImageReward, check_image_reward
from diffdiv.rewards.sequences import RewardError
from diffdiv.rewards.zoo import judge_reward

CPU = torch.device("cpu")
PROMPTS = ["a red seven", "two on white", "a cat"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP whose folder also holds an aesthetic predictor."""
    folder = write_clip(tmp_path_factory.mktemp("clip"), projection=768)
    sizes, weights = (768, 1024, 128, 64, 16, 1), {}
    generator = torch.Generator().manual_seed(1)
    for n, (inner, outer) in enumerate(pairwise(sizes)):
        weights[f"layers.{2 * n}.weight"] = torch.randn(outer, inner, generator=generator) / 10
        weights[f"layers.{2 * n}.bias"] = torch.randn(outer, generator=generator)
    save_file(weights, folder / "aesthetic.safetensors")
    return folder


def smooth_pictures(size=48):
    """Pictures that resizing does not alias: sums of few waves."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(3, 3, 6, 6, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1)


BY_COSINE = {clip_score_reward: 100, pickscore_reward: None, hpsv2_reward: 1}


@pytest.mark.parametrize("make", BY_COSINE, ids=lambda f: f.__name__)
def test_value_is_that_of_the_plain_route(clip, make):
    """8-bit pictures through the model's own processor: the cosine differs by less than 0.01."""
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    images = smooth_pictures()
    pictures = [to_pil_image(((x + 1) * 127.5).round().to(torch.uint8)) for x in images]
    inputs = processor(text=PROMPTS, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    cosine = (out.image_embeds * out.text_embeds).sum(1)
    scale = BY_COSINE[make] or float(model.logit_scale.detach().exp())
    found = make(clip, CPU)(images, PROMPTS)
    torch.testing.assert_close(found, scale * cosine, rtol=0, atol=0.01 * scale)


def test_the_aesthetic_value_is_that_of_the_plain_route(clip):
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    pictures = [to_pil_image(((x + 1) * 127.5).round().to(torch.uint8)) for x in smooth_pictures()]
    weights, reward = load_file(clip / "aesthetic.safetensors"), aesthetic_reward(clip, CPU)
    with torch.no_grad():
        inputs = processor(images=pictures, return_tensors="pt")
        x = model.get_image_features(**inputs).pooler_output
        x = x / x.norm(dim=1, keepdim=True)
        for n in range(0, 10, 2):
            x = x @ weights[f"layers.{n}.weight"].T + weights[f"layers.{n}.bias"]
    torch.testing.assert_close(reward(smooth_pictures(), PROMPTS), x[:, 0], rtol=0.01, atol=0)


@pytest.mark.parametrize("make", [*BY_COSINE, aesthetic_reward], ids=lambda f: f.__name__)
def test_gradient_reaches_the_latent_and_is_right(clip, tmp_path, make):
    """Through the VAE; against a central difference along the gradient."""
    reward = make(clip, CPU)
    check_image_reward(reward, 16, PROMPTS[0], CPU)
    codec = LatentCodec(tiny_stable_diffusion(tmp_path), CPU)
    latent = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def value(x):
        return reward(codec.decode_with_gradient(x), PROMPTS).double().sum()

    leaf = latent.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    direction, h = gradient / gradient.norm(), 0.03
    with torch.no_grad():
        slope = (value(latent + h * direction) - value(latent - h * direction)) / (2 * h)
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_saturated_pixels_can_still_move(clip):
    images = torch.full((1, 3, 16, 16), 1.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(clip_score_reward(clip, CPU)(images, ["a"]).sum(), images)
    assert bool(gradient.any())


def test_the_judge_rewards_what_a_prompt_leaves_open():
    folder = resource("assets/embedded_judge")
    reward = judge_reward(folder, CPU, {"colour": "red"})
    batch = PromptedDigits("test", drop_probability=0.5).batch(range(64))
    found = reward(batch.images, batch.prompts)
    said = batch.mentioned.colour
    assert bool((found[said >= 0] == 0).all())
    log_p = torch.log_softmax(load_judge(folder)(batch.images)["colour"], 1)[:, 0]
    torch.testing.assert_close(found[said < 0], log_p[said < 0])
    red, other = (said < 0) & (batch.shown.colour == 0), (said < 0) & (batch.shown.colour > 0)
    assert found[red].mean() > -0.1 and found[other].mean() < -3
    with pytest.raises(ValueError, match="beige"):
        judge_reward(folder, CPU, {"colour": "beige"})


FAULTY = {
    "raises": (lambda x, p: x.nope, "raised AttributeError"),
    "shape": (lambda x, p: x.mean(), "not a tensor"),
    "nan": (lambda x, p: x.flatten(1).mean(1) / 0, "not finite"),
    "cut": (lambda x, p: x.detach().flatten(1).mean(1).requires_grad_(), "no usable gradient"),
    "batch": (lambda x, p: x.flatten(1).mean(1) - x.mean() + len(x), "depends on the other"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_reward_is_named(name):
    function, message = FAULTY[name]
    with pytest.raises(RewardError, match=f"reward {name}: .*{message}"):
        check_image_reward(ImageReward(name, function), 16, "a", CPU)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no CLIP model there"):
        clip_score_reward(tmp_path, CPU)
    with pytest.raises(FileNotFoundError, match=r"aesthetic\.safetensors"):
        aesthetic_reward(tmp_path, CPU)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"hpsv2_1\.safetensors"):
        hpsv2_reward(tmp_path, CPU, name="hpsv2_1")


def test_a_gradient_is_not_asked_of_a_black_box():
    black_box = ImageReward("box", lambda x, p: x.detach().flatten(1).mean(1))
    check_image_reward(black_box, 16, "a", CPU, needs_gradient=False)
    with pytest.raises(RewardError, match="differentiable: false"):
        check_image_reward(black_box, 16, "a", CPU)
