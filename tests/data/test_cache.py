"""The cache of embeddings and latents: equal to computing them, resumed, refused when damaged."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffdiv.core.noise import normal
from diffdiv.data import cache as cache_module
from diffdiv.data.cache import Cache, CacheError, build_cache, fingerprint
from diffdiv.data.captions import CaptionedImages
from diffdiv.data.digits import DIGITS
from diffdiv.models.backbones import LatentCodec, PromptEncoder
from diffdiv.resources import resource

KEY = {"vae": "abc", "image_size": 32, "dtype": "float32"}
COUNT = 22


def values(rows: Sequence[int]) -> dict[str, Tensor]:
    """Three tensors of different shapes and dtypes, a function of the row alone."""
    row = torch.tensor(rows)[:, None]
    return {
        "text": (row + torch.arange(6) / 7).reshape(-1, 2, 3).bfloat16(),
        "mean": row / 3 + torch.arange(4.0),
        "label": row[:, 0],
    }


class Counted:
    """``values``, counting the rows asked for, and interrupted when asked for ``stop``."""

    def __init__(self, stop: int | None = None) -> None:
        self.rows: list[int] = []
        self.stop = stop

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        if self.stop in rows:
            raise KeyboardInterrupt
        self.rows += rows
        return values(rows)


def build(folder: Path, compute=values, key=KEY, count=COUNT, **options) -> None:
    options = {"shard_size": 5, "batch_size": 2} | options
    build_cache(folder, key=key, count=count, compute=compute, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path) -> Path:
    build(tmp_path / "cache")
    return tmp_path / "cache"


def test_rows_are_what_was_computed_in_the_order_asked(folder):
    cache = Cache(folder, KEY, verify=True)
    assert len(cache) == COUNT
    assert cache.tensors == {"text": "bfloat16 [2, 3]", "mean": "float32 [4]", "label": "int64 []"}
    for rows in ([21], [3, 0, 19, 3, 7], list(range(COUNT))):
        found, wanted = cache.rows(rows), values(rows)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    assert cache.rows([4, 2], ["label"])["label"].tolist() == [4, 2]
    assert cache.rows([4, 2], ["label"]).keys() == {"label"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_bit_pattern_of_a_dtype_is_kept(tmp_path, dtype):
    limits = torch.finfo(dtype)
    x = torch.tensor([0.0, -0.0, limits.smallest_normal / 4, limits.max, limits.eps], dtype=dtype)
    build(tmp_path, lambda rows: {"x": x.expand(len(rows), 5)}, count=3)
    found = Cache(tmp_path, KEY).rows([0, 2])["x"]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(found.view(bits), x.expand(2, 5).contiguous().view(bits))


def test_results_do_not_depend_on_batches_and_shards(tmp_path):
    for i, (shard_size, batch_size) in enumerate([(5, 2), (1, 1), (100, 7), (22, 22)]):
        build(tmp_path / f"{i}", shard_size=shard_size, batch_size=batch_size)
        found = Cache(tmp_path / f"{i}", KEY).rows(range(COUNT))
        assert all(torch.equal(found[name], value) for name, value in values(range(COUNT)).items())
    assert contents(tmp_path / "0").keys() == {"manifest.json"} | {
        f"shard-{n:05}.{suffix}" for n in range(5) for suffix in ("json", "safetensors")
    }


def test_few_shards_stay_open(tmp_path):
    build(tmp_path, shard_size=1)
    cache = Cache(tmp_path, KEY)
    assert torch.equal(cache.rows(range(COUNT))["mean"], values(range(COUNT))["mean"])
    assert cache._file.cache_info().currsize == cache_module.MAX_OPEN < COUNT


def test_an_interrupted_build_goes_on_at_the_missing_shard(tmp_path, folder):
    half = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        build(half, Counted(stop=13))
    assert len(list(half.glob("*.safetensors"))) == 2  # rows 0-9; 10-12 are lost with their shard
    with pytest.raises(CacheError, match="no finished cache"):
        Cache(half, KEY)
    again = Counted()
    build(half, again, shard_size=7)  # the size of shards is the one it began with
    assert again.rows == list(range(10, COUNT))
    assert contents(half) == contents(folder)
    build(half, unused := Counted())
    assert unused.rows == []


def test_a_kill_between_shard_and_record_recomputes_that_shard(tmp_path, folder):
    before = contents(folder)
    (folder / "shard-00001.json").unlink()
    (folder / ".tmp-shard-00001.safetensors").write_bytes(b"half")
    build(folder, again := Counted())
    assert again.rows == list(range(5, 10)) and contents(folder) == before


def test_ranks_share_the_shards(tmp_path, folder):
    shared, counted = tmp_path / "shared", [Counted(), Counted()]
    barrier = threading.Barrier(2, timeout=20)
    ranks = [
        threading.Thread(
            target=build,
            args=(shared, counted[rank]),
            kwargs={"rank": rank, "world": 2, "barrier": lambda: barrier.wait() and None},
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert counted[0].rows == [*range(5), *range(10, 15), 20, 21]
    assert counted[1].rows == [*range(5, 10), *range(15, 20)]
    assert contents(shared) == contents(folder)


def test_another_key_is_refused_and_the_entry_named(folder):
    for key, sentence in (
        (KEY | {"image_size": 64}, "image_size = 32, wanted is 64"),
        (KEY | {"seed": 0}, "seed = None, wanted is 0"),
        ({"vae": "abc", "image_size": 32}, "dtype = 'float32', wanted is None"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Cache(folder, key)
        with pytest.raises(ValueError, match=sentence):
            build(folder, Counted(), key=key)
    with pytest.raises(ValueError, match="count = 22, wanted is 23"):
        build(folder, count=23)
    (folder / "manifest.json").unlink()  # not finished: the key is known all the same
    with pytest.raises(ValueError, match="vae = 'abc', wanted is 'xyz'"):
        build(folder, key=KEY | {"vae": "xyz"})


def test_keys_are_compared_as_they_are_written(tmp_path):
    key = {"blocks": (1, 2), "scale": 0.1 + 0.2, "name": "Löwe", "none": None}
    build(tmp_path, key=key)
    Cache(tmp_path, key)
    build(tmp_path, unused := Counted(), key=key)
    assert not unused.rows


def test_a_truncated_shard_is_named_and_rebuilt_alone(folder):
    before = contents(folder)
    path = folder / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"shard-00002\.safetensors is damaged \(\d+ bytes, man"):
        Cache(folder, KEY)
    build(folder, again := Counted())
    assert again.rows == list(range(10, 15)) and contents(folder) == before
    path.unlink()
    with pytest.raises(CacheError, match=r"shard-00002\.safetensors is damaged \(None bytes"):
        Cache(folder, KEY)


def test_a_flipped_bit_of_a_shard_is_found_before_it_is_used(folder):
    """Bits that belong to no row read (names, other rows) may pass, wrong values never."""
    path = folder / "shard-00001.safetensors"
    whole, wanted = path.read_bytes(), values(range(5, 10))
    found = 0
    for at in range(0, len(whole), 5):
        flip(path, at)
        cache = Cache(folder, KEY)
        try:
            rows = cache.rows(range(5, 10))
        except CacheError as error:
            assert "shard-00001.safetensors is damaged" in str(error)
            found += 1
        else:
            assert all(torch.equal(rows[name], value) for name, value in wanted.items())
        path.write_bytes(whole)
    num_data_bytes = 5 * (12 + 16 + 8 + 3 * 8)  # rows and their checksums
    assert found >= num_data_bytes // 5
    for at in (len(whole) // 3, len(whole) - 1):
        flip(path, at)
        with pytest.raises(CacheError, match=r"shard-00001\.safetensors is damaged \(sha256"):
            Cache(folder, KEY, verify=True)
        path.write_bytes(whole)


def test_bytes_read_as_another_type_are_found(folder):
    path = folder / "shard-00000.safetensors"
    whole = path.read_bytes()
    assert whole.count(b'"F32"') == 1
    path.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors is damaged \(row 0 of mean"):
        Cache(folder, KEY).rows([0])


def test_a_flipped_bit_of_the_manifest_is_found(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        flip(path, at)
        if json_or_none(path.read_bytes()) != json.loads(whole):  # white space may pass
            with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
                Cache(folder, KEY)
        path.write_bytes(whole)
    Cache(folder, KEY)


def json_or_none(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_what_cannot_be_asked_is_refused(folder, tmp_path):
    cache = Cache(folder, KEY)
    for row in (-1, COUNT):
        with pytest.raises(IndexError, match=f"row {row} is not in 0..21"):
            cache.rows([0, row])
    with pytest.raises(ValueError, match="no tensor 'std', but"):
        cache.rows([0], ["mean", "std"])
    with pytest.raises(ValueError, match="0 rows"):
        build(tmp_path / "empty", count=0)
    with pytest.raises(CacheError, match="there is no finished cache here"):
        Cache(tmp_path / "empty", KEY)


def test_bad_results_are_never_written(tmp_path):
    def overflow(rows: Sequence[int]) -> dict[str, Tensor]:
        return {"mean": torch.tensor([1e6 if row == 3 else 1.0 for row in rows]).half()}

    with pytest.raises(FloatingPointError, match="mean: not finite in rows 2 to 3"):
        build(tmp_path, overflow)
    with pytest.raises(ValueError, match="text: 1 rows computed for 2"):
        build(tmp_path, lambda rows: {"text": torch.zeros(1, 3)})
    assert contents(tmp_path) == {}


def test_shards_of_another_kind_are_not_mixed(tmp_path):
    def compute(rows: Sequence[int]) -> dict[str, Tensor]:
        return {"x": torch.zeros(len(rows), dtype=torch.float16 if rows[0] < 15 else torch.float32)}

    with pytest.raises(CacheError, match=r"shard-00003\.json is damaged \(tensors .*float32"):
        build(tmp_path, compute)
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_is_one_sentence_and_leaves_no_rest(folder, monkeypatch):
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (folder / "shard-00004.safetensors").unlink()
    before = contents(folder)
    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.raises(CacheError, match=r"shard-00004\.safetensors was not written; earlier"):
        build(folder)
    assert contents(folder) == before


def test_fingerprint_follows_the_weights_and_not_their_place(tmp_path):
    teacher = resource("assets/embedded_sd")
    copies = [tmp_path / name for name in "ab"]
    for copy in copies:
        for source in ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
            path = copy / source.removeprefix("vae/")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes((teacher / source).read_bytes())
    (copies[1] / "README.md").write_text("not weights")
    assert fingerprint(copies[0]) == fingerprint(copies[1]) == fingerprint(teacher / "vae")
    known = {fingerprint(copies[0]), fingerprint(teacher / "text_encoder")}
    flip(copies[0] / "diffusion_pytorch_model.safetensors", -1)
    known.add(fingerprint(copies[0]))
    (copies[1] / "config.json").rename(copies[1] / "other.json")
    known.add(fingerprint(copies[1]))
    assert len(known) == 4 and all(len(digest) == 64 for digest in known)
    with pytest.raises(ValueError, match="no weights and no configuration"):
        fingerprint(tmp_path / "nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_on_equals_cache_off_bit_for_bit(tmp_path, dtype):
    """Latents drawn from cached posteriors and cached text, against encoding at each step.

    Convolutions round differently for one image and for many (measured: 1.5e-6), so images are
    encoded one at a time on both sides; in a batch, they agree to rounding.
    """
    teacher = resource("assets/embedded_sd")
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a red handwritten {DIGITS[i % 10]}")
    data = CaptionedImages(tmp_path, 32, seed=0)
    codec = LatentCodec(teacher, torch.device("cpu"))
    codec.scale = 0.18215

    def compute(rows: Sequence[int]) -> dict[str, Tensor]:
        batch = data.read(rows)
        posterior = codec.vae.encode(batch.images).latent_dist
        text = PromptEncoder(teacher)(batch.captions).text
        return {"mean": posterior.mean, "std": posterior.std, "text": text.to(dtype)}

    key = {"vae": fingerprint(teacher / "vae"), "data": data.fingerprint(), "dtype": str(dtype)}
    build(tmp_path / "cache", compute, key, len(data), batch_size=1)
    cache, shape = Cache(tmp_path / "cache", key), codec.latent_shape(32)
    for indices in (range(4), [30, 7], [11]):
        batch, cached = data.batch(indices), cache.rows(data.rows(indices))
        eps = normal(shape, seed=0, purpose="posterior", indices=indices)
        drawn = (cached["mean"] + cached["std"] * eps) * codec.scale
        one_by_one = zip(batch.images.split(1), eps.split(1), strict=True)
        assert torch.equal(drawn, torch.cat([codec.encode(*pair) for pair in one_by_one]))
        torch.testing.assert_close(drawn, codec.encode(batch.images, eps), rtol=0, atol=1e-5)
        assert torch.equal(cached["text"], PromptEncoder(teacher)(batch.captions).text.to(dtype))


def test_shards_are_plain_safetensors(folder):
    rows = load_file(folder / "shard-00004.safetensors")
    assert rows.keys() == {n + s for n in ("text", "mean", "label") for s in ("", ".crc32")}
    assert torch.equal(rows["mean"], values([20, 21])["mean"])
