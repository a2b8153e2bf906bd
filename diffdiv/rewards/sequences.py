"""Rewards of DNA sequences: motifs, and any function of the user's, checked before it is trusted.

x         one-hot or soft sequences [B, L, V], or int64 tokens [B, L]; DNA: V = 4, A, C, G, T
reward    [B], higher is better; its unit is the unit of alpha in KL-regularised fine-tuning
M         motifs; u in (0, 1) says how surely one is there
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import conv1d, one_hot

from diffdiv.data.motifs import MotifScan, read_motifs


class RewardError(ValueError):
    """A reward does not do what fine-tuning needs of it."""


class RewardFunction(Protocol):
    """Scores sequences; see :class:`SequenceReward` for what it is given."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Rewards [B]."""


@dataclass(frozen=True)
class SequenceReward:
    """A reward function with what is known of it.

    Calling it accepts tokens and one-hot or soft sequences alike.

    Attributes:
        name: in reports and errors.
        function: scores a batch; each score depends on its own sequence only.
        takes: what the function is given, "one_hot" (float [B, L, V]) or "tokens" (int64 [B, L]).
        differentiable: whether its gradient in one-hot input means something.
        bounds: (lowest, highest) value possible, if known.
        num_tokens: V.
    """

    name: str
    function: RewardFunction
    takes: Literal["one_hot", "tokens"] = "one_hot"
    differentiable: bool = True
    bounds: tuple[float, float] | None = None
    num_tokens: int = 4

    def __post_init__(self) -> None:
        if self.takes == "tokens" and self.differentiable:
            raise ValueError(f"reward {self.name}: a function of tokens has no gradient")

    def __call__(self, x: Tensor, /) -> Tensor:
        """Rewards [B], float32 or better.

        Raises:
            RewardError: if the result is not a finite number for each sequence.
        """
        if self.takes == "tokens":
            given = x.argmax(-1) if x.is_floating_point() else x
        else:
            given = x if x.is_floating_point() else one_hot(x, self.num_tokens).float()
        found = self.function(given)
        if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RewardError(f"reward {self.name}: returned {got}, not a tensor [{len(x)}]")
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        if not torch.isfinite(found.detach()).all():
            bad = int((~torch.isfinite(found.detach())).sum())
            raise RewardError(f"reward {self.name}: {bad} of {len(x)} values are not finite")
        return found


def check_reward(
    reward: SequenceReward,
    length: int,
    *,
    needs_gradient: bool,
    device: torch.device | str = "cpu",
    seed: int = 0,
    start: Tensor | None = None,
) -> None:
    """Try a reward on random sequences, so that a faulty one is named before the first step.

    Args:
        reward: to try.
        length: L.
        needs_gradient: whether training differentiates it (DRAKES, guidance).
        device: to try on.
        seed: of the sequences.
        start: tokens to keep [L]; letters are drawn where there is none of them (the mask). None:
            letters are drawn everywhere.

    Raises:
        RewardError: if it raises, returns another shape or a number that is not finite, differs
            between two calls (dropout left on), depends on the other sequences of the batch (batch
            norm left in training mode), or has no usable gradient although one is needed.
    """
    generator, size = torch.Generator().manual_seed(seed), reward.num_tokens
    # of 21 tokens of proteins the last is "unknown"
    tokens = torch.randint(0, min(size, 20), (4, length), generator=generator)
    if start is not None:
        tokens = torch.where(start.cpu() < size, start.cpu(), tokens)
    x = one_hot(tokens, size).float().to(device)
    name = f"reward {reward.name}"
    try:
        with torch.no_grad():
            found, again, alone = reward(x), reward(x), reward(x[:1])
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"{name}: raised {type(error).__name__}: {error}") from error
    if not torch.equal(found, again):
        raise RewardError(f"{name}: two calls differ; is dropout left on (net.eval())?")
    if not torch.allclose(found[:1], alone, rtol=1e-3, atol=1e-5):
        raise RewardError(f"{name}: a value depends on the other sequences of the batch")
    if reward.bounds is not None:
        low, high = reward.bounds
        if found.min() < low or found.max() > high:
            raise RewardError(f"{name}: gave values outside its bounds {low:g}..{high:g}")
    if needs_gradient:
        _check_gradient(reward, x, name)


def _check_gradient(reward: SequenceReward, x: Tensor, name: str) -> None:
    if not reward.differentiable:
        raise RewardError(f"{name}: is not differentiable; choose a method that needs no gradient")
    x = x.clone().requires_grad_()
    try:
        with torch.enable_grad():
            total = reward(x).sum()
            gradient = torch.autograd.grad(total, x, allow_unused=True)[0]
    except RuntimeError as error:
        raise RewardError(f"{name}: has no gradient ({error})") from error
    if gradient is None or not gradient.any():
        raise RewardError(f"{name}: its gradient is zero on random sequences (argmax inside?)")
    if not torch.isfinite(gradient).all():
        raise RewardError(f"{name}: its gradient is not finite")


