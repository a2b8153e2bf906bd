"""The shared-encoder student against plain forwards of the same unmodified U-Net."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from builders import tiny_unet
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffdiv.models.shared_encoder import SharedEncoder

TIMES = (751, 501, 251, 1)
Inputs = dict[str, object]


def sd_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny_unet(
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
    ).eval()


def sdxl_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny_unet(
        layers_per_block=2,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    ).eval()


def classed_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny_unet(num_class_embeds=5).eval()


def inputs(net: UNet2DConditionModel, dtype: torch.dtype, size: tuple[int, int]) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    found: Inputs = {"sample": draw(3, 4, *size), "encoder_hidden_states": draw(3, 7, 16)}
    if net.config.get("addition_embed_type") == "text_time":
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(3, 6).to(dtype)
        found["added_cond_kwargs"] = {"text_embeds": draw(3, 16), "time_ids": ids}
    if net.config.get("num_class_embeds"):
        found["class_labels"] = torch.tensor([0, 3, 4])
    return found


def with_controlnet(given: Inputs, net: UNet2DConditionModel, dtype: torch.dtype) -> Inputs:
    """Residuals in the shapes that the encoder's features have."""
    shapes: list[torch.Size] = []

    def record(_m: nn.Module, _a: object, kwargs: dict[str, object]) -> None:
        shapes.extend(x.shape for x in kwargs["res_hidden_states_tuple"])

    handles = [b.register_forward_pre_hook(record, with_kwargs=True) for b in net.up_blocks]
    middle: list[Tensor] = []
    handles.append(net.mid_block.register_forward_hook(lambda *call: middle.append(call[2])))
    net(timestep=751, **given)
    for handle in handles:
        handle.remove()
    # up blocks take the features from the end
    blocks = [len(block.resnets) for block in net.up_blocks]
    ordered: list[torch.Size] = []
    for count in blocks:
        ordered = shapes[:count] + ordered
        shapes = shapes[count:]
    generator = torch.Generator().manual_seed(2)
    draw = lambda shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    return given | {
        "down_block_additional_residuals": tuple(draw(shape) for shape in ordered),
        "mid_block_additional_residual": draw(middle[0].shape),
    }


NETS = {"sd": sd_unet, "sdxl": sdxl_unet, "classes": classed_unet}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
EXTRAS = ("none", "controlnet", "mask", "freeu")


@pytest.mark.parametrize("size", [(8, 8), (10, 6)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("extra", EXTRAS)
@torch.no_grad()
def test_one_time_is_the_ordinary_forward(
    name: str, dtype: str, size: tuple[int, int], extra: str
) -> None:
    kind = DTYPES[dtype]
    net = NETS[name]().to(kind)
    given = inputs(net, kind, size)
    if extra == "controlnet":
        given = with_controlnet(given, net, kind)
    if extra == "mask":
        mask = torch.ones(3, 7)
        mask[:, 3:] = 0
        given["encoder_attention_mask"] = mask
    if extra == "freeu":
        net.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    plain = net(timestep=751, **given).sample
    (found,) = SharedEncoder(net, (751,))(timestep=751, **given)
    assert torch.equal(found, plain)


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-6), ("fp64", 1e-12)])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("extra", EXTRAS)
@torch.no_grad()
def test_one_batch_is_separate_decoder_calls(
    name: str, dtype: str, bound: float, extra: str
) -> None:
    kind = DTYPES[dtype]
    net = NETS[name]().to(kind)
    given = inputs(net, kind, (8, 8))
    if extra == "controlnet":
        given = with_controlnet(given, net, kind)
    if extra == "mask":
        given["encoder_attention_mask"] = torch.tensor([[1.0, 1, 0, 0, 1, 1, 1]] * 3)
    if extra == "freeu":
        net.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    (together,) = SharedEncoder(net, TIMES)(timestep=751, **given)
    apart = [SharedEncoder(net, (t,))(timestep=751, **given)[0] for t in TIMES]
    difference = (together - torch.cat(apart)).abs().max() / together.abs().max()
    assert float(difference) <= bound
    assert not torch.allclose(apart[0], apart[1], rtol=1e-3)  # the decoder's time matters


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_separate_decoder_calls(name: str) -> None:
    net = NETS[name]().double()
    given = inputs(net, torch.float64, (8, 8))
    weights = torch.randn(4, 3, 4, 8, 8, dtype=torch.float64)
    parameters = list(net.parameters())
    (together,) = SharedEncoder(net, TIMES)(timestep=751, **given)
    found = torch.autograd.grad((together.unflatten(0, (4, 3)) * weights).sum(), parameters)
    apart = [SharedEncoder(net, (t,))(timestep=751, **given)[0] for t in TIMES]
    expected = torch.autograd.grad((torch.stack(apart) * weights).sum(), parameters)
    scale = max(float(g.abs().max()) for g in expected)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) < 1e-12 * scale
    assert all(bool(g.any()) for g in found)


