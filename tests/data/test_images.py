"""Folders of images, sound and broken: what is drawn, in which order, and what is set aside."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffdiv.data.images import ImageFolder


def write(path: Path, colour=(255, 0, 0), size=(16, 16), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """40 grey images, ten in each of four classes; image i has the value 6 i."""
    for i in range(40):
        write(tmp_path / "set" / "abcd"[i // 10] / f"{i:02d}.png", 6 * i, mode="L")
    return tmp_path / "set"


def values(x0: torch.Tensor) -> list[int]:
    return [round(float(v)) for v in (x0[:, 0, 0, 0] + 1) * 127.5]


def test_values_classes_and_shapes(folder):
    images = ImageFolder(folder, 8, channels=1, class_from="folder")
    assert len(images) == 40 and images.classes == ["a", "b", "c", "d"] and not images.quarantine
    x0, labels = images.batch(range(40), seed=0)
    assert x0.shape == (40, 1, 8, 8) and x0.dtype == torch.float32
    assert [value // 60 for value in values(x0)] == labels.tolist()
    assert ImageFolder(folder, 8, channels=3).batch([0], seed=0)[0].shape == (1, 3, 8, 8)


def test_each_epoch_visits_every_image_once_in_its_own_order(folder):
    images = ImageFolder(folder, 8, channels=1)
    x0, labels = images.batch(range(80), seed=5)
    assert labels is None
    first, second = values(x0[:40]), values(x0[40:])
    assert sorted(first) == sorted(second) == [6 * i for i in range(40)]
    assert first != second and first != values(images.batch(range(40), seed=6)[0])


def test_a_sample_depends_on_seed_and_index_only(tmp_path):
    for i in range(20):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 255, (9, 9, 3), np.uint8))
        image.save(tmp_path / f"{i}.png")
    images = ImageFolder(tmp_path, 9)
    whole, _ = images.batch(range(12), seed=1)
    parts = torch.cat([ImageFolder(tmp_path, 9).batch([i], seed=1)[0] for i in range(12)])
    assert torch.equal(whole, parts)
    plain = ImageFolder(tmp_path, 9, flip=False).batch(range(12), seed=1)[0]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(whole, plain, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(whole, plain, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True)) and 0 < sum(mirrored) < 12


def test_centre_is_cut_after_scaling(tmp_path):
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    Image.fromarray(image).save(tmp_path / "wide.png")
    x0, _ = ImageFolder(tmp_path, 10).batch([0], seed=0)
    assert torch.equal(x0, torch.ones(1, 3, 10, 10))


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "rgb"),
    [
        ("CMYK", (0, 255, 255, 0), "tiff", (255, 0, 0)),
        ("RGBA", (0, 0, 255, 255), "png", (0, 0, 255)),
        ("RGBA", (0, 0, 0, 0), "png", (255, 255, 255)),
        ("LA", (0, 0), "png", (255, 255, 255)),
        ("I;16", 65535, "png", (255, 255, 255)),
        ("I;16", 257 * 100, "png", (100, 100, 100)),
        ("P", 0, "gif", (0, 0, 0)),
        ("1", 1, "png", (255, 255, 255)),
    ],
)
def test_modes_become_rgb(tmp_path, mode, colour, suffix, rgb):
    write(tmp_path / f"x.{suffix}", colour, mode=mode)
    x0, _ = ImageFolder(tmp_path, 8).batch([0], seed=0)
    assert [round(float(v)) for v in (x0[0, :, 4, 4] + 1) * 127.5] == list(rgb)


def bomb() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""
    data = io.BytesIO()
    Image.new("L", (1, 1)).save(data, "png")
    png = bytearray(data.getvalue())
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "cannot identify"),
        ("text.jpg", b"not an image", "cannot identify"),
        ("bomb.png", bomb(), "decompression bomb"),
        ("small.png", None, "1x1 pixels, smaller than 8"),
    ],
)
def test_broken_files_are_set_aside_with_the_reason(folder, name, content, reason):
    path = folder / "a" / name
    write(path, size=(1, 1)) if content is None else path.write_bytes(content)
    images = ImageFolder(folder, 8, channels=1, class_from="folder")
    assert len(images) == 40
    ((where, why),) = images.quarantine
    assert where == path and reason in why
    assert sorted(values(images.batch(range(40), seed=0)[0])) == [6 * i for i in range(40)]


def test_truncated_files_are_found_at_once_or_replaced_when_read(folder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))
    cut = folder / "a" / "cut.jpg"
    noise.save(cut)
    cut.write_bytes(cut.read_bytes()[:-600])
    images = ImageFolder(folder, 8, channels=1, class_from="folder", flip=False)
    x0, labels = images.batch(range(len(images)), seed=0)
    assert [path for path, _ in images.quarantine] == [cut]
    assert set(values(x0)) == {6 * i for i in range(40)}
    assert [value // 60 for value in values(x0)] == labels.tolist()
    again = ImageFolder(folder, 8, channels=1, class_from="folder", flip=False)
    assert torch.equal(x0, again.batch(range(len(again)), seed=0)[0])


def test_a_file_that_vanishes_is_replaced(folder):
    images = ImageFolder(folder, 8, channels=1)
    (folder / "a" / "03.png").unlink()
    x0, _ = images.batch(range(40), seed=0)
    assert 18 not in values(x0) and len(x0) == 40
    assert images.quarantine[0][0].name == "03.png"


def test_too_many_broken_late_is_an_error(folder):
    images = ImageFolder(folder, 8, channels=1)
    for i in range(5):
        (folder / "a" / f"{i:02d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3 of 40 images cannot be used \(more than 5%\)"):
        images.batch(range(40), seed=0)


def test_folders_that_cannot_serve_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no image"):
        ImageFolder(tmp_path / "nothing", 8)
    with pytest.raises(ValueError, match=r"40 of 40.*00.png: 16x16 pixels, smaller than 64"):
        ImageFolder(folder, 64)
    with pytest.raises(ValueError, match="channels: 4"):
        ImageFolder(folder, 8, channels=4)
    write(folder / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png lies in no sub-folder"):
        ImageFolder(folder, 8, class_from="folder")


def test_dataset_gives_what_the_folder_gives(tmp_path):
    datasets = pytest.importorskip("datasets")
    from diffdiv.data.images import DatasetImages

    paths = [str(write(tmp_path / "in" / f"{i}.png", (10 * i, 0, 0))) for i in range(5)]
    table = datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 2, 1, 0]})
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    images = DatasetImages(tmp_path / "saved", 8, label_key="label")
    x0, labels = images.batch(range(5), seed=0)
    assert torch.equal(x0, ImageFolder(tmp_path / "in", 8).batch(range(5), seed=0)[0])
    assert labels.tolist() == [[0, 1, 2, 1, 0][value // 10] for value in values(x0)]
