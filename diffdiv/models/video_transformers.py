"""Wan and CogVideoX as image-to-video networks to be trained; see models/image_to_video.py."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import (
    CogVideoXImageToVideoPipeline,
)
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from torch import Tensor, nn

from diffdiv.models.denoiser import Condition, Denoiser
from diffdiv.models.families import schedule_for
from diffdiv.models.video import VideoCodec, as_images, vp_from_table
from diffdiv.models.video_calls import call_cogvideox, call_wan

Rows = Mapping[str, Tensor]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


class Wan:
    """Wan 2.1 image-to-video: a flow transformer with text, blind to the level.

    Args:
        pipe: the stock pipeline.

    Raises:
        ValueError: for Wan 2.2's two networks, or its times per token.
    """

    tells_level = False

    def __init__(self, pipe: WanImageToVideoPipeline) -> None:
        if pipe.config["boundary_ratio"] is not None or pipe.config["expand_timesteps"]:
            raise ValueError("Wan 2.2 (two networks, or times per token) cannot be trained here")
        self.pipe, self.net = pipe, cast(nn.Module, pipe.transformer)
        self.codec = VideoCodec(pipe.vae)
        scheduler = pipe.scheduler
        self.schedule, kind = schedule_for(type(scheduler).__name__, scheduler.config, (0, 0, 0))
        if kind != "flow":
            raise ValueError(f"Wan's scheduler predicts {kind!r}, not a flow")
        self.lora_targets: tuple[str, ...] = (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")
        self._empty = self._text([""])

    @torch.no_grad()
    def image(self, frames: Tensor, num_frames: int) -> Tensor:
        """Scaled latents [B, F, C, H, W] of the image before grey frames."""
        grey = torch.zeros_like(frames)[:, None].expand(-1, num_frames - 1, -1, -1, -1)
        return self.codec.scaled(self.codec.posterior(torch.cat([frames[:, None], grey], 1))[0])

    @torch.no_grad()
    def embed(self, frames: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Text [B, L, D], and CLIP tokens of the image where the network takes them."""
        rows = {"text": self._text(captions)}
        if cast(ModelMixin, self.net).config["image_dim"] is not None:
            device = next(self.pipe.image_encoder.parameters()).device
            rows["tokens"] = self.pipe.encode_image(as_images(frames), device)
        return rows

    def _text(self, captions: Sequence[str]) -> Tensor:
        """As the pipeline's, whose clean-up of web text wants a package of its own."""
        encoder = self.pipe.text_encoder
        words = self.pipe.tokenizer(
            list(captions), padding="max_length", max_length=512, truncation=True,
            return_tensors="pt",
        ).to(encoder.device)  # fmt: skip
        text = encoder(words.input_ids, words.attention_mask).last_hidden_state
        return text * words.attention_mask[:, :, None].to(text.dtype)

    def without(self, rows: Rows, y: Tensor, dropped: Tensor) -> tuple[Rows, Tensor]:
        """The empty text; the image stays, as in the pipeline."""
        return _without_text(rows, self._empty, dropped), y

    def denoiser(
        self, net: nn.Module, rows: Rows, y: Tensor, level: Tensor
    ) -> tuple[Denoiser, Condition]:
        """The level is not told."""
        call = partial(call_wan, y=y, tokens=rows.get("tokens"), time_stride=self.codec.stride[0])
        return Denoiser(net, call, self.schedule, "flow"), Condition(text=rows["text"])


class CogVideoX:
    """CogVideoX image-to-video: a v-predicting transformer with text, blind to the level.

    Args:
        pipe: the stock pipeline.
    """

    tells_level = False

    def __init__(self, pipe: CogVideoXImageToVideoPipeline) -> None:
        self.pipe, self.net = pipe, cast(nn.Module, pipe.transformer)
        self.codec, self.schedule = (
            VideoCodec(pipe.vae),
            vp_from_table(pipe.scheduler.alphas_cumprod),
        )
        self._config = cast(ModelMixin, self.net).config
        self.lora_targets: tuple[str, ...] = (*ATTENTION, *FEED_FORWARD)
        self._empty = self._text([""])

    @torch.no_grad()
    def image(self, frames: Tensor, num_frames: int) -> Tensor:
        """Latents [B, 1, C, H, W] of the image alone; CogVideoX 1.5 divides by the scale."""
        z = self.codec.posterior(frames[:, None])[0]
        inverted = self.pipe.vae.config["invert_scale_latents"]
        return z / self.codec.scale[0] if inverted else self.codec.scaled(z)

    @torch.no_grad()
    def embed(self, frames: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Text [B, L, D]."""
        return {"text": self._text(captions)}

    @torch.no_grad()
    def _text(self, captions: Sequence[str]) -> Tensor:
        length, device = self._config["max_text_seq_length"], self.pipe.text_encoder.device
        return self.pipe.encode_prompt(
            list(captions), do_classifier_free_guidance=False, max_sequence_length=length,
            device=device,
        )[0]  # fmt: skip

    def without(self, rows: Rows, y: Tensor, dropped: Tensor) -> tuple[Rows, Tensor]:
        """The empty text; the image stays, as in the pipeline."""
        return _without_text(rows, self._empty, dropped), y

    def denoiser(
        self, net: nn.Module, rows: Rows, y: Tensor, level: Tensor
    ) -> tuple[Denoiser, Condition]:
        """The level is not told. ValueError if the frames do not fill the network's patches."""
        frames, rows_, columns = rows["mean"].shape[1], *rows["mean"].shape[3:]
        patch = self._config["patch_size_t"]
        if patch and frames % patch:
            raise ValueError(f"{frames} latent frames are no multiple of this network's {patch}")
        rotary = None
        if self._config["use_rotary_positional_embeddings"]:
            _, height, width = self.codec.pixels(frames, rows_, columns)
            rotary = self.pipe._prepare_rotary_positional_embeddings(
                height, width, frames, y.device
            )
        has_offset = self._config["ofs_embed_dim"] is not None
        call = partial(call_cogvideox, y=y, rotary=rotary, has_offset=has_offset)
        return Denoiser(net, call, self.schedule, "v"), Condition(text=rows["text"])


def _without_text(rows: Rows, empty: Tensor, dropped: Tensor) -> Rows:
    text = rows["text"]
    return {**rows, "text": torch.where(dropped[:, None, None], empty.to(text), text)}
