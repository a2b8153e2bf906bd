"""Image-to-video networks behind the denoiser contract, against their stock pipelines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_video_pipelines import saved, tiny_cogvideox, tiny_svd, tiny_wan
from torch import Tensor

from diffdiv.models.adapters import SharedBase
from diffdiv.models.image_to_video import ImageToVideo, open_host
from diffdiv.models.video import vp_from_table
from diffdiv.models.video_calls import svd_schedule

CPU = torch.device("cpu")
SIZES = {"svd": (3, 16, 16), "wan": (5, 16, 16), "cogvideox": (5, 64, 64)}
MAKE = {"svd": tiny_svd, "wan": tiny_wan, "cogvideox": tiny_cogvideox}
PIXELS = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: saved(make(), root / name) for name, make in MAKE.items()}


@pytest.fixture(scope="module")
def hosts(folders: dict[str, Path]) -> dict[str, ImageToVideo]:
    return {name: open_host(folder, CPU) for name, folder in folders.items()}


def first_frame(name: str) -> tuple[Image.Image, Tensor]:
    """One image of the host's size, and the same in [-1, 1]."""
    _, height, width = SIZES[name]
    pixels = PIXELS[:height, :width]
    frame = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    return Image.fromarray(pixels), frame[None]


def stock_step(pipe: DiffusionPipeline, name: str) -> tuple[Tensor, float, Tensor, Tensor | None]:
    """x_t, time, x0 of the scheduler, in a late step; and the y that CogVideoX's pipeline drew."""
    image, _ = first_frame(name)
    num_frames, height, width = SIZES[name]
    options: dict[str, object] = {"num_frames": num_frames, "height": height, "width": width}
    if name == "svd":
        options |= {"fps": 7, "noise_aug_strength": 0.0, "max_guidance_scale": 1.0}
    else:
        options |= {"guidance_scale": 1.0}
    if name == "wan":
        options["prompt_embeds"] = wan_text(pipe, "a cat")
    elif name == "cogvideox":
        options |= {"prompt": "a cat", "max_sequence_length": 16}
    seen: list[tuple[Tensor, float, Tensor]] = []
    step = pipe.scheduler.step

    def look(output: Tensor, t: Tensor, x_t: Tensor, **rest: object) -> object:
        index = pipe.scheduler.step_index or 0 if name != "cogvideox" else 0
        if name == "svd":
            sigma = float(pipe.scheduler.sigmas[index])
            x0 = x_t / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
        elif name == "wan":
            sigma = float(pipe.scheduler.sigmas[index])
            x0 = x_t - sigma * output
        else:
            abar = float(pipe.scheduler.alphas_cumprod[int(t)])
            x0 = abar**0.5 * x_t - (1 - abar) ** 0.5 * output
            sigma = float(t)
        seen.append((x_t, float(t) if name == "wan" else sigma, x0))
        return step(output, t, x_t, **rest)

    pipe.scheduler.step = look
    drawn: list[Tensor] = []
    if name == "cogvideox":
        prepare = pipe.prepare_latents

        def look_at_y(*given: object, **rest: object) -> tuple[Tensor, Tensor]:
            latents, y = prepare(*given, **rest)
            drawn.append(y[:, :1])
            return latents, y

        pipe.prepare_latents = look_at_y
    pipe.set_progress_bar_config(disable=True)
    pipe(image, num_inference_steps=4, output_type="latent",
         generator=torch.Generator().manual_seed(0), **options)  # fmt: skip
    x_t, t, x0 = seen[2]
    if name == "wan":  # the integer it is told, over 1000
        return x_t.transpose(1, 2), t / 1000, x0.transpose(1, 2), None
    return x_t, t, x0, drawn[0] if drawn else None


def wan_text(pipe: DiffusionPipeline, text: str) -> Tensor:
    """As the pipeline's own encoding, whose clean-up needs ftfy."""
    words = pipe.tokenizer([text], padding="max_length", max_length=512, return_tensors="pt")
    found = pipe.text_encoder(words.input_ids, words.attention_mask).last_hidden_state
    length = int(words.attention_mask.sum())
    return torch.cat([found[:, :length], found.new_zeros(1, 512 - length, 16)], 1).detach()


@pytest.mark.parametrize("name", MAKE)
def test_x0_is_that_of_the_stock_pipeline(folders, hosts, name: str) -> None:
    """Same image, noisy latents and time in; the scheduler's x0 out."""
    host = hosts[name]
    x_t, t, x0, drawn = stock_step(DiffusionPipeline.from_pretrained(folders[name]), name)
    _, frame = first_frame(name)
    rows = {"mean": x_t, **host.embed(frame, ["a cat"])}
    y = host.image(frame, SIZES[name][0]) if drawn is None else drawn
    denoiser, cond = host.denoiser(host.net, rows, y, torch.zeros(1))
    with torch.no_grad():
        found = denoiser(x_t.float(), torch.tensor([t], dtype=torch.float64), cond)
    # Wan's scheduler rounds the time it tells to an integer of 1000
    assert float((found - x0).std() / x0.std()) < (1e-3 if name == "wan" else 1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_the_target_is_what_a_perfect_network_returns(hosts, name: str) -> None:
    host = hosts[name]
    shape = host.codec.space(*SIZES[name]).shape
    x0, eps = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    t = host.schedule.sample_t(torch.tensor([0.3, 0.9]))
    denoiser, _ = host.denoiser(host.net, rows_for(host, name), torch.zeros(2, 1), torch.zeros(2))
    x_t = host.schedule.add_noise(x0, eps, t)
    found = denoiser.x0_from_raw(denoiser.target(x0, eps, t), x_t, t)
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)


