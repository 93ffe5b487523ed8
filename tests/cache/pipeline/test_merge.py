from __future__ import annotations

import json
import os
import signal
import sys
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tests.cache.caches import PARTS, write_named_cache
from tests.cache.pipeline.test_extract import SMALL, finished, hdf5_bytes, run_until
from tests.cache.samples import make_manifest, write_images
from ulfine_fast.cache import ids as id_digests
from ulfine_fast.cache.ids import refuse_shared_ids
from ulfine_fast.cache.io import lock
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.merge import CachesDiffer, merge
from ulfine_fast.cache.shard import read_shard
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache


@pytest.fixture
def two(tmp_path):
    """Two caches with one class in common, under another index."""
    write_named_cache(tmp_path / "pets", ["cat", "dog"], skipped=1)
    write_named_cache(tmp_path / "zoo", ["emu", "dog", "yak"])
    return tmp_path / "pets", tmp_path / "zoo"


def opened(folder: Path) -> FeatureCache:
    cache = FeatureCache.open(folder)
    assert cache.verify() == []
    return cache


# -- what comes out


def test_two_forms_of_unicode_are_one_class(tmp_path):
    """Caches of version 0.1 keep names as their source had them."""
    one, other = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_named_cache(tmp_path / "one", [one, "dog"])
    write_named_cache(tmp_path / "other", ["yak", other])
    merge([tmp_path / "one", tmp_path / "other"], tmp_path / "all")
    both = opened(tmp_path / "all")
    assert both.class_names == [one, "dog", "yak"]
    counts = {name: list(FeatureCache.open(tmp_path / name).labels) for name in ("one", "other")}
    assert list(both.labels).count(0) == counts["one"].count(0) + counts["other"].count(1)
    assert np.array_equal(both.text_features[0], FeatureCache.open(tmp_path / "one").text_features[0])


def test_rows_come_split_by_split_and_keep_every_bit(two, tmp_path):
    done = merge(two, tmp_path / "all")
    pets, zoo, both = (opened(folder) for folder in (*two, tmp_path / "all"))
    assert (done.images, done.classes, done.shards, done.kept) == (24, 4, 8, 0)
    assert both.class_names == ["cat", "dog", "emu", "yak"]
    assert [(record.split, record.rows) for record in both.records] == [
        *(2 * [("train", 4), ("train", 2)]),
        *(2 * [("unlabeled", 3)]),
        *(2 * [("test", 3)]),
    ]
    for cache in (pets, zoo):
        rows = [both.ids.index(name) for name in cache.ids]
        assert np.array_equal(both.plain[rows], cache.plain)
        assert both.splits[rows].tolist() == cache.splits.tolist()
        names, merged_names = [*cache.class_names, None], [*both.class_names, None]
        assert [merged_names[k] for k in both.labels[rows]] == [names[k] for k in cache.labels]
        view_indices = np.searchsorted(both.view_rows, np.asarray(rows)[cache.view_rows])
        for kind in ("weak", "strong"):
            assert np.array_equal(both.views(kind)[view_indices], cache.views(kind))


def test_texts_of_each_class_come_from_a_cache_that_has_it(two, tmp_path):
    merge(two, tmp_path / "all")
    pets, zoo, both = (opened(folder) for folder in (*two, tmp_path / "all"))
    assert both.text_features is not None
    assert np.array_equal(both.text_features[:2], pets.text_features)
    assert np.array_equal(both.text_features[2:], zoo.text_features[[0, 2]])
    assert np.array_equal(both.prototypes[2:], zoo.prototypes[[0, 2]])


def test_a_shard_that_nothing_changes_in_keeps_its_bytes(two, tmp_path):
    merge(two, tmp_path / "all")
    assert (tmp_path / "all/shards/00000.h5").read_bytes() == (two[0] / "shards/00000.h5").read_bytes()


def test_the_manifest_says_what_went_in(two, tmp_path):
    merge(two, tmp_path / "all")
    source = json.loads((tmp_path / "all/manifest.json").read_text())["source"]
    assert (source["kind"], source["name"], source["rows"]) == ("merged", "pets + zoo", 28)
    assert [(one["path"], one["rows"]) for one in source["caches"]] == [(str(two[0]), 16), (str(two[1]), 12)]
    assert [one["source"]["kind"] for one in source["caches"]] == ["folder", "folder"]


def test_skipped_images_go_along(two, tmp_path):
    merge(two, tmp_path / "all", prefix=True)
    skipped = [one["id"] for record in opened(tmp_path / "all").records for one in record.skipped]
    assert skipped == [f"pets/{split}/{number}/lost0" for number, (split, _) in enumerate(PARTS)]


def test_a_merge_can_be_merged(two, tmp_path):
    merge(two, tmp_path / "all")
    write_named_cache(tmp_path / "farm", ["yak", "cow"])
    merge([tmp_path / "all", tmp_path / "farm"], tmp_path / "more")
    more = opened(tmp_path / "more")
    assert (len(more), more.class_names) == (36, ["cat", "dog", "emu", "yak", "cow"])


