"""Sample grids during training: the student at fixed prompts and noise, the teacher beside it."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate
from torchvision.utils import save_image

from diffdiv.core.noise import normal
from diffdiv.models.denoiser import Denoiser, GuidedDenoiser
from diffdiv.models.generator import Generator
from diffdiv.runtime.run import Run
from diffdiv.samplers import sample_ode, time_grid
from diffdiv.sources import Source

_FIRST_INDEX = 10**9  # far from every training index
_COLUMNS = 8


class WithWeights(nn.Module):
    """A module called with other weights (an average) in place of its own, without a copy."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._call = lambda args, kwargs: functional_call(module, dict(weights), args, kwargs)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._call(args, kwargs)


class Preview:
    """Draws ``samples/step-*.png`` and, once, ``samples/teacher.png`` and ``captions.json``.

    Args:
        run: whose folder, step and averaged weights are used; only rank 0 draws.
        source: conditions, captions, decoding.
        teacher: sampled in 20 steps from the same noise.
        generator: the student.
        half_life: of the average that is shown, in images.
        count: number of samples.
    """

    def __init__(
        self,
        run: Run,
        source: Source,
        teacher: Denoiser | GuidedDenoiser,
        generator: Generator,
        *,
        half_life: int,
        count: int = 32,
    ) -> None:
        self.run, self.source, self.teacher, self.generator = run, source, teacher, generator
        self.half_life = half_life
        self.indices = range(_FIRST_INDEX, _FIRST_INDEX + count)
        self.folder = run.folder / "samples"

    def show(self) -> None:
        """Draw the student at the present step (and the teacher if that was not done yet)."""
        if not self.run.is_main:
            return
        self.folder.mkdir(exist_ok=True)
        z = normal(self.source.shape, seed=self.run.config.seed, purpose="z", indices=self.indices)
        z = z.to(self.run.device)
        cond = self.source.conditions(self.indices).to(self.run.device)
        if not (self.folder / "teacher.png").is_file():
            schedule = self.generator.denoiser.schedule
            self._save("teacher", sample_ode(self.teacher, z, cond, time_grid(schedule, 20)))
            captions = {
                "prompts": self.source.captions(self.indices),
                "rows": -(-len(self.indices) // _COLUMNS),
                "columns": _COLUMNS,
            }
            (self.folder / "captions.json").write_text(json.dumps(captions, indent=1))
        student = self.run.networks["student"].module
        weights = self.run.ema_weights("student", self.half_life)
        with torch.no_grad():
            x0 = self.generator.with_net(WithWeights(student, weights))(z, cond)
        self._save(f"step-{self.run.step:08d}", x0)

    def _save(self, name: str, x0: Tensor) -> None:
        images = (self.source.decode(x0) + 1) / 2
        if images.shape[-1] < 64:  # small worlds are looked at enlarged, pixel by pixel
            images = interpolate(images, scale_factor=64 // images.shape[-1], mode="nearest")
        staged = self.folder / f".{name}.png"
        save_image(images, staged, nrow=_COLUMNS, padding=2, pad_value=0.5)
        staged.replace(self.folder / f"{name}.png")
