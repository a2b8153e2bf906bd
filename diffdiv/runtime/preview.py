"""Sample grids during training: the student at fixed prompts and noise, the teacher beside it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate
from torchvision.utils import save_image

from diffdiv.core.noise import normal
from diffdiv.models.denoiser import Condition
from diffdiv.runtime.run import Run
from diffdiv.runtime.yaml_io import replace_text
from diffdiv.sources import Source

_INDICES = range(10**9, 10**9 + 32)  # far from every training index
_COLUMNS = 8
Sampler = Callable[[Tensor, Condition], Tensor]


class WithWeights(nn.Module):
    """A module called with other weights (an average) in place of its own, without a copy."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._call = lambda args, kwargs: functional_call(module, dict(weights), args, kwargs)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._call(args, kwargs)


@dataclass(frozen=True)
class Preview:
    """Draws ``samples/step-*.png`` and, once, ``samples/teacher.png`` and ``captions.json``.

    Attributes:
        run: whose folder, step and averaged weights are used; only rank 0 draws.
        source: conditions, captions, decoding.
        name: of the network that is shown.
        half_life: of its average, in images.
        sampler_with: network -> sampler (standard normal z [B, K C, H, W], cond) -> x0.
        teacher: drawn once from the same conditions and the first C channels of z, or None.
        noise_shape: of z for one sample, where the sampler takes several draws (see
            :meth:`Generator.noise_shape`); None = that of a sample.
    """

    run: Run
    source: Source
    name: str
    half_life: int
    sampler_with: Callable[[nn.Module], Sampler]
    teacher: Sampler | None = None
    noise_shape: tuple[int, int, int] | None = None

    def show(self) -> None:
        """Draw at the present step (and the teacher if that was not done yet)."""
        if not self.run.is_main:
            return
        folder, source = self.run.folder / "samples", self.source
        folder.mkdir(exist_ok=True)
        shape = self.noise_shape or source.shape
        z = normal(shape, seed=self.run.config.seed, purpose="z", indices=_INDICES)
        z, cond = z.to(self.run.device), source.conditions(_INDICES).to(self.run.device)
        with torch.no_grad():
            if self.teacher is not None and not (folder / "teacher.png").is_file():
                first = z[:, : source.shape[0]]
                self._save(folder / "teacher.png", self.teacher(first, cond))
            module = self.run.networks[self.name].module
            shown = WithWeights(module, self.run.ema_weights(self.name, self.half_life))
            x0 = self.sampler_with(shown)(z, cond)
            self._save(folder / f"step-{self.run.step:08d}.png", x0)
        grid = {"rows": len(_INDICES) // _COLUMNS, "columns": _COLUMNS}
        captions = {"prompts": source.captions(_INDICES), **grid}
        replace_text(folder / "captions.json", json.dumps(captions, indent=1))

    def _save(self, file: Path, x0: Tensor) -> None:
        images = (self.source.decode(x0) + 1) / 2
        if images.shape[-1] < 64:  # small worlds are looked at enlarged, pixel by pixel
            images = interpolate(images, scale_factor=64 // images.shape[-1], mode="nearest")
        staged = file.with_name(f".{file.name}")
        save_image(images, staged, nrow=_COLUMNS, padding=2, pad_value=0.5)
        staged.replace(file)