@dataclass(frozen=True, eq=False)
class MotifPanel:
    """Motifs with weights, and pairs whose nearness counts.

    Attributes:
        scan: of M motifs.
        weights: by name; 0 where a motif is not named.
        pairs: (name, name, weight).
        threshold: share of a motif's best score at which it counts as half there.
    """

    scan: MotifScan
    weights: Mapping[str, float]
    pairs: Sequence[tuple[str, str, float]] = ()
    threshold: float = 0.8

    def __post_init__(self) -> None:
        named = {*self.weights, *(name for a, b, _ in self.pairs for name in (a, b))}
        if unknown := sorted(named - set(self.scan.names)):
            raise ValueError(f"weights, pairs: {unknown} are not among {self.scan.names}")

    def row(self, name: str) -> int:
        """Number of a motif."""
        return self.scan.names.index(name)

    def weight_vector(self, x: Tensor) -> Tensor:
        """[M], like ``x``."""
        return torch.tensor([self.weights.get(name, 0.0) for name in self.scan.names]).to(x)

    def margin(self, x: Tensor) -> Tensor:
        """Score minus threshold at each place [B, M, L], nats."""
        return self.scan(x) - (self.threshold * self.scan.best)[:, None].to(x)


def affinity_reward(panel: MotifPanel, *, tau: float = 3.0, scale: float = 1.0) -> RewardFunction:
    """One bounded value per motif: u = sigmoid((log-sum-exp over places of the margin) / tau).

    reward = scale (sum of w u + sum over pairs of c u_a u_b). Smooth far below the threshold, where
    the gradient of :func:`occupancy_reward` has died out, and not to be raised by many weak sites.
    """

    def reward(x: Tensor) -> Tensor:
        u = (panel.margin(x).logsumexp(2) / tau).sigmoid()
        total = u @ panel.weight_vector(x)
        for a, b, weight in panel.pairs:
            total = total + weight * u[:, panel.row(a)] * u[:, panel.row(b)]
        return scale * total

    return reward


def occupancy_reward(
    panel: MotifPanel, *, tau: float = 1.0, window: tuple[int, int] = (8, 26)
) -> RewardFunction:
    """Counts of sites, with diminishing returns, and of pairs at the right distance.

    Occupancy o = sigmoid(margin / tau) at each place; n = sum of o;
    reward = sum of w log(1 + n) + sum over pairs of c log(1 + sum of o_a(i) o_b(j)), the last sum
    over places whose centres are ``window`` apart, in either order.
    """
    low, high = window
    if not 0 < low <= high or not tau > 0:
        raise ValueError(f"window, tau: {window}, {tau} are not increasing from 1 and positive")

    def reward(x: Tensor) -> Tensor:
        occupancy = (panel.margin(x) / tau).sigmoid()
        total = occupancy.sum(2).log1p() @ panel.weight_vector(x)
        kernel = torch.ones(2 * high + 1).to(x)
        kernel[high - low + 1 : high + low] = 0
        for a, b, weight in panel.pairs:
            near = conv1d(occupancy[:, panel.row(b), None], kernel[None, None], padding=high)[:, 0]
            total = total + weight * (occupancy[:, panel.row(a)] * near).sum(1).log1p()
        return total

    return reward


def motif_file_reward(
    path: Path,
    *,
    weights: Mapping[str, float] | None = None,
    pairs: Sequence[tuple[str, str, float]] = (),
    threshold: float = 0.8,
    tau: float = 3.0,
) -> SequenceReward:
    """The affinity reward of the motifs of a MEME or JASPAR file.

    Args:
        path: the file.
        weights: name of a motif ("MA0139.1 CTCF", as in the file) -> weight; None = all 1.
        pairs, threshold, tau: see :class:`MotifPanel` and :func:`affinity_reward`.

    Raises:
        ValueError: if the file cannot be read, or a name is not in it.
    """
    scan = MotifScan(read_motifs(path))
    chosen = dict.fromkeys(scan.names, 1.0) if weights is None else weights
    panel = MotifPanel(scan, chosen, pairs, threshold)
    values = [*chosen.values(), *(weight for _, _, weight in pairs)]
    bounds = sum(min(v, 0.0) for v in values), sum(max(v, 0.0) for v in values)
    return SequenceReward(path.name, affinity_reward(panel, tau=tau), bounds=bounds)
