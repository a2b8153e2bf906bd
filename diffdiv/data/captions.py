"""Images with captions, from folders and webdataset shards, drawn by global sample index.

Everything below a folder counts: images with ``NAME.txt`` beside ``NAME.png``; images named in the
rows of a table in the folder itself (``captions.csv|jsonl|parquet`` or ``metadata.*``, columns
``file_name`` and ``caption`` or ``text``; several rows may name one image); samples of ``*.tar``
shards (``KEY.jpg`` with ``KEY.txt`` or ``KEY.json``). Shards are read in place, at offsets from an
index of their headers: nothing is extracted, so no name in an archive becomes a path. An image
without a usable caption is set aside like a broken one.
"""

import csv
import hashlib
import importlib
import io
import json
import os
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from PIL import ExifTags
from torch import Tensor

from diffdiv.core.noise import permuted, uniform
from diffdiv.data.images import SUFFIXES, ImageItems

COLUMNS = ("caption", "text")
TABLES = tuple(f"{n}.{s}" for n in ("captions", "metadata") for s in ("csv", "jsonl", "parquet"))
Span = tuple[Path, int, int]  # shard, offset and size in bytes


@dataclass(frozen=True)
class CaptionedBatch:
    """Images [B, C, H, W] in [-1, 1], their captions, and what was cut from where.

    ``time_ids`` [B, 6] float32, pixels, as SDXL is conditioned (arXiv:2307.01952v1, section 2.2):
    height and width of the original, top and left of the cut after scaling, height and width.
    """

    images: Tensor
    captions: list[str]
    time_ids: Tensor


@dataclass(frozen=True, slots=True)
class _Item:
    path: Path  # of the image; inside a shard only a label for messages
    caption: str
    problem: str | None
    span: Span | None


class _Pictures(ImageItems):
    def __init__(self, name: Path, items: Sequence[_Item], size: int, channels: int) -> None:
        self._items = items
        super().__init__(name, [item.path for item in items], size, channels, flip=False)

    def _open(self, item: int) -> Path | io.BytesIO:
        found = self._items[item]
        if found.problem is not None:
            raise ValueError(found.problem)
        return found.path if found.span is None else io.BytesIO(_read_span(found.span))

    def usable(self) -> list[_Item]:
        return [self._items[item] for item in self._usable]

    def read(self, row: int) -> tuple[Tensor, str, list[int]]:
        """Image, caption and time ids of a usable row, or of the next one that can be read."""
        x0, item = self._first_readable(row)
        with self._image(item) as image:
            width, height = image.size
            if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # lies on its side
                width, height = height, width
        scale = self._size / min(width, height)
        cut = [round((side * scale - self._size) / 2) for side in (height, width)]
        time_ids = [height, width, *cut, self._size, self._size]
        return x0, self._items[item].caption, time_ids


class CaptionedImages:
    """Images and captions, never mirrored; what a row holds follows from the disk alone."""

    def __init__(self, path: Path, size: int, *, seed: int, channels: int = 3) -> None:
        """List the items and check the header of every image.

        Args:
            path: folder, searched recursively, or one ``.tar``.
            size: images are scaled to cover a square of this size and cut to it at the centre.
            seed: of the order.
            channels: 3 for RGB, 1 for grey.

        Raises:
            ValueError: if there is no image, a table or a shard cannot be read, or more than 5 %
                of the items are broken, missing, smaller than ``size`` or without a caption.
            ImportError: for a .parquet table without pyarrow.
        """
        tars = [path] if path.suffix == ".tar" else sorted(path.rglob("*.tar"))
        items = [*_folder_items(path), *(item for tar in tars for item in _shard_items(tar))]
        self._pictures = _Pictures(path, items, size, channels)
        self._root, self._usable, self._seed = path, self._pictures.usable(), seed

    @property
    def quarantine(self) -> list[tuple[Path, str]]:
        """Items that cannot be used, as (path, reason); grows when one fails late."""
        return self._pictures.quarantine

    def __len__(self) -> int:
        """Number of rows: items that could be used at construction."""
        return len(self._usable)

    def rows(self, indices: Sequence[int]) -> list[int]:
        """Rows of global sample indices: each epoch of ``len(self)`` visits every row once."""
        return [permuted(i, len(self), seed=self._seed, purpose="images") for i in indices]

    def read(self, rows: Sequence[int]) -> CaptionedBatch:
        """The items of these rows, in [0, len); one that fails now is replaced by the next.

        Raises:
            ValueError: if by now more than 5 % of the items turned out to be broken.
        """
        images, captions, time_ids = zip(*map(self._pictures.read, rows), strict=True)
        return CaptionedBatch(torch.stack(images), list(captions), torch.tensor(time_ids).float())

    def batch(self, indices: Sequence[int]) -> CaptionedBatch:
        """Images and captions of global sample indices; errors as in :meth:`read`."""
        return self.read(self.rows(indices))

    def captions_of(self, rows: Sequence[int]) -> list[str]:
        """Captions of rows; no image is read."""
        return [self._usable[row].caption for row in rows]

    def one_row_an_image(self) -> list[int]:
        """A row of each image, in the order of the disk: which of its captions, the seed decides.

        Images of different files are different images.
        """
        rows: dict[Path, list[int]] = {}
        for row, item in enumerate(self._usable):
            rows.setdefault(item.path, []).append(row)
        drawn = uniform(seed=self._seed, purpose="caption", indices=range(len(rows))).tolist()
        return [
            several[int(u * len(several))] for several, u in zip(rows.values(), drawn, strict=True)
        ]

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Captions of global sample indices; no image is read."""
        return self.captions_of(self.rows(indices))

    def fingerprint(self) -> str:
        """sha256 over relative path, caption and size in bytes of every row, for a cache's key."""
        digest = hashlib.sha256()
        for item in self._usable:
            size = item.path.stat().st_size if item.span is None else item.span[2]
            facts = [os.path.relpath(item.path, self._root), item.caption, size]
            digest.update(json.dumps(facts).encode())
        return digest.hexdigest()


