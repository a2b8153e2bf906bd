"""The one-step pipeline against diffusers' schedulers, its definitions and its refusals."""

import ast
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, UNet2DModel

FILE = Path(__file__).parents[2] / "pipelines" / "one_step_unet.py"


@pytest.fixture(scope="module")
def pipeline_class():
    spec = importlib.util.spec_from_file_location("one_step_unet", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OneStepUNetPipeline


def tiny_unet(num_classes: int | None = None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=num_classes,
    ).eval()


def latents(num: int = 3) -> torch.Tensor:
    return torch.randn(num, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [399, 999])
def test_x0_is_that_of_the_ddim_step(pipeline_class, prediction, t):
    unet, z = tiny_unet(), latents()
    scheduler = DDIMScheduler(
        prediction_type=prediction, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(1000)
    with torch.no_grad():
        out = unet(z, torch.tensor([t])).sample
    expected = scheduler.step(out, t, z).pred_original_sample
    alpha_bar = float(scheduler.alphas_cumprod[t])
    pipe = pipeline_class(
        unet, scheduler, prediction, float(t), alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    )
    x0 = pipe(latents=z, output_type="x0").images
    assert float((x0 - expected).abs().max() / expected.abs().max()) < 1e-5


def test_edm_is_that_of_the_edm_scheduler(pipeline_class):
    unet, z = tiny_unet(), latents()
    scheduler = EDMEulerScheduler(sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    x_t = 80.0 * z
    with torch.no_grad():
        out = unet(scheduler.scale_model_input(x_t, t), t[None] * 1000).sample
    expected = scheduler.precondition_outputs(x_t, out, torch.tensor(80.0))
    pipe = pipeline_class(
        unet, scheduler, "edm", alpha_init=1.0, sigma_init=80.0, input_scale=80.0, sigma_data=0.5
    )
    x0 = pipe(latents=z, output_type="x0").images
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)


def test_flow_solves_its_definition(pipeline_class):
    """x_t = (1 - t) x0 + t eps and F = eps - x0 give x0 = x_t - t F."""
    unet, z = tiny_unet(), latents()
    pipe = pipeline_class(unet, DDIMScheduler(), "flow", 0.75, 0.25, 0.75, input_scale=0.8)
    with torch.no_grad():
        out = unet(0.8 * z, torch.tensor([0.75])).sample
    x0 = pipe(latents=z, output_type="x0").images
    torch.testing.assert_close(x0, 0.8 * z - 0.75 * out, rtol=1e-5, atol=1e-5)


def test_folder_round_trip_keeps_weights_and_settings(pipeline_class, tmp_path):
    settings = {"prediction": "edm", "sigma_init": 40.0, "input_scale": 40.0, "alpha_init": 1.0}
    pipe = pipeline_class(tiny_unet(5), DDIMScheduler(), **settings)
    pipe.save_pretrained(tmp_path)
    again = pipeline_class.from_pretrained(tmp_path)
    assert {name: again.config[name] for name in settings} == settings
    call = {"latents": latents(), "class_labels": [0, 4, 2], "output_type": "x0"}
    assert torch.equal(pipe(**call).images, again(**call).images)


def test_outputs_labels_and_seeds(pipeline_class):
    pipe = pipeline_class(tiny_unet(5), DDIMScheduler(), "sample")
    images = pipe(batch_size=2, class_labels=3).images
    assert [image.size for image in images] == [(8, 8)] * 2 and images[0].mode == "L"

    def draw(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(class_labels=labels, generator=generators, output_type="pt").images

    pair = draw([1, 2], [5, 6])
    assert pair.shape == (2, 1, 8, 8) and 0 <= float(pair.min()) <= float(pair.max()) <= 1
    torch.testing.assert_close(pair[1:], draw([2], [6]), rtol=1e-5, atol=1e-6)
    array = pipe(class_labels=[1], latents=latents(1), output_type="np", return_dict=False)[0]
    assert array.shape == (1, 8, 8, 1)
    assert not torch.equal(draw([1], [5]), draw([2], [5]))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"num_inference_steps": 4, "class_labels": 0}, "one-step"),
        ({"num_inference_steps": 0, "class_labels": 0}, "one-step"),
        ({}, "0..4"),
        ({"class_labels": 5}, "0..4"),
        ({"class_labels": [0, -1]}, "0..4"),
        ({"class_labels": 0.5}, "whole numbers"),
        ({"class_labels": [0, 1], "batch_size": 3}, "do not agree"),
        ({"class_labels": 0, "batch_size": 0}, "not positive"),
        ({"class_labels": 0, "latents": torch.zeros(1, 3, 8, 8)}, "shape"),
        ({"class_labels": 0, "output_type": "jpeg"}, "jpeg"),
    ],
)
def test_calls_that_cannot_be_right_are_refused(pipeline_class, call, word):
    pipe = pipeline_class(tiny_unet(5), DDIMScheduler(), "sample")
    with pytest.raises(ValueError, match=word):
        pipe(**call)


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "score"},
        {"sigma_init": 0.0},
        {"input_scale": math.nan},
        {"prediction": "epsilon", "alpha_init": 0.0},
    ],
)
def test_settings_that_cannot_be_right_are_refused(pipeline_class, settings):
    with pytest.raises(ValueError, match=r"prediction|positive"):
        pipeline_class(tiny_unet(), DDIMScheduler(), **settings)


def test_the_file_imports_nothing_of_this_project():
    allowed = {"math", "numpy", "PIL", "torch", "diffusers"}
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported <= allowed
