"""Clips of moving digits: sampled from any start, and scored against the world's law.

The condition is a set of images, several samples of each; rows of one image share a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffdiv.core.latent_stats import (
    Granularity,
    LatentMoments,
    LatentSpace,
    LatentStats,
    analytic_init,
)
from diffdiv.core.leakage import ConditionDraw, ConditionNoise
from diffdiv.core.noise import normal
from diffdiv.core.schedule import Schedule
from diffdiv.core.tensor import flat_mean
from diffdiv.data.moving_digits import MovingDigits, MovingWorld, bayes_denoiser, first_frames
from diffdiv.metrics.leakage import ImageDenoiser, leakage_table
from diffdiv.metrics.motion import (
    Features,
    circular_speed,
    clip_frechet,
    first_frame_error,
    motion_law_distance,
    static_fraction,
)
from diffdiv.models.clip_net import Degrade
from diffdiv.models.denoiser import Condition, Denoiser
from diffdiv.samplers import sample_ode, time_grid


def principal_features(clips: Tensor, count: int = 24) -> Features:
    """The ``count`` first principal components of clips [N, F, *space], float64."""
    flat = clips.flatten(1).double()
    centre = flat.mean(0)
    axes = torch.linalg.eigh(torch.cov(flat.T)).eigenvectors[:, -count:]
    return lambda x: (x.flatten(1).double() - centre) @ axes


@dataclass(frozen=True, eq=False)
class ClipJudge:
    """What samples for these images are measured against.

    Attributes:
        world: the law.
        image: one row a sample [B, *space].
        groups: rows of one image share a number [B].
        reference: clips of the very law for these images.
        features: of the Frechet distance.
    """

    world: MovingWorld
    image: Tensor
    groups: Tensor
    reference: Tensor
    features: Features

    @property
    def seeds(self) -> int:
        """Samples of each image."""
        return int((self.groups == self.groups[0]).sum())

    @staticmethod
    def of(world: MovingWorld, images: Tensor, *, seeds: int, repeats: int = 50) -> "ClipJudge":
        """Judge of ``seeds`` samples for each of the images [N, *space].

        The reference holds every image with every velocity in proportion to the prior, to within
        one part in ``repeats``.
        """
        groups = torch.arange(len(images)).repeat_interleave(seeds)
        counts = (world.prior * repeats).round().long()
        motion = torch.arange(len(counts)).repeat_interleave(counts)
        still = images.repeat_interleave(len(motion), 0)
        reference = world.clips(still, motion.repeat(len(images)))
        features = principal_features(reference)
        return ClipJudge(world, images[groups], groups, reference, features)

    def real(self, *, seed: int) -> Tensor:
        """Samples of the law itself: what the ideal model would be measured at."""
        rows = range(len(self.image))
        motion = self.world.draw_motion(rows, seed=seed, purpose="judge.real")
        return self.world.clips(self.image, motion)

    def measure(self, clips: Tensor) -> dict[str, float]:
        """Figures of one clip a row.

        Returns:
            "motion" and "static_fraction" by cross-correlation (a clip is static below half a cell
            per frame); "image_law_distance": total variation between the motions of one image and
            their law; "fit_error": mean squared distance to the image's nearest clip (quality);
            "first_frame_error"; "frechet_distance" on 24 principal components.
        """
        motion = self.world.nearest_motion(clips, self.image)
        nearest = self.world.clips(self.image, motion)
        speed = circular_speed(clips)
        return {
            "frechet_distance": clip_frechet(clips, self.reference, self.features, batch=4096),
            "image_law_distance": motion_law_distance(motion, self.groups, self.world.prior),
            "motion": float(speed.mean()),
            "static_fraction": static_fraction(speed, 0.5),
            "fit_error": float(flat_mean((clips - nearest).square()).mean()),
            "first_frame_error": first_frame_error(clips, self.image),
        }


def clip_stats(clips: Tensor, granularity: Granularity) -> LatentStats:
    """Mean and variance of clips [N, F, *space] for Analytic-Init."""
    five = clips.reshape(*clips.shape[:2], 1, 1, -1)
    moments = LatentMoments(LatentSpace("none", 1, five.shape[1], 1, five.shape[4]))
    moments.add(five)
    return moments.stats(granularity)


def sample_clips(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    seed: int,
    num_steps: int = 25,
    start: float = 1.0,
    stats: LatentStats | None = None,
) -> Tensor:
    """Clips from an earlier start (Analytic-Init of arXiv 2406.15735), by DDIM.

    Args:
        denoiser: of these images' clips, vp family.
        shape: [B, F, *space].
        seed: of the noise.
        num_steps: of the sampler, spread over what is left of the time.
        start: M, part of the times that is used.
        stats: of clean clips: start from the nearest Gaussian; None: from N(0, I).
    """
    schedule = denoiser.schedule
    low = replace(schedule, t_max=round(start * (schedule.t_max + 1)) - 1)
    times = time_grid(low, num_steps)
    x = normal(shape[1:], seed=seed, purpose="clip.sample", indices=range(shape[0]))
    if stats is not None:
        five = x.reshape(*shape[:2], 1, 1, -1)
        x = analytic_init(stats, schedule, float(times[0])).draw(five).reshape(x.shape)
    return sample_ode(denoiser, x / schedule.sigma(times[:1]).to(x), Condition(), times)


def shown_through(noise: ConditionNoise) -> Degrade:
    """A degradation at inference, its level untold: a low-pass that needs no training (ALG)."""

    def degrade(image: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        never_clean = ConditionDraw(
            torch.zeros_like(t), torch.ones_like(t), torch.zeros_like(image)
        )
        return noise(image, t.contiguous(), never_clean)[0], torch.zeros(len(image))

    return degrade


def told_through(noise: ConditionNoise) -> Degrade:
    """The clean image, but told the median level of training at t: how far to trust it.

    A network that has seen images of this level alone at t has not learned to read the motion off
    them; told 0 there, it is asked what it was never asked in training.
    """

    def degrade(image: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros_like(image)
        draw = ConditionDraw(torch.zeros_like(t), torch.ones_like(t), zeros)
        return image, noise(zeros, t.contiguous(), draw)[1]

    return degrade


def noised_through(noise: ConditionNoise, *, seed: int) -> Degrade:
    """The median noise of training at inference too, fresh at every t, its level told."""

    def degrade(image: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        rows, purpose = range(len(image)), f"shown.{float(t[0]):g}"
        eps = normal(image.shape[1:], seed=seed, purpose=purpose, indices=rows)
        draw = ConditionDraw(torch.zeros_like(t), torch.ones_like(t), eps.to(image))
        return noise(image, t.contiguous(), draw)

    return degrade


@dataclass(frozen=True, eq=False)
class Trial:
    """What models of one world are tried on: clips they have seen, others, and samples.

    Attributes:
        world: the law of clips.
        schedule: of the models, vp family.
        sets: clips and images, "seen" (training pairs, if there are fixed ones) and "unseen".
        judge: of samples for unseen images.
        stats: of the training clips, by granularity.
    """

    world: MovingWorld
    schedule: Schedule
    sets: dict[str, tuple[Tensor, Tensor]]
    judge: ClipJudge
    stats: dict[Granularity, LatentStats]

    @staticmethod
    def of(
        data: MovingDigits, schedule: Schedule, *, num_images: int = 60, seeds: int = 20
    ) -> "Trial":
        """Trial of models trained on ``data``: ``seeds`` samples of so many unseen images."""
        world, images = data.world, first_frames(data.world, "test")
        motion = world.draw_motion(range(len(images)), seed=0, purpose="trial.unseen")
        sets = {"unseen": (world.clips(images, motion), images)}
        if data.motion is None:
            clips = data.batch(range(len(data.images)))[0]
        else:
            clips = world.clips(data.images, data.motion)
            sets["seen"] = (clips, data.images)
        kinds: tuple[Granularity, ...] = ("channel", "shrunk")
        stats = {kind: clip_stats(clips, kind) for kind in kinds}
        judge = ClipJudge.of(world, images[:num_images], seeds=seeds)
        return Trial(world, schedule, sets, judge, stats)

    def bayes(self, image: Tensor) -> Denoiser:
        """The ideal denoiser of the clips of these images."""
        return bayes_denoiser(self.world, self.schedule, image)

    def leakage(
        self, models: dict[str, ImageDenoiser], times: Sequence[float], *, draws: int = 4
    ) -> list[dict[str, float | str]]:
        """Rows of ``leakage_table``, the ideal denoiser first."""
        return leakage_table({"bayes": self.bayes, **models}, self.sets, times, seed=0, draws=draws)

    def samples(
        self,
        model: ImageDenoiser,
        *,
        seed: int,
        start: float = 1.0,
        init: Granularity | None = None,
    ) -> Tensor:
        """One clip for each row of the judge, from an earlier start if asked for."""
        shape = (len(self.judge.image), *self.judge.reference.shape[1:])
        stats = None if init is None else self.stats[init]
        return sample_clips(model(self.judge.image), shape, seed=seed, start=start, stats=stats)
