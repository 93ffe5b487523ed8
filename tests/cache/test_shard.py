from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from tests.cache.samples import LAYOUT, make_shard
from ulfine_fast.cache import shard as shards
from ulfine_fast.cache.ids import read_ids
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.shard import Layout, Shard, ShardRecord, pack_shard, read_shard, verify_shard, write_shard

TINY_SHA256 = "3214d4386a01e28fe112b868ba78b839e2192e3e1aedc4483d65605f8a2de6ee"


def finish(folder, shard: Shard, data: bytes | None = None, number: int = 0, **changes):
    """Writes a shard (or the bytes in its place) with a record that fits."""
    path = folder / f"{number:05d}.h5"
    if data is None:
        digest, size = write_shard(path, shard)
    else:
        path.write_bytes(data)
        digest, size = hashlib.sha256(data).hexdigest(), len(data)
    n = len(shard.ids)
    record = ShardRecord(number, shard.split, 0, n, n, digest, size, {"read": 0.5, "encode": 1.0, "write": 0.1})
    dataclasses.replace(record, **changes).write(path.with_suffix(".json"))
    return path


def rewritten(shard: Shard, change) -> bytes:
    """The bytes of a shard after `change(file)`, with whatever the HDF5 library makes of it."""
    buffer = io.BytesIO(pack_shard(shard))
    with h5py.File(buffer, "r+") as file:
        change(file)
    return buffer.getvalue()


# -- bytes


def test_the_same_rows_give_the_same_bytes():
    assert pack_shard(make_shard()) == pack_shard(make_shard())
    assert pack_shard(make_shard()) != pack_shard(make_shard(seed=1))


def test_bytes_do_not_depend_on_how_the_arrays_lie_in_memory():
    shard = make_shard()
    wide = np.concatenate([shard.plain, shard.weak, shard.strong], axis=1)  # (n, 4, D)
    sliced = dataclasses.replace(shard, plain=wide[:, :1], weak=wide[:, 1:2], strong=np.asfortranarray(wide[:, 2:]))
    assert pack_shard(sliced) == pack_shard(shard)
    big_endian = dataclasses.replace(shard, plain=shard.plain.astype(">f2"))
    assert pack_shard(big_endian) == pack_shard(shard)


@pytest.mark.skipif(h5py.version.hdf5_version_tuple[0] != 2, reason="the constant was taken with HDF5 2")
def test_exact_bytes_of_a_tiny_shard():
    ones = np.ones((1, 1, 2), dtype=np.float16)
    shard = Shard(
        "train", ["a"], np.zeros(1, np.int32), ones, ones, ones, np.ones((1, 2), np.float32), np.zeros((1, 2))
    )
    assert hashlib.sha256(pack_shard(shard)).hexdigest() == TINY_SHA256


def test_layout_read_with_h5py_alone(tmp_path):
    shard = make_shard()
    with h5py.File(finish(tmp_path, shard), "r") as file:
        assert sorted(file) == ["id", "label", "plain", "split", "strong", "view", "weak"]
        assert [text.decode() for text in file["id"][()]] == shard.ids
        assert file["label"].dtype == np.int32
        assert file["label"][()].tolist() == [-1, 0, 1]
        assert file["split"].dtype == np.uint8
        assert file["split"].attrs["names"].tolist() == ["train", "unlabeled", "val", "test"]
        assert [file[name].shape for name in ("plain", "weak", "strong")] == [(3, 1, 4), (3, 1, 4), (3, 2, 4)]
        assert all(file[name].dtype == np.float16 for name in ("plain", "weak", "strong"))
        assert [text.decode() for text in file["view/kind"][()]] == ["weak", "strong", "strong"]
        assert file["view/seed"][()].tolist() == [7]
        assert (file["view/scale"].shape, file["view/scale"].dtype) == ((3, 3), np.float32)
        assert (file["view/flip"].shape, file["view/flip"].dtype) == ((3, 3), np.uint8)
        assert all(file[name].chunks is None and file[name].compression is None for name in ("plain", "weak", "strong"))


