from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cache.caches import write_named_cache
from tests.cache.pipeline.test_extract import SMALL, Tripwire, finished, hdf5_bytes, run_until, stop
from tests.cache.samples import write_images, write_tiny_model
from ulfine_fast.cache.ids import KnownIds
from ulfine_fast.cache.io import lock
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.models.options import ModelOptions
from ulfine_fast.cache.pipeline.append import PENDING, append
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.merge import merge
from ulfine_fast.cache.shard import read_shard
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.sources.rows import Part
from ulfine_fast.cache.store import FeatureCache

# After the 11 images of `images`: 4 + 1 of the old classes, 2 of a new one that sorts before them.
MORE = {"train/cat": 6, "train/ant": 2, "test/dog": 2}


@pytest.fixture
def cache(images, tiny_encoder, tmp_path) -> Path:
    extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL)
    return tmp_path / "cache"


@pytest.fixture
def grown(images) -> Path:
    """The folder of images once more have come."""
    before = {path: path.read_bytes() for path in images.rglob("*.png")}
    write_images(images, MORE, seed=1)
    for path, content in before.items():
        path.write_bytes(content)
    return images


def opened(folder: Path) -> FeatureCache:
    cache = FeatureCache.open(folder)
    assert cache.verify() == []
    return cache


# -- what comes out


def test_new_images_come_after_the_old_ones(cache, grown, tiny_encoder, tmp_path):
    before, old = opened(cache), hdf5_bytes(cache)
    old_plain, old_weak = before.plain.copy(), before.views("weak").copy()
    done = append(open_source(grown), tiny_encoder, cache, workers=0)
    assert (done.images, done.encoded, done.known, done.classes) == (17, 6, 11, 1)
    assert (done.shards, done.kept) == (8, 5)
    after = opened(cache)
    assert after.class_names == ["cat", "dog", "ant"]
    assert after.ids[:11] == before.ids
    assert after.ids[11:] == [
        "train/ant/000.png",
        "train/ant/001.png",
        "train/cat/003.png",
        "train/cat/004.png",
        "train/cat/005.png",
        "test/dog/001.png",
    ]
    assert after.labels[11:].tolist() == [2, 2, 0, 0, 0, 1]
    assert np.array_equal(after.plain[:11], old_plain)
    assert np.array_equal(after.views("weak")[:8], old_weak)
    assert {name: data for name, data in hdf5_bytes(cache).items() if name in old and name != "text.h5"} == {
        name: data for name, data in old.items() if name != "text.h5"
    }
    assert not (cache / PENDING).exists()


def test_features_are_those_of_one_extraction(cache, grown, tiny_encoder, tmp_path):
    append(open_source(grown), tiny_encoder, cache, workers=0)
    extract(open_source(grown), tiny_encoder, tmp_path / "at-once", **SMALL)
    one, other = opened(cache), opened(tmp_path / "at-once")
    rows = [one.ids.index(name) for name in other.ids]
    # batches begin at other rows, which may move the last bits
    assert np.allclose(one.plain[rows], other.plain, atol=2e-3)
    names = [one.class_names[label] for label in one.labels[rows] if label >= 0]
    assert names == [other.class_names[label] for label in other.labels if label >= 0]
    order = [other.class_names.index(name) for name in one.class_names]
    assert np.allclose(one.text_features, other.text_features[order], atol=1e-6)
    view = np.searchsorted(one.view_rows, np.asarray(rows)[other.view_rows])
    assert np.allclose(one.views("strong")[view], other.views("strong"), atol=2e-3)


def test_the_manifest_says_what_was_appended(cache, grown, tiny_encoder):
    append(open_source(grown), tiny_encoder, cache, workers=0)
    write_images(grown, {"train/bee": 1}, seed=5)
    append(open_source(grown), tiny_encoder, cache, workers=0)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert (manifest["version"], manifest["source"]["rows"]) == (2, 18)
    appended = manifest["source"]["appended"]
    assert [(one["kind"], one["rows"], one["first_shard"], one["classes"]) for one in appended] == [
        ("folder", 6, 5, 1),
        ("folder", 1, 8, 1),
    ]
    assert all(one["path"] == str(grown) and len(one["fingerprint"]) == 64 for one in appended)