def rows_for(host: ImageToVideo, name: str) -> dict[str, Tensor]:
    frames = torch.cat([first_frame(name)[1]] * 2)
    shape = host.codec.space(*SIZES[name]).shape
    return {"mean": torch.zeros(2, *shape), **host.embed(frames, ["", "a"])}


@pytest.mark.parametrize("name", MAKE)
def test_dropped_conditions_are_the_unconditional_ones(hosts, name: str) -> None:
    host = hosts[name]
    rows, y = rows_for(host, name), torch.ones(2, 1, 1, 1, 1)
    dropped = torch.tensor([False, True])
    without, image = host.without(rows, y, dropped)
    if name == "svd":
        assert not without["tokens"][1].any() and torch.equal(
            without["tokens"][0], rows["tokens"][0]
        )
        assert image.flatten().tolist() == [1.0, 0.0]
    else:
        empty = host.embed(first_frame(name)[1], [""])["text"][0]
        assert torch.equal(without["text"][1], empty) and torch.equal(image, y)
        assert torch.equal(without["text"][0], rows["text"][0])


def test_svds_law_of_noise_and_what_it_is_told(folders) -> None:
    """ln sigma of mean 0.7 and spread 1.6; time 0.25 ln sigma; fps - 1, bucket, level."""
    law = svd_schedule()
    u = (torch.arange(10_000) + 0.5) / 10_000
    logs = law.sample_t(u).log()
    assert float(logs.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(logs.std()) == pytest.approx(1.6, abs=0.01)
    t = torch.tensor([0.002, 1.0, 700.0])
    torch.testing.assert_close(law.net_time(t), 0.25 * t.log())
    host = open_host(folders["svd"], CPU, fps=5.0, motion_bucket=20)
    rows = rows_for(host, "svd")
    _, cond = host.denoiser(host.net, rows, torch.zeros(2, 1), torch.tensor([0.5, 3.0]))
    assert cond.time_ids.tolist() == [[4.0, 20.0, 0.5], [4.0, 20.0, 3.0]]


def test_levels_reach_svd_and_the_condition_reaches_all(hosts) -> None:
    for name in MAKE:
        host = hosts[name]
        rows, (num, _, _) = rows_for(host, name), SIZES[name]
        x_t = torch.randn(rows["mean"].shape, generator=torch.Generator().manual_seed(1))
        y = host.image(torch.cat([first_frame(name)[1]] * 2), num)
        t = host.schedule.sample_t(torch.tensor([0.5, 0.5]))

        def raw(y: Tensor, level: float, host=host, rows=rows, x_t=x_t, t=t) -> Tensor:
            denoiser, cond = host.denoiser(host.net, rows, y, torch.full((2,), level))
            with torch.no_grad():
                return denoiser.raw(x_t, t, cond)

        plain = raw(y, 0.0)
        assert not torch.allclose(raw(y + 3, 0.0), plain, rtol=1e-3)
        assert torch.equal(raw(y, 3.0), plain) is (name != "svd")


@pytest.mark.parametrize("name", MAKE)
def test_adapters_find_their_layers(folders, name: str) -> None:
    host = open_host(folders[name], CPU)
    view = SharedBase(host.net).add("model", rank=2, alpha=2, targets=host.lora_targets, seed=0)
    assert sum(p.numel() for p in view.parameters()) > 500


def test_a_table_gives_its_schedule() -> None:
    table = torch.linspace(0.999, 0.0, 1000, dtype=torch.float64)
    schedule = vp_from_table(table)
    t = torch.arange(1000.0)
    torch.testing.assert_close(schedule.alpha(t) ** 2, table, rtol=1e-9, atol=1e-12)


def test_other_pipelines_are_told_apart(tmp_path: Path, folders) -> None:
    with pytest.raises(ValueError, match=r"no model_index.json there"):
        open_host(tmp_path, CPU)
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXImageToVideoPipeline"}')
    with pytest.raises(ValueError, match="LTXImageToVideoPipeline is not one of StableVideo"):
        open_host(tmp_path, CPU)
    index = folders["wan"] / "model_index.json"
    (tmp_path / "wan").symlink_to(folders["wan"])
    before = index.read_text()
    index.write_text(before.replace('"expand_timesteps": false', '"expand_timesteps": true'))
    try:
        with pytest.raises(ValueError, match=r"Wan 2.2 .* cannot be trained here"):
            open_host(tmp_path / "wan", CPU)
    finally:
        index.write_text(before)
