"""Rewards of the embedded DNA world, and the best that any model can do for them.

    r, w     reward [N] of exact samples of the world; their weights in the tilted law
    alpha    reward units per nat

The law that maximises E[r] - alpha KL(law || world) is world(x) exp(r(x) / alpha) / Z; its mean
reward against its KL is the exact front, which no model can pass. Estimated by importance weights
on exact samples; the table that ships was made by benchmarks/dna_front.py.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isinf, log

import torch
from torch import Tensor

from diffdiv.data.dna_world import world_motifs
from diffdiv.data.motifs import MotifScan
from diffdiv.resources import resource
from diffdiv.rewards.sequences import (
    MotifPanel,
    SequenceReward,
    affinity_reward,
    occupancy_reward,
)

WEIGHTS = {
    "HNF1": 0.6, "HNF4": 0.6, "FOXA": 0.5, "CEBP": 0.4, "AP1": 0.3, "GATA": -0.2, "CTCF": -0.6,
}  # fmt: skip
PAIRS = (("HNF1", "HNF4", 1.2), ("FOXA", "CEBP", 0.9), ("HNF4", "FOXA", 0.6))
FRONT = "assets/embedded_dna/front.json"


def _panel(purity: float, threshold: float) -> MotifPanel:
    return MotifPanel(MotifScan(world_motifs(purity), pseudo=0.0), WEIGHTS, PAIRS, threshold)


def world_reward() -> SequenceReward:
    """What models are scored by: sites and well-spaced pairs of liver factors."""
    return SequenceReward("dna_world", occupancy_reward(_panel(0.85, 0.62), tau=1.0))


def world_twin() -> SequenceReward:
    """The same biology measured by another instrument; no training sees it."""
    twin = occupancy_reward(_panel(0.90, 0.70), tau=0.5, window=(6, 22))
    return SequenceReward("dna_world_twin", twin)


def world_affinity() -> SequenceReward:
    """What to train on by gradient: smooth and bounded, see :func:`affinity_reward`."""
    values = [*WEIGHTS.values(), *(weight for _, _, weight in PAIRS)]
    bounds = 2 * sum(min(v, 0.0) for v in values), 2 * sum(max(v, 0.0) for v in values)
    affinity = affinity_reward(_panel(0.85, 0.62), tau=3.0, scale=2.0)
    return SequenceReward("dna_world_affinity", affinity, bounds=bounds)


@dataclass(frozen=True)
class FrontPoint:
    """The best law at one alpha.

    Attributes:
        alpha: reward units per nat.
        reward: mean under the law, with its standard error.
        kl: from the world, nats, with its standard error.
        twin: mean twin reward.
        value: alpha log Z, the maximum of E[r] - alpha KL.
        bits_per_base: of the law's sequences, under the world.
        effective: number of samples that carry the weights; below a few hundred, doubt the row.
    """

    alpha: float
    reward: float
    reward_error: float
    kl: float
    kl_error: float
    twin: float
    value: float
    bits_per_base: float
    effective: float


def front_point(reward: Tensor, alpha: float, *, twin: Tensor, bits: Tensor) -> FrontPoint:
    """The tilted law from N independent exact samples.

    Args:
        reward, twin: [N].
        alpha: positive.
        bits: -log2 p / L of each sample [N].
    """
    r, n = reward.double(), len(reward)
    log_z = float((r / alpha).logsumexp(0)) - log(n)
    relative = (r / alpha - log_z).exp()  # dP*/dP, mean 1
    w = relative / n
    mean = float(w @ r)
    # first-order influence of each sample on the two estimates
    on_reward = relative * (r - mean)
    on_kl = on_reward / alpha - (relative - 1)
    return FrontPoint(
        alpha=alpha,
        reward=mean,
        reward_error=float(on_reward.square().mean().sqrt()) / n**0.5,
        kl=mean / alpha - log_z,
        kl_error=float(on_kl.square().mean().sqrt()) / n**0.5,
        twin=float(w @ twin.double()),
        value=mean if isinf(alpha) else alpha * log_z,
        bits_per_base=float(w @ bits.double()),
        effective=float(1 / w.square().sum()),
    )


@dataclass(frozen=True)
class Front:
    """Rows by falling alpha, the first (alpha = inf) the world itself.

    Attributes:
        rows: points of the front.
        facts: how it was made.
    """

    rows: tuple[FrontPoint, ...]
    facts: Mapping[str, object]

    def reward_at(self, kl: float) -> float:
        """Largest mean reward at this KL from the world, by interpolation in sqrt(KL).

        The front starts like sqrt(KL); between rows the chord lies at most a little below it.

        Raises:
            ValueError: outside the table.
        """
        kls = [max(row.kl, 0.0) ** 0.5 for row in self.rows]
        if not 0 <= kl <= kls[-1] ** 2:
            raise ValueError(f"kl: {kl:.3g} is not in 0..{kls[-1] ** 2:.3g} nats")
        at = min(max(sum(k <= kl**0.5 for k in kls), 1), len(kls) - 1)
        share = (kl**0.5 - kls[at - 1]) / (kls[at] - kls[at - 1])
        return self.rows[at - 1].reward * (1 - share) + self.rows[at].reward * share

    def bound_at(self, kl: float) -> float:
        """What no law at this KL >= 0 can pass: least of alpha KL + alpha log Z over the rows.

        By the variational formula of Donsker and Varadhan every alpha gives such a bound; that of a
        row is the tangent of the front there. Beyond the last row it stays true and grows loose.
        """
        return min(row.value + row.alpha * kl for row in self.rows if not isinf(row.alpha))

    def to_json(self) -> str:
        """Text of the table."""
        rows = [
            {k: None if isinf(v) else round(v, 5) for k, v in asdict(row).items()}
            for row in self.rows
        ]
        lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)
        return f'{{\n "facts": {json.dumps(self.facts)},\n "rows": [\n  {lines}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> "Front":
        """Of :meth:`to_json`."""
        content = json.loads(text)
        rows = [{**row, "alpha": row["alpha"] or inf} for row in content["rows"]]
        return cls(tuple(FrontPoint(**row) for row in rows), content["facts"])


def read_front() -> Front:
    """The table that ships, for :func:`world_reward` on 100 bp."""
    return Front.from_json(resource(FRONT).read_text("utf-8"))


@torch.no_grad()
def score(reward: SequenceReward, tokens: Tensor, *, chunk: int = 1024) -> Tensor:
    """Rewards [N] of many sequences [N, L], in bounded memory."""
    return torch.cat([reward(part) for part in tokens.split(chunk)])
