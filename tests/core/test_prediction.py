"""The linear solve against definitions, closed forms and diffusers."""

import itertools

import pytest
import torch

from diffdiv.core.prediction import PREDICTION_KINDS, check_convertible, coefficients, convert

GRID = torch.tensor([0.05, 0.3, 0.7, 0.999], dtype=torch.float64)
FAMILIES = {
    "vp": ((1 - GRID**2).sqrt(), GRID),
    "edm": (torch.ones(4, dtype=torch.float64), GRID * 80),
    "flow": (1 - GRID, GRID),
}


def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kinds", itertools.product(PREDICTION_KINDS, repeat=2))
def test_convert_gives_the_definition_of_the_other_kind(family, kinds):
    source, wanted = kinds
    alpha, sigma = FAMILIES[family]
    x0, eps = pair()
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    x_t = a * x0 + s * eps
    definition = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0, "score": -eps / s}
    got = convert(definition[source], source, wanted, x_t, alpha, sigma)
    torch.testing.assert_close(got, definition[wanted], rtol=1e-9, atol=1e-9)


def test_score_is_the_gradient_of_the_log_density_of_a_gaussian():
    # x0 ~ N(m, s^2): E[x0 | x_t] is known, and the score of x_t comes from autograd
    mean, std = 0.7, 1.3
    alpha, sigma = (
        torch.tensor([0.6], dtype=torch.float64),
        torch.tensor([0.8], dtype=torch.float64),
    )
    x_t = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    variance = alpha**2 * std**2 + sigma**2
    (score,) = torch.autograd.grad((-0.5 * (x_t - alpha * mean) ** 2 / variance).sum(), x_t)
    x0_mean = mean + alpha * std**2 / variance * (x_t.detach() - alpha * mean)
    got = convert(x0_mean, "x0", "score", x_t.detach(), alpha, sigma)
    torch.testing.assert_close(got, score, rtol=1e-12, atol=0)


def test_v_and_x0_agree_with_the_diffusers_scheduler():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    x0, eps = (x.float() for x in pair())
    t = torch.tensor([3, 399, 700, 999])
    alpha = scheduler.alphas_cumprod[t].sqrt()
    sigma = (1 - scheduler.alphas_cumprod[t]).sqrt()
    x_t = scheduler.add_noise(x0, eps, t)
    v = scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(convert(eps, "eps", "v", x_t, alpha, sigma), v, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(convert(v, "v", "x0", x_t, alpha, sigma), x0, rtol=1e-3, atol=1e-4)


def test_no_pure_noise_singularity_for_v():
    zero, one = torch.zeros(1), torch.ones(1)
    x0, eps = pair()
    got = convert((-x0)[:1], "v", "x0", eps[:1], zero, one)  # alpha 0: v = -x0
    torch.testing.assert_close(got, x0[:1])


@pytest.mark.parametrize(
    ("kind", "alpha", "sigma"), [("eps", 0.0, 1.0), ("x0", 1.0, 0.0), ("score", 0.0, 1.0)]
)
def test_singular_cases_are_refused_with_a_way_out(kind, alpha, sigma):
    other = "x0" if kind != "x0" else "eps"
    level = torch.tensor([alpha]), torch.tensor([sigma])
    with pytest.raises(ValueError, match=r"does not determine x0 at 1 of 1 noise levels.*'v'"):
        convert(torch.zeros(1, 2), kind, other, torch.zeros(1, 2), *level)
    with pytest.raises(ValueError, match=kind):
        check_convertible(kind, *level)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"epsilon.*not one of x0, eps"):
        coefficients("epsilon", torch.ones(1), torch.ones(1))
