"""Agreement of images with their prompts, and likeness of images, by a local CLIP model.

CLIP score: Hessel et al., arXiv 2104.08718, with the factor 100 in place of 2.5. Nothing is
downloaded.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from diffdiv.metrics.images import to_uint8


def require_clip(clip: Path) -> None:
    """FileNotFoundError, saying what to fetch, if there is no CLIP model in this folder."""
    if not (clip / "config.json").is_file():
        raise FileNotFoundError(
            f"{clip}: no CLIP model there; the CLIP score needs a local copy of one, such as "
            "openai/clip-vit-large-patch14 (MIT), as written by save_pretrained"
        )


class ClipEmbedder:
    """A CLIP model and its own preparation of images and text.

    Args:
        clip: local transformers folder of a CLIP model with its processor.
        device: to run on.

    Raises:
        FileNotFoundError: if there is no such folder.
    """

    def __init__(self, clip: Path, device: torch.device | str = "cpu") -> None:
        require_clip(clip)
        model = CLIPModel.from_pretrained(clip, use_safetensors=True, local_files_only=True)
        torch.nn.Module.to(model, device, torch.float32)
        self._model, self._device = model.eval(), device
        self._processor = CLIPProcessor.from_pretrained(clip, local_files_only=True)

    @torch.no_grad()
    def __call__(
        self, images: Iterable[Tensor], prompts: Sequence[str], *, batch: int = 64
    ) -> tuple[Tensor, Tensor]:
        """Unit embeddings [N, D] of images and of their prompts, on the CPU.

        Args:
            images: N of [3, H, W] in [-1, 1], of any sizes; read as they are needed.
            prompts: one for each; cut to the length CLIP knows.
            batch: at once.

        Raises:
            ValueError: if the numbers differ.
        """
        stream, found = iter(images), []
        for start in range(0, len(prompts), batch):
            texts = list(prompts[start : start + batch])
            pictures = [to_uint8(image[None])[0] for _, image in zip(texts, stream, strict=False)]
            if len(pictures) < len(texts):
                raise ValueError(f"{start + len(pictures)} images, but {len(prompts)} prompts")
            inputs = self._processor(
                text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True
            )
            out = self._model(**inputs.to(self._device))  # embeddings come normalised
            found.append((out.image_embeds.cpu(), out.text_embeds.cpu()))
        if next(stream, None) is not None:
            raise ValueError(f"more images than the {len(prompts)} prompts")
        shown, said = zip(*found, strict=True)
        return torch.cat(shown), torch.cat(said)


def mean_clip_score(shown: Tensor, said: Tensor) -> float:
    """Mean of 100 max(0, cosine) of unit embeddings [N, D] of images and of their prompts."""
    return 100 * float((shown * said).sum(1).clamp_min(0).mean())


def clip_score(images: Tensor, prompts: Sequence[str], clip: Path) -> float:
    """Mean of 100 max(0, cosine) between the CLIP embeddings of images and their prompts.

    Args:
        images: [N, 3, H, W] in [-1, 1].
        prompts, clip: see :class:`ClipEmbedder`, also for errors.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images, but {len(prompts)} prompts")
    return mean_clip_score(*ClipEmbedder(clip)(images, prompts))
