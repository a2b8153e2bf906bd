"""What shows that a reward was hacked: figures of images, and of the networks, before and after.

    images      [B, 3, H, W] in [-1, 1]         score       images, prompts -> [B], higher is better
    x_t         alpha x0 + sigma eps            gap         fake_x0 - reference_x0 at x_t

A student that satisfies its reward and nothing else gives itself away: rewards that nobody trained
on stay behind, samples of one prompt become alike, colours and fine structure drift, the reward
falls under small changes that no eye minds, and it stays when the prompts are exchanged. No single
figure proves it; each is read beside its value before the training.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor, to_pil_image

from diffdiv.core.noise import normal
from diffdiv.core.schedule import Schedule
from diffdiv.core.tensor import flat_mean
from diffdiv.models.denoiser import Condition

Score = Callable[[Tensor, Sequence[str]], Tensor]
AnyDenoiser = Callable[[Tensor, Tensor, Condition], Tensor]
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def colour_and_texture(images: Tensor) -> dict[str, float]:
    """How images look, without any network.

    Args:
        images: [B, 3, H, W] in [-1, 1].

    Returns:
        Means over images, values of pixels taken in [0, 1]: "brightness" (luma), "contrast"
        (standard deviation of luma), "saturation" (of HSV: 1 - min / max of the channels; black has
        0), "clipped" (share of channel values within half an 8-bit level of 0 or 1), "edges" (mean
        size of the luma's gradient, per pixel), "high frequencies" (see
        :func:`high_frequency_share`).
    """
    pixels = ((images.float() + 1) / 2).clamp(0, 1)
    luma = _luma(pixels)
    top, bottom = pixels.amax(1), pixels.amin(1)
    down, right = luma.diff(dim=1)[:, :, :-1], luma.diff(dim=2)[:, :-1]
    half = 0.5 / 255
    return {
        "brightness": float(luma.mean()),
        "contrast": float(luma.flatten(1).std(1, correction=0).mean()),
        "saturation": float(((top - bottom) / top.clamp_min(1e-6)).mean()),
        "clipped": float(((pixels <= half) | (pixels >= 1 - half)).double().mean()),
        "edges": float((down.square() + right.square()).sqrt().mean()),
        "high frequencies": high_frequency_share(images),
    }


def _luma(pixels: Tensor) -> Tensor:
    weights = pixels.new_tensor(_LUMA).view(3, 1, 1)
    return (pixels * weights).sum(1)


def high_frequency_share(images: Tensor, *, cutoff: float = 0.5) -> float:
    """Share of the luma's variance at frequencies beyond ``cutoff`` times Nyquist's, in [0, 1].

    White noise has 1 - pi cutoff^2 / 4 there, photographs a few hundredths; grids and speckles that
    please a reward raise it.

    Args:
        images: [B, 3, H, W] in [-1, 1], not all of one value.
        cutoff: radius in the plane of frequencies, Nyquist's frequency of an axis = 1.
    """
    luma = _luma(images.double())
    power = torch.fft.fft2(luma - luma.mean((1, 2), keepdim=True)).abs().square()
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) * 2 for n in luma.shape[1:])
    beyond = torch.hypot(rows[:, None], columns[None]).to(power.device) > cutoff
    return float((power * beyond).sum() / power.sum().clamp_min(1e-12))


def jpeg(images: Tensor, *, quality: int = 50) -> Tensor:
    """Images through 8 bits and JPEG; no gradient. Shape and range as given."""
    found = []
    for image in ((images + 1) * 127.5).clamp(0, 255).round().to("cpu", torch.uint8):
        file = io.BytesIO()
        to_pil_image(image).save(file, format="JPEG", quality=quality)
        found.append(pil_to_tensor(Image.open(file)).float() / 127.5 - 1)
    return torch.stack(found).to(images)


def blur(images: Tensor) -> Tensor:
    """Images under a Gaussian of standard deviation 1 / 64 of the shorter side, 7 wide or more."""
    std = min(images.shape[-2:]) / 64
    return gaussian_blur(images, [2 * max(3, round(3 * std)) + 1] * 2, [std, std])


def crop(images: Tensor) -> Tensor:
    """Images without a sixteenth at each border, enlarged to their size again (bilinear)."""
    height, width = images.shape[-2:]
    inner = pad(images, (-(width // 16),) * 2 + (-(height // 16),) * 2)
    return interpolate(inner, (height, width), mode="bilinear", align_corners=False)


PERTURBATIONS: dict[str, Callable[[Tensor], Tensor]] = {"JPEG": jpeg, "blur": blur, "crop": crop}


@torch.no_grad()
def under_perturbations(score: Score, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Mean score of images as they are ("plain") and after each of ``PERTURBATIONS``."""
    changed = {"plain": images, **{name: change(images) for name, change in PERTURBATIONS.items()}}
    return {name: float(score(shown, prompts).double().mean()) for name, shown in changed.items()}


