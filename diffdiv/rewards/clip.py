"""Rewards by CLIP models: CLIP score, PickScore, HPSv2 and LAION's aesthetic predictor.

    images    [B, 3, H, W] in [-1, 1]        prompts    one for each

Weights are local folders; nothing is downloaded. The network's own resizing and normalisation are
done in torch, because the usual processors go through 8-bit pictures and cut the gradient; values
differ from theirs by the resizing alone (tests: under 1 %).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffdiv.rewards.images import ImageReward
from diffdiv.rewards.pixels import fitted, normalised
from diffdiv.rewards.published import clip_names, load_exactly

_AESTHETIC = (768, 1024, 128, 64, 16, 1)


class ClipScorer:
    """Cosine between the embeddings of images and prompts, by a local CLIP model.

    Args:
        folder: transformers folder of a CLIP model, with its tokenizer and image processor.
        device: to run on.
        weights: safetensors file to take instead of the folder's, in transformers' or open_clip's
            naming; None = the folder's.
        fit: how pictures that are not square are made so, see ``fitted``.

    Raises:
        FileNotFoundError, ValueError: if there is no model, or the weights are not its.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        weights: Path | None = None,
        fit: Literal["crop", "pad"] = "crop",
    ) -> None:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no CLIP model there; wanted is a local folder as written by "
                "save_pretrained, with its tokenizer and image processor"
            )
        if weights is None:
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        else:
            config = CLIPConfig.from_pretrained(folder, local_files_only=True)
            model = CLIPModel(config)
            load_exactly(model, clip_names(load_file(weights)), weights)
        nn.Module.to(model, device, torch.float32)
        self.model, self._fit = model.eval().requires_grad_(False), fit
        self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        prepare = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self._mean, self._std = tuple(prepare.image_mean), tuple(prepare.image_std)
        self._size = model.vision_model.embeddings.image_size

    def pixels(self, images: Tensor) -> Tensor:
        """What the vision network is given."""
        return normalised(fitted(images, self._size, self._fit), self._mean, self._std)

    def embed(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit embeddings [B, D] of images, with gradient, and of prompts."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True,
            return_tensors="pt",
        ).to(images.device)  # fmt: skip
        # normalised by the model itself
        out = self.model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=self.pixels(images),
        )
        return out.image_embeds, out.text_embeds


def clip_score_reward(folder: Path, device: torch.device) -> ImageReward:
    """100 times the cosine of CLIP embeddings (arXiv 2104.08718, without its cut at 0)."""
    scorer = ClipScorer(folder, device)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        shown, said = scorer.embed(images, prompts)
        return 100 * (shown * said).sum(1)

    return ImageReward("clip_score", score)


def pickscore_reward(folder: Path, device: torch.device) -> ImageReward:
    """PickScore (arXiv 2305.01569): the cosine times the model's own logit scale."""
    scorer = ClipScorer(folder, device)
    scale = float(scorer.model.logit_scale.exp())

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        shown, said = scorer.embed(images, prompts)
        return scale * (shown * said).sum(1)

    return ImageReward("pickscore", score)


def hpsv2_reward(folder: Path, device: torch.device, *, name: str = "hpsv2") -> ImageReward:
    """HPSv2 or v2.1 (arXiv 2306.09341): the cosine itself, near 0.3; papers print 100 x.

    Pictures that are not square are padded in black, as the published scorer does.

    Args:
        folder: transformers folder of CLIP ViT-H/14 (config, tokenizer, image processor). Weights
            are read from ``NAME.safetensors`` in it (hpsv2 or hpsv2_1), in open_clip's naming, as
            published, or transformers'; or, where that is missing, are the folder's own. (The
            published file is a pickle with the weights under ``state_dict``; convert it once.)
        device: to run on.
        name: of the reward and the file; the versions differ in their weights alone.

    Raises:
        FileNotFoundError, ValueError: if weights are missing, or are not of this model.
    """
    file = folder / f"{name}.safetensors"
    own = (folder / "model.safetensors").is_file()
    if not (file.is_file() or own):
        raise FileNotFoundError(f"{file}: the weights of {name} are wanted there, as safetensors")
    weights = file if file.is_file() else None
    scorer = ClipScorer(folder, device, weights=weights, fit="pad")

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        shown, said = scorer.embed(images, prompts)
        return (shown * said).sum(1)

    return ImageReward(name, score)


def aesthetic_reward(folder: Path, device: torch.device) -> ImageReward:
    """LAION's aesthetic predictor v2: a linear network on unit CLIP ViT-L/14 image embeddings.

    Args:
        folder: a CLIP model folder that also holds ``aesthetic.safetensors`` with the predictor's
            five layers ``layers.N.weight`` and ``layers.N.bias`` (the published file is a pickle;
            convert it once).
        device: to run on.

    Raises:
        FileNotFoundError, ValueError: if the predictor is not there, or has other layers.
    """
    file = folder / "aesthetic.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the predictor's weights are wanted there, as safetensors")
    scorer, weights = ClipScorer(folder, device), load_file(file)
    names = sorted({key.rpartition(".")[0] for key in weights}, key=lambda n: int(n.split(".")[-1]))
    layers = [(weights[f"{n}.weight"].to(device), weights[f"{n}.bias"].to(device)) for n in names]
    sizes = [layers[0][0].shape[1], *(weight.shape[0] for weight, _ in layers)] if layers else []
    if tuple(sizes[1:]) != _AESTHETIC[1:]:
        raise ValueError(f"{file}: layers of sizes {sizes}, not {list(_AESTHETIC)}")

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        x, _ = scorer.embed(images, prompts)
        for weight, bias in layers:
            x = x @ weight.T + bias
        return x[:, 0]

    return ImageReward("aesthetic", score)
