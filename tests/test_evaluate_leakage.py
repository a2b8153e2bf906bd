"""Does an image-to-video model leak: seen against unseen clips, by `diffdiv evaluate --leakage`."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from markupsafe import escape
from PIL import Image
from tiny_video_pipelines import saved, tiny_cogvideox, tiny_svd, tiny_wan
from torch import Tensor, nn

from diffdiv import leakage_judge as module
from diffdiv.cli import main
from diffdiv.core.noise import normal
from diffdiv.core.schedule import edm, rectified_flow
from diffdiv.data.video import VideoFolder
from diffdiv.evaluate_leakage import evaluate_leakage
from diffdiv.leakage_clips import (
    Clips,
    Manner,
    OneStep,
    generate_clips,
    one_step,
)
from diffdiv.leakage_judge import (
    Eyes,
    frame_difference,
    judge_clips,
    judge_student,
    student_verdict,
)
from diffdiv.leakage_protocol import Asked
from diffdiv.leakage_verdict import FRACTIONS, ratio, times_at, verdict
from diffdiv.metrics.leakage import leakage_curve
from diffdiv.models.image_to_video import ImageToVideo, open_host
from diffdiv.models.video_calls import svd_schedule

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and ten seen and ten unseen videos of four frames."""
    root = tmp_path_factory.mktemp("world")
    saved(tiny_svd(), root / "svd")
    draw = np.random.default_rng(0)
    for kind in ("seen", "unseen"):
        for number in range(10):
            (root / kind / str(number)).mkdir(parents=True)
            for frame in range(4):
                pixels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / kind / f"{number}/{frame}.png")
    return root


@pytest.fixture(scope="module")
def host(world: Path) -> ImageToVideo:
    return open_host(world / "svd", CPU)