def test_each_dataset_carries_the_checksum_of_its_raw_bytes(tmp_path):
    shard = make_shard()
    with h5py.File(finish(tmp_path, shard), "r") as file:
        for name in ("label", "split", "plain", "weak", "strong", "view/scale", "view/flip", "view/seed"):
            assert file[name].attrs["sha256"] == hashlib.sha256(file[name][()].tobytes()).hexdigest()
        assert file["id"].attrs["sha256"] == hashlib.sha256("\n".join(shard.ids).encode()).hexdigest()
        assert file["view/kind"].attrs["sha256"] == hashlib.sha256(b"weak\nstrong\nstrong").hexdigest()


# -- there and back


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("weak", "strong"), [(1, 2), (0, 1), (2, 0), (0, 0)])
def test_round_trip(tmp_path, dtype, weak, strong):
    layout = Layout(5, dtype, weak, strong)
    shard = make_shard(layout=layout)
    back = read_shard(finish(tmp_path, shard), layout)
    assert (back.split, back.ids, back.view_seed) == (shard.split, shard.ids, 7 if weak + strong else 0)
    for name in ("labels", "plain", "weak", "strong", "scale", "flip"):
        wanted, value = getattr(shard, name), getattr(back, name)
        assert value.dtype == wanted.dtype
        assert np.array_equal(value, wanted), name


def test_a_shard_without_rows_is_fine(tmp_path):
    empty = make_shard(0)
    path = finish(tmp_path, empty, rows_read=2, skipped=[{"id": "a", "reason": "x"}, {"id": "b", "reason": "y"}])
    back = read_shard(path, LAYOUT)
    assert (back.ids, back.plain.shape, back.strong.shape) == ([], (0, 1, 4), (0, 2, 4))


def test_very_long_ids_survive(tmp_path):
    shard = dataclasses.replace(make_shard(1), ids=["ж" * 3000])
    assert read_shard(finish(tmp_path, shard), LAYOUT).ids == ["ж" * 3000]


def test_arrays_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="3 ids"):
        pack_shard(dataclasses.replace(make_shard(3), plain=make_shard(2).plain))


def test_record_round_trip(tmp_path):
    record = ShardRecord(3, "val", 10, 4, 3, "ab", 99, {"read": 0.25}, [{"id": "x", "reason": "cut"}])
    record.write(tmp_path / "00003.json")
    assert ShardRecord.read(tmp_path / "00003.json") == record
    assert (tmp_path / "00003.json").read_text().endswith("}\n")


# -- damage


def test_a_flipped_byte_names_the_shard(tmp_path):
    path = finish(tmp_path, make_shard(), number=12)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"shard 00012 is damaged.*checksum"):
        read_shard(path, LAYOUT)


def test_every_flipped_byte_is_found(tmp_path):
    """Always by the file's checksum; here for a sample of all positions."""
    path = finish(tmp_path, make_shard())
    data = path.read_bytes()
    for position in range(0, len(data), 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :])
        assert verify_shard(path, LAYOUT)[1], position


