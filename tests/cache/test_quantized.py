"""One byte a number: codes and scales by hand, error bounds, and how a shard keeps them."""

from __future__ import annotations

import dataclasses
import hashlib

import h5py
import numpy as np
import pytest

from tests.cache.samples import make_manifest, make_shard, make_text, put_shard
from ulfine_fast.cache import shard as shards
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.quantized import quantized, restored
from ulfine_fast.cache.shard import Layout, ShardRecord, pack_shard, read_shard, shard_path, verify_shard
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cache.text import write_text

LAYOUT = Layout(dim=4, dtype="int8", weak=1, strong=2)


def test_codes_and_scales_by_hand():
    codes, scales = quantized(np.array([[1.27, -0.02, 0.004, 0.0], [0.0, 0.0, 0.0, 0.0], [-254.0, 3.0, 1.1, 0.9]]))
    assert codes.tolist() == [[127, -2, 0, 0], [0, 0, 0, 0], [-127, 2, 1, 0]]  # 1.5 goes to the even neighbour
    assert (codes.dtype, scales.dtype) == (np.int8, np.float32)
    assert np.allclose(scales, [0.01, 0.0, 2.0])
    assert np.array_equal(restored(codes, scales)[2], np.float16([-254, 4, 2, 0]))


def test_the_error_is_half_a_step():
    rows = np.random.default_rng(0).standard_normal((50, 3, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    codes, scales = quantized(rows)
    error = np.abs(codes * scales[..., None] - rows)
    assert (error <= scales[..., None] * 0.5001).all()
    back = restored(codes, scales).astype(np.float32)
    cosines = (back * rows).sum(-1) / np.linalg.norm(back, axis=-1)
    assert cosines.min() > 0.9999


def test_quantising_what_was_restored_changes_nothing_more():
    rows = np.random.default_rng(1).standard_normal((200, 1, 33)).astype(np.float16)
    codes, scales = quantized(rows)
    back = restored(codes, scales)
    assert np.array_equal(np.abs(back).max(-1), np.abs(rows).max(-1))
    again = quantized(back)
    assert np.array_equal(again[0], codes)
    assert np.array_equal(again[1], scales)


def test_the_smallest_numbers_stay_within_the_codes():
    codes, scales = quantized(np.full((1, 2), 1e-45, dtype=np.float32))
    assert np.abs(codes.astype(int)).max() <= 127
    assert np.isfinite(restored(codes, scales)).all()


def int8_shard(n=5, split="train", seed=0, layout=LAYOUT):
    floats = Layout(layout.dim, "float16", layout.weak, layout.strong)
    return dataclasses.replace(make_shard(n, floats, split, seed), quantized=True)


def test_a_shard_keeps_bytes_and_reads_as_float16(tmp_path):
    (tmp_path / "shards").mkdir()
    shard = int8_shard()
    put_shard(tmp_path, shard)
    path = shard_path(tmp_path, 0)
    with h5py.File(path) as file:
        types = {name: (file[name].dtype.name, file[name].shape) for name in file if name not in ("id", "view")}
    assert types["plain"] == ("int8", (5, 1, 4))
    assert types["plain_scale"] == ("float32", (5, 1))
    assert types["strong_scale"] == ("float32", (5, 2))
    read = read_shard(path, LAYOUT)
    assert read.plain.dtype == read.strong.dtype == np.float16
    assert np.array_equal(read.weak, restored(*quantized(shard.weak)))
    # writing what was read gives the very file again
    assert pack_shard(read) == path.read_bytes()
    assert verify_shard(path, LAYOUT)[1] == []


def test_a_damaged_scale_is_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    put_shard(tmp_path, int8_shard())
    path = shard_path(tmp_path, 0)
    with h5py.File(path, "r+") as file:
        file["weak_scale"][3, 0] = 1e30
    record = ShardRecord.read(path.with_suffix(".json"))
    dataclasses.replace(record, checksum=hashlib.sha256(path.read_bytes()).hexdigest()).write(path.with_suffix(".json"))
    problems = " ".join(verify_shard(path, LAYOUT)[1])
    assert "weak_scale does not match its checksum" in problems
    with pytest.raises(InputError, match=r"the weak features of image 'train/катя/3.png' are not finite"):
        shards._refuse_not_finite(path, path.read_bytes(), read_shard(path, LAYOUT, finite=False))


def test_a_shard_of_another_type_is_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    put_shard(tmp_path, make_shard(3, Layout(4, "float16", 1, 2)))
    with pytest.raises(InputError, match="plain has type float16, expected int8"):
        read_shard(shard_path(tmp_path, 0), LAYOUT)


def test_a_cache_hands_out_float16(tmp_path):
    manifest = make_manifest(dtype="int8", source={**make_manifest().source, "rows": 7})
    (tmp_path / "shards").mkdir()
    manifest.write(tmp_path)
    write_text(tmp_path, make_text(manifest), manifest)
    shards = [int8_shard(4), int8_shard(3, "test", 1, manifest.layout("test"))]
    for number, shard in enumerate(shards):
        named = dataclasses.replace(
            shard, ids=[f"{number}/{row}" for row in range(len(shard.ids))], labels=np.zeros(len(shard.ids), np.int32)
        )
        put_shard(tmp_path, named, number, first=4 * number)
    assert manifest.version == 3
    cache = FeatureCache.open(tmp_path)
    assert cache.plain.dtype == cache.views("strong").dtype == np.float16
    wanted = [restored(*quantized(shard.plain))[:, 0] for shard in shards]
    assert np.array_equal(cache.plain, np.concatenate(wanted))
    assert np.array_equal(cache.views("strong"), restored(*quantized(shards[0].strong)))
    assert cache.verify() == []
