"""Zero-shot evaluation on captioned images: what is asked, what is kept, what is measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_stable_diffusion
from PIL import Image
from tiny_clip import write_clip
from tiny_pipelines import write_pipeline
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPModel, CLIPProcessor

from diffdiv import evaluate_captions as module
from diffdiv import evaluate_images
from diffdiv.api import prepare
from diffdiv.cli import main
from diffdiv.data.captions import CaptionedImages
from diffdiv.evaluate import evaluate_path
from diffdiv.evaluate_captions import Protocol, evaluate_captions
from diffdiv.export import export_run
from diffdiv.metrics import images as metrics
from diffdiv.metrics.card import file_sha256
from diffdiv.metrics.frechet import frechet_distance
from diffdiv.runtime.student import open_run
from diffdiv.schedulers import flow_scheduler

WORDS = "one two three four five six seven eight nine ten".split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of 40x20 pixels with three captions each."""
    folder = tmp_path_factory.mktemp("coco")
    rows = []
    for number, word in enumerate(WORDS):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        for way in ("a", "the", "some"):
            rows.append({"file_name": f"{number}.png", "caption": f"{way} {word}"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP model."""
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A short distillation of Stable Diffusion on these pictures."""
    root = tmp_path_factory.mktemp("run")
    items = [
        f"run.folder={root / 'run'}", f"teacher.path={tiny_stable_diffusion(root)}",
        f"data.path={data}", "data.kind=captions", "data.real=data", "run.batch_size=2",
        "run.accumulation=1", "run.steps=2", "run.trackers=[]", "run.device=cpu",
        "run.precision=fp32", "run.sample_every=null", "run.save_every=null",
        "student.ema_half_lives=[8]", "student.lr=1.0e-2", "critic_updates=1", "gan.r1_gamma=0",
    ]  # fmt: skip
    recipe, config = prepare("configs/f_distill/sd.yaml", items)
    recipe.main(config)
    return root / "run"


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for the weights of FID, with a small network in place of Inception."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", file_sha256(path))
    monkeypatch.setattr(metrics, "_inception", lambda path, device: colours)
    return path


def colours(images: Tensor) -> Tensor:
    """Mean colour of the quarters of uint8 images: [B, 12]."""
    assert images.dtype == torch.uint8 and images.shape[1] == 3
    return torch.nn.functional.avg_pool2d(images.float(), images.shape[-1] // 2).flatten(1)


def pixels(folder: Path, number: int) -> Tensor:
    return pil_to_tensor(Image.open(evaluate_images.image_file(folder, number))).int()


def test_a_run_is_marked_as_by_hand(
    run: Path, data: Path, clip: Path, inception: Path, tmp_path: Path
) -> None:
    """Every figure again, from the kept files and other code."""
    protocol = Protocol(data, num=6, seed=3, size=16, batch=4, inception=inception, clip=clip)
    result = evaluate_captions(run, protocol, images=tmp_path / "made", out=tmp_path / "out.json")
    found, folder = result["rows"][0]["metrics"], tmp_path / "made"
    assert len(list(folder.glob("*.png"))) == 6 * 4

    real = CaptionedImages(data, 16, seed=3)
    every = real.read([3 * i for i in range(10)]).images
    made = torch.stack([pixels(folder, i) for i in range(6)]).to(torch.uint8)
    features = [colours(((every + 1) * 127.5).round().to(torch.uint8)), colours(made)]
    assert found["fid"] == pytest.approx(frechet_distance(*features), rel=1e-4)
    assert {"kid", "precision", "recall"} < set(found)

    captions = module.Questions(protocol).captions
    model, words = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    embedded = {}
    for number, caption in captions.items():
        image = Image.open(evaluate_images.image_file(folder, number))
        with torch.no_grad():
            out = model(**words(text=[caption], images=[image], return_tensors="pt"))
        embedded[number] = (out.image_embeds[0], out.text_embeds[0])
    scores = [max(0.0, float(cosine_similarity(*embedded[i], dim=0))) for i in range(6)]
    assert found["clip_score"] == pytest.approx(100 * sum(scores) / 6, abs=2e-3)
    alike = []
    for i in range(6):
        four = [embedded[i + k * 10**7][0] for k in range(4)]
        alike += [float(four[a] @ four[b]) for a in range(4) for b in range(a)]
    assert found["in_batch_similarity"] == pytest.approx(sum(alike) / len(alike), abs=1e-4)
    assert found["in_batch_similarity"] < 1 - 1e-6, "different noise makes different images"

    assert result["rows"][0]["name"] == "student, 1 step"
    card = result["card"]
    assert card["n"] == 6 and card["real_images"] == 10 and card["ema_half_life"] == 8
    assert "--seed 3 --size 16 --batch 4 --dtype fp32" in card["command"]
    written = [
        json.loads(p.read_text()) for p in (folder / "evaluation.json", tmp_path / "out.json")
    ]
    assert written == [result, result] == [json.loads((run / "evaluation.json").read_text())] * 2


def test_captions_are_one_an_image_and_follow_the_seed(data: Path, clip: Path) -> None:
    def asked(num: int, seed: int) -> list[str]:
        questions = module.Questions(Protocol(data, num=num, seed=seed, size=16, clip=clip))
        return [questions.captions[i] for i in range(num)]

    whole = asked(10, 0)
    assert sorted(caption.split()[1] for caption in whole) == sorted(WORDS)
    assert len({caption.split()[0] for caption in whole}) > 1
    assert asked(10, 0) == whole != asked(10, 1)
    assert asked(5, 0) == whole[:5], "a smaller number is the beginning of a larger one"


def test_generation_goes_on_and_does_not_depend_on_the_batch(
    run: Path, data: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(folder: str, batch: int, **more: object) -> dict[str, float]:
        protocol = Protocol(data, num=5, size=16, batch=batch, clip=clip, **more)
        return evaluate_captions(run, protocol, images=tmp_path / folder)["rows"][0]["metrics"]

    whole = evaluate("whole", 7)
    files = sorted(file.name for file in (tmp_path / "whole").glob("*.png"))
    replace, count = evaluate_images._replace, 0

    def dying(path: Path, write: object) -> None:
        nonlocal count
        count += 1
        if count == 9:
            path.with_name(f".{path.name}").write_bytes(b"half an image")
            raise KeyboardInterrupt
        replace(path, write)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate_images, "_replace", dying)
        with pytest.raises(KeyboardInterrupt):
            evaluate("stopped", 3)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "stopped").glob("[!.]*.png")}
    assert len(kept) == 7
    assert evaluate("stopped", 2) == pytest.approx(whole, rel=1e-3)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "made once"
    assert sorted(file.name for file in (tmp_path / "stopped").glob("[!.]*.png")) == files
    for name in files:  # a network rounds differently in another batch
        number = int(name[:8])
        difference = pixels(tmp_path / "whole", number) - pixels(tmp_path / "stopped", number)
        assert difference.abs().max() <= 1
    with pytest.raises(ValueError, match=r"images made with other seed; name another folder"):
        evaluate("stopped", 2, seed=1)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, run: Path) -> dict[str, Path]:
    """Pipelines: one whose steps draw noise from its generator, and one from the global one."""
    root = tmp_path_factory.mktemp("several")
    export_run(run, root / "sd")
    sd3 = write_pipeline("sd3", root / "flow")
    flow_scheduler(1000, 1, 4).save_pretrained(sd3 / "scheduler")
    index = json.loads((sd3 / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchLCMScheduler"]
    (sd3 / "model_index.json").write_text(json.dumps(index))
    return {"export": root / "sd", "noise in between": sd3}


@pytest.mark.parametrize("name", ["export", "noise in between"])
def test_pipelines_are_called_image_by_image(
    several: dict[str, Path], run: Path, name: str, tmp_path: Path
) -> None:
    steps = None if name == "export" else 4
    options = {"seed": 0, "device": CPU, "dtype": "fp32"}
    make = evaluate_images.pipeline_maker(several[name], **options, steps=steps)
    prompts = ["one", "two", "one", "two", "one"]
    together = make.draw(prompts, range(5))
    alone = [make.draw([p], [i])[0] for i, p in enumerate(prompts)]
    apart = [np.abs(np.asarray(a, int) - b).max() for a, b in zip(together, alone, strict=True)]
    assert max(apart) <= 1
    assert np.abs(np.asarray(alone[0], int) - alone[2]).max() > 1, "each has its own noise"
    if name == "export":
        assert make.network_evaluations == 1
        with pytest.raises(ValueError, match="has its own steps and guidance"):
            evaluate_images.pipeline_maker(several[name], **options, guidance=2.0)
        shape = open_run(run, CPU).source.shape
        assert np.asarray(alone[0]).shape == (2 * shape[1], 2 * shape[2], 3)
    else:
        guided = evaluate_images.pipeline_maker(several[name], **options, steps=4, guidance=3.0)
        assert (make.network_evaluations, guided.network_evaluations) == (8, 8)
        plain = evaluate_images.pipeline_maker(several[name], **options, steps=4, guidance=0.0)
        assert plain.network_evaluations == 4


def test_the_command_line(
    several: dict[str, Path], data: Path, clip: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*more: str, path: Path = several["export"]) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["diffdiv", "evaluate", str(path), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    on = ("--data", str(data), "--num", "4", "--size", "16")
    status, _, sentence = call(*on)
    assert status == 1 and "give at least one" in sentence
    status, _, sentence = call(*on, "--inception", "nowhere.pth")
    assert status == 1 and "no such file; FID needs weights-inception" in sentence
    status, _, sentence = call(*on, "--clip", "nowhere")
    assert status == 1 and "clip-vit-large-patch14" in sentence
    status, _, sentence = call(
        "--data", str(data), "--num", "11", "--size", "16", "--clip", str(clip)
    )
    assert status == 1 and "has 10 captioned images" in sentence
    status, _, sentence = call("--steps", "4")
    assert status == 1 and "--steps: only with --data FOLDER" in sentence
    assert not (tmp_path / "evaluation").exists()
    status, text, _ = call(*on, "--clip", str(clip))
    assert status == 0 and "clip_score" in text
    assert (tmp_path / "evaluation" / "sd" / "evaluation.json").is_file()


def test_a_run_on_captions_alone_is_marked_by_clip(run: Path, clip: Path) -> None:
    with pytest.raises(ValueError, match="--clip FOLDER"):
        evaluate_path(run, num=4)
    result = evaluate_path(run, num=4, clip=clip)
    assert [row["name"] for row in result["rows"]][-1] == "student, 1 step"
    assert all(0 <= row["metrics"]["clip_score"] <= 100 for row in result["rows"])
    assert result["card"]["weights_sha256"] == file_sha256(clip / "model.safetensors")


@pytest.mark.slow
def test_with_an_inception_network(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real route, with random weights in place of the published ones."""
    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patched.setattr(torch, "load", lambda *args, **options: {})
        random = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="x")
    path = tmp_path / "weights.pth"
    torch.save(random.state_dict(), path)
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", file_sha256(path))
    protocol = Protocol(data, num=4, size=16, inception=path)
    result = evaluate_captions(run, protocol, images=tmp_path / "made")
    made = torch.stack([pixels(tmp_path / "made", i) for i in range(4)]).to(torch.uint8)
    real = CaptionedImages(data, 16, seed=0).read([3 * i for i in range(10)]).images
    features = [random(x)[0] for x in (((real + 1) * 127.5).round().to(torch.uint8), made)]
    assert result["rows"][0]["metrics"]["fid"] == pytest.approx(
        frechet_distance(*features), rel=1e-4
    )
    assert result["card"]["weights_sha256"] == file_sha256(path)