def test_new_classes_alone_read_no_image(tmp_path, tiny_encoder):
    write_images(tmp_path / "p", {"a": 2, "b": 2})
    table = tmp_path / "p/list.csv"
    table.write_text("path,label\na/000.png,0\na/001.png,0\nb/000.png,1\nb/001.png,1\n")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    extract(open_source(table, class_names_file=names), tiny_encoder, tmp_path / "cache", **SMALL)
    old = hdf5_bytes(tmp_path / "cache")
    names.write_text("cat\ndog\nemu\n")
    source = open_source(table, class_names_file=names)
    done = append(Tripwire(source, source.rows[0].id, stop), tiny_encoder, tmp_path / "cache", workers=0)
    assert (done.images, done.encoded, done.classes, done.known) == (4, 0, 1, 4)
    after = opened(tmp_path / "cache")
    assert after.class_names == ["cat", "dog", "emu"]
    wanted = tiny_encoder.encode_texts(["a photo of a emu.", "emu"]).numpy()
    assert np.allclose(after.text_features[2], wanted, atol=1e-6)
    new = hdf5_bytes(tmp_path / "cache")
    assert [name for name in new if new[name] != old.get(name)] == ["text.h5"]


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_tokens_and_whole_numbers_are_appended_too(tiny_model, tmp_path, dtype):
    encoder = load_encoder(tiny_model, device="cpu", features="last-block")
    root = write_images(tmp_path / "p", {"train/cat": 2, "train/dog": 2})
    extract(open_source(root), encoder, tmp_path / "cache", dtype=dtype, **SMALL)
    write_images(root, {"test/dog": 3})
    append(open_source(root), encoder, tmp_path / "cache", workers=0)
    cache = opened(tmp_path / "cache")
    assert cache.manifest is not None
    assert ModelOptions.of_manifest(cache.manifest).features == "last-block"
    layout = cache.manifest.layout("test")
    assert read_shard(tmp_path / "cache/shards/00002.h5", layout).tokens.shape == (3, 1, 2, 16)
    with pytest.raises(CacheMismatch, match="tokens"):
        append(open_source(root), load_encoder(tiny_model, device="cpu"), tmp_path / "cache")


