"""f-divergences D_f(p || q) = E_q[f(r)], r = p_teacher / p_student, in log space.

    log_r    log density ratio at x_t; the logit of the optimal discriminator (real = positive)
    f        convex, f(1) = 0, as a function of log r
    h        r^2 f''(r), the weight of the f-distill gradient, as a function of log r

Gradient (f-distill, arXiv 2502.15681v1, main theorem):
    grad_theta D_f(p_t || q_t) = -E[ h(r) (grad log p_t - grad log q_t)(x_t) dx_t/dtheta ],
so r enters as a detached weight. h is evaluated from log_r: JS and softened reverse KL are
sigmoids of it and cannot overflow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffdiv.core.names import divergence_name

_LOG2 = log(2.0)


@dataclass(frozen=True)
class Divergence:
    """One f-divergence.

    Attributes:
        name: full name, the one used in YAML, logs and reports (short forms: core/names.py).
        f: generator as a function of log r, nats.
        h: r^2 f''(r) as a function of log r, non-negative.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]


def _softened_f(log_r: Tensor) -> Tensor:
    # (r + 1) log(1/2 + 1/(2r)); log(1 + 1/r) = softplus(-log r)
    return (log_r.exp() + 1) * (softplus(-log_r) - _LOG2)


def _jensen_shannon_f(log_r: Tensor) -> Tensor:
    r = log_r.exp()
    return r * log_r - (r + 1) * (softplus(log_r) - _LOG2)


def _neyman_f(log_r: Tensor) -> Tensor:
    return (1 - log_r.exp()) ** 2 * (-log_r).exp()


DIVERGENCES: tuple[Divergence, ...] = (
    Divergence("reverse_kl", lambda a: -a, torch.ones_like),
    Divergence("softened_reverse_kl", _softened_f, lambda a: torch.sigmoid(-a)),
    Divergence("jensen_shannon", _jensen_shannon_f, torch.sigmoid),
    Divergence("squared_hellinger", lambda a: 1 - (a / 2).exp(), lambda a: (a / 2).exp() / 4),
    Divergence("forward_kl", lambda a: a.exp() * a, torch.exp),
    Divergence("jeffreys", lambda a: (a.exp() - 1) * a, lambda a: a.exp() + 1),
    Divergence("neyman_chi2", _neyman_f, lambda a: 2 * (-a).exp()),
    Divergence("pearson_chi2", lambda a: (a.exp() - 1) ** 2, lambda a: 2 * (2 * a).exp()),
)


def get_divergence(name: str) -> Divergence:
    """The divergence of that name or alias.

    Raises:
        ValueError: naming what is allowed and the nearest name.
    """
    full = divergence_name(name)
    return next(divergence for divergence in DIVERGENCES if divergence.name == full)
