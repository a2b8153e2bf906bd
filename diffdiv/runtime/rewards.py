"""The rewards of a run: opened, tried, saved with it, their weights written down."""

from collections.abc import Mapping
from pathlib import Path

from diffdiv.models.backbones import LatentCodec
from diffdiv.rewards.weighted import WeightedRewards
from diffdiv.rewards.zoo import RewardSettings, open_image_rewards, weights_sha256
from diffdiv.runtime.run import Run
from diffdiv.sources import Source


def attach_rewards(
    run: Run, settings: Mapping[str, RewardSettings | None], *, pipeline: Path, source: Source
) -> WeightedRewards:
    """Rewards of decoded latents, as a run's configuration has them.

    Args:
        run: whose device they are on, and whose states keep their running means.
        settings: by name; None = switched off.
        pipeline: folder whose VAE decodes.
        source: whose shape and prompts they are tried on.

    Raises:
        FileNotFoundError, ValueError: naming weights or code that are missing or do not fit.
        RewardError: naming a reward that does not do what training needs.
    """
    codec = LatentCodec(pipeline, run.device)
    opened = open_image_rewards(settings, run.device)
    rewards = WeightedRewards(opened, codec.decode_with_gradient, seed=run.config.seed)
    rewards.check(codec.factor * source.shape[-1], source.captions([0])[0], run.device)
    run.attach("rewards", rewards)
    for name, digest in weights_sha256(settings).items() if run.is_main else ():
        run.event("weights", f"{name} has SHA-256 {digest}")
    return rewards
