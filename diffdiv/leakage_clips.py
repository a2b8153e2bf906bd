"""What the leakage meter looks at: one-step predictions of real clips, and generated ones.

    x0       latents of a real clip [B, F, C, H, W]       x0_hat   one-step prediction from x_t
    error    mean (x0_hat - x0)^2 per value
    motion   sum of squared differences between latent frames (metrics/leakage.py)
    copier   error of the prediction that repeats the first latent frame: what is left to be said
             about a clip once its image is known

Everything streams: a batch of real clips is in memory, whatever their number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from diffdiv.core.noise import normal, permuted, uniform
from diffdiv.core.tensor import flat_mean
from diffdiv.data.video import VideoFolder
from diffdiv.models.image_to_video import ImageToVideo
from diffdiv.models.video import as_images
from diffdiv.video_clips import captions_of, encode


@dataclass(frozen=True)
class Clips:
    """The middle clips of ``count`` videos of a folder, in an order drawn by ``seed``."""

    videos: VideoFolder
    count: int
    seed: int

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Frames [B, N, 3, height, width] in [-1, 1], and captions."""
        total, seed = len(self.videos), self.seed
        places = [permuted(i, total, seed=seed, purpose="leakage.videos") for i in indices]
        frames, paths = zip(*map(self.videos.middle, places), strict=True)
        return torch.stack(frames), captions_of(paths)


@dataclass(frozen=True)
class OneStep:
    """One-step predictions of N clips at T times; float64, on the CPU.

    Attributes:
        error: mean squared error per value [N, T].
        motion: motion energy of x0_hat [N, T].
        energy: motion energy of x0 [N].
        copier: error of the copier [N].
    """

    error: Tensor
    motion: Tensor
    energy: Tensor
    copier: Tensor


@dataclass(frozen=True)
class Manner:
    """How the network is run.

    Attributes:
        seed: of all noise.
        level: noise on the image that the pipeline adds and tells (Stable Video Diffusion).
        batch: clips at once; changes the rounding alone.
        bf16: autocast to bfloat16.
    """

    seed: int = 0
    level: float = 0.0
    batch: int = 1
    bf16: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        """Context of every forward."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


@torch.no_grad()
def one_step(
    host: ImageToVideo,
    clips: Clips,
    times: Sequence[float],
    *,
    manner: Manner,
    progress: Callable[[int], object] = lambda done: None,
) -> OneStep:
    """One-step predictions of real clips, one forward a clip and time.

    Args:
        host: the pipeline.
        clips: real ones.
        times: in the unit of its schedule; a clip gets the same noise at all of them.
        manner: how.
        progress: told how many clips were just done.
    """
    errors, motions, energies, copiers = [], [], [], []
    for start in range(0, clips.count, manner.batch):
        indices = range(start, min(start + manner.batch, clips.count))
        frames, captions = clips.read(indices)
        rows = encode(host, frames, captions)
        x0 = host.codec.scaled(rows["mean"]).float()
        y, level = _image(host, frames, rows["image"], indices, manner)
        eps = normal(x0.shape[1:], seed=manner.seed, purpose="leakage", indices=indices).to(x0)
        denoiser, cond = host.denoiser(host.net, rows, y, level)
        energies.append(_motion_energy(x0))
        copiers.append(_mean_square(x0 - x0[:, :1]))
        found = []
        for time in times:
            t = torch.full((len(x0),), time, dtype=torch.float64, device=x0.device)
            x_t = denoiser.schedule.add_noise(x0, eps, t)
            with manner.autocast(x0.device):
                x0_hat = denoiser(x_t, t, cond)
            found.append(torch.stack([_mean_square(x0_hat - x0), _motion_energy(x0_hat)]))
        error, motion = torch.stack(found, 2)
        errors.append(error)
        motions.append(motion)
        progress(len(indices))
    return OneStep(*(torch.cat(part) for part in (errors, motions, energies, copiers)))


def _image(
    host: ImageToVideo, frames: Tensor, y: Tensor, indices: Sequence[int], manner: Manner
) -> tuple[Tensor, Tensor]:
    """y and its level as the pipeline has them: where it noises its image, y is made anew."""
    level = torch.full((len(y),), manner.level, dtype=torch.float32, device=y.device)
    if manner.level == 0:
        return y, level
    first = frames[:, 0]
    noise = normal(first.shape[1:], seed=manner.seed, purpose="leakage.image", indices=indices)
    return host.image((first + manner.level * noise).to(y.device), frames.shape[1]), level


def _mean_square(values: Tensor) -> Tensor:
    return flat_mean(values.double().square()).cpu()


def _motion_energy(x0: Tensor) -> Tensor:
    return x0.double().diff(dim=1).square().flatten(1).sum(1).cpu()


class _Frames(Protocol):
    frames: Tensor


@torch.no_grad()
def generate_clips(
    host: ImageToVideo,
    frames: Tensor,
    captions: Sequence[str],
    seeds_each: int,
    *,
    manner: Manner,
    call: dict[str, object],
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[Tensor, int]:
    """Clips by the stock pipeline's own call; clip i draws its noise from (seed, i).

    Args:
        host: the pipeline.
        frames: real clips [B, N, 3, height, width] in [-1, 1], whose first frames are the images.
        captions: their texts.
        seeds_each: clips an image.
        manner: how.
        call: further arguments of the call.
        progress: told how many clips were just done.

    Returns:
        Clips [B * seeds_each, N, 3, height, width] in [-1, 1] on the CPU, those of one image
        together, and the network evaluations of one clip.

    Raises:
        ValueError: if the pipeline makes another number of frames than it is asked for.
    """
    device = next(host.net.parameters()).device
    counts: list[int] = []
    hook = host.net.register_forward_pre_hook(partial(_count, counts), with_kwargs=True)
    pipe = cast(Callable[..., _Frames], host.pipe)  # the base class has no __call__
    host.pipe.set_progress_bar_config(disable=True)
    numbers = range(len(frames) * seeds_each)
    drawn = uniform(seed=manner.seed, purpose="leakage.sample", indices=numbers)
    made = []
    for number, seed in zip(numbers, (drawn * 2**53).long().tolist(), strict=True):
        clip, caption = frames[number // seeds_each], captions[number // seeds_each]
        first = clip[:1].to(device)
        with manner.autocast(device):
            video = pipe(
                image=as_images(first)[0],
                num_frames=len(clip), height=clip.shape[2], width=clip.shape[3],
                generator=torch.Generator().manual_seed(seed), output_type="pt",
                **_text(host, first, caption), **call,
            ).frames  # fmt: skip
        if video.shape[1] != len(clip):  # CogVideoX, of an even number of latent frames
            raise ValueError(f"asked for {len(clip)} frames, the pipeline made {video.shape[1]}")
        made.append(video.float().cpu() * 2 - 1)
        progress(1)
    hook.remove()
    return torch.cat(made), sum(counts) // len(numbers)


def _count(
    counts: list[int], net: nn.Module, args: tuple[object, ...], named: dict[str, object]
) -> None:
    """Note how many samples a forward is on; guidance may take two at once."""
    sample = args[0] if args else named["hidden_states"]
    assert isinstance(sample, Tensor)
    counts.append(len(sample))


def _text(host: ImageToVideo, first: Tensor, caption: str) -> dict[str, Tensor]:
    """The pipeline's text, encoded as in training; nothing for a host without."""
    rows = host.embed(first, [caption])
    if "text" not in rows:
        return {}
    empty = host.embed(first, [""])["text"]
    return {"prompt_embeds": rows["text"], "negative_prompt_embeds": empty}
