"""Digits that move on a torus: image-to-video worlds whose ideal denoiser is known exactly.

    F, K, D   frames; velocities a clip can have; dimensions of space (1: strip, 2: torus)
    image     the condition, a clean first frame [B, *space], in [-1, 1], background -1
    x0        clip [B, F, *space]: frame f is the image shifted by f times the velocity
    motion    index of the velocity [B], int64; its law is the same for every image

Image and velocity determine the clip, so given the image x0 has K values, and the posterior of
x_t = alpha x0 + sigma eps is a softmax over them. A shift keeps the norm, so |x_t - alpha x0|^2
differs between them by the inner product alone:

    p(k | x_t, image) ~ prior_k exp(alpha <x_t, clip_k> / sigma^2),   E[x0 | x_t, image] its mean.

Whatever a network knows of the motion beyond that, it has read off the image: in these worlds the
image says nothing about the motion. The digits are scikit-learn's (see data/digits.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import torch
from torch import Tensor, nn

from diffdiv.core.noise import permuted, uniform
from diffdiv.core.schedule import Schedule
from diffdiv.core.tensor import expand_like
from diffdiv.data.digits import Split, load_digits
from diffdiv.models.denoiser import Denoiser

_MARGIN = 4  # cells on every side of the digit in the first frame
_GLYPH = 8  # cells of a digit


@dataclass(frozen=True, eq=False)
class MovingWorld:
    """The law of clips given an image.

    Attributes:
        space: cells along each direction; every direction is periodic.
        num_frames: F.
        velocities: cells per frame [K, D], int64.
        prior: probability of each velocity [K], positive, sum one, float64.
    """

    space: tuple[int, ...]
    num_frames: int
    velocities: Tensor
    prior: Tensor

    def __post_init__(self) -> None:
        """Raise ValueError for shapes or a prior that make no world."""
        if self.velocities.shape != (len(self.prior), len(self.space)):
            shape = [len(self.prior), len(self.space)]
            raise ValueError(f"velocities: shape {list(self.velocities.shape)} is not {shape}")
        if not (self.prior > 0).all() or abs(float(self.prior.sum()) - 1) > 1e-9:
            raise ValueError(f"prior: {self.prior.tolist()} is not positive with sum one")

    @property
    def speeds(self) -> Tensor:
        """Length of each velocity [K], cells per frame, float64."""
        return self.velocities.double().norm(dim=1)

    @property
    def is_still(self) -> Tensor:
        """Which velocities are zero [K]."""
        return (self.velocities == 0).all(1)

    def sources(self) -> Tensor:
        """For every velocity, frame and cell: the image's cell it shows [K, F, cells], int64."""
        grid = torch.stack(
            torch.meshgrid(*(torch.arange(n) for n in self.space), indexing="ij"), -1
        ).reshape(-1, len(self.space))
        shift = torch.arange(self.num_frames)[:, None] * self.velocities[:, None]  # [K, F, D]
        cells = (grid - shift[:, :, None]) % torch.tensor(self.space)
        strides = torch.tensor([prod(self.space[d + 1 :]) for d in range(len(self.space))])
        return (cells * strides).sum(-1)

    def every_clip(self, image: Tensor) -> Tensor:
        """The clip of every velocity [B, K, F, *space] for images [B, *space]."""
        if image.shape[1:] != self.space:
            raise ValueError(f"image: shape {list(image.shape)} is not [B, {self.space}]")
        clips = image.flatten(1)[:, self.sources().to(image.device)]
        return clips.unflatten(-1, self.space)

    def clips(self, image: Tensor, motion: Tensor) -> Tensor:
        """The clip of one velocity each, [B, F, *space]."""
        sources = self.sources().to(image.device)[motion].flatten(1)
        return image.flatten(1).gather(1, sources).unflatten(1, (self.num_frames, *self.space))

    def draw_motion(self, indices: Sequence[int], *, seed: int, purpose: str) -> Tensor:
        """Velocities [B] of the global sample indices, drawn from the prior."""
        return self.motion_at(uniform(seed=seed, purpose=purpose, indices=indices))

    def motion_at(self, u: Tensor) -> Tensor:
        """Quantiles of the prior at u in [0, 1): indices of velocities, in their order."""
        motion = torch.searchsorted(self.prior.cumsum(0), u.double(), right=True)
        return motion.clamp_max(len(self.prior) - 1)

    def posterior(
        self, x_t: Tensor, image: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> Tensor:
        """Probability of every velocity given x_t and the image [B, K], in the dtype of x_t.

        Args:
            x_t: noised clips [B, F, *space].
            image: [B, *space].
            alpha, sigma: [B] or numbers; sigma is positive.
        """
        return self._log_joint(x_t, self.every_clip(image), alpha, sigma).softmax(1)

    def x0_mean(
        self, x_t: Tensor, image: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> Tensor:
        """Mean of x0 given x_t and the image: no denoiser has a smaller mean squared error."""
        clips = self.every_clip(image.to(x_t))
        share = self._log_joint(x_t, clips, alpha, sigma).softmax(1)
        return (share[:, None] @ clips.flatten(2)).view_as(x_t)

    def nearest_motion(self, clips: Tensor, image: Tensor) -> Tensor:
        """Velocity whose clip of this image is nearest to ``clips``, [B]."""
        return self._inner(clips, self.every_clip(image.to(clips))).argmax(1)

    def _log_joint(
        self, x_t: Tensor, clips: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> Tensor:
        alpha, sigma = (
            torch.as_tensor(value, dtype=torch.float64, device=x_t.device)
            for value in (alpha, sigma)
        )
        inner = self._inner(x_t, clips)
        return self.prior.log().to(x_t) + expand_like(alpha / sigma.square(), inner) * inner

    def _inner(self, x_t: Tensor, clips: Tensor) -> Tensor:
        """<x_t, clip_k> [B, K]."""
        if x_t.shape[1:] != clips.shape[2:]:
            raise ValueError(f"clips: shape {list(x_t.shape)} is not [B, {list(clips.shape[2:])}]")
        return (clips.flatten(2) @ x_t.flatten(1)[..., None]).squeeze(-1)


def _world(
    space: tuple[int, ...], num_frames: int, max_speed: int, still_probability: float
) -> MovingWorld:
    """All velocities up to ``max_speed`` along each direction; the moving ones equally likely."""
    if not 0 < still_probability < 1:
        raise ValueError(f"still_probability: {still_probability} is not in (0, 1)")
    steps = range(-max_speed, max_speed + 1)
    velocities = torch.tensor(list(product(steps, repeat=len(space))))
    is_still = (velocities == 0).all(1)
    moving = (1 - still_probability) / (len(velocities) - 1)
    prior = torch.where(is_still, still_probability, moving).double()
    return MovingWorld(space, num_frames, velocities, prior / prior.sum())


def strip_world(
    *, num_frames: int = 6, max_speed: int = 2, still_probability: float = 0.6
) -> MovingWorld:
    """Column profiles of digits on a circle of 16 cells; five velocities by default."""
    return _world((_GLYPH + 2 * _MARGIN,), num_frames, max_speed, still_probability)


def torus_world(
    *, num_frames: int = 6, max_speed: int = 2, still_probability: float = 0.6
) -> MovingWorld:
    """8x8 digits on a torus of 16x16 cells; 25 velocities by default."""
    return _world((_GLYPH + 2 * _MARGIN,) * 2, num_frames, max_speed, still_probability)


def first_frames(world: MovingWorld, split: Split) -> Tensor:
    """First frames [N, *space] of a world from its digits: 1500 "train", 297 "test"."""
    glyphs = load_digits(split)[0][:, 0]
    if len(world.space) == 1:
        ink = (glyphs + 1).sum(1)
        glyphs = 2 * ink / ink.amax(1, keepdim=True) - 1
    return nn.functional.pad(glyphs, (_MARGIN, _MARGIN) * len(world.space), value=-1.0)


class MovingDigits:
    """Training clips by global sample index.

    With ``num_pairs`` every image has one clip for good, as in a collection of real videos, and a
    network can learn the motion of each image by heart. The velocities are dealt out in proportion
    to the prior, so that what a model gets wrong is not the luck of a small draw. Without, every
    sample moves anew.
    """

    def __init__(
        self, world: MovingWorld, *, num_pairs: int | None, seed: int, split: Split = "train"
    ) -> None:
        """Choose the images and, with ``num_pairs``, their velocities.

        Raises:
            ValueError: if there are not so many digits.
        """
        frames = first_frames(world, split)
        count = len(frames) if num_pairs is None else num_pairs
        if not 0 < count <= len(frames):
            raise ValueError(f"num_pairs: {count} is not in 1..{len(frames)}")
        chosen = [permuted(i, len(frames), seed=seed, purpose="moving.image") for i in range(count)]
        self.world, self.images, self._seed = world, frames[chosen], seed
        #: velocity of every image [N]; None: drawn anew for every sample
        self.motion = None
        if num_pairs is not None:
            dealt = [permuted(i, count, seed=seed, purpose="moving.pair") for i in range(count)]
            self.motion = world.motion_at((torch.tensor(dealt) + 0.5) / count)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x0 [B, F, *space] and image [B, *space] of the global sample indices."""
        rows = [
            permuted(index, len(self.images), seed=self._seed, purpose="moving.order")
            for index in indices
        ]
        motion = (
            self.world.draw_motion(indices, seed=self._seed, purpose="moving.sample")
            if self.motion is None
            else self.motion[rows]
        )
        return self.world.clips(self.images[rows], motion), self.images[rows]


def bayes_denoiser(world: MovingWorld, schedule: Schedule, image: Tensor) -> Denoiser:
    """The ideal denoiser of the clips of these images [B, *space], in the place of a network."""

    def call(_net: nn.Module, x_t: Tensor, t: Tensor, _cond: object) -> Tensor:
        return world.x0_mean(x_t, image, schedule.alpha(t), schedule.sigma(t))

    # told t itself, whatever scale a network of this family would be told
    return Denoiser(nn.Identity(), call, replace(schedule, net_time=lambda t: t), "x0")
