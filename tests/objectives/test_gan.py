"""GAN losses: the optimum is the log density ratio; R1 against closed forms."""

import pytest
import torch

from diffdiv.objectives.gan import (
    approximate_r1_penalty,
    discriminator_loss,
    generator_gan_loss,
    r1_penalty,
)


def test_the_optimal_logit_is_the_log_density_ratio():
    """The derivative of the population loss vanishes at log p/q (a grid of two densities)."""
    x = torch.linspace(-6, 6, 601, dtype=torch.float64)
    p, q = ((-((x - m) ** 2) / 2).softmax(0) for m in (0.8, 0.0))
    logit = (p / q).log().requires_grad_()
    # populations by weighting: loss = sum q softplus(l) + sum p softplus(-l)
    loss = sum(
        discriminator_loss(logit[i : i + 1], logit[i : i + 1].detach()) * q[i]
        + discriminator_loss(logit[i : i + 1].detach(), logit[i : i + 1]) * p[i]
        for i in range(0, 601, 25)
    )
    (grad,) = torch.autograd.grad(loss, logit)
    assert float(grad.abs().max()) < 1e-15


def test_generator_loss_pushes_logits_up():
    log_r = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    generator_gan_loss(log_r).backward()
    torch.testing.assert_close(log_r.grad, -torch.sigmoid(-log_r.detach()) / 3)


def test_exact_r1_of_a_quadratic_logit():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(lambda v: scale * v.square().sum(1), x)
    expected = 0.5 * (2 * 1.5 * x).square().sum(1).mean()
    torch.testing.assert_close(penalty, expected)
    penalty.backward()  # quadratic in the scale: d/ds = 2 * penalty / s
    torch.testing.assert_close(scale.grad, 2 * expected / 1.5)


def test_approximate_r1_is_exact_r1_in_expectation():
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(4, generator=generator, dtype=torch.float64)
    x = torch.randn(1, 4, generator=generator, dtype=torch.float64).expand(40_000, 4)
    eps = torch.randn(40_000, 4, generator=generator, dtype=torch.float64)

    def logits(v):
        return torch.tanh(v @ direction)

    approximate = approximate_r1_penalty(logits, x, logits(x), eps, step=1e-4)
    exact = r1_penalty(logits, x[:1])
    # (eps . g)^2 has relative standard deviation sqrt 2: 5 standard errors are 3.5 %
    assert float(approximate.detach()) == pytest.approx(float(exact.detach()), rel=0.036)
