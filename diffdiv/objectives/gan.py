"""Diffusion-GAN losses on discriminator logits log_r (real = positive)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

Logits = Callable[[Tensor], Tensor]


def generator_gan_loss(log_r: Tensor) -> Tensor:
    """Non-saturating generator loss mean softplus(-log_r); log_r [B] at the student's x_t."""
    return softplus(-log_r).mean()


def discriminator_loss(log_r_fake: Tensor, log_r_real: Tensor) -> Tensor:
    """Logistic loss whose optimum is log_r = log(p_real / p_fake); logits [B] each."""
    return softplus(log_r_fake).mean() + softplus(-log_r_real).mean()


def r1_penalty(logits: Logits, x_t_real: Tensor) -> Tensor:
    """Exact R1: half the mean squared gradient norm of the logit at noised real samples.

    (1/2) E ||grad_x log_r(x_t)||^2 (Mescheder et al., arXiv 1801.04406); needs a second
    derivative through the feature trunk, which only the math attention kernel has.

    Args:
        logits: x_t [B, ...] -> log_r [B].
        x_t_real: noised real samples, detached.

    Returns:
        Penalty, scalar; multiply by gamma.
    """
    x_t = x_t_real.detach().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        (grad,) = torch.autograd.grad(logits(x_t).sum(), x_t, create_graph=True)
    return 0.5 * grad.square().flatten(1).sum(1).mean()


def approximate_r1_penalty(
    logits: Logits, x_t_real: Tensor, log_r_real: Tensor, eps: Tensor, *, step: float = 0.01
) -> Tensor:
    """R1 by a random finite difference: (1/2) E ((log_r(x_t + step eps) - log_r(x_t)) / step)^2.

    Its expectation over eps is the exact penalty up to O(step^2): E (eps . g)^2 = ||g||^2. Both
    logits are taken around the same noised x_t. No second derivative is needed.

    Args:
        logits: x_t [B, ...] -> log_r [B].
        x_t_real: noised real samples.
        log_r_real: logits at ``x_t_real``, already known from the discriminator loss.
        eps: standard normal noise, shape of x_t_real.
        step: length of the difference, in units of x_t.
    """
    difference = logits(x_t_real + step * eps) - log_r_real
    return 0.5 * (difference / step).square().mean()
