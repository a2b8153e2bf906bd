"""h = r^2 f'' by autograd, identities, closed forms, the gradient theorem by differences."""

import pytest
import torch

from diffdiv.core.divergence import DIVERGENCES, get_divergence
from diffdiv.core.names import DIVERGENCE_ALIASES, divergence_name

LOG_R = torch.linspace(-6, 6, 49, dtype=torch.float64)
ALL = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)


def test_table_and_names_agree():
    assert tuple(d.name for d in DIVERGENCES) == tuple(DIVERGENCE_ALIASES)
    assert len(DIVERGENCES) == 8


@ALL
def test_h_is_r_squared_times_second_derivative(divergence):
    r = LOG_R.exp().requires_grad_()
    (first,) = torch.autograd.grad(divergence.f(r.log()).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(divergence.h(LOG_R), (r**2 * second).detach(), rtol=1e-6, atol=1e-12)


@ALL
def test_f_is_convex_and_zero_at_one(divergence):
    zero = torch.zeros((), dtype=torch.float64)
    assert abs(float(divergence.f(zero))) < 1e-15
    assert bool((divergence.h(LOG_R) >= 0).all())


def test_identities():
    h = {d.name: d.h(LOG_R) for d in DIVERGENCES}
    one = torch.ones_like(LOG_R)
    torch.testing.assert_close(h["jensen_shannon"] + h["softened_reverse_kl"], one)
    torch.testing.assert_close(h["jeffreys"], h["reverse_kl"] + h["forward_kl"])
    torch.testing.assert_close(h["squared_hellinger"], (LOG_R / 2).exp() / 4)
    assert torch.equal(h["reverse_kl"], one)


@pytest.mark.parametrize("name", ["jensen_shannon", "softened_reverse_kl"])
def test_bounded_weights_do_not_overflow(name):
    h = get_divergence(name).h(torch.tensor([-1e4, 1e4]))
    assert bool(torch.isfinite(h).all())
    assert 0 <= float(h.min()) <= float(h.max()) <= 1


# p = .4 N(-1.5, .9^2) + .6 N(1.2, .7^2), q = N(m, s^2) at m = .3, s = 1.1
# (Neyman's integrand q^2/p lives in the far tail: hence the wide range)
X = torch.linspace(-25, 25, 200_001, dtype=torch.float64)
DX = float(X[1] - X[0])


def log_normal(x, mean, std):
    mean, std = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, std))
    return torch.distributions.Normal(mean, std, validate_args=False).log_prob(x)


def log_p(x):
    parts = [0.4, 0.6], [-1.5, 1.2], [0.9, 0.7]
    terms = [
        log_normal(x, m, s) + torch.tensor(w, dtype=torch.float64).log()
        for w, m, s in zip(*parts, strict=True)
    ]
    return torch.logsumexp(torch.stack(terms), 0)


def value(divergence, mean, std):
    log_q = log_normal(X, mean, std)
    return float((log_q.exp() * divergence.f(log_p(X) - log_q)).sum() * DX)


def gradient_by_theorem(divergence, mean, std):
    """-E_q[h(r) (score_p - score_q) dx/dtheta] for x = mean + std z, by quadrature over x."""
    x = X.clone().requires_grad_()
    (score_p,) = torch.autograd.grad(log_p(x).sum(), x)
    log_q = log_normal(X, mean, std)
    score_q = -(X - mean) / std**2
    integrand = -log_q.exp() * divergence.h(log_p(X) - log_q) * (score_p - score_q) * DX
    return float(integrand.sum()), float((integrand * (X - mean) / std).sum())


@ALL
def test_gradient_theorem_by_finite_differences(divergence):
    mean, std, step = 0.3, 1.1, 1e-4

    def derivative(of):  # fourth-order central difference
        near, far = of(step) - of(-step), of(2 * step) - of(-2 * step)
        return (8 * near - far) / (12 * step)

    differences = (
        derivative(lambda d: value(divergence, mean + d, std)),
        derivative(lambda d: value(divergence, mean, std + d)),
    )
    assert gradient_by_theorem(divergence, mean, std) == pytest.approx(differences, rel=1e-6)


# (d/dm, d/ds) printed by the derivation the design started from; independent of this code
PRINTED = {
    "reverse_kl": (-0.062759, -0.511199),
    "softened_reverse_kl": (-0.059456, -0.228391),
    "jensen_shannon": (-0.003303, -0.282808),
    "squared_hellinger": (0.003458, -0.155846),
    "forward_kl": (0.148760, -0.894065),
    "jeffreys": (0.086001, -1.405264),
}


@pytest.mark.parametrize("name", PRINTED)
def test_gradients_equal_the_printed_ones(name):
    assert gradient_by_theorem(get_divergence(name), 0.3, 1.1) == pytest.approx(
        PRINTED[name], abs=2e-6
    )


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("forward_kl", lambda d2: d2.exp() - 1),
        ("jeffreys", lambda d2: (d2.exp() - 1) / 4),
        ("squared_hellinger", lambda d2: (d2 / 4).exp() - 1),
    ],
)
def test_normalised_variance_of_h_between_gaussians(name, of):
    """Var_q[h] / E_q[h]^2 for p = N(d, 1), q = N(0, 1): closed forms."""
    d = 1.0
    q = log_normal(X, 0.0, 1.0).exp() * DX
    h = get_divergence(name).h(d * X - d**2 / 2)
    mean = (q * h).sum()
    relative = ((q * h**2).sum() - mean**2) / mean**2
    torch.testing.assert_close(
        relative, of(torch.tensor(d**2, dtype=torch.float64)), rtol=1e-8, atol=0
    )


def test_names_aliases_and_typos():
    assert divergence_name("js") == "jensen_shannon"
    assert get_divergence("kl").name == "forward_kl"
    with pytest.raises(
        ValueError, match=r"'klll' is not one of reverse_kl.*did you mean 'forward_kl'"
    ):
        divergence_name("klll")