def test_added_conditions_reach_every_decoder_row() -> None:
    """The released code drops SDXL's pooled text and sizes in the decoder."""
    net = sdxl_unet()
    given = inputs(net, torch.float32, (8, 8))
    student = SharedEncoder(net, TIMES)
    first = student(timestep=751, **given)[0].unflatten(0, (4, 3))
    added = given["added_cond_kwargs"]
    other = given | {"added_cond_kwargs": {**added, "text_embeds": added["text_embeds"].flip(0)}}
    embedding = student._embedding
    rows = torch.tensor(TIMES).repeat_interleave(3)
    text = given["encoder_hidden_states"]
    before, after = (embedding(given["sample"], rows, text, case) for case in (given, other))
    changed = (before != after).any(1)
    assert changed.view(4, 3)[:, [0, 2]].all() and not changed.view(4, 3)[:, 1].any()
    assert torch.isfinite(first).all()


def test_lora_scale_and_hooks() -> None:
    from diffusers.loaders import PeftAdapterMixin
    from peft import LoraConfig

    net = sd_unet()
    assert isinstance(net, PeftAdapterMixin)
    net.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    given = inputs(net, torch.float32, (8, 8))
    scaled = given | {"cross_attention_kwargs": {"scale": 0.5}}
    with torch.no_grad():
        plain = net(timestep=751, **scaled).sample
        (found,) = SharedEncoder(net, (751,))(timestep=751, **scaled)
        assert torch.equal(found, plain)
        assert not torch.allclose(plain, net(timestep=751, **given).sample)


def test_ip_adapter_images_are_tiled() -> None:
    """Text may be a pair (text, [image tokens]); masks of the adapter stay as they are."""
    from diffdiv.models.shared_encoder import tile

    text, image, mask = torch.randn(3, 7, 16), torch.randn(3, 1, 4, 16), torch.ones(3, 1, 8, 8)
    tiled = tile((text, [image]), 4, 3)
    assert tiled[0].shape == (12, 7, 16) and tiled[1][0].shape == (12, 1, 4, 16)
    assert torch.equal(tiled[0][3:6], text)
    kept = tile({"scale": 0.5, "ip_adapter_masks": [mask], "gligen": {"objs": text}}, 4, 3)
    assert kept["scale"] == 0.5 and kept["ip_adapter_masks"][0] is mask
    assert kept["gligen"]["objs"].shape[0] == 12


def test_t2i_adapter_list_is_not_emptied() -> None:
    net = tiny_unet().eval()
    given = inputs(net, torch.float32, (8, 8))
    residuals = [torch.randn(3, 8, 8, 8), torch.randn(3, 16, 4, 4)]
    student = SharedEncoder(net, TIMES)
    extra = given | {"down_intrablock_additional_residuals": residuals}
    with torch.no_grad():
        first, again = (student(timestep=751, **extra)[0] for _ in range(2))
    assert len(residuals) == 2 and torch.equal(first, again)


@contextmanager
def counted_hooks(net: nn.Module) -> Iterator[None]:
    before = [len(module._forward_pre_hooks) for module in net.modules()]
    yield
    assert [len(module._forward_pre_hooks) for module in net.modules()] == before


def test_hooks_are_removed_also_after_an_error() -> None:
    net = sd_unet()
    given = inputs(net, torch.float32, (8, 8))
    student = SharedEncoder(net, TIMES)
    with counted_hooks(net):
        student(timestep=751, **given)
    with counted_hooks(net), pytest.raises(RuntimeError):
        student(timestep=751, **(given | {"encoder_hidden_states": torch.randn(3, 7, 5)}))


def test_short_batch_checkpointing_and_compiled_blocks() -> None:
    net = sd_unet()
    student = SharedEncoder(net, TIMES)
    given = inputs(net, torch.float32, (8, 8))
    (plain,) = student(timestep=751, **given)
    parameters = list(net.parameters())
    expected = torch.autograd.grad(plain.square().sum(), parameters)
    short = {name: value[:1] for name, value in given.items()}
    with torch.no_grad():
        rows = student(timestep=751, **short)[0]
    torch.testing.assert_close(rows, plain.unflatten(0, (4, 3))[:, 0], rtol=1e-4, atol=1e-5)

    net.train().enable_gradient_checkpointing()
    (again,) = student(timestep=751, **given)
    found = torch.autograd.grad(again.square().sum(), parameters)
    assert torch.equal(again, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    net.disable_gradient_checkpointing()

    net.compile_repeated_blocks(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(student(timestep=751, **given)[0], plain.detach())