def test_shards_without_rows_are_left_out(tmp_path):
    write_named_cache(tmp_path / "a", ["cat"], parts=[("train", 2)])
    write_named_cache(tmp_path / "b", ["cat"], parts=[("train", 0), ("test", 1)], skipped=1)
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all").shards == 3
    assert len(opened(tmp_path / "all")) == 3


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_tokens_and_whole_numbers_go_along(tiny_model, tmp_path, dtype):
    encoder = load_encoder(tiny_model, device="cpu", features="last-block")
    for name, classes in (("a", ["cat", "dog"]), ("b", ["cow", "dog"])):
        root = write_images(tmp_path / f"images-{name}", {f"train/{one}": 2 for one in classes}, seed=len(name))
        extract(open_source(root), encoder, tmp_path / name, dtype=dtype, **SMALL)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all", prefix=True)
    one, both = opened(tmp_path / "a"), opened(tmp_path / "all")
    assert np.array_equal(both.plain[:4], one.plain)
    assert both.manifest is not None
    assert (both.manifest.tokens, both.manifest.dtype, both.manifest.version) == (["pre", "post"], dtype, 3)
    whole, part = (read_shard(folder / "shards/00000.h5", one.manifest.layout("train")) for folder in (
        tmp_path / "all", tmp_path / "a"))  # fmt: skip
    assert whole.tokens.shape == (3, 3, 2, 16)
    assert np.array_equal(whole.tokens, part.tokens)


# -- ids


def test_shared_ids_need_a_prefix(tmp_path):
    for folder in ("a", "b"):
        write_named_cache(tmp_path / folder, ["cat"], name="same")
    with pytest.raises(InputError, match=r"two rows have the id 'same/train/0-0'; give --prefix"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all", prefix=True)
    assert opened(tmp_path / "all").ids[:6:5] == ["a/same/train/0-0", "a/same/train/1-1"]


def test_prefixes_must_differ(tmp_path):
    for folder in ("a/pets", "b/pets"):
        write_named_cache(tmp_path / folder, ["cat"])
    with pytest.raises(InputError, match="two caches have the folder name 'pets'"):
        merge([tmp_path / "a/pets", tmp_path / "b/pets"], tmp_path / "all", prefix=True)


def test_equal_digests_of_different_ids_are_no_clash(monkeypatch):
    monkeypatch.setattr(id_digests, "_digests", lambda ids: np.array([len(one) for one in ids], np.uint64))
    refuse_shared_ids(lambda: [["a", "b"], ["cc"]], "")
    with pytest.raises(InputError, match="two rows have the id 'b'; rename it"):
        refuse_shared_ids(lambda: [["a", "b"], ["b"]], "rename it")


@pytest.mark.parametrize("name", ["", "a\0b", "\udcff"])
def test_ids_that_cannot_be_stored_are_named(name):
    with pytest.raises(InputError, match="cannot be stored"):
        refuse_shared_ids(lambda: [["fine", name]], "")


# -- what does not fit together


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dtype": "float32"}, "dtype is 'float16' in .*pets and 'float32' in .*zoo"),
        ({"prompts": ["{}"]}, r"prompts\.0 is 'a photo of a \{\}\.' in"),
        ({"views": {**make_manifest().views, "strong": 1}}, r"views\.strong is 2 in"),
        ({"preprocessing": "another"}, "preprocessing is"),
        ({"mean": [0.5, 0.5, 0.4]}, r"mean\.2 is 0\.5 in .* and 0\.4"),
        ({"model": {**make_manifest().model, "sha256": "cd" * 32}}, r"model\.sha256 is 'abab"),
    ],
)
def test_what_differs_is_named_with_both_caches(tmp_path, change, field):
    write_named_cache(tmp_path / "pets", ["cat"])
    write_named_cache(tmp_path / "zoo", ["cat"], **change)
    with pytest.raises(CachesDiffer, match=field) as caught:
        merge([tmp_path / "pets", tmp_path / "zoo"], tmp_path / "all")
    assert caught.value.field in field.replace("\\", "")
    assert not (tmp_path / "all").exists()


def test_the_same_weights_from_another_folder_are_the_same_model(tmp_path):
    write_named_cache(tmp_path / "a", ["cat"], model={**make_manifest().model, "name": "local-dir:/x"}, batch_size=8)
    write_named_cache(tmp_path / "b", ["cat"], model={**make_manifest().model, "name": "local-dir:/y"}, shard_size=99)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    manifest = opened(tmp_path / "all").manifest
    assert manifest is not None
    assert (manifest.model["name"], manifest.batch_size, manifest.shard_size) == ("local-dir:/x", 64, 1024)


