"""Rewards opened from settings: the user's own code and entry points; torchmetrics' CLIP score."""

import sys

import pytest
import torch
from tiny_clip import write_clip
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPModel, CLIPProcessor

from diffdiv.rewards.clip import clip_score_reward
from diffdiv.rewards.weighted import WeightedRewards
from diffdiv.rewards.zoo import open_image_rewards
from diffdiv.runtime.reward_config import IMAGE_REWARDS, RewardConfig

CPU = torch.device("cpu")


class TensorFeatures(CLIPModel):
    """transformers 5 returns features in an object; torchmetrics 1.9 wants the tensor."""

    def get_image_features(self, pixel_values):
        return super().get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids, attention_mask):
        return super().get_text_features(input_ids, attention_mask).pooler_output


def lively_clip(folder):
    """Scores from 40 to 60: a model as it is made says nearly the same of all pictures."""
    write_clip(folder)
    model, generator = CLIPModel.from_pretrained(folder), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(0, 0.3, generator=generator)
    model.visual_projection.weight.data.neg_()
    model.save_pretrained(folder)
    return folder


def test_clip_score_agrees_with_torchmetrics(tmp_path):
    """8-bit pictures of another size; 100 max(cosine, 0) of each within 1 % of ours."""
    folder = lively_clip(tmp_path)
    coarse = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    images = torch.nn.functional.interpolate(coarse, (40, 56), mode="bicubic").clamp(0, 1) * 2 - 1
    prompts = ["a red seven", "two on white", "a cat", "x", "a blue one", "nine nine"]
    ours = clip_score_reward(folder, CPU)(images, prompts)
    assert float(ours.min()) > 5 and float(ours.std()) > 5

    def models():
        return TensorFeatures.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)

    theirs, bytes_ = CLIPScore(models), ((images + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        found = [float(theirs(*pair)) for pair in zip(bytes_, prompts, strict=True)]
    torch.testing.assert_close(ours, torch.tensor(found), rtol=0.01, atol=0)
    assert float(theirs.compute()) == pytest.approx(float(ours.mean()), rel=0.01)


def test_the_clip_loss_is_a_clip_score_with_a_ceiling(tmp_path):
    """scale 0.001, ceiling 50: the gradient of 0.1 relu(0.5 - cosine), sample by sample."""
    folder = lively_clip(tmp_path)
    settings = RewardConfig(path=folder, scale=0.001, ceiling=50.0)
    rewards = WeightedRewards(
        open_image_rewards({"clip_score": settings}, CPU), lambda x: x, seed=0
    )
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    images.requires_grad_()
    prompts = ["a red seven", "two on white", "a cat", "x", "a blue one", "nine nine"]
    cosine = clip_score_reward(folder, CPU)(images, prompts) / 100
    gap = 0.5 - cosine
    assert 0 < int((gap > 0).sum()) < 6  # the mean would be clamped as one
    (wanted,) = torch.autograd.grad((0.1 * gap.relu()).mean(), images)
    total, _ = rewards(images, prompts, range(6))
    (found,) = torch.autograd.grad(-total.mean(), images)
    torch.testing.assert_close(found, wanted)


def test_every_name_opens_and_says_what_it_misses(tmp_path):
    for name in IMAGE_REWARDS:
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            open_image_rewards({name: RewardConfig(path=tmp_path, colour="red")}, CPU)
    with pytest.raises(ValueError, match="'nothing' is not among aesthetic"):
        open_image_rewards({"nothing": RewardConfig(path=tmp_path)}, CPU)


def test_a_reward_of_the_users_own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def redness(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    settings = RewardConfig(file=f"{file}:redness", allow_code=True, scale=3.0, ceiling=0.5)
    (found,) = open_image_rewards({"redness": settings, "pickscore": None}, CPU)
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(found.reward(images, ["a", "b"]), images[:, 0].mean((1, 2)))
    assert (found.reward.name, found.scale, found.ceiling) == ("redness", 3.0, 0.5)
    with pytest.raises(ValueError, match="has no function 'blueness'"):
        settings = RewardConfig(file=f"{file}:blueness", allow_code=True)
        open_image_rewards({"blueness": settings}, CPU)


def test_a_reward_of_an_installed_package(tmp_path, monkeypatch):
    """A package on the path, with metadata as an installer writes it."""
    (tmp_path / "some_package.py").write_text(
        "def blueness(images, prompts):\n    return images[:, 2].mean((1, 2))\n"
    )
    info = tmp_path / "some_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diffdiv.rewards]\nblueness = some_package:blueness\n")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = open_image_rewards({"blueness": RewardConfig()}, CPU)
    assert float(found.reward(torch.ones(1, 3, 2, 2), ["a"])) == 1.0
    sys.modules.pop("some_package")