@pytest.fixture
def clips(world: Path) -> Clips:
    return Clips(VideoFolder(world / "seen", num_frames=3, size=(16, 16)), 3, 0)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """Exit status of the command line."""
    monkeypatch.setattr(sys, "argv", ["diffdiv", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_error_and_motion_by_hand(host: ImageToVideo, clips: Clips) -> None:
    """One time, from the stock network's own output and EDM's formulas; any batch size."""
    sigma, level = 100.0, 0.02
    manner = Manner(seed=5, level=level, batch=2)
    found = one_step(host, clips, [sigma], manner=manner)
    frames, _ = clips.read(range(3))
    vae, unet = host.pipe.vae, host.pipe.unet
    noise = normal((3, 16, 16), seed=5, purpose="leakage.image", indices=range(3))
    with torch.no_grad():
        x0 = 0.18215 * vae.encode(frames.flatten(0, 1)).latent_dist.mode().unflatten(0, (3, 3))
        image = vae.encode(frames[:, 0] + level * noise).latent_dist.mode()
        x_t = x0 + sigma * normal(x0.shape[1:], seed=5, purpose="leakage", indices=range(3))
        told = torch.tensor([[6.0, 127.0, level]] * 3)
        tokens = host.embed(frames[:, 0], [""] * 3)["tokens"]
        both = torch.cat([x_t / (sigma**2 + 1) ** 0.5, image[:, None].expand(-1, 3, -1, -1, -1)], 2)
        v = unet(both, 0.25 * torch.tensor(sigma).log(), tokens, told).sample
    x0_hat = x_t / (sigma**2 + 1) - sigma / (sigma**2 + 1) ** 0.5 * v
    error = (x0_hat - x0).square().mean((1, 2, 3, 4))
    motion = (x0_hat[:, 1:] - x0_hat[:, :-1]).square().sum((1, 2, 3, 4))
    torch.testing.assert_close(found.error[:, 0], error.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.motion[:, 0], motion.double(), rtol=1e-4, atol=0)
    copier = (x0 - x0[:, :1]).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(found.copier, copier.double(), rtol=1e-5, atol=0)


class _Copier(nn.Module):
    """A network whose x0 is the unscaled image in every frame, times the scale of the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(()))

    def forward(self, both: Tensor, time: Tensor, **_: object) -> tuple[Tensor]:
        x_in, image = both.chunk(2, 2)
        sigma = (4 * time[0]).exp()
        root = (sigma**2 + 1).sqrt()
        return ((x_in / root - self.x0(0.18215 * image)) * root / sigma,)

    def x0(self, image: Tensor) -> Tensor:
        return image


class _Knowing(_Copier):
    """Has learned clips by heart, and lets every other image move as one of these."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known

    def x0(self, image: Tensor) -> Tensor:
        nearest = (image[:, None, 0] - self.known[None, :, 0]).flatten(2).norm(dim=2).argmin(1)
        return image + self.known[nearest] - self.known[nearest, :1]


def test_a_copier_shows_no_motion(
    host: ImageToVideo, clips: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves, and its error is the copier's, where the first latent is the image's."""
    monkeypatch.setattr(host, "net", _Copier())
    found = one_step(host, clips, [10.0], manner=Manner())
    assert float((found.motion[:, 0] / found.energy).max()) < 1e-6
    torch.testing.assert_close(found.error[:, 0], found.copier, rtol=1e-4, atol=0)


def test_a_leak_is_found_and_only_where_there_is_one(
    host: ImageToVideo, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that knows the seen clips errs twice as much as a copier on others."""
    sets = [
        Clips(VideoFolder(world / kind, num_frames=3, size=(16, 16)), 10, 0)
        for kind in ("seen", "unseen")
    ]
    times = times_at(host.schedule, FRACTIONS)
    known = host.codec.scaled(host.codec.posterior(sets[0].read(range(10))[0])[0])
    said = {}
    for net in (_Copier(), _Knowing(known)):
        monkeypatch.setattr(host, "net", net)
        seen, unseen = (one_step(host, clips, times, manner=Manner(batch=5)) for clips in sets)
        said[type(net)] = verdict(seen, unseen)
    assert said[_Copier][1].startswith("No sign of a leak")
    assert said[_Copier][0]["unseen"] == pytest.approx(1, abs=1e-3)
    figures, sentence = said[_Knowing]
    assert sentence.startswith("It leaks")
    assert figures["seen"] == pytest.approx(0, abs=1e-3)
    assert figures["unseen"] == pytest.approx(2, abs=0.2)  # independent noise clips


def test_means_are_those_of_the_toys_meter(host: ImageToVideo, clips: Clips) -> None:
    """leakage_curve on the same latents and noise, all clips at once."""
    times = [0.5, 50.0]
    found = one_step(host, clips, times, manner=Manner(seed=2))
    frames, captions = clips.read(range(3))
    rows = {"mean": host.codec.posterior(frames)[0], **host.embed(frames[:, 0], captions)}
    x0, y = host.codec.scaled(rows["mean"]), host.image(frames[:, 0], 3)
    denoiser, cond = host.denoiser(host.net, rows, y, torch.zeros(3))
    bound = replace(denoiser, call=lambda net, x, t, _: denoiser.call(net, x, t, cond))
    for k, point in enumerate(leakage_curve(lambda _: bound, x0, frames[:, 0], times, seed=2)):
        assert float(found.error[:, k].mean()) == pytest.approx(point.error, rel=1e-4)
        assert ratio(found.motion[:, k], found.energy)[0] == pytest.approx(point.motion, rel=1e-4)


def test_standard_error_of_a_ratio() -> None:
    """Against the scatter of 4000 repetitions; its own scatter is about 1 %, allowed are 8 %."""
    draw = torch.Generator().manual_seed(0)
    bottom = 1 + 3 * torch.rand(4000, 50, generator=draw, dtype=torch.float64)
    top = 0.5 * bottom + 0.3 * torch.randn(4000, 50, generator=draw, dtype=torch.float64)
    found = torch.tensor([ratio(t, b) for t, b in zip(top, bottom, strict=True)])
    assert float(found[:, 1].mean()) == pytest.approx(float(found[:, 0].std()), rel=0.08)


def test_times_are_what_start_means() -> None:
    assert times_at(svd_schedule(), [0.85, 1.0]) == pytest.approx([103, 700], rel=0.01)
    assert times_at(rectified_flow(), [0.3, 1.0]) == [0.3, 1.0]
    assert times_at(edm(), [1.0]) == pytest.approx([80.0])


def test_verdict_says_what_was_put_in() -> None:
    draw = torch.Generator().manual_seed(0)

    def made(error: float, count: int = 40) -> OneStep:
        copier = 1 + torch.rand(count, generator=draw, dtype=torch.float64)
        noise = 0.05 * torch.randn(count, len(FRACTIONS), generator=draw, dtype=torch.float64)
        return OneStep(copier[:, None] * (error + noise), copier[:, None].clone(), copier, copier)

    figures, sentence = verdict(made(0.5), made(0.9))
    assert sentence.startswith("It leaks:")
    assert figures["gap"] == pytest.approx(0.4, abs=0.03)
    assert verdict(made(0.5), made(0.5))[1].startswith("No sign of a leak")
    assert verdict(made(0.9), made(0.5))[1].startswith("The sets cannot be compared")
    assert verdict(made(0.5, 5), made(0.9, 5))[1].startswith("Too few clips")
    assert verdict(made(0.5), None)[1].startswith("Nothing can be said")


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_other_hosts(name: str, tmp_path: Path) -> None:
    """One-step predictions, and clips by the pipeline's own call."""
    pipe, side, num = (tiny_wan(), 16, 5) if name == "wan" else (tiny_cogvideox(), 64, 9)
    host = open_host(saved(pipe, tmp_path / "pipe"), CPU)
    frames = torch.rand(1, num, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for number, frame in enumerate(((frames[0] + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()):
        (tmp_path / "videos/0").mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(tmp_path / f"videos/0/{number}.png")
    clips = Clips(VideoFolder(tmp_path / "videos", num_frames=num, size=(side, side)), 1, 0)
    found = one_step(host, clips, times_at(host.schedule, FRACTIONS), manner=Manner())
    assert found.error.shape == (1, len(FRACTIONS)) and bool(found.error.isfinite().all())
    call: dict[str, object] = {"num_inference_steps": 2}
    made, evaluations = generate_clips(host, frames, ["a"], 2, manner=Manner(), call=call)
    assert made.shape == (2, num, 3, side, side) and evaluations == 4  # guided: twice a step
    assert not torch.equal(made[0], made[1])


def test_generated_clips_are_the_stock_pipelines(host: ImageToVideo, clips: Clips) -> None:
    frames, captions = clips.read(range(2))
    call: dict[str, object] = {"num_inference_steps": 2, "fps": 7, "noise_aug_strength": 0.0}
    made, evaluations = generate_clips(host, frames, captions, 2, manner=Manner(), call=call)
    assert made.shape == (4, 3, 3, 16, 16) and evaluations == 4
    again, _ = generate_clips(host, frames[:1], captions[:1], 2, manner=Manner(), call=call)
    torch.testing.assert_close(again, made[:2])
    eyes = Eyes.of(None, None, CPU)
    own, truth = judge_clips(made, frames, 2, eyes)
    step = (made[:, 1:] - made[:, :-1]).square().mean((1, 2, 3, 4)).sqrt()
    assert own["frame_difference"] == pytest.approx(float(step.mean()), rel=1e-5)
    assert truth["frame_difference"] == pytest.approx(float(frame_difference(frames).mean()))
    assert "frechet_distance_r3d" not in own
    copies = frames[:, :1].expand(-1, 3, -1, -1, -1).repeat_interleave(2, 0)
    still, _ = judge_clips(copies, frames, 2, eyes)
    assert still["static_fraction"] == 1 and still["diversity_thumbnails"] == 0
    assert still["first_frame_error"] == 0 == still["motion_ratio"]


def test_networks_judge_where_there_are_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow of 3 pixels to the right for generated clips, 1 for real ones; a feature of two."""

    def flow(frames: Tensor, following: Tensor) -> Tensor:
        shift = torch.where(frames.mean((1, 2, 3)) > 0, 3.0, 1.0)[:, None, None]
        return torch.stack([shift.expand(-1, 16, 16), torch.zeros(len(frames), 16, 16)], 1)

    monkeypatch.setattr(module, "raft_flow", lambda path, device: flow)
    monkeypatch.setattr(module, "r3d_features", lambda path, device: lambda v: v[:, :2, 0, 0, 0])
    made, real = torch.full((4, 3, 3, 16, 16), 0.5), torch.full((2, 3, 3, 16, 16), -0.5)
    own, truth = judge_clips(made, real, 2, Eyes.of(Path("a"), Path("b"), CPU))
    assert (own["flow_pixels_per_frame"], truth["flow_pixels_per_frame"]) == (3, 1)
    assert own["motion_ratio"] == 3 and own["diversity_r3d"] == 0
    assert own["frechet_distance_r3d"] == pytest.approx(2)  # a distance of one in both features


def test_a_student_over_its_teacher_by_hand() -> None:
    """Half the motion, a third of the variety; one feature. Errors against 2000 repetitions."""
    draw = torch.Generator().manual_seed(0)
    images, seeds = 30, 4

    def clips(motion: Tensor, place: Tensor) -> Tensor:
        frames = torch.stack([place, place + motion], 1)
        return frames[:, :, None, None, None].expand(-1, -1, 3, 2, 2)

    def pair() -> tuple[Tensor, Tensor]:
        moved = 1 + torch.rand(images * seeds, generator=draw, dtype=torch.float64)
        place = torch.randn(images * seeds, generator=draw, dtype=torch.float64)
        return clips(0.5 * moved, place / 3), clips(moved, place)

    eyes = Eyes(frame_difference, lambda v: v[:, :1, 0, 0, 0], "motion", "diversity", True)
    made, taught = pair()
    figures, said = judge_student(made, taught, seeds, eyes)
    assert figures["motion_ratio"] == pytest.approx(0.5)
    assert figures["diversity_ratio"] == pytest.approx(1 / 3)
    assert figures["motion_ratio_se"] < 1e-6  # every clip has lost the same share
    change = 0.5 * (taught[:, 1] - taught[:, 0])[:, 0, 0, 0]
    assert figures["motion_change"] == pytest.approx(float(change.mean()))
    assert said.startswith("The student has lost motion and variety: it has 0.5")
    same, said = judge_student(taught, taught, seeds, eyes)
    assert (same["motion_ratio"], same["diversity_ratio"]) == (1, 1)
    assert same["frechet_distance_r3d"] == pytest.approx(0, abs=1e-6)
    assert said.startswith("No sign that the student has lost")
    still, said = judge_student(taught, clips(0 * change, 0 * change), seeds, eyes)
    assert still == {} and "teacher's clips do not vary" in said
    found = [judge_student(pair()[0], pair()[1], seeds, eyes)[0] for _ in range(300)]
    for name in ("motion_ratio", "diversity_ratio"):
        scatter = torch.tensor([one[name] for one in found]).std()
        mean = sum(one[f"{name}_se"] for one in found) / len(found)
        assert mean == pytest.approx(float(scatter), rel=0.2)


def test_what_is_said_of_a_student() -> None:
    assert student_verdict((0.7, 0.05), (1.0, 0.05), 20).startswith("The student has lost motion:")
    assert student_verdict((0.9, 0.05), (0.4, 0.05), 20).startswith("The student has lost variety")
    assert student_verdict((1.4, 0.1), (1.0, 0.1), 20).startswith("The student moves more")
    assert student_verdict((0.9, 0.05), (1.0, 0.05), 20).startswith("No sign")
    assert student_verdict((0.1, 0.01), (1.0, 0.05), 9).startswith("Too few images")


def test_command_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("seen/0", "seen/1", "unseen/0", "unseen/1"):
        shutil.copytree(world / name, tmp_path / name)
    words = ["evaluate", str(world / "svd"), "--leakage", "seen", "--unseen", "unseen"]
    words += ["--shape", "3x16x16", "--num", "4"]
    words += ["--steps", "1", "--seed", "1", "--batch", "10", "--out", "found.json"]
    assert run(monkeypatch, *words) == 0
    assert "# Too few clips for a verdict" in capsys.readouterr().out
    home = tmp_path / "evaluation/svd"
    found = json.loads((home / "evaluation.json").read_text("utf-8"))
    assert (tmp_path / "found.json").read_bytes() == (home / "evaluation.json").read_bytes()
    rows = [row for row in found["rows"] if row["name"] == "unseen"]
    assert [row["metrics"]["start"] for row in rows] == list(FRACTIONS)
    assert found["card"]["real_clips"] == {"seen": 2, "unseen": 2}
    assert str(world) not in json.dumps(found)
    page = (tmp_path / "found.html").read_text("utf-8")
    assert page == (home / "report.html").read_text("utf-8")
    assert page.count("<svg") == 3 and page.count("<img") == 2 + 2 + 4
    assert str(escape(found["card"]["verdict"])) in page
    assert not re.search(r'(src|href|url)[="(]++(?!data:|#)', page)


@pytest.mark.slow
def test_a_student_beside_its_teacher_by_command_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One unguided step against the same weights' 25 guided ones: what each row is about."""
    monkeypatch.chdir(tmp_path)
    for name in ("seen/0", "seen/1"):
        shutil.copytree(world / name, tmp_path / name)
    words = ["evaluate", str(world / "svd"), "--leakage", "seen", "--shape", "3x16x16"]
    words += ["--num", "8", "--steps", "1", "--guidance", "1", "--teacher", str(world / "svd")]
    assert run(monkeypatch, *words) == 0
    assert "Too few images for a verdict on the student" in capsys.readouterr().out
    found = json.loads((tmp_path / "evaluation/svd/evaluation.json").read_text("utf-8"))
    made, _, taught, between = found["rows"][-4:]
    names = ["made from seen", "teacher, from seen", "student over teacher"]
    assert [row["name"] for row in (made, taught, between)] == names
    assert (made["network_evaluations"], taught["network_evaluations"]) == (1, 50)
    for name, part in (("motion", "frame_difference"), ("diversity", "diversity_thumbnails")):
        by_hand = made["metrics"][part] / taught["metrics"][part]
        assert between["metrics"][f"{name}_ratio"] == pytest.approx(by_hand, rel=1e-5)
    assert "--teacher svd" in found["card"]["command"]
    page = (tmp_path / "evaluation/svd/report.html").read_text("utf-8")
    assert "The student over its teacher" in page and page.count("<img") == 2 + 8 + 8


def test_a_run_brings_its_clips(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size and rates of its training, the call its export asks for; results stay in the run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copytree(world / "svd", tmp_path / "run/export")
    told = {"call": {"noise_aug_strength": 0.0}}
    (tmp_path / "run/export/export.json").write_text(json.dumps(told))
    videos = {"num_frames": 3, "height": 16, "width": 16, "fps": 5.0}
    config = {"recipe": "timenoise", "videos": videos, "model": {"motion_bucket": 9}}
    (tmp_path / "run/config.yaml").write_text(json.dumps(config))
    asked = Asked(most=2, batch=2, bf16=True)
    found = evaluate_leakage(Path("run"), world / "seen", asked=asked)
    assert found["card"]["call"] == {"fps": 5, "motion_bucket_id": 9, "noise_aug_strength": 0.0}
    assert found["card"]["clip"] == "3x16x16"
    assert str(found["card"]["verdict"]).startswith("Nothing can be said about a leak")
    assert json.loads((tmp_path / "run/evaluation/evaluation.json").read_text("utf-8")) == found
    (tmp_path / "run/config.yaml").write_text("recipe: f_distill\n")
    with pytest.raises(ValueError, match="a run of f_distill, not of timenoise"):
        evaluate_leakage(tmp_path / "run", world / "seen")


def test_errors(world: Path, tmp_path: Path) -> None:
    svd, seen, short = world / "svd", world / "seen", Asked(shape=SHAPE)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="there is no video here"):
        evaluate_leakage(svd, tmp_path / "none", asked=short)
    with pytest.raises(ValueError, match="is not one of StableVideoDiffusionPipeline"):
        (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        evaluate_leakage(tmp_path, seen)
    with pytest.raises(ValueError, match="4 frames, fewer than the 9"):
        evaluate_leakage(svd, seen, asked=Asked(shape=(9, 16, 16)))
    with pytest.raises(ValueError, match="nothing can move"):
        evaluate_leakage(svd, seen, asked=Asked(shape=(1, 16, 16)))
    with pytest.raises(ValueError, match="11 images, seen has 10"):
        evaluate_leakage(svd, seen, asked=Asked(shape=SHAPE, num=44))
    with pytest.raises(ValueError, match="is among the seen videos too"):
        evaluate_leakage(svd, seen, unseen=seen, asked=short)
    with pytest.raises(ValueError, match="no multiple of the 4 seeds"):
        Asked(num=6)
    with pytest.raises(ValueError, match="4 clips are of one image; a comparison takes two"):
        Asked(num=4, teacher=svd)
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan/model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')
    with pytest.raises(ValueError, match="WanImageToVideoPipeline, but the student is Stable"):
        evaluate_leakage(svd, seen, asked=replace(short, num=8, teacher=tmp_path / "wan"))


def test_videos_are_looked_at_before_the_model_is_opened(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 20 GB takes a minute to open; a wrong folder of videos should not wait for it."""

    def opened(*_: object, **__: object) -> ImageToVideo:
        raise AssertionError("the model was opened")

    monkeypatch.setattr("diffdiv.evaluate_leakage.open_host", opened)
    (tmp_path / "none").mkdir()
    for videos, unseen in ((tmp_path / "none", None), (world / "seen", world / "seen")):
        with pytest.raises(ValueError, match=r"no video here|is among the seen videos"):
            evaluate_leakage(world / "svd", videos, unseen=unseen, asked=Asked(shape=SHAPE))
    with pytest.raises(ValueError, match="4 frames, fewer than"):
        evaluate_leakage(world / "svd", world / "seen", asked=Asked(shape=(9, 16, 16)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "3x16x16"], "--shape: only with --leakage FOLDER"),
        (["--leakage", "{}", "--size", "2"], "--size: not with --leakage"),
        (["--teacher", "{}"], "--teacher: only with --leakage FOLDER"),
        (["--leakage", "{}", "--guidance", "2"], "for generated clips: give num too"),
        (["--leakage", "{}", "--shape", "16"], "'16' is not FRAMESxHEIGHTxWIDTH"),
        (["--leakage", "{}", "--num", "6"], "no multiple of the 4 seeds"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str],
    said: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word.format(world / "seen") for word in options]
    assert run(monkeypatch, "evaluate", str(world / "svd"), *words) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
