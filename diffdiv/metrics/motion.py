"""How much clips move, how varied they are for one image, and how far two sets of clips differ.

    clips    on a torus [B, F, *space], or videos [B, F, 3, H, W] in [-1, 1]
    speed    of a clip, [B], in cells or pixels per frame
    flow     displacement of every pixel to the next frame [N, 2, H, W], pixels

Motion alone proves nothing: noise moves too. Every comparison here puts a distance between
distributions beside it (compare_clips). Optical flow as a score of generated video: RAFT, arXiv
2003.12039, in torchvision; the dynamic degree follows VBench's rule (arXiv 2311.17982) with
torchvision's network, so its figures are not VBench's. Weights come by path; nothing is downloaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torchvision.models.optical_flow import raft_large, raft_small
from torchvision.models.video import r3d_18

from diffdiv.core.tensor import flat_mean
from diffdiv.metrics.frechet import frechet_distance

Flow = Callable[[Tensor, Tensor], Tensor]
Features = Callable[[Tensor], Tensor]
_LARGEST = 0.05  # part of the pixels that decides whether a frame moves (VBench)
_SMALLEST = 128  # pixels a side that RAFT's pyramid needs
_MEAN, _STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # of Kinetics-400


def circular_displacements(clips: Tensor) -> Tensor:
    """Shift from each frame to the next at the peak of their circular cross-correlation.

    Args:
        clips: [B, F, *space] on a torus of D dimensions.

    Returns:
        [B, F - 1, D], float64, cells, each in [-n/2, n/2); ties go to the smaller index.
    """
    space = clips.shape[2:]
    axes = tuple(range(2, clips.ndim))
    spectrum = torch.fft.fftn(clips.double() - clips.double().mean(axes, keepdim=True), dim=axes)
    product = spectrum[:, 1:] * spectrum[:, :-1].conj()
    correlation = torch.fft.ifftn(product, dim=axes).real.flatten(2)
    peak = torch.unravel_index(correlation.argmax(2), space)
    shifts = [(p + n // 2) % n - n // 2 for p, n in zip(peak, space, strict=True)]
    return torch.stack(shifts, -1).double()


def circular_speed(clips: Tensor) -> Tensor:
    """Mean length of the displacement between frames [B], cells per frame; without optical flow."""
    return circular_displacements(clips).norm(dim=2).mean(1)


@dataclass(frozen=True)
class FlowSpeeds:
    """Lengths of the optical flow of videos, pixels per frame.

    Attributes:
        mean: over all pixels, [B, F - 1].
        fastest: over the fastest twentieth of the pixels, [B, F - 1].
        side: shorter side of the frames, pixels.
    """

    mean: Tensor
    fastest: Tensor
    side: int

    @property
    def score(self) -> Tensor:
        """Motion score of each video [B]: mean length over pixels and frames."""
        return self.mean.mean(1)


@torch.no_grad()
def flow_speeds(videos: Tensor, flow: Flow) -> FlowSpeeds:
    """Optical flow between neighbouring frames of videos [B, F, 3, H, W] in [-1, 1], F >= 2.

    Raises:
        ValueError: for another shape.
    """
    if videos.ndim != 5 or videos.shape[1] < 2:
        raise ValueError(f"videos: shape {list(videos.shape)} is not [B, F >= 2, 3, H, W]")
    means, fastest = [], []
    for video in videos:
        length = flow(video[:-1], video[1:]).norm(dim=1).flatten(1)
        count = max(int(_LARGEST * length.shape[1]), 1)
        means.append(length.mean(1))
        fastest.append(length.topk(count, dim=1).values.mean(1))
    return FlowSpeeds(torch.stack(means), torch.stack(fastest), min(videos.shape[-2:]))


def raft_flow(
    weights: Path, *, small: bool = False, num_updates: int = 20, device: torch.device | str = "cpu"
) -> Flow:
    """Optical flow by torchvision's RAFT.

    Frames are padded, repeating the border, to multiples of 8 and at least 128 pixels.

    Args:
        weights: safetensors file of its state.
        small: RAFT-small in place of RAFT-large.
        num_updates: refinements of the flow.
        device: of the network.

    Raises:
        FileNotFoundError: without the file; says how to make it.
    """
    state = _weights(weights, "optical_flow.raft_small" if small else "optical_flow.raft_large")
    network = (raft_small if small else raft_large)(weights=None, progress=False)
    network.load_state_dict(state)
    network = network.to(device).eval().requires_grad_(False)

    def flow(frames: Tensor, following: Tensor) -> Tensor:
        height, width = frames.shape[-2:]
        missing = [max(-n % 8, _SMALLEST - n) for n in (width, height)]
        pad = [part for n in missing for part in (n // 2, n - n // 2)]
        pair = [
            functional.pad(x.to(device, torch.float32), pad, mode="replicate")
            for x in (frames, following)
        ]
        found: Tensor = network(*pair, num_flow_updates=num_updates)[-1]
        left, top = pad[0], pad[2]
        return found[..., top : top + height, left : left + width].cpu()

    return flow


def r3d_features(weights: Path, *, device: torch.device | str = "cpu") -> Features:
    """Features [B, 512] of videos [B, F, 3, H, W] by torchvision's R3D-18 (Kinetics-400).

    A Frechet distance on them is FVD-like and must not be called FVD, which means I3D's.

    Raises:
        FileNotFoundError: without the safetensors file; says how to make it.
    """
    state = _weights(weights, "video.r3d_18")
    network = r3d_18(weights=None, progress=False)
    network.load_state_dict(state)
    network.fc = torch.nn.Identity()
    network = network.to(device).eval().requires_grad_(False)

    def features(videos: Tensor) -> Tensor:
        size = (3, 1, 1, 1)
        mean, std = (torch.tensor(value).reshape(size) for value in (_MEAN, _STD))
        x = functional.interpolate(
            videos.float().transpose(1, 2), size=(videos.shape[1], 112, 112), mode="trilinear"
        )
        found: Tensor = network((((x + 1) / 2 - mean) / std).to(device))
        return found.cpu()

    return features


def _weights(path: Path, name: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; where there is internet, safetensors.torch.save_file("
            f'torchvision.models.{name}(weights="DEFAULT").state_dict(), "{path.name}") makes it'
        )
    return load_file(path)


def motion_error(speed: Tensor, requested: Tensor) -> float:
    """Mean absolute difference between the speed [B] of clips and the speed asked for [B]."""
    return float((speed.double() - requested.to(speed.device)).abs().mean())


def static_fraction(speed: Tensor, threshold: float) -> float:
    """Part of the clips that are slower than ``threshold``."""
    return float((speed < threshold).double().mean())


def dynamic_degree(speeds: FlowSpeeds, *, fps: float = 8.0) -> float:
    """Part of the videos that move by VBench's rule; saturates, and rewards jitter.

    A pair of frames moves if its fastest twentieth exceeds 6 pixels of 256, a video if a quarter of
    its frames do; at less than 8 frames per second the threshold grows. Differs from the rule in
    asking for one moving pair at least.
    """
    threshold = max(1.0, 8.0 / fps) * 6.0 * speeds.side / 256
    needed = max(round((speeds.fastest.shape[1] + 1) / 4), 1)
    return float(((speeds.fastest > threshold).sum(1) >= needed).double().mean())


def motion_law_distance(motion: Tensor, groups: Tensor, prior: Tensor) -> float:
    """Total variation between the motions of one image's samples and their law, mean over images.

    0 where every image gets every motion as often as it should; 1 - prior of the commonest where
    the image decides. n samples of the very law are at a distance too (of order (K/n)^0.5).

    Args:
        motion: index of the motion of each sample [B], int64.
        groups: samples of one image share a number [B].
        prior: the law [K].
    """
    distances = []
    for group in groups.unique():
        counts = torch.bincount(motion[groups == group], minlength=len(prior))
        distances.append((counts / counts.sum() - prior).abs().sum() / 2)
    return float(torch.stack(distances).mean())


def seed_diversity(features: Tensor, groups: Tensor) -> float:
    """Root mean square distance of two samples of the same image that differ in the seed alone.

    Args:
        features: [B, D]: flattened clips, or what a network sees in them.
        groups: samples of one image share a number [B]; two or more of each.

    Raises:
        ValueError: if an image has a single sample.
    """
    squares = []
    for group in groups.unique():
        rows = features[groups == group].double()
        if len(rows) < 2:
            raise ValueError(f"groups: {int(group)} has one sample, so there is nothing to compare")
        squares.append(2 * rows.var(0).sum())
    return float(torch.stack(squares).mean().sqrt())


def first_frame_error(clips: Tensor, image: Tensor) -> float:
    """Mean squared error of the first frame against the image it was made from."""
    return float(flat_mean((clips[:, 0] - image.to(clips)).square()).mean())


def clip_frechet(clips: Tensor, reference: Tensor, features: Features, *, batch: int = 64) -> float:
    """Frechet distance between features of two sets of clips, in bounded memory."""
    found = [
        torch.cat([features(part) for part in half.split(batch)]) for half in (clips, reference)
    ]
    return frechet_distance(*found)


def compare_clips(
    clips: Tensor,
    reference: Tensor,
    *,
    images: Tensor,
    groups: Tensor,
    speed: Callable[[Tensor], Tensor],
    features: Features,
    still_below: float,
) -> dict[str, Mapping[str, float]]:
    """A model against another, or a few-step student against its teacher, made from one condition.

    Args:
        clips: of the model or student [B, F, ...].
        reference: of the other, of real data or of the teacher; row i from the same image.
        images: the conditions [B, ...].
        groups: [B], rows of one image share a number.
        speed: clips -> [B], e.g. ``circular_speed`` or ``lambda v: flow_speeds(v, flow).score``.
        features: of the distance and of the diversity.
        still_below: speed below which a clip counts as still.

    Returns:
        "clips" and "reference": motion, static_fraction, seed_diversity, first_frame_error;
        "between": motion_ratio, motion_change (mean absolute, row by row), frechet_distance.
    """
    speeds = {"clips": speed(clips), "reference": speed(reference)}
    result: dict[str, Mapping[str, float]] = {}
    for name, half in (("clips", clips), ("reference", reference)):
        result[name] = {
            "motion": float(speeds[name].mean()),
            "static_fraction": static_fraction(speeds[name], still_below),
            "seed_diversity": seed_diversity(features(half), groups),
            "first_frame_error": first_frame_error(half, images),
        }
    own, other = speeds["clips"], speeds["reference"]
    result["between"] = {
        "motion_ratio": float(own.mean() / other.mean()),
        "motion_change": motion_error(own, other),
        "frechet_distance": clip_frechet(clips, reference, features),
    }
    return result
