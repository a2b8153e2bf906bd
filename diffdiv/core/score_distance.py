"""Distances between scores, for score-based divergences (Diff-Instruct*, arXiv 2410.20898).

y       score difference at one sample, s_student - s_reference, in a stated space [B, ...]
d(y)    [B], zero only at y = 0;     d'(y)   its gradient, shape of y
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffdiv.core.tensor import expand_like


@dataclass(frozen=True)
class ScoreDistance:
    """A distance of score differences.

    Attributes:
        name: in configurations and reports.
        value: y [B, ...] -> d(y) [B].
        gradient: y [B, ...] -> d'(y) [B, ...].
    """

    name: str
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]


def squared() -> ScoreDistance:
    """d = |y|^2 / 2: SIM (arXiv 2410.16794), and SiD with alpha = 1."""
    return ScoreDistance("squared", lambda y: y.flatten(1).square().sum(1) / 2, lambda y: y)


def pseudo_huber(c: float) -> ScoreDistance:
    """d = sqrt(|y|^2 + c^2) - c, the norm over all dimensions of a sample.

    Far from 0 its gradient is a unit vector: the size of y is lost, as a normaliser would lose it.

    Args:
        c: where it turns from quadratic to linear, in the unit of y: a value for scores is not one
            for x0.

    Raises:
        ValueError: if c is not positive.
    """
    if c <= 0:
        raise ValueError(f"pseudo-Huber's c must be positive, not {c}")

    def root(y: Tensor) -> Tensor:
        return (y.flatten(1).square().sum(1) + c * c).sqrt()

    return ScoreDistance(
        f"pseudo_huber({c:g})", lambda y: root(y) - c, lambda y: y / expand_like(root(y), y)
    )
