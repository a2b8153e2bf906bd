"""The closed forms of the mixture against autograd, sums over components and Tweedie's formula."""

import math

import pytest
import torch

from diffdiv.data.toy import GaussianMixture, gaussian_ring

LEVELS = [(1.0, 0.0), (0.9, 0.3), (0.5, 0.9), (0.05, 2.0)]


@pytest.fixture
def x_t() -> torch.Tensor:
    return torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_log_prob_agrees_with_torch_distributions(x_t, alpha, sigma):
    ring = gaussian_ring()
    variance = (alpha * ring.std) ** 2 + sigma**2
    components = torch.distributions.MultivariateNormal(
        alpha * ring.means, variance * torch.eye(2, dtype=torch.float64)
    )
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(ring.weights), components
    )
    torch.testing.assert_close(
        ring.log_prob(x_t, alpha, sigma), mixture.log_prob(x_t), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_score_is_the_gradient_of_log_prob(x_t, alpha, sigma):
    ring = gaussian_ring()
    x_t.requires_grad_()
    (gradient,) = torch.autograd.grad(ring.log_prob(x_t, alpha, sigma).sum(), x_t)
    torch.testing.assert_close(ring.score(x_t, alpha, sigma), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_x0_mean_obeys_tweedie(x_t, alpha, sigma):
    ring = gaussian_ring(5, radius=2.0, std=0.3)
    tweedie = (x_t + sigma**2 * ring.score(x_t, alpha, sigma)) / alpha
    torch.testing.assert_close(ring.x0_mean(x_t, alpha, sigma), tweedie, rtol=1e-9, atol=1e-9)


def test_x0_mean_at_pure_noise_is_the_mean_of_the_data(x_t):
    ring = gaussian_ring(3)
    mean = (ring.weights[:, None] * ring.means).sum(0).expand(40, 2)
    torch.testing.assert_close(ring.x0_mean(x_t, 0.0, 1.0), mean)


def test_levels_per_sample_images_and_float32(x_t):
    ring = gaussian_ring()
    alpha, sigma = torch.linspace(0.1, 1, 40), torch.linspace(1, 0.1, 40)
    rows = [
        ring.x0_mean(x_t[i : i + 1], float(alpha[i]), float(sigma[i])) for i in range(len(alpha))
    ]
    batch = ring.x0_mean(x_t, alpha, sigma)
    torch.testing.assert_close(batch, torch.cat(rows), rtol=1e-12, atol=1e-12)
    image = ring.x0_mean(x_t.float().view(40, 2, 1, 1), alpha, sigma)
    assert image.shape == (40, 2, 1, 1) and image.dtype == torch.float32
    torch.testing.assert_close(image.flatten(1), batch.float(), rtol=1e-4, atol=1e-5)


def test_samples_follow_the_law():
    # Shares and moments of 20,000 draws within 5 standard errors: 10 comparisons, two-sided
    # normal tail 5.7e-7 each, so a false alarm for a random seed has probability below 1e-5.
    ring, num = gaussian_ring(), 20_000
    x0, mode = ring.sample(range(num), seed=3, dtype=torch.float64)
    share = torch.bincount(mode, minlength=8) / num
    error = (ring.weights * (1 - ring.weights) / num).sqrt()
    assert ((share - ring.weights).abs() < 5 * error).all()
    residual = (x0 - ring.means[mode]) / ring.std
    assert abs(float(residual.mean())) < 5 / math.sqrt(2 * num)
    assert abs(float(residual.square().mean()) - 1) < 5 * math.sqrt(2 / (2 * num))


def test_a_sample_depends_on_its_index_only():
    ring = gaussian_ring()
    whole, _ = ring.sample(range(8), seed=1)
    parts = torch.cat([ring.sample([i], seed=1)[0] for i in range(8)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, ring.sample(range(8), seed=2)[0])


@pytest.mark.parametrize(
    ("means", "weights", "std", "word"),
    [
        (torch.zeros(2), torch.ones(2) / 2, 0.1, "shapes"),
        (torch.zeros(2, 2), torch.tensor([0.5, 0.4]), 0.1, "sum one"),
        (torch.zeros(2, 2), torch.tensor([1.5, -0.5]), 0.1, "positive"),
        (torch.zeros(2, 2), torch.ones(2) / 2, 0.0, "std"),
    ],
)
def test_what_is_no_mixture_is_refused(means, weights, std, word):
    with pytest.raises(ValueError, match=word):
        GaussianMixture(means.double(), weights.double(), std)