@torch.no_grad()
def prompt_dependence(score: Score, images: Tensor, prompts: Sequence[str]) -> float:
    """Mean score with their own prompts minus with those of others; about 0 = prompts ignored.

    Every image is scored with the first other text from the prompt half a batch on.

    Raises:
        ValueError: if all prompts are one text.
    """
    if len(set(prompts)) < 2:
        raise ValueError("prompts: all are the same, so none can be exchanged")
    count, others = len(prompts), []
    for i, own in enumerate(prompts):
        following = (prompts[(i + count // 2 + k) % count] for k in range(count))
        others.append(next(text for text in following if text != own))
    return float((score(images, prompts).double() - score(images, others).double()).mean())


def distance_within(features: Tensor, groups: int) -> float:
    """Mean Euclidean distance between two samples of one prompt; falls when variety is lost.

    Args:
        features: [groups * K, D], the K >= 2 samples of a prompt one after the other.
        groups: number of prompts.
    """
    stacked = features.double().unflatten(0, (groups, -1))
    count = stacked.shape[1]
    return float(torch.cdist(stacked, stacked).sum((1, 2)).mean() / (count * (count - 1)))


@dataclass(frozen=True)
class TimeBin:
    """Networks on the student's samples at one time; means over samples and dimensions.

    Attributes:
        t: the time.
        gap: (alpha / sigma)^2 |fake_x0 - reference_x0|^2, the squared score difference in units of
            eps: what the regulariser holds down.
        fake_loss: |fake_x0 - x0|^2. The best any denoiser can have on these samples is their own
            posterior variance.
        reference_loss: |reference_x0 - x0|^2. Above fake_loss, where the fake score has followed
            the student; a fake score that lags makes the regulariser's gradient wrong.
    """

    t: float
    gap: float
    fake_loss: float
    reference_loss: float


@torch.no_grad()
def by_time(
    x0: Tensor,
    cond: Condition,
    times: Sequence[float],
    *,
    reference: AnyDenoiser,
    fake: AnyDenoiser,
    schedule: Schedule,
    seed: int,
) -> list[TimeBin]:
    """Regulariser and quality of the fake score at each of some times.

    Args:
        x0: student samples [B, ...].
        cond: their conditions.
        times: in the schedule's unit.
        reference, fake: denoisers; the fake score is compared with this reference, unguided if its
            quality is the question.
        schedule: of both.
        seed: of the noise; the same noise at every time.
    """
    eps = normal(tuple(x0.shape[1:]), seed=seed, purpose="by time", indices=range(len(x0))).to(x0)
    found = []
    for time in times:
        t = torch.full((len(x0),), time, device=x0.device)
        x_t = schedule.add_noise(x0, eps, t)
        ours, theirs = fake(x_t, t, cond).double(), reference(x_t, t, cond).double()
        snr = (schedule.alpha(t) / schedule.sigma(t)).square()
        means = (
            float((flat_mean((a - b).square()) * scale).mean())
            for a, b, scale in ((ours, theirs, snr), (ours, x0, 1.0), (theirs, x0, 1.0))
        )
        found.append(TimeBin(time, *means))
    return found
