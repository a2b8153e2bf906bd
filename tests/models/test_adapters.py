"""Shared base with adapters against separate networks, peft's own switch and plain autograd."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from builders import tiny_stable_diffusion, tiny_unet
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointError

from diffdiv.core.divergence import get_divergence
from diffdiv.core.schedule import Noising, vp_from_betas
from diffdiv.models.adapters import (
    AdapterView,
    SharedBase,
    enable_checkpointing,
    lora_layers,
    merged_state_dict,
)
from diffdiv.models.denoiser import Condition, Denoiser, guided, tap
from diffdiv.models.discriminator import heads_for
from diffdiv.models.families import call_sd_unet
from diffdiv.objectives import f_distill

TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
).split()
DOUBLE = torch.float64
COND = Condition(text=torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(9)).double())
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(8)).double()
TIME = torch.tensor([20.0, 400.0, 900.0], dtype=DOUBLE)


def build_net(dtype: torch.dtype = DOUBLE) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny_unet().to(dtype).eval()


def perturb(view: AdapterView, seed: int) -> AdapterView:
    """Away from B = 0, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in view.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return view


def build_shared(
    dtype: torch.dtype = DOUBLE, *names: str
) -> tuple[SharedBase, tuple[AdapterView, ...]]:
    shared = SharedBase(build_net(dtype))
    for seed, name in enumerate(names or ("student", "fake")):
        perturb(shared.add(name, rank=2, alpha=3, targets=TARGETS, seed=seed), 10 + seed)
    return shared, tuple(shared.views.values())


def run(net: nn.Module, x: Tensor = X) -> Tensor:
    return call_sd_unet(net, x, TIME, COND.to(x.device, x.dtype))


def test_the_base_at_rest_is_the_untouched_network_bit_for_bit() -> None:
    shared, _ = build_shared()
    assert torch.equal(run(shared.net), run(build_net()))


def test_a_new_adapter_changes_nothing_and_follows_from_its_seed_alone() -> None:
    weights = []
    for global_seed in (1, 2):
        shared = SharedBase(build_net())
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        view = shared.add("student", rank=4, alpha=8, targets=TARGETS, seed=7)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(run(view), run(build_net()))
        weights.append(view.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert float(weights[0]["mid_block.resnets.0.conv1.lora_A.weight"].std()) > 0
    fan_in = 16 * 9
    assert float(weights[0]["mid_block.resnets.0.conv1.lora_A.weight"].abs().max()) <= fan_in**-0.5


def test_a_view_equals_a_plain_network_with_merged_weights() -> None:
    shared, views = build_shared()
    for view in views:
        plain = build_net()
        plain.load_state_dict(merged_state_dict(view))
        difference = (run(plain) - run(view)).abs().max()
        assert difference < 1e-12
        assert (run(plain) - run(shared.net)).abs().max() > 1e-2


def test_weights_of_a_view_are_the_adapters_alone_under_the_plain_names() -> None:
    shared, (student, fake) = build_shared()
    plain = {name for name, _ in build_net().named_modules()}
    for key in student.state_dict():
        layer, factor, kind = key.rsplit(".", 2)
        assert layer in plain and factor in ("lora_A", "lora_B") and kind == "weight"
    assert list(student.state_dict()) == [name for name, _ in student.named_parameters()]
    own = {id(p) for p in student.parameters()}
    assert not own & {id(p) for p in fake.parameters()}
    assert own <= {id(p) for p in shared.net.parameters()}
    fake.load_state_dict(student.state_dict())
    assert torch.equal(run(fake), run(student))
    assert student.config["sample_size"] == 8


def test_a_role_is_pefts_own_switch() -> None:
    shared, _ = build_shared()
    layers = [layer for _, layer in lora_layers(shared.net, "fake")]
    for name in ("student", "fake", None):
        with shared.role(name):
            ours = run(shared.net)
        for layer in layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)
        assert torch.equal(run(shared.net), ours)
        shared._write(None)


