"""Sections of a configuration that the distillation recipes share."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from diffdiv.core.names import divergence_name
from diffdiv.runtime.config import Config, ExistingFolder


class TeacherConfig(Config):
    """The frozen teacher."""

    path: ExistingFolder  # diffusers folder: a text-to-image pipeline, or UNet2DModel + scheduler
    guidance_scale: float | None = Field(None, ge=1)  # None: no guidance
    # of its weights, and of a base that adapters share; int8: linear layers, the rest is bf16
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    checkpointing: bool = False  # recompute activations in the backward, in all networks
    compile: bool = False  # torch.compile of the repeated blocks, in all networks


class LoraConfig(Config):
    """A low-rank adapter on the teacher's frozen network, in place of a full copy."""

    rank: int = Field(64, ge=1)
    alpha: int = Field(64, ge=1)  # the update is scaled by alpha / rank


class DivergenceConfig(Config):
    """Which divergence, and how its weights are normalised."""

    name: Annotated[str, AfterValidator(divergence_name)] = "jensen_shannon"
    decay: float = Field(0.9, ge=0, lt=1)  # of the running means of r and h, per update
    clip: tuple[float, float] = (0.1, 20.0)  # bounds on r (FastGen's default)

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if not 0 < self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {list(self.clip)} is not increasing and positive")
        return self


class GanConfig(Config):
    """Discriminator (always trained when a ratio is needed) and GAN loss."""

    weight: float | None = Field(1e-3, ge=0)  # of the student's GAN loss; None: off
    balance: bool = False  # weight = GAN to VSD gradient norm at x0
    trunk: Literal["teacher", "fake"] = "teacher"  # whose features the heads read
    blocks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # None: the middle one
    lr: float = Field(1e-4, gt=0)
    r1_gamma: float = Field(0.0, ge=0)
    r1: Literal["exact", "approximate"] = "approximate"

    @model_validator(mode="after")
    def _exact_needs_frozen_trunk(self) -> Self:
        if self.trunk == "fake" and self.r1 == "exact" and self.r1_gamma > 0:
            raise ValueError("r1 'exact' differentiates a frozen trunk: use trunk 'teacher'")
        return self


class DataConfig(Config):
    """Conditions and real samples."""

    kind: Literal["prompted_digits", "digits", "images", "prompts", "captions"]
    path: Path | None = None  # image folder, captioned images, or prompt file
    real: Literal["data", "teacher"] = "data"  # whose samples the discriminator calls real
    cache: Path | None = None  # folder for text embeddings and latents, computed once

    @model_validator(mode="after")
    def _path(self) -> Self:
        files = ("images", "prompts", "captions")
        if self.kind in files and (self.path is None or not self.path.exists()):
            raise ValueError(f"path {str(self.path)!r} must exist for kind {self.kind!r}")
        if self.kind == "prompts" and self.real == "data":
            raise ValueError("kind 'prompts' has no images: set data.real to 'teacher'")
        if self.cache is not None and self.kind not in ("prompts", "captions"):
            raise ValueError(f"cache: there is nothing to cache for kind {self.kind!r}")
        return self
