"""Sample grids during training: the student at fixed prompts and noise, the teacher beside it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.utils import save_image

from diffdiv.core.noise import normal
from diffdiv.models.denoiser import Condition
from diffdiv.runtime.resume import any_rank
from diffdiv.runtime.run import Run
from diffdiv.runtime.yaml_io import replace_text
from diffdiv.samplers import sample_in_parts
from diffdiv.sources import Source

_INDICES = range(10**9, 10**9 + 32)  # far from every training index
_COLUMNS = 8
Sampler = Callable[[Tensor, Condition], Tensor]


@dataclass(frozen=True)
class Preview:
    """Draws ``samples/step-*.png`` and, once, ``samples/teacher.png`` and ``captions.json``.

    Attributes:
        run: whose folder, step and averaged weights are used. All ranks draw, for a sharded
            network needs them; rank 0 writes.
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
        run, source = self.run, self.source
        folder = run.folder / "samples"
        folder.mkdir(exist_ok=True)
        shape = self.noise_shape or source.shape
        z = normal(shape, seed=run.config.seed, purpose="z", indices=_INDICES)
        z, cond = z.to(run.device), source.conditions(_INDICES).to(run.device)
        is_missing = run.is_main and not (folder / "teacher.png").is_file()
        if self.teacher is not None and any_rank(is_missing, run.device):
            start = z[:, : source.shape[0]]
            with torch.no_grad():
                self._save(folder / "teacher.png", sample_in_parts(self.teacher, start, cond))
        with run.averaged(self.name, self.half_life) as net:
            x0 = sample_in_parts(self.sampler_with(net), z, cond)
        self._save(folder / f"step-{run.step:08d}.png", x0)
        grid = {"rows": len(_INDICES) // _COLUMNS, "columns": _COLUMNS}
        captions = {"prompts": source.captions(_INDICES), **grid}
        if run.is_main:
            replace_text(folder / "captions.json", json.dumps(captions, indent=1))

    def _save(self, file: Path, x0: Tensor) -> None:
        if not self.run.is_main:
            return
        images = (self.source.decode(x0) + 1) / 2
        if images.shape[-1] < 64:  # small worlds are looked at enlarged, pixel by pixel
            images = interpolate(images, scale_factor=64 // images.shape[-1], mode="nearest")
        staged = file.with_name(f".{file.name}")
        save_image(images, staged, nrow=_COLUMNS, padding=2, pad_value=0.5)
        staged.replace(file)
