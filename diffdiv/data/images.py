"""Images from folders and datasets: global sample index -> item, the same in every process.

Broken items never stop a run: they are set aside with their path and the reason, and the next item
takes their place. Too many of them, or none that can be used, is an error before training starts.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffdiv.core.noise import permuted, uniform

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MAX_BROKEN = 0.05


class ImageItems:
    """Numbered images of any origin, checked once, drawn by global sample index.

    Attributes:
        classes: names of the classes, in the order of their numbers; empty without labels.
    """

    def __init__(
        self, name: Path, paths: Sequence[Path], size: int, channels: int, flip: bool
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels: {channels} is not 1 or 3")
        if not paths:
            raise ValueError(f"{name}: there is no image here ({', '.join(sorted(SUFFIXES))})")
        self.classes: list[str] = []
        self._labels: Tensor | None = None
        self._name, self._paths = name, paths
        self._size, self._channels, self._flip = size, channels, flip
        self._broken: dict[int, str] = {}  # item -> reason
        for item in range(len(paths)):
            try:
                self._check(item)
            except Exception as error:  # decoders raise whatever broken bytes lead them to
                self._set_aside(item, error)
        self._refuse_too_many()
        self._usable = [item for item in range(len(paths)) if item not in self._broken]

    @property
    def quarantine(self) -> list[tuple[Path, str]]:
        """Items that cannot be used, as (path, reason); grows when one fails late."""
        return [(self._paths[item], reason) for item, reason in self._broken.items()]

    def __len__(self) -> int:
        """Number of items that could be used at construction."""
        return len(self._usable)

    def batch(self, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor | None]:
        """Images of global sample indices.

        Each epoch of ``len(self)`` indices visits every item once, in an order drawn from the seed
        and the epoch; sample i is mirrored or not as a function of (seed, i).

        Returns:
            x0 [B, C, H, W] in [-1, 1], float32, and the classes [B] int64 or None.

        Raises:
            ValueError: if by now more than 5 % of the items turned out to be broken.
        """
        flips = uniform(seed=seed, purpose="images.flip", indices=indices) < 0.5
        images, items = [], []
        for index, flip in zip(indices, flips.tolist(), strict=True):
            x0, item = self._first_readable(permuted(index, len(self), seed=seed, purpose="images"))
            images.append(x0.flip(-1) if flip and self._flip else x0)
            items.append(item)
        return torch.stack(images), None if self._labels is None else self._labels[items]

    def _first_readable(self, position: int) -> tuple[Tensor, int]:
        while True:  # ends: too many broken items are refused
            item = self._usable[position % len(self)]
            if item not in self._broken:
                try:
                    return self._read(item), item
                except Exception as error:
                    self._set_aside(item, error)
                    self._refuse_too_many()
            position += 1

    def _set_aside(self, item: int, error: Exception) -> None:
        self._broken[item] = str(error) or type(error).__name__

    def _refuse_too_many(self) -> None:
        if len(self._broken) > MAX_BROKEN * len(self._paths):
            path, reason = self.quarantine[0]
            raise ValueError(
                f"{self._name}: {len(self._broken)} of {len(self._paths)} images cannot be used "
                f"(more than {MAX_BROKEN:.0%}); the first is {path}: {reason}"
            )

    def _open(self, item: int) -> Path | io.BytesIO:
        return self._paths[item]

    def _image(self, item: int) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(self._open(item))

    def _check(self, item: int) -> None:
        with self._image(item) as image:
            if min(image.size) < self._size:
                raise ValueError(f"{image.width}x{image.height} pixels, smaller than {self._size}")
            image.verify()

    def _read(self, item: int) -> Tensor:
        with self._image(item) as file:
            image = _plain(ImageOps.exif_transpose(file), self._channels)
        image = ImageOps.fit(image, (self._size, self._size), Image.Resampling.LANCZOS)
        values = np.asarray(image, np.float32).reshape(self._size, self._size, self._channels)
        return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1).contiguous()


class ImageFolder(ImageItems):
    """The images below a folder, in sorted order."""

    def __init__(
        self,
        path: Path,
        size: int,
        *,
        channels: int = 3,
        class_from: Literal["folder"] | None = None,
        flip: bool = True,
    ) -> None:
        """Check the header of every image.

        Args:
            path: searched recursively.
            size: images are scaled to cover a square of this size and cut to it at the centre.
            channels: 3 for RGB, 1 for grey. Transparency is laid on white.
            class_from: "folder" = the first folder below ``path`` is the class.
            flip: mirror half of the samples.

        Raises:
            ValueError: if there is no image, or more than 5 % are broken or smaller than ``size``.
        """
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if class_from and (loose := [file for file in files if file.parent == path]):
            raise ValueError(f"{path}: {loose[0].name} lies in no sub-folder, so has no class")
        super().__init__(path, files, size, channels, flip)
        if class_from:
            folders = [file.relative_to(path).parts[0] for file in files]
            classes, numbers = np.unique(folders, return_inverse=True)
            self.classes, self._labels = classes.tolist(), torch.from_numpy(numbers)


class DatasetImages(ImageItems):
    """A local Hugging Face dataset with a column of images."""

    def __init__(
        self,
        path: Path,
        size: int,
        *,
        image_key: str = "image",
        label_key: str | None = None,
        channels: int = 3,
        flip: bool = True,
    ) -> None:
        """Open a dataset written by ``save_to_disk``, or the train split of a local folder.

        Arguments and errors as for :class:`ImageFolder`; ``label_key`` is a column of class
        numbers. ImportError without the package ``datasets``.
        """
        try:
            import datasets
        except ImportError:
            raise ImportError("datasets is not installed: pip install 'diffdiv[data]'") from None
        if (path / "state.json").is_file():
            data = datasets.load_from_disk(str(path))
        else:
            data = datasets.load_dataset(str(path), split="train")
        for key in filter(None, (image_key, label_key)):
            if key not in data.column_names:
                raise ValueError(f"{path}: no column {key!r}; there is {data.column_names}")
        self._data, self._key = data.cast_column(image_key, datasets.Image(decode=False)), image_key
        paths = [path / f"row-{row}" for row in range(len(data))]
        super().__init__(path, paths, size, channels, flip)
        if label_key is not None:
            self._labels = torch.as_tensor(data[label_key][:], dtype=torch.int64)
            self.classes = [str(i) for i in range(int(self._labels.max()) + 1)]

    def _open(self, item: int) -> Path | io.BytesIO:
        image = self._data[item][self._key]
        return Path(image["path"]) if image["bytes"] is None else io.BytesIO(image["bytes"])


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8-bit RGB or grey; 16-bit values are scaled, transparency laid on white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")