def read_rows(path: Path) -> list[dict[str, object]]:
    """The rows of a .csv with a header, a .jsonl of objects or a .parquet, by column.

    ValueError names a file that is malformed; ImportError for .parquet without pyarrow.
    """
    if path.suffix == ".parquet":
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise ImportError("pyarrow is not installed: pip install 'diffdiv[data]'") from None
        return list(parquet.read_table(path).to_pylist())
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file, strict=True))
            return [dict(json.loads(line)) for line in file if line.strip()]
    except (csv.Error, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a table of rows with columns ({error})") from None


def _folder_items(root: Path) -> Iterator[_Item]:
    tables = [root / name for name in TABLES if (root / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{root}: both {tables[0].name} and {tables[1].name}; one table is wanted")
    listed = set()
    for number, row in enumerate(read_rows(tables[0]) if tables else (), 1):
        where, name = f"{tables[0]}: row {number}", row.get("file_name")
        if not isinstance(name, str) or not set(COLUMNS) & set(row):
            raise ValueError(f"{where} has no file_name, or neither caption nor text: {list(row)}")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{where} names {name!r}, which is not below this folder")
        listed.add(path := root / name)
        item = _item(path, partial(_of_columns, row))
        missing = None if path.is_file() else f"row {number} of {tables[0].name} names no file"
        yield _Item(path, item.caption, missing or item.problem, None)
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        if path not in listed:
            yield _item(path, path.with_suffix(".txt").read_bytes)


def _shard_items(shard: Path) -> Iterator[_Item]:
    samples: dict[str, dict[str, Span]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                if member.isreg() and not member.issparse():
                    parts = samples.setdefault(folder + slash + key, {})
                    parts[f".{suffix.lower()}"] = (shard, member.offset_data, member.size)
            # tarfile takes a cut or overwritten header for the end; a whole archive ends in zeros
            if _read_span((shard, tar.offset, tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it breaks off at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard}: not a whole, uncompressed tar file ({error})") from None
    for key, parts in samples.items():
        for suffix in [suffix for suffix in parts if suffix in SUFFIXES][:1]:
            # joined as text: with a path, a leading "/" would swallow the shard's own
            label = Path(f"{shard}/{key}{suffix}")
            yield _item(label, partial(_of_sample, parts), parts[suffix])


def _item(path: Path, caption: Callable[[], str | bytes], span: Span | None = None) -> _Item:
    """The item with its caption, or with the reason why it has none."""
    try:
        content = caption()
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        text = " ".join(text.split())
        if bad := [c for c in text if unicodedata.category(c) == "Cc"]:
            raise ValueError(f"it has the control character {bad[0]!r}")
        problem = None if text else "its caption is empty"
    except (OSError, ValueError) as error:
        text, problem = "", f"it has no usable caption: {error}"
    return _Item(path, text, problem, span)


def _of_sample(parts: Mapping[str, Span]) -> str | bytes:
    if ".txt" in parts:
        return _read_span(parts[".txt"])
    if ".json" not in parts:
        raise ValueError("its sample has neither .txt nor .json")
    value = json.loads(_read_span(parts[".json"]))
    return _of_columns(value if isinstance(value, dict) else {})


def _of_columns(row: Mapping[str, object]) -> str:
    for text in map(row.get, COLUMNS):
        if isinstance(text, str):
            return text
    raise ValueError(f"there is no text in {' or '.join(COLUMNS)}")


def _read_span(span: Span) -> bytes:
    path, offset, size = span
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
