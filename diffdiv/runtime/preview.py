"""Sample grids during training: the student at fixed prompts and noise, the teacher beside it."""

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate
from torchvision.utils import save_image

from diffdiv.core.noise import normal
from diffdiv.models.denoiser import Condition
from diffdiv.runtime.run import Run
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


Sampler = Callable[[Tensor, Condition], Tensor]


class Preview:
    """Draws ``samples/step-*.png`` and, once, ``samples/teacher.png`` and ``captions.json``.

    Args:
        run: whose folder, step and averaged weights are used; only rank 0 draws.
        source: conditions, captions, decoding.
        name: of the network that is shown.
        half_life: of its average, in images.
        sampler_with: network -> sampler (standard normal z [B, ...], cond) -> x0.
        teacher: drawn once from the same noise and conditions, or None.
        count: number of samples.
    """

    def __init__(
        self,
        run: Run,
        source: Source,
        name: str,
        half_life: int,
        sampler_with: Callable[[nn.Module], Sampler],
        *,
        teacher: Sampler | None = None,
        count: int = 32,
    ) -> None:
        self.run, self.source, self.name, self.half_life = run, source, name, half_life
        self.sampler_with, self.teacher = sampler_with, teacher
        self.indices = range(_FIRST_INDEX, _FIRST_INDEX + count)
        self.folder = run.folder / "samples"

    def show(self) -> None:
        """Draw at the present step (and the teacher if that was not done yet)."""
        if not self.run.is_main:
            return
        self.folder.mkdir(exist_ok=True)
        z = normal(self.source.shape, seed=self.run.config.seed, purpose="z", indices=self.indices)
        z = z.to(self.run.device)
        cond = self.source.conditions(self.indices).to(self.run.device)
        with torch.no_grad():
            if self.teacher is not None and not (self.folder / "teacher.png").is_file():
                self._save("teacher", self.teacher(z, cond))
            module = self.run.networks[self.name].module
            shown = WithWeights(module, self.run.ema_weights(self.name, self.half_life))
            self._save(f"step-{self.run.step:08d}", self.sampler_with(shown)(z, cond))
        captions = {
            "prompts": self.source.captions(self.indices),
            "rows": -(-len(self.indices) // _COLUMNS),
            "columns": _COLUMNS,
        }
        (self.folder / "captions.json").write_text(json.dumps(captions, indent=1))

    def _save(self, name: str, x0: Tensor) -> None:
        images = (self.source.decode(x0) + 1) / 2
        if images.shape[-1] < 64:  # small worlds are looked at enlarged, pixel by pixel
            images = interpolate(images, scale_factor=64 // images.shape[-1], mode="nearest")
        staged = self.folder / f".{name}.png"
        save_image(images, staged, nrow=_COLUMNS, padding=2, pad_value=0.5)
        staged.replace(self.folder / f"{name}.png")
