"""Image distances against closed forms, torchmetrics and clean-fid, without Inception weights."""

import json
import pickle
from importlib.metadata import version

import pytest
import torch
from tiny_clip import write_clip
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPModel, CLIPProcessor

from diffdiv.metrics import images as module
from diffdiv.metrics.card import metric_card, write_evaluation
from diffdiv.metrics.clip import clip_score
from diffdiv.metrics.frechet import frechet_distance
from diffdiv.metrics.images import image_metrics


class Extractor(nn.Module):
    """A fixed random map of uint8 images to 12 features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 12), nn.Tanh())

    @torch.no_grad()
    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return self.net(x.float() / 255)


def draw(num: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.5 * torch.randn(num, 3, 8, 8, generator=generator) + shift).clamp(-1, 1)


def test_agreement_with_torchmetrics_and_clean_fid():
    real, fake, extractor = draw(300, 0), draw(200, 1, 0.2), Extractor()
    found = image_metrics(real.split(64), fake.split(50), inception=extractor, cross_check=True)
    reference = FrechetInceptionDistance(feature=extractor, input_img_size=(3, 8, 8))
    reference.update(((real + 1) * 127.5).round().to(torch.uint8), real=True)
    reference.update(((fake + 1) * 127.5).round().to(torch.uint8), real=False)
    assert found["frechet_distance"] == pytest.approx(float(reference.compute()), rel=1e-4)
    assert found["frechet_distance_clean_fid"] == pytest.approx(found["frechet_distance"], rel=1e-6)
    assert "fid" not in found and "kid" not in found


def test_kernel_distance_is_the_unbiased_cubic_mmd():
    real, fake, extractor = draw(80, 0), draw(80, 1, 0.2), Extractor()
    x, y = (extractor(((v + 1) * 127.5).round().to(torch.uint8)).double() for v in (real, fake))

    def kernel(a, b):
        return (a @ b.T / 12 + 1) ** 3

    off_diagonal = sum(float(kernel(v, v).sum() - kernel(v, v).trace()) for v in (x, y))
    expected = off_diagonal / (80 * 79) - 2 * float(kernel(x, y).mean())
    found = image_metrics([real], [fake], inception=extractor)
    assert found["kernel_distance"] == pytest.approx(expected, rel=1e-4)


def test_equal_sets_are_at_no_distance_and_a_constant_shift_at_its_square():
    x0, extractor = draw(100, 2), Extractor()
    found = image_metrics([x0], [x0], inception=extractor)
    assert abs(found["frechet_distance"]) < 1e-6
    assert found["precision"] == found["recall"] == 1

    def mean_colour(x):
        return x.float().mean((2, 3))

    grey = torch.full((50, 3, 4, 4), -1.0) + draw(50, 3).mean((1, 2, 3), keepdim=True).abs()
    moved = grey + 100 / 127.5
    found = image_metrics([grey], [moved], inception=mean_colour)
    # uint8 rounds both sides alike: 100 levels in each of three colours
    assert found["frechet_distance"] == pytest.approx(3 * 100**2, rel=1e-3)


def test_precision_and_recall_see_dropped_and_invented_modes():
    def mean_colour(x):
        return x.float().mean((2, 3))

    levels = torch.linspace(-1, 1, 40)
    left = (levels / 5 - 0.8).view(40, 1, 1, 1).expand(40, 3, 2, 2)
    right = (levels / 5 + 0.8).view(40, 1, 1, 1).expand(40, 3, 2, 2)
    both = torch.cat([left, right])
    dropped = image_metrics([both], [left], inception=mean_colour)
    assert dropped["precision"] == 1 and dropped["recall"] == pytest.approx(0.5, abs=0.05)
    invented = image_metrics([left], [both], inception=mean_colour)
    assert invented["recall"] == 1 and invented["precision"] == pytest.approx(0.5, abs=0.05)


def test_grey_images_and_batch_sizes_do_not_matter():
    x0, other, extractor = draw(40, 4)[:, :1], draw(40, 5)[:, :1], Extractor()
    whole = image_metrics([x0], [other], inception=extractor)
    parts = image_metrics(x0.split(7), iter(other.split(13)), inception=extractor)
    assert parts == pytest.approx(whole, rel=1e-5)
    rgb = image_metrics([x0.expand(-1, 3, -1, -1)], [other], inception=extractor)
    assert rgb == pytest.approx(whole)
    with pytest.raises(ValueError, match="too few"):
        image_metrics([x0[:3]], [other], inception=extractor)


def test_without_the_right_weights_nothing_is_called_fid(tmp_path):
    x0 = [draw(5, 0)]
    with pytest.raises(FileNotFoundError, match=r"weights-inception.*Apache-2\.0"):
        image_metrics(x0, x0, inception=tmp_path / "absent.pth")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        image_metrics(x0, x0, inception=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_inception_route_is_torch_fidelitys(tmp_path, monkeypatch):
    """With random weights in place of the published ones, whose hash is then expected instead."""
    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        # the extractor loads weights while it is made; let it keep its random ones
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patched.setattr(torch, "load", lambda *args, **options: {})
        random = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="x")
    path = tmp_path / "weights.pth"
    torch.save(random.state_dict(), path)
    monkeypatch.setattr(module, "INCEPTION_SHA256", module.file_sha256(path))
    real, fake = draw(6, 0), draw(6, 1)
    found = image_metrics([real], [fake], inception=path)
    features = [
        random(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))[0] for x in (real, fake)
    ]
    assert found["fid"] == pytest.approx(frechet_distance(*features), rel=1e-4)
    assert set(found) == {"fid", "kid", "precision", "recall"}


@pytest.fixture
def clip(tmp_path):
    path = write_clip(tmp_path / "clip")
    return path, CLIPModel.from_pretrained(path).eval(), CLIPProcessor.from_pretrained(path)


def test_clip_score_is_the_clipped_cosine(clip):
    path, model, processor = clip
    x0 = draw(70, 6).repeat(1, 1, 2, 2)
    prompts = ["a red seven on white"[: 3 + i % 18] for i in range(70)]
    cosines = []
    for image, prompt in zip(x0, prompts, strict=True):
        uint8 = ((image + 1) * 127.5).round().to(torch.uint8)
        inputs = processor(text=[prompt], images=[uint8], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits_per_image / model.logit_scale.exp()
        cosines.append(max(0.0, float(logits)))
    assert clip_score(x0, prompts, path) == pytest.approx(100 * sum(cosines) / 70, rel=1e-4)
    with pytest.raises(ValueError, match="70 images, but 1 prompts"):
        clip_score(x0, ["a"], path)


def test_clip_weights_are_asked_for_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"clip-vit-large-patch14 \(MIT\)"):
        clip_score(draw(1, 0), ["a"], tmp_path)


def test_card_and_evaluation_file(tmp_path):
    (tmp_path / "weights").write_bytes(b"abc")
    card = metric_card(
        n=10,
        seed=0,
        features="judge",
        device="cpu",
        command="diffdiv evaluate x",
        weights=tmp_path / "weights",
    )
    # sha256 of "abc" as FIPS 180-2 gives it
    assert card["weights_sha256"].startswith("ba7816bf8f01cfea414140de5dae2223")
    rows = [{"name": "student", "network_evaluations": 1, "metrics": {"a": 0.5}}]
    path = write_evaluation(tmp_path, rows, card)
    stored = json.loads(path.read_text())
    assert stored["rows"] == rows and stored["card"]["versions"]["torch"] == version("torch")
    rows[0]["metrics"]["a"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_evaluation(tmp_path, rows, card)
    assert json.loads(path.read_text()) == stored