def test_nothing_new_changes_nothing(cache, images, tiny_encoder):
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    done = append(open_source(images), tiny_encoder, cache)
    assert (done.encoded, done.known, done.kept, done.shards) == (0, 11, 5, 5)
    assert before == {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_images_that_could_not_be_read_are_known(images, tiny_encoder, tmp_path):
    (images / "train/cat/001.png").write_bytes(b"cut")
    extract(open_source(images), tiny_encoder, tmp_path / "cache", max_skipped=0.5, **SMALL)
    assert append(open_source(images), tiny_encoder, tmp_path / "cache").known == 11


def test_a_merged_cache_can_grow(cache, grown, tiny_encoder, tmp_path):
    manifest = opened(cache).manifest
    assert manifest is not None
    names = ("model", "preprocessing", "exact", "mean", "std", "views", "prompts")
    kept = {name: getattr(manifest, name) for name in names}
    write_named_cache(tmp_path / "zoo", ["yak"], **kept)
    (tmp_path / "zoo/text.h5").unlink()
    from ulfine_fast.cache.text import encode_classes, write_text

    write_text(tmp_path / "zoo", encode_classes(tiny_encoder, [["a photo of a yak.", "yak"]]))
    merge([cache, tmp_path / "zoo"], tmp_path / "all")
    assert append(open_source(grown), tiny_encoder, tmp_path / "all", workers=0).images == 11 + 12 + 6
    assert opened(tmp_path / "all").class_names == ["cat", "dog", "yak", "ant"]


class Files:
    """A stream made of a listed source: each split is a file."""

    kind = "files"

    def __init__(self, source):
        self.source, self.class_names, self.read = source, source.class_names, source.read

    def plan(self, shard_size):
        splits = dict.fromkeys(row.split for row in self.source.rows)
        return [Part(number, split, None, None, split) for number, split in enumerate(splits)]

    def open(self, part):
        return [row for row in self.source.rows if row.split == part.split]

    def close(self, part):
        pass

    def describe(self):
        return {"kind": self.kind, "path": "somewhere"}

    def fingerprint(self):
        return "ab" * 32


def test_the_cache_of_a_stream_can_grow_too(grown, images, tiny_encoder, tmp_path):
    source = open_source(grown)
    few = open_source(grown)
    few.rows = [row for row in source.rows if row.split in ("train", "val")]
    extract(Files(few), tiny_encoder, tmp_path / "cache", **SMALL)
    done = append(source, tiny_encoder, tmp_path / "cache", workers=0)
    assert (done.known, done.encoded) == (len(few.rows), 6)
    cache = opened(tmp_path / "cache")
    assert cache.manifest is not None
    assert (cache.manifest.parts, len(cache)) == (4, 17)
    assert sorted(cache.ids) == sorted(row.id for row in source.rows)
    assert append(source, tiny_encoder, tmp_path / "cache").encoded == 0


def test_a_stream_is_appended_part_by_part(cache, grown, tiny_encoder):
    done = append(Files(open_source(grown)), tiny_encoder, cache, workers=0)
    assert (done.known, done.encoded, done.shards, done.classes) == (11, 6, 7, 1)
    grew = opened(cache)
    assert [(record.split, record.first_row, record.rows) for record in grew.records[5:]] == [
        ("train", 11, 5),
        ("test", 16, 1),
    ]
    assert grew.ids[11:13] == ["train/ant/000.png", "train/ant/001.png"]
    assert grew.labels[11:].tolist() == [2, 2, 0, 0, 0, 1]
    assert append(Files(open_source(grown)), tiny_encoder, cache, workers=0).encoded == 0


@pytest.mark.parametrize("wanted", [[], ["a"], ["b", "zz", "a", "ü"]])
def test_known_ids(wanted):
    assert KnownIds([["a"], [], ["ü", "c"]]).holds(wanted).tolist() == [one in ("a", "ü", "c") for one in wanted]
    assert not KnownIds([]).holds(wanted).any()


# -- stopped and continued


CHILD = """
import os, sys, threading
from pathlib import Path
from ulfine_fast.cache.pipeline.append import append
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.models.options import ModelOptions
from ulfine_fast.cache.sources import open_source

images, model, out, name, reached = sys.argv[1:]
replace = os.replace
def halt(old, new):
    if Path(new).name == name:
        Path(reached).touch()
        threading.Event().wait()
    replace(old, new)
os.replace = halt
append(open_source(images), load_encoder(model, device="cpu"), out, workers=0)
"""


def interrupted(cache, source, encoder, name, monkeypatch):
    """Appends until the file `name` is to get its name."""
    real = os.replace

    def halt(old, new):
        if Path(new).name == name:
            raise KeyboardInterrupt
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", halt)
        with pytest.raises(KeyboardInterrupt):
            append(source, encoder, cache, workers=0)


@pytest.mark.parametrize(("name", "done"), [(PENDING, 5), ("00007.json", 7), ("text.h5", 8), ("manifest.json", 8)])
def test_readers_see_the_old_cache_until_the_end(cache, grown, tiny_encoder, monkeypatch, name, done):
    before = opened(cache)
    old = (before.ids, before.class_names, before.plain.tobytes(), before.text_features.tobytes())
    interrupted(cache, open_source(grown), tiny_encoder, name, monkeypatch)
    assert len(finished(cache)) == done
    seen = opened(cache)
    assert (seen.ids, seen.class_names, seen.plain.tobytes(), seen.text_features.tobytes()) == old
    again = append(open_source(grown), tiny_encoder, cache, workers=0)
    assert (again.kept, again.images, len(opened(cache))) == (done, 17, 17)
    assert not (cache / PENDING).exists()


def test_kill_9_and_continue(cache, grown, tiny_model, tiny_encoder, tmp_path):
    shutil.copytree(cache, tmp_path / "undisturbed")
    append(open_source(grown), tiny_encoder, tmp_path / "undisturbed", workers=0)
    reached = tmp_path / "reached"
    arguments = [sys.executable, "-c", CHILD, grown, tiny_model, cache, "00006.h5", reached]
    child = run_until(reached, [str(one) for one in arguments], signal.SIGKILL)
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert finished(cache)[5:] == ["00005"]
    assert append(open_source(grown), tiny_encoder, cache, workers=0).kept == 6
    assert hdf5_bytes(cache) == hdf5_bytes(tmp_path / "undisturbed")
    assert list(cache.rglob("*.tmp")) == []


def test_a_kill_after_the_change_over_is_cleaned_up(cache, grown, tiny_encoder, monkeypatch):
    from ulfine_fast.cache.pipeline import append as module

    monkeypatch.setattr(module, "_remove_pending", lambda _: stop())
    with pytest.raises(KeyboardInterrupt):
        append(open_source(grown), tiny_encoder, cache, workers=0)
    monkeypatch.undo()
    assert (cache / PENDING).exists()
    assert append(open_source(grown), tiny_encoder, cache).encoded == 0
    assert not (cache / PENDING).exists()


def test_ctrl_c_says_how_to_continue(cache, grown, tiny_encoder):
    source = open_source(grown)
    with pytest.raises(KeyboardInterrupt, match=r"stopped: [12] of 3 new shards are finished in .*cache; run the same"):
        append(Tripwire(source, "test/dog/001.png", stop), tiny_encoder, cache, workers=0)
    assert append(source, tiny_encoder, cache, workers=0).images == 17


def test_another_append_waits_for_the_first_or_replaces_it(cache, grown, tiny_encoder, tmp_path, monkeypatch):
    interrupted(cache, open_source(grown), tiny_encoder, "text.h5", monkeypatch)
    write_images(tmp_path / "other", {"train/cat": 9, "train/dog": 3}, seed=8)
    other = open_source(tmp_path / "other")
    with pytest.raises(InputError, match=r"append of .*images to .*cache is unfinished; .*removing .*append\.json"):
        append(other, tiny_encoder, cache, workers=0)
    (cache / PENDING).unlink()
    assert len(finished(cache)) == 8
    # shards of the append that was given up must not pass for those of this one
    assert append(other, tiny_encoder, cache, workers=0).kept == 5
    new = next(row for row in other.rows if row.id not in FeatureCache.open(cache).ids[:11])
    wanted = tiny_encoder.encode_images(tiny_encoder.transform(other.read(new))[None])[0].numpy()
    assert np.allclose(opened(cache).plain[11], wanted, atol=2e-3)


def test_a_source_that_grew_meanwhile_begins_anew(cache, grown, tiny_encoder, monkeypatch):
    interrupted(cache, open_source(grown), tiny_encoder, "text.h5", monkeypatch)
    write_images(grown, {"train/bee": 1}, seed=5)
    done = append(open_source(grown), tiny_encoder, cache, workers=0)
    assert (done.kept, done.encoded, done.classes) == (5, 7, 2)
    assert opened(cache).class_names == ["cat", "dog", "ant", "bee"]


# -- what is refused


def test_another_model_is_refused(cache, grown, tmp_path):
    other = load_encoder(write_tiny_model(tmp_path / "other", seed=1), device="cpu")
    with pytest.raises(CacheMismatch, match=r"model\.sha256 .*; append with the model, precision and features"):
        append(open_source(grown), other, cache)
    assert not (cache / PENDING).exists()


def test_an_unfinished_cache_is_refused(cache, grown, tiny_encoder):
    (cache / "shards/00003.json").unlink()
    with pytest.raises(InputError, match="shard 00003 is missing"):
        append(open_source(grown), tiny_encoder, cache)


def test_too_many_unreadable_images_end_it(cache, grown, tiny_encoder):
    (grown / "train/cat/004.png").write_bytes(b"cut")
    with pytest.raises(
        InputError, match=r"1 of 17 images cannot be read so far, .* of 0\.01 .*: not an image.*; fix or remove them"
    ):
        append(open_source(grown), tiny_encoder, cache, workers=0)
    (grown / "train/cat/004.png").unlink()
    assert append(open_source(grown), tiny_encoder, cache, workers=0).images == 16


def test_a_share_of_the_whole_may_be_unreadable(images, tiny_encoder, tmp_path):
    extract(open_source(images), tiny_encoder, tmp_path / "cache", max_skipped=0.1, **SMALL)
    write_images(tmp_path / "other", {"train/ant": 2})
    (tmp_path / "other/train/ant/000.png").write_bytes(b"cut")
    done = append(open_source(tmp_path / "other"), tiny_encoder, tmp_path / "cache", workers=0)
    assert (done.images, [one["id"] for one in done.skipped]) == (12, ["train/ant/000.png"])


def test_a_pending_manifest_that_is_cut_is_named(cache, grown, tiny_encoder):
    (cache / PENDING).write_text("{")
    with pytest.raises(InputError, match=r"manifest\.append\.json cannot be read"):
        append(open_source(grown), tiny_encoder, cache)


def test_views_of_an_imported_cache_cannot_be_drawn_again(tmp_path, grown, tiny_encoder):
    views = {"weak": 1, "strong": 0, "seed": 0}
    write_named_cache(tmp_path / "imported", ["cat"], views=views)
    with pytest.raises(InputError, match="was imported, so it is unknown how its views were drawn"):
        append(open_source(grown), tiny_encoder, tmp_path / "imported")


def test_one_writer_at_a_time(cache, grown, tiny_encoder):
    with lock.writer(cache), pytest.raises(InputError, match=r"another process writes to .*cache"):
        append(open_source(grown), tiny_encoder, cache, workers=0)


def test_a_mistyped_folder_is_not_made(grown, tiny_encoder, tmp_path):
    with pytest.raises(InputError, match="is not a feature cache"):
        append(open_source(grown), tiny_encoder, tmp_path / "cahce")
    assert not (tmp_path / "cahce").exists()
