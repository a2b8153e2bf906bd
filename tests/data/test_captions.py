"""Captioned images from folders, tables and shards: what is drawn, and what is set aside."""

import csv
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffdiv.data.captions import CaptionedImages, read_rows
from diffdiv.data.images import ImageFolder

WORDS = ["a red seven", "ein Löwe, 獅子", 'she said "no, no"', "two\nlines", "ﬀ 🦁"]


def picture(i: int, size=(9, 9)) -> Image.Image:
    pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(i: int, kind: str = "png") -> bytes:
    data = io.BytesIO()
    picture(i).save(data, kind)
    return data.getvalue()


def caption(i: int) -> str:
    return f"{i} {WORDS[i % 5]}"


def clean(i: int) -> str:
    return " ".join(caption(i).split())


def fill(folder: Path, count: int = 20) -> Path:
    """Images with sidecars in two sub-folders."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
        path.with_suffix(".txt").write_text(caption(i), "utf-8")
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(numbers: range, kind: str = "png") -> list[tuple[str, bytes]]:
    """Image and text, or image and JSON, of each number."""
    members = []
    for i in numbers:
        json_or_text = (
            (f"{i:04d}.json", json.dumps({"caption": caption(i)}).encode())
            if i % 2
            else (f"{i:04d}.txt", caption(i).encode())
        )
        members += [(f"{i:04d}.{kind}", encoded(i, kind)), json_or_text]
    return members


def pixels(x0: torch.Tensor) -> np.ndarray:
    return ((x0 + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)


def check_pairs(data: CaptionedImages, count: int) -> None:
    """Every image comes once in an epoch, with its own caption."""
    batch = data.batch(range(count))
    numbers = [int(text.split()[0]) for text in batch.captions]
    assert sorted(numbers) == list(range(count)) == list(range(len(data)))
    assert batch.captions == [clean(i) for i in numbers] == data.captions(range(count))
    for got, i in zip(pixels(batch.images), numbers, strict=True):
        assert np.array_equal(got, np.asarray(picture(i)))


def test_sidecars(tmp_path):
    check_pairs(CaptionedImages(fill(tmp_path), 9, seed=0), 20)


@pytest.mark.parametrize("stem", ["captions", "metadata"])
@pytest.mark.parametrize("column", ["caption", "text"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables(tmp_path, stem, column, encoding):
    fill(tmp_path)
    for text in tmp_path.rglob("*.txt"):
        text.unlink()
    rows = [{"id": i, "file_name": f"{'ab'[i % 2]}/{i:02d}.png"} for i in range(20)]
    rows = [row | {column: caption(row["id"])} for row in rows]
    with (tmp_path / f"{stem}.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ["id", "file_name", column])
        writer.writeheader()
        writer.writerows(rows)
    check_pairs(CaptionedImages(tmp_path, 9, seed=1), 20)
    (tmp_path / f"{stem}.csv").unlink()
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / f"{stem}.jsonl").write_text(lines, encoding)
    check_pairs(CaptionedImages(tmp_path, 9, seed=1), 20)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    fill(tmp_path)
    names = [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(20)]
    table = {"file_name": names, "caption": [caption(i) for i in range(20)]}
    parquet.write_table(pyarrow.table(table), tmp_path / "captions.parquet")
    check_pairs(CaptionedImages(tmp_path, 9, seed=1), 20)


def test_several_captions_of_one_image_are_several_rows(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(3))
    (tmp_path / "captions.csv").write_text("file_name,caption\nx.png,one\nx.png,two\n")
    batch = CaptionedImages(tmp_path, 9, seed=0).batch(range(2))
    assert sorted(batch.captions) == ["one", "two"]
    assert torch.equal(batch.images[0], batch.images[1])


def test_images_outside_the_table_keep_their_sidecar(tmp_path):
    fill(tmp_path, 4)
    (tmp_path / "captions.csv").write_text('file_name,caption\na/00.png,"0 other"\n')
    assert sorted(CaptionedImages(tmp_path, 9, seed=0).captions(range(4)))[0] == "0 other"


def test_shards_give_what_tarfile_reads(tmp_path):
    for number, numbers in enumerate((range(8), range(8, 20))):
        write_tar(tmp_path / f"set-{number}.tar", samples(numbers))
    data = CaptionedImages(tmp_path, 9, seed=2)
    check_pairs(data, 20)
    stored: dict[str, bytes] = {}
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as tar:
            stored |= {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    images = [stored[name] for name in stored if name.endswith(".png")]
    for row in (13, 2, 19, 0):  # any order
        got = pixels(data.read([row]).images)[0]
        assert np.array_equal(got, np.asarray(Image.open(io.BytesIO(images[row]))))
    one = CaptionedImages(tmp_path / "set-0.tar", 9, seed=2)
    check_pairs(one, 8)


def test_shards_equal_the_folder_they_were_made_from(tmp_path):
    fill(tmp_path / "folder")
    paths = sorted((tmp_path / "folder").rglob("*.png"))
    files = [file for path in paths for file in (path, path.with_suffix(".txt"))]
    members = [(str(file.relative_to(tmp_path)), file.read_bytes()) for file in files]
    tar = CaptionedImages(write_tar(tmp_path / "x.tar", members), 8, seed=3)
    folder = CaptionedImages(tmp_path / "folder", 8, seed=3)
    one, other = tar.batch([5, 30]), folder.batch([5, 30])
    assert torch.equal(one.images, other.images) and one.captions == other.captions
    assert torch.equal(one.time_ids, other.time_ids)


def test_a_sample_depends_on_seed_and_index_only(tmp_path):
    data = CaptionedImages(fill(tmp_path), 9, seed=4)
    whole = data.batch(range(50))
    for start in range(0, 50, 7):  # another batch size, and a resumed process
        part = CaptionedImages(tmp_path, 9, seed=4).batch(range(start, min(start + 7, 50)))
        assert torch.equal(part.images, whole.images[start : start + 7])
        assert part.captions == whole.captions[start : start + 7]
    orders = [CaptionedImages(tmp_path, 9, seed=s).captions(range(20)) for s in (4, 5)]
    assert orders[0] != orders[1] and whole.captions[:20] != whole.captions[20:40]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(whole.captions[20:40])
    images = ImageFolder(tmp_path, 9, flip=False).batch(range(50), seed=4)[0]
    assert torch.equal(images, whole.images)  # one order for images, captioned or not


@pytest.mark.parametrize(
    ("size", "orientation", "wanted"),
    [
        ((9, 9), 1, [9, 9, 0, 0, 8, 8]),
        ((32, 16), 1, [16, 32, 0, 4, 8, 8]),
        ((16, 48), 1, [48, 16, 8, 0, 8, 8]),
        ((32, 16), 6, [32, 16, 4, 0, 8, 8]),  # stored lying: shown 16 wide, 32 high
        ((32, 16), 3, [16, 32, 0, 4, 8, 8]),
    ],
)
def test_time_ids_tell_the_original_the_cut_and_the_target(tmp_path, size, orientation, wanted):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(0, size).save(tmp_path / "x.jpg", exif=exif)
    (tmp_path / "x.txt").write_text("a cat")
    time_ids = CaptionedImages(tmp_path, 8, seed=0).batch([0]).time_ids
    assert time_ids.dtype == torch.float32 and time_ids.tolist() == [wanted]


def test_channels(tmp_path):
    fill(tmp_path, 2)
    assert CaptionedImages(tmp_path, 9, seed=0, channels=1).batch([0]).images.shape == (1, 1, 9, 9)


def no_sidecar(folder: Path) -> None:
    (folder / "a" / "00.txt").unlink()


def no_image(folder: Path) -> None:
    row = {"file_name": "a/gone.png", "caption": "gone"}
    (folder / "captions.jsonl").write_text(json.dumps(row))


@pytest.mark.parametrize(
    ("spoil", "name", "reason"),
    [
        (no_sidecar, "00.png", r"no usable caption.*00\.txt"),
        (lambda f: (f / "a/00.txt").write_text(" \n"), "00.png", "its caption is empty"),
        (lambda f: (f / "a/00.txt").write_bytes(b"\xff"), "00.png", "utf-8"),
        (
            lambda f: (f / "a/00.txt").write_bytes(b"a\x1b[31m"),
            "00.png",
            r"control character '\\x1b'",
        ),
        (lambda f: (f / "a/00.png").write_bytes(b""), "00.png", "cannot identify"),
        (lambda f: (f / "a/00.png").write_bytes(encoded(0)[:-40]), "00.png", "."),
        (no_image, "gone.png", r"row 1 of captions\.jsonl names no file"),
    ],
)
def test_what_cannot_be_used_is_set_aside_with_the_reason(tmp_path, spoil, name, reason):
    spoil(fill(tmp_path, 40))
    data = CaptionedImages(tmp_path, 9, seed=0)
    captions = data.batch(range(len(data))).captions
    ((path, why),) = data.quarantine
    assert path.name == name and re.search(reason, why)
    wanted = range(0 if name == "gone.png" else 1, 40)
    assert {int(text.split()[0]) for text in captions} == set(wanted)


def test_samples_of_a_shard_that_cannot_be_used(tmp_path):
    members = [
        *samples(range(2, 60)),
        ("0.png", encoded(0)),
        ("1.jpg", b"not an image"),
        ("1.txt", b"one"),
        ("only.txt", b"a text without an image is no item"),
        ("__meta__", b""),
    ]
    data = CaptionedImages(write_tar(tmp_path / "x.tar", members), 9, seed=0)
    assert len(data) == 58
    reasons = {path.name: why for path, why in data.quarantine}
    assert reasons.keys() == {"0.png", "1.jpg"}
    assert "neither .txt nor .json" in reasons["0.png"] and "cannot identify" in reasons["1.jpg"]
    bad = {"list": b"[1]", "empty": b"{}", "number": b'{"caption": 3}', "broken": b"{"}
    members = samples(range(96)) + [(f"{n}.png", encoded(0)) for n in bad]
    members += [(f"{name}.json", content) for name, content in bad.items()]
    data = CaptionedImages(write_tar(tmp_path / "y.tar", members), 9, seed=0)
    assert {path.stem for path, _ in data.quarantine} == bad.keys()


def test_names_in_a_shard_are_never_paths(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    fill(outside, 1)
    shard = tmp_path / "in" / "x.tar"
    shard.parent.mkdir()
    hostile = [f"{outside}/a/00", "../outside/a/00", "/etc/passwd", "a/../../b"]
    with tarfile.open(shard, "w") as tar:
        for i, name in enumerate(hostile):
            for suffix, data in (("png", encoded(50 + i)), ("txt", b"50 mine")):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.png")
            info.type, info.linkname = kind, f"{outside}/a/00.png"
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    data = CaptionedImages(shard, 9, seed=0)
    assert len(data) == 4 and not data.quarantine
    for row, got in enumerate(pixels(data.read(range(4)).images)):
        assert np.array_equal(got, np.asarray(picture(50 + row)))
    assert sorted(tmp_path.rglob("*")) == before
    assert all(str(item.path).startswith(str(shard)) for item in data._usable)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("captions.csv", "file_name,words\na/00.png,x\n", "row 1 has no file_name, or neither"),
        ("captions.csv", "caption\nx\n", "row 1 has no file_name"),
        (
            "captions.csv",
            'file_name,caption\n../x.png,"x"\n',
            r"names '\.\./x.png', which is not",
        ),
        ("captions.jsonl", '{"file_name": "/x.png", "text": "x"}', "row 1 names '/x.png'"),
        ("captions.jsonl", '{"file_name": "a/00.png"', "not a table of rows"),
        ("captions.jsonl", "3", "not a table of rows"),
        ("metadata.csv", 'file_name,caption\na/00.png,"x\n', "not a table of rows"),
        ("captions.parquet", "", "pyarrow is not installed|arquet"),
        ("x.tar", "not a tar file", "not a whole, uncompressed tar"),
    ],
)
def test_what_cannot_be_read_at_all_is_refused_in_one_sentence(tmp_path, name, content, sentence):
    (fill(tmp_path) / name).write_text(content)
    with pytest.raises((ValueError, ImportError), match=sentence) as caught:
        CaptionedImages(tmp_path, 9, seed=0)
    assert "\n" not in str(caught.value)


def test_truncated_and_compressed_shards_are_refused_by_name(tmp_path):
    whole = write_tar(tmp_path / "x.tar", samples(range(20))).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        last = tar.getmembers()[-1]
    in_data, in_header, before_it = last.offset_data + 1, last.offset + 100, last.offset
    for end in (700, len(whole) // 2, in_data, in_header, before_it):
        (tmp_path / "x.tar").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"x\.tar: not a whole, uncompressed tar"):
            CaptionedImages(tmp_path, 9, seed=0)
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.add(fill(tmp_path / "y"))
    with pytest.raises(ValueError, match=r"x\.tar: not a whole, uncompressed tar"):
        CaptionedImages(tmp_path / "x.tar", 9, seed=0)


def test_folders_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no image here"):
        CaptionedImages(tmp_path, 9, seed=0)
    with pytest.raises(ValueError, match="there is no image here"):
        CaptionedImages(write_tar(tmp_path / "empty.tar", []), 9, seed=0)
    fill(tmp_path)
    for number in (0, 2):
        (tmp_path / "a" / f"{number:02d}.txt").unlink()
    with pytest.raises(ValueError, match=r"2 of 20 images cannot be used.*no usable caption"):
        CaptionedImages(tmp_path, 9, seed=0)
    for name in ("captions.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"both captions\.csv and metadata\.jsonl"):
        CaptionedImages(tmp_path, 9, seed=0)


def test_fingerprint_follows_names_captions_and_sizes_but_not_the_place(tmp_path):
    def of(name: str) -> str:
        return CaptionedImages(tmp_path / name, 9, seed=0).fingerprint()

    for name in "xyz":
        fill(tmp_path / name)
    assert of("x") == of("y")
    (tmp_path / "y" / "a" / "00.txt").write_text("other words")
    (tmp_path / "z" / "a" / "00.png").rename(tmp_path / "z" / "a" / "0.png")
    (tmp_path / "z" / "a" / "00.txt").rename(tmp_path / "z" / "a" / "0.txt")
    assert len({of("x"), of("y"), of("z")}) == 3
    write_tar(tmp_path / "t.tar", samples(range(4)))
    assert of("t.tar") == of("t.tar") != of("x")


def test_rows_keep_quotes_commas_and_newlines(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('file_name,caption\r\na.png,"one, ""two""\r\nthree"\r\n', newline="")
    assert read_rows(path) == [{"file_name": "a.png", "caption": 'one, "two"\r\nthree'}]
