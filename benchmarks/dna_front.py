"""The exact reward/KL front of the embedded DNA world, for assets/embedded_dna/front.json.

    python benchmarks/dna_front.py --n 800000 --out assets/embedded_dna/front.json

Exact samples of the grammar, weighted by exp(reward / alpha); see diffdiv/rewards/dna_world.py.
"""

import argparse
import time
from pathlib import Path

import torch

from diffdiv.data.dna_world import bits_per_base, dna_world
from diffdiv.rewards.dna_world import Front, front_point, score, world_reward, world_twin

INFINITY = float("inf")
ALPHAS = (
    INFINITY, 16.0, 8.0, 4.0, 3.0, 2.0, 1.5, 1.2, 1.0, 0.85, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3,
)  # fmt: skip
CHUNK = 8192


def main() -> None:
    """Sample, score, tilt, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=800_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, world = time.process_time(), dna_world()
    rewards, twins, log_probs = [], [], []
    for start in range(0, args.n, CHUNK):
        tokens = world.sample(range(start, min(start + CHUNK, args.n)), seed=args.seed)
        rewards.append(score(world_reward(), tokens))
        twins.append(score(world_twin(), tokens))
        log_probs.append(world.log_prob(tokens))
    reward, twin, log_prob = torch.cat(rewards), torch.cat(twins), torch.cat(log_probs)
    bits = -log_prob / (world.length * torch.log(torch.tensor(2.0, dtype=torch.float64)))
    rows = tuple(front_point(reward, alpha, twin=twin, bits=bits) for alpha in ALPHAS)
    entropy, error = bits_per_base(log_prob, world.length)
    best_of = {}
    for count in (4, 16, 64, 256):
        whole = reward[: len(reward) // count * count].view(-1, count)
        best_of[str(count)] = round(float(whole.amax(1).mean()), 4)
    facts = {
        "command": f"python benchmarks/dna_front.py --n {args.n} --seed {args.seed}",
        "samples": args.n,
        "length": world.length,
        "entropy_bits_per_base": round(entropy, 5),
        "entropy_error": round(error, 5),
        "reward_std": round(float(reward.std()), 4),
        "reward_99_percent": round(float(reward.quantile(0.99)), 4),
        "twin_correlation": round(float(torch.corrcoef(torch.stack([reward, twin]))[0, 1]), 4),
        "best_of_n": best_of,
        "cpu_seconds": round(time.process_time() - began),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(Front(rows, facts).to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