def test_models_without_a_known_digest_go_by_name(tmp_path):
    model = {**make_manifest().model, "sha256": ""}
    write_named_cache(tmp_path / "a", ["cat"], model=model)
    write_named_cache(tmp_path / "b", ["cat"], model={**model, "name": "another"})
    with pytest.raises(CachesDiffer, match=r"model\.name is 'ViT-B-16' in .*a and 'another' in .*b"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")


def test_other_text_features_of_one_class_are_refused(two, tmp_path, monkeypatch):
    write_named_cache(tmp_path / "odd", ["dog"])
    from tests.cache.caches import class_text, write_text

    manifest = FeatureCache.open(tmp_path / "odd").manifest
    text = class_text(manifest)
    text.features[0, 0, 0] += 0.1
    write_text(tmp_path / "odd", text, manifest)
    with pytest.raises(InputError, match=r"text features of class 'dog' differ by up to 0\.1 between .*pets and .*odd"):
        merge([two[0], tmp_path / "odd"], tmp_path / "all")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["pets"], "at least two caches to merge, got 1"),
        (["pets", "pets"], "is given twice"),
        (["pets", "all"], "is one of the caches to merge"),
        (["pets", "nothing"], "is not a feature cache"),
    ],
)
def test_caches_that_cannot_be_chosen(two, tmp_path, chosen, message):
    write_named_cache(tmp_path / "all", ["cat"])
    with pytest.raises(InputError, match=message):
        merge([tmp_path / name for name in chosen], tmp_path / "all")


def test_an_unfinished_cache_is_named(two, tmp_path):
    (two[1] / "shards/00002.json").unlink()
    with pytest.raises(InputError, match="shard 00002 is missing"):
        merge(two, tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_damaged_shard_stops_the_merge_before_it_is_copied(two, tmp_path):
    data = bytearray((two[1] / "shards/00000.h5").read_bytes())
    data[-10] ^= 1
    (two[1] / "shards/00000.h5").write_bytes(data)
    with pytest.raises(InputError, match="shard 00000 is damaged"):
        merge(two, tmp_path / "all", prefix=True)
    assert finished(tmp_path / "all") == ["00000", "00001"]


def test_another_cache_in_the_folder_is_refused(two, tmp_path):
    merge(two, tmp_path / "all")
    before = hdf5_bytes(tmp_path / "all")
    with pytest.raises(CacheMismatch, match=r"holds another cache, so choose another folder or remove it"):
        merge(two[::-1], tmp_path / "all")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(notes\.txt\) and no cache"):
        merge(two, tmp_path / "full")
    assert hdf5_bytes(tmp_path / "all") == before


def test_one_writer_at_a_time(two, tmp_path):
    with lock.writer(tmp_path / "all"), pytest.raises(InputError, match=r"another process writes to .*all"):
        merge(two, tmp_path / "all")
    merge(two, tmp_path / "all")


# -- stopped and continued


CHILD = """
import os, sys, threading
from pathlib import Path
from ulfine_fast.cache.pipeline.merge import merge

one, other, out, name, reached = sys.argv[1:]
replace = os.replace
def halt(old, new):
    if Path(new).name == name:
        Path(reached).touch()
        threading.Event().wait()
    replace(old, new)
os.replace = halt
merge([one, other], out)
"""


@pytest.mark.parametrize(("name", "done"), [("manifest.json", 0), ("text.h5", 0), ("00003.h5", 3), ("00005.json", 5)])
def test_kill_9_and_continue_gives_the_same_bytes(two, tmp_path, name, done):
    merge(two, tmp_path / "undisturbed")
    out, reached = tmp_path / "all", tmp_path / "reached"
    arguments = [sys.executable, "-c", CHILD, *two, out, name, reached]
    child = run_until(reached, [str(one) for one in arguments], signal.SIGKILL)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert len(finished(out)) == done
    assert merge(two, out).kept == done
    assert hdf5_bytes(out) == hdf5_bytes(tmp_path / "undisturbed")
    assert list(out.rglob("*.tmp")) == []


def test_nothing_is_done_twice(two, tmp_path):
    merge(two, tmp_path / "all")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("*.h5")}
    assert merge(two, tmp_path / "all").kept == 8
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_ctrl_c_says_how_to_continue(two, tmp_path, monkeypatch):
    real = os.replace

    def stop(old, new):
        if Path(new).name == "00001.h5":
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped: 1 of 8 shards are finished in .*; run the same command again"
    ):
        merge(two, tmp_path / "all")


# -- memory


def test_memory_is_that_of_one_shard(tmp_path):
    wide = {**make_manifest().model, "dim": 256}

    def peak(shards: int) -> int:
        folder = tmp_path / str(shards)
        for name in ("a", "b"):
            write_named_cache(folder / name, ["cat", "dog"], parts=[("train", 300)] * shards, model=wide)
        tracemalloc.start()
        merge([folder / "a", folder / "b"], folder / "all")
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    small, large = peak(1), peak(6)
    # Six times the rows: their digests, and the records, are all that grows.
    assert large < 1.5 * small
