"""Compiled blocks and int8 weights against the plain network, in every role."""

import pytest
import torch
from test_adapters import COND, TARGETS, TIME, X, build_net, build_shared, perturb
from torch import nn

from diffdiv.models.adapters import SharedBase, compile_blocks, quantise_linears, trained_copies
from diffdiv.models.families import call_sd_unet


def loss_in_three_roles(teacher: nn.Module, student: nn.Module, fake: nn.Module) -> torch.Tensor:
    """A graph through the student and, frozen, through the other two roles, as a GAN loss has."""
    dtype = next(student.parameters()).dtype
    cond, x = COND.to(X.device, dtype), X.to(dtype)
    made = call_sd_unet(student, x, TIME, cond)
    gap = call_sd_unet(fake, made, TIME, cond) - call_sd_unet(teacher, made, TIME, cond)
    with torch.no_grad():
        base = call_sd_unet(teacher, x, TIME, cond)
    return (gap.square() + (made - base).square()).mean()


# torch looks at tensors of the graph while it traces them
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_equal_plain_ones_in_every_role_and_are_compiled_once():
    results, counts = [], []

    def counting(graph, _example):
        counts.append(1)
        return graph.forward

    for compiled in (False, True):
        shared, (student, fake) = build_shared()
        if compiled:
            torch._dynamo.reset()
            compile_blocks(shared.net, backend=counting)
        for turn in range(3):
            student.zero_grad()
            loss = loss_in_three_roles(shared.net, student, fake)
            loss.backward()
            if turn == 0:
                after_first = len(counts)
        results.append([loss.detach(), *(p.grad for p in student.parameters())])
    assert 0 < after_first == len(counts), "a role switch compiled anew"
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_a_network_without_repeated_blocks_is_refused():
    with pytest.raises(ValueError, match="diffusers names no blocks of Linear to be compiled"):
        compile_blocks(nn.Linear(2, 2))


def test_full_copies_are_compiled_too():
    nets = trained_copies(
        build_net(), {"student": None}, seed=0, checkpointing=False, compiled=True
    )
    blocks = [m for m in nets["student"].modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)


def test_int8_base_stays_near_the_bfloat16_one_and_passes_gradient():
    pytest.importorskip("torchao")
    found = []
    for quantised in (False, True):
        net = build_net(torch.bfloat16)
        if quantised:
            net.requires_grad_(False)
            quantise_linears(net)
        shared = SharedBase(net)
        student = perturb(shared.add("student", rank=2, alpha=3, targets=TARGETS, seed=0), 10)
        with torch.autocast("cpu", torch.bfloat16):
            x = X.float().requires_grad_()
            out = call_sd_unet(student, x, TIME, COND.to(x.device, torch.float32))
            teacher = call_sd_unet(net, x.detach(), TIME, COND.to(x.device, torch.float32))
        out.float().square().mean().backward()
        assert out.dtype == torch.bfloat16
        grads = torch.cat([p.grad.flatten().float() for p in student.parameters()])
        found.append([out.detach().float(), teacher.float(), x.grad, grads])
    for plain, small in zip(*found, strict=True):
        difference = float((plain - small).norm() / plain.norm())
        assert 0 < difference < 0.05  # rows of 8 or 16 values; wider ones are nearer
    inside = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert any(type(m.weight.data).__name__ != "Tensor" for m in inside if "lora" not in str(m))