def test_roles_come_back_after_an_exception() -> None:
    shared, (student, _) = build_shared()
    with shared.role("fake"):
        expected = run(shared.net)
        with pytest.raises(TypeError):
            student("no such input")
        assert torch.equal(run(shared.net), expected)
    assert torch.equal(run(shared.net), run(build_net()))


def test_a_role_switch_between_forward_and_backward_keeps_the_gradient() -> None:
    shared, (student, fake) = build_shared()
    run(student).square().sum().backward()
    expected = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    loss = run(student).square().sum()
    with torch.no_grad():
        run(shared.net), run(fake)
    flags = [p.requires_grad for p in shared.net.parameters()]
    with shared.role("fake"):
        loss.backward()
    found = [p.grad for p in student.parameters() if p.grad is not None]
    assert len(found) == len(expected) == len(list(student.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert flags == [p.requires_grad for p in shared.net.parameters()]
    assert sum(flags) == 2 * len(expected)
    assert all(p.grad is None for p in fake.parameters())


def test_adding_an_adapter_keeps_frozen_what_was_frozen() -> None:
    shared = SharedBase(build_net())
    first = shared.add("first", rank=1, alpha=1, targets=["to_q"], seed=0).requires_grad_(False)
    second = shared.add("second", rank=1, alpha=1, targets=["to_q", "to_v"], seed=0)
    assert not any(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for p in second.parameters())
    perturb(second, 1)
    assert torch.equal(run(first), run(build_net()))  # also at layers that only the second has


# -- objectives: one base against three networks ---------------------------------------------------


def denoiser(net: nn.Module) -> Denoiser:
    schedule = vp_from_betas(torch.linspace(0.001, 0.02, 1000))
    return Denoiser(net=net, call=call_sd_unet, schedule=schedule, prediction="eps")


def objectives(
    teacher: nn.Module, student: nn.Module, fake: nn.Module, trunk: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Losses and gradients of one critic and one student update, from these three networks."""
    cond, x = COND.to(X.device, dtype), X.to(dtype)
    base = denoiser(teacher)
    uncond = cond[:1].map(torch.zeros_like)
    blocks = ["mid_block", "down_blocks.0"]
    heads = heads_for(
        denoiser(build_net(torch.float32)),
        (4, 8, 8),
        COND[:1].to(X.device, torch.float32),
        blocks,
        seed=3,
    )
    critic = f_distill.Critic(guided(base, 2.0, uncond), denoiser(fake), heads, blocks, trunk)
    ratio = f_distill.RatioStatistics(get_divergence("jensen_shannon"))
    eps = x.flip(0)
    at = Noising(TIME, TIME / 1000, eps)
    results: dict[str, Tensor] = {}

    def keep(name: str, loss: Tensor, weights: nn.Module) -> None:
        parameters = dict(weights.named_parameters())
        for parameter in parameters.values():
            parameter.grad = None
        loss.backward()
        results[name] = loss.detach()
        results.update({f"{name} {k}": p.grad for k, p in parameters.items() if p.grad is not None})

    x0 = denoiser(student)(x, torch.full((3,), 700.0, dtype=DOUBLE), cond)
    loss, _ = f_distill.fake_score_loss(critic.fake, x0, cond, at)
    keep("fake", loss, fake)
    real = f_distill.Real(x.roll(1, 0), cond, at)
    loss, _ = f_distill.density_ratio_loss(
        x0, cond, at, real, critic=critic, ratio=ratio, r1_gamma=0.1
    )
    keep("disc", loss, heads)
    loss, _ = f_distill.student_loss(x0, cond, at, critic=critic, ratio=ratio, gan_weight=0.5)
    keep("student", loss, student)
    return results


def separate(view: AdapterView, dtype: torch.dtype) -> AdapterView:
    """A network of its own that carries the same adapter."""
    alone = SharedBase(build_net(dtype)).add(view.name, rank=2, alpha=3, targets=TARGETS, seed=5)
    alone.load_state_dict(view.state_dict())
    return alone


@pytest.mark.parametrize("trunk", ["teacher", "fake"])
@pytest.mark.parametrize(
    ("dtype", "bound", "checkpointed"),
    [(torch.float32, 1e-6, False), (DOUBLE, 1e-12, False), (DOUBLE, 1e-12, True)],
)
def test_losses_and_gradients_equal_those_of_separate_networks(
    dtype: torch.dtype, bound: float, trunk: str, checkpointed: bool
) -> None:
    shared, (student, fake) = build_shared(dtype)
    if checkpointed:
        enable_checkpointing(shared)
    ours = objectives(shared.net, student, fake, trunk, dtype)
    theirs = objectives(
        build_net(dtype).requires_grad_(False),
        separate(student, dtype),
        separate(fake, dtype),
        trunk,
        dtype,
    )
    assert ours.keys() == theirs.keys()
    assert len(ours) > 2 * len(list(student.parameters()))
    for key, expected in theirs.items():
        assert (ours[key] - expected).abs().max() <= bound * expected.abs().max(), key


# -- checkpointing ---------------------------------------------------------------------------------


def three_roles(shared: SharedBase, student: nn.Module, fake: nn.Module) -> Tensor:
    """One graph through all roles; gradient passes the teacher and the fake score."""
    x0 = run(student)
    return run(fake, run(shared.net, x0)).square().sum() + run(shared.net, x0).abs().sum()


def gradients(loss: Tensor, *views: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for view in views for p in view.parameters()]))


def test_checkpointing_recomputes_every_forward_in_its_own_role() -> None:
    shared, views = build_shared()
    expected = gradients(three_roles(shared, *views), *views)
    enable_checkpointing(shared)
    found = gradients(three_roles(shared, *views), *views)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(run(shared.net), run(build_net()))


def test_plain_checkpointing_would_be_wrong() -> None:
    shared, (student, fake) = build_shared()
    expected = gradients(run(fake, run(student)).square().sum(), student)
    shared.net.enable_gradient_checkpointing()
    loss = run(fake, run(student)).square().sum()
    with shared.role("student"):  # equal shapes: nothing is noticed
        silent = gradients(loss, student)
    worst = max(float((a - b).abs().max()) for a, b in zip(silent, expected, strict=True))
    assert worst > 1e-2
    with pytest.raises(CheckpointError):  # the teacher saves fewer tensors: noticed
        gradients(three_roles(shared, student, fake), student)


def test_checkpointing_of_a_plain_network() -> None:
    net = build_net()
    expected = gradients(run(net).square().sum(), net)
    enable_checkpointing(net)
    calls = []
    for module in net.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    loss = run(net).square().sum()
    before = len(calls)
    found = gradients(loss, net)
    assert len(calls) > before  # blocks ran again
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="Linear is no diffusers backbone"):
        enable_checkpointing(nn.Linear(1, 1))


def test_a_forward_that_stops_inside_a_checkpoint_leaves_nothing_behind() -> None:
    shared, (student, _) = build_shared()
    block = "down_blocks.0.resnets.0"  # called by the checkpoint function itself
    weights = [p for name, p in student.named_parameters() if name.startswith(f"{block}.conv")]

    def tapped() -> tuple[Tensor, ...]:
        with tap(student, [block], stop=True) as features:
            run(student)
        return torch.autograd.grad(features[block].square().sum(), weights)

    expected = tapped()
    enable_checkpointing(shared)
    assert len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(tapped(), expected, strict=True))
    assert torch.equal(run(shared.net), run(build_net()))


# -- what a run does with a view -------------------------------------------------------------------


def test_averaged_weights_without_a_copy_of_the_base() -> None:
    _, (student, fake) = build_shared()
    before = run(student)
    averaged = {key: (a + fake.state_dict()[key]) / 2 for key, a in student.state_dict().items()}
    found = functional_call(student, averaged, (X, TIME, COND.text), {"return_dict": False})[0]
    assert torch.equal(run(student), before)
    fake.load_state_dict(averaged)
    assert torch.equal(found, run(fake))


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0,
                            world_size=1)  # fmt: skip
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_ddp_over_a_view_trains_its_adapter_alone() -> None:
    shared, (student, _) = build_shared()
    enable_checkpointing(shared)
    expected = gradients(run(shared.net, run(student)).square().sum(), student)
    before = deepcopy(shared.net.state_dict())
    wrapped = DistributedDataParallel(student)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    run(shared.net, run(wrapped)).square().sum().backward()
    found = [p.grad for p in student.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    optimizer.step()
    for key, value in shared.net.state_dict().items():
        assert torch.equal(value, before[key]) == (".student." not in key), key


def test_a_half_precision_base_trains_float32_adapters_under_autocast() -> None:
    _, (student, _) = build_shared(torch.bfloat16)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(run(student, X.bfloat16()).float().square().sum(), student)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found)
    merged = merged_state_dict(student)
    assert {v.dtype for v in merged.values()} == {torch.bfloat16}
    assert merged.keys() == build_net().state_dict().keys()


def test_features_are_tapped_through_a_view() -> None:
    _, (student, fake) = build_shared()
    with tap(student, ["mid_block"]) as features:
        run(student)
    plain = build_net()
    plain.load_state_dict(merged_state_dict(student))
    with tap(plain, ["mid_block"]) as expected:
        run(plain)
    assert torch.allclose(features["mid_block"], expected["mid_block"], atol=1e-12)
    with pytest.raises(ValueError, match="no block 'nowhere' in AdapterView; blocks: down_blocks"):
        with tap(fake, ["nowhere"]):
            pass


def test_diffusers_loads_the_weights_of_a_view_as_a_lora(tmp_path: Path) -> None:
    folder = tiny_stable_diffusion(tmp_path)
    load = StableDiffusionPipeline.from_pretrained
    x, cond = X.float(), COND.to(X.device, torch.float32)
    shared = SharedBase(load(folder).unet)
    view = perturb(shared.add("student", rank=2, alpha=5, targets=TARGETS, seed=0), 1)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=view.state_dict(),
        unet_lora_adapter_metadata=view.settings,
    )
    stock = load(folder)
    stock.load_lora_weights(tmp_path / "lora")
    found = call_sd_unet(stock.unet, x, TIME.float(), cond)
    expected = call_sd_unet(view, x, TIME.float(), cond)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(expected, call_sd_unet(shared.net, x, TIME.float(), cond), atol=0.01)


@pytest.mark.slow
def test_compilation_makes_one_graph_a_role_without_breaks() -> None:
    shared, (student, fake) = build_shared()
    expected = [run(net) for net in (shared.net, student, fake)]
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    shared.net.compile(backend=backend, fullgraph=True)
    for _ in range(3):
        found = [run(net) for net in (shared.net, student, fake)]
    assert len(graphs) == 3
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_what_cannot_be_an_adapter_is_refused() -> None:
    shared, _ = build_shared()
    with pytest.raises(ValueError, match="already carries adapters"):
        SharedBase(shared.net)
    with pytest.raises(ValueError, match="'student' is in use"):
        shared.add("student", rank=1, alpha=1, targets=["to_q"], seed=0)
    with pytest.raises(ValueError, match=r"'a\.b' is in use or no identifier"):
        shared.add("a.b", rank=1, alpha=1, targets=["to_q"], seed=0)
    with pytest.raises(ValueError, match="'to_queue' matches no layer in this UNet2DConditionM"):
        shared.add("third", rank=1, alpha=1, targets=["to_q", "to_queue"], seed=0)
    with pytest.raises(ValueError, match="'norm1' matches LayerNorm layers"):
        shared.add("third", rank=1, alpha=1, targets=["norm1"], seed=0)
    with pytest.raises(ValueError, match="'third': rank 1, alpha 1 and 0 targets"):
        shared.add("third", rank=1, alpha=1, targets=[], seed=0)
    with pytest.raises(ValueError, match="rank 0, alpha 1 and 1 targets; all must be positive"):
        shared.add("third", rank=0, alpha=1, targets=["to_q"], seed=0)