def test_a_file_with_a_wrong_checksum_is_never_parsed(tmp_path, monkeypatch):
    """HDF5 may loop for ever over damaged bytes."""
    path = finish(tmp_path, make_shard())
    record = ShardRecord.read(path.with_suffix(".json"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(h5py, "File", lambda *_, **__: pytest.fail("HDF5 parsed the file"))
    (problem,) = verify_shard(path, LAYOUT)[1]
    assert "checksum in its record" in problem
    with pytest.raises(InputError, match="checksum in its record"):
        read_shard(path, LAYOUT, finite=False)
    (tmp_path / "shards").mkdir()
    path.rename(tmp_path / "shards/00000.h5")
    with pytest.raises(InputError, match="checksum in its record"):
        read_ids(tmp_path, record)


ZEROED = """
import sys
from pathlib import Path
from tests.cache.samples import LAYOUT
from ulfine_fast.cache import hdf5
from ulfine_fast.cache.io.errors import InputError
data = Path(sys.argv[1]).read_bytes()
refused = 0
for length in (8, 16, 64):
    for start in range(0, len(data), 8):
        try:
            with hdf5.unpacked(data[:start] + bytes(length) + data[start + length:]) as file:
                for name in ("id", "view/kind"):
                    hdf5.take(file, name, shape=(3,))
        except InputError:
            refused += 1
print(refused)
"""


def test_zeroed_bytes_anywhere_do_not_hang_where_no_checksum_guards_them(tmp_path):
    """The texts of a cache of version 1 are in such a file."""
    path = finish(tmp_path, make_shard())
    done = subprocess.run([sys.executable, "-c", ZEROED, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_a_wrong_dataset_checksum_is_found_though_the_file_is_as_recorded(tmp_path):
    def change(file):
        file["strong"][0, 0, 0] = 9

    shard = make_shard()
    path = finish(tmp_path, shard, rewritten(shard, change))
    assert "strong does not match" in verify_shard(path, LAYOUT)[1][0]


def test_missing_files_are_named(tmp_path):
    path = finish(tmp_path, make_shard(), number=4)
    path.unlink()
    with pytest.raises(InputError, match="shard 00004 is missing"):
        read_shard(path, LAYOUT)
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"shard 00004 is missing: no 00004\.json"):
        read_shard(path, LAYOUT)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shard": 0}', "null", '{"shard": 0, "unexpected": 1}'])
def test_a_damaged_record_names_the_shard(tmp_path, text):
    path = finish(tmp_path, make_shard())
    path.with_suffix(".json").write_text(text)
    with pytest.raises(InputError, match="shard 00000"):
        read_shard(path, LAYOUT)


@pytest.mark.parametrize("change", [{"rows": -1}, {"split": "dev"}, {"rows": 2}, {"bytes": "9"}, {"skipped": 3}])
def test_a_record_with_impossible_values_is_refused(tmp_path, change):
    path = finish(tmp_path, make_shard())
    values = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(values | change))
    with pytest.raises(InputError, match="shard 00000"):
        read_shard(path, LAYOUT)


def test_a_file_that_is_no_hdf5_is_refused(tmp_path):
    path = finish(tmp_path, make_shard(), b"no HDF5 at all")
    with pytest.raises(InputError, match="shard 00000 cannot be used: not a readable HDF5 file"):
        read_shard(path, LAYOUT)


@pytest.mark.parametrize("name", ["plain", "weak", "strong"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_names_shard_and_image(tmp_path, name, value):
    shard = make_shard()
    getattr(shard, name)[1, -1, 2] = value
    with pytest.raises(InputError, match=rf"shard 00000: the {name} features of image 'train/катя/1.png' are not"):
        read_shard(finish(tmp_path, shard), LAYOUT)
    assert np.array_equal(
        read_shard(tmp_path / "00000.h5", LAYOUT, finite=False).plain, shard.plain, equal_nan=name == "plain"
    )


@pytest.mark.parametrize(
    ("dim", "dtype", "weak", "strong"),
    [(5, "float16", 1, 2), (4, "float32", 1, 2), (4, "float16", 2, 2), (4, "float16", 1, 3)],
)
def test_a_shard_of_another_layout_is_refused(tmp_path, dim, dtype, weak, strong):
    with pytest.raises(InputError, match="expected"):
        read_shard(finish(tmp_path, make_shard()), Layout(dim, dtype, weak, strong))


def test_rows_of_another_split_are_refused(tmp_path):
    with pytest.raises(InputError, match="another split"):
        read_shard(finish(tmp_path, make_shard(split="train"), split="unlabeled"), LAYOUT)


# -- what a shard may not hold: content that lies elsewhere


def _external_link(file, elsewhere):
    file["plain"] = h5py.ExternalLink(str(elsewhere), "/plain")


def _soft_link(file, elsewhere):
    file["plain"] = h5py.SoftLink("/weak")


def _virtual(file, elsewhere):
    layout = h5py.VirtualLayout((3, 1, 4), "float16")
    layout[:] = h5py.VirtualSource(str(elsewhere), "plain", (3, 1, 4))
    file.create_virtual_dataset("plain", layout)


def _external_storage(file, elsewhere):
    file.create_dataset("plain", (3, 1, 4), "float16", external=[(str(elsewhere), 0, 24)])


def _group(file, elsewhere):
    file.create_group("plain")


@pytest.mark.parametrize("put", [_external_link, _soft_link, _virtual, _external_storage, _group])
def test_content_that_lies_elsewhere_is_refused(tmp_path, put):
    elsewhere = tmp_path / "elsewhere.h5"
    elsewhere.write_bytes(pack_shard(make_shard()))

    def change(file):
        del file["plain"]
        put(file, elsewhere)

    path = finish(tmp_path, make_shard(), rewritten(make_shard(), change))
    with pytest.raises(InputError, match=r"plain (is a link|keeps its content in another|is not a dataset)"):
        read_shard(path, LAYOUT, finite=False)


def test_a_linked_group_is_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere.h5"
    elsewhere.write_bytes(pack_shard(make_shard()))

    def change(file):
        del file["view"]
        file["view"] = h5py.ExternalLink(str(elsewhere), "/view")

    path = finish(tmp_path, make_shard(), rewritten(make_shard(), change))
    with pytest.raises(InputError, match="view/scale is a link"):
        read_shard(path, LAYOUT)


def test_a_missing_dataset_is_named(tmp_path):
    def change(file):
        del file["label"]

    path = finish(tmp_path, make_shard(), rewritten(make_shard(), change))
    with pytest.raises(InputError, match="label is missing"):
        read_shard(path, LAYOUT)


def test_a_huge_declared_shape_allocates_nothing(tmp_path):
    def change(file):
        del file["plain"]
        file.create_dataset("plain", (3, 1 << 40, 4), "float16", chunks=(1, 1024, 4))

    path = finish(tmp_path, make_shard(), rewritten(make_shard(), change))
    with pytest.raises(InputError, match=r"plain has shape \(3, 1099511627776, 4\)"):
        read_shard(path, LAYOUT)


def test_a_dataset_without_its_data_is_refused(tmp_path):
    def change(file):
        del file["plain"]
        file.create_dataset("plain", (3, 1, 4), "float16")

    path = finish(tmp_path, make_shard(), rewritten(make_shard(), change))
    with pytest.raises(InputError, match="plain declares 24 bytes, which the file does not hold"):
        read_shard(path, LAYOUT)


def test_numbers_in_place_of_ids_are_refused(tmp_path):
    def change(file):
        del file["id"]
        file["id"] = np.arange(3)

    path = finish(tmp_path, make_shard(), rewritten(make_shard(), change))
    with pytest.raises(InputError, match="id does not hold text"):
        read_shard(path, LAYOUT)


# -- writing


def test_nothing_is_left_beside_a_written_shard(tmp_path):
    beginning = tmp_path / f"00000.h5.{os.getpid()}.tmp"
    beginning.write_bytes(b"left by a killed run, and longer than what is written" * 1000)
    write_shard(tmp_path / "00000.h5", make_shard())
    assert [path.name for path in tmp_path.iterdir()] == ["00000.h5"]
    assert (tmp_path / "00000.h5").read_bytes() == pack_shard(make_shard())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_names_the_file_and_the_reason(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "00000.h5").write_bytes(b"before")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(InputError, match=r"cannot write .*00000\.h5 \(No space left on device\)"):
        write_shard(tmp_path / "00000.h5", make_shard())
    assert [path.name for path in tmp_path.iterdir()] == ["00000.h5"]
    assert (tmp_path / "00000.h5").read_bytes() == b"before"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*Not a directory"):
        write_shard(tmp_path / "file" / "00000.h5", make_shard())


def test_the_record_follows_the_shard_on_the_disk(tmp_path, monkeypatch):
    """A record must never be found without its shard, so both are flushed before their names appear."""
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), real_fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(b.name), real_replace(a, b))[1])
    finish(tmp_path, make_shard())
    assert calls == ["fsync", "00000.h5", "fsync", "fsync", "00000.json", "fsync"]


def test_is_intact(tmp_path):
    path = finish(tmp_path, make_shard())
    record = ShardRecord.read(path.with_suffix(".json"))
    assert shards.is_intact(path, record)
    data = path.read_bytes()
    for other in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(other)
        assert not shards.is_intact(path, record)
    path.unlink()
    assert not shards.is_intact(path, record)
