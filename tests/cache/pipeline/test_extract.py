from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cache.samples import write_images, write_tiny_model
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.plan import batches_of, split_rows
from ulfine_fast.cache.pipeline.views import ViewRecipe, draw
from ulfine_fast.cache.shard import ShardRecord
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.sources.rows import Row
from ulfine_fast.cache.store import FeatureCache

# Two images a batch and three a shard make 5 shards of the 11 images: train 3 + 2, unlabeled 3, val 1, test 2.
SIZES = {"batch_size": 2, "shard_size": 3}
SMALL = {**SIZES, "workers": 0, "prompts": ["a photo of a {}.", "{}"]}


class Tripwire:
    """A source that calls `action` when the image `at` is to be read."""

    def __init__(self, source, at, action):
        self.source, self.at, self.action = source, at, action
        self.kind, self.class_names, self.rows, self.describe = (
            source.kind,
            source.class_names,
            source.rows,
            source.describe,
        )

    def read(self, row):
        if row.id == self.at:
            self.action()
        return self.source.read(row)


class OffEncoder:
    """A real encoder of which one call gives what `change` makes of its features."""

    def __init__(self, encoder, call, change):
        self._encoder, self._call, self._change, self._calls = encoder, call, change, 0

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode_pixels(self, pixels):
        self._calls += 1
        features = self._encoder.encode_pixels(pixels)
        return self._change(features) if self._calls == self._call else features


def hdf5_bytes(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*.h5"))}


def finished(cache: Path) -> list[str]:
    return sorted(path.stem for path in (cache / "shards").glob("*.json"))


def stop():
    raise KeyboardInterrupt


@pytest.fixture
def source(images):
    return open_source(images)


@pytest.fixture
def undisturbed(source, tiny_encoder, tmp_path):
    """The bytes of a cache made in one go."""
    extract(source, tiny_encoder, tmp_path / "undisturbed", **SMALL)
    return hdf5_bytes(tmp_path / "undisturbed")


# -- what comes out


def test_a_cache_holds_the_features_of_every_image(source, tiny_encoder, tmp_path):
    summary = extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    assert (summary.images, summary.encoded, summary.shards, summary.kept) == (11, 11, 5, 0)
    assert (summary.skipped, sorted(summary.stages)) == ([], ["encode", "read", "write"])
    assert summary.images_per_second > 0
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.ids == [row.id for row in source.rows]
    assert cache.labels.tolist() == [row.label for row in source.rows]
    assert cache.splits.tolist() == [row.split for row in source.rows]
    assert cache.verify() == []
    for number in (0, 7, 10):
        pixels = tiny_encoder.transform(source.read(source.rows[number]))[None]  # (1, 3, H, W)
        wanted = tiny_encoder.encode_images(pixels)[0].numpy()
        assert np.allclose(cache.plain[number], wanted, atol=2e-3)


def test_views_are_those_of_the_recipe(source, tiny_encoder, tmp_path):
    recipe = ViewRecipe(weak=2, strong=1, seed=5)
    extract(source, tiny_encoder, tmp_path / "cache", views=recipe, dtype="float32", **SMALL)
    cache = FeatureCache.open(tmp_path / "cache")
    row, size = source.rows[4], tiny_encoder.spec.image_size
    drawn = draw(source.read(row), row.id, recipe, image_size=size)
    wanted = tiny_encoder.encode_pixels(torch.from_numpy(drawn.pixels)).numpy()  # (3, D)
    assert np.allclose(cache.views("weak")[4], wanted[:2], atol=1e-5)
    assert np.allclose(cache.views("strong")[4], wanted[2:], atol=1e-5)


def test_text_features_come_from_the_prompts(source, tiny_encoder, tmp_path):
    extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    cache = FeatureCache.open(tmp_path / "cache")
    wanted = tiny_encoder.encode_texts(["a photo of a cat.", "cat", "a photo of a dog.", "dog"]).view(2, 2, -1)
    assert np.allclose(cache.text_features, wanted.numpy(), atol=1e-6)
    mean = torch.nn.functional.normalize(wanted.mean(1), dim=-1)
    assert np.allclose(cache.prototypes, mean.numpy(), atol=1e-6)
    assert cache.logit_scale == pytest.approx(tiny_encoder.spec.logit_scale)


def test_the_manifest_says_what_was_done(source, tiny_encoder, tmp_path):
    extract(source, tiny_encoder, tmp_path / "cache", max_skipped=0.25, **SMALL)
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["model"]["sha256"] == tiny_encoder.spec.sha256
    assert (manifest["model"]["dim"], manifest["model"]["normalized"], manifest["precision"]) == (8, True, "fp32")
    assert (manifest["mean"], manifest["std"]) == ([0.5] * 3, [0.25] * 3)
    assert "Resize" in manifest["preprocessing"]
    assert (manifest["source"]["kind"], manifest["source"]["rows"]) == ("folder", 11)
    assert (manifest["batch_size"], manifest["shard_size"], manifest["max_skipped"]) == (2, 3, 0.25)
    assert {"torch", "open_clip_torch", "h5py", "hdf5"} <= set(manifest["libraries"])


def test_records_count_rows_and_time(source, tiny_encoder, tmp_path):
    extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "cache/shards").glob("*.json"))]
    assert [record["split"] for record in records] == ["train", "train", "unlabeled", "val", "test"]
    assert [record["first_row"] for record in records] == [0, 3, 5, 8, 9]
    assert [record["rows"] for record in records] == [3, 2, 3, 1, 2]
    assert all(sorted(record["seconds"]) == ["encode", "read", "write"] for record in records)


def test_twice_gives_the_same_bytes_and_readers_change_nothing(source, tiny_encoder, tmp_path, undisturbed):
    extract(source, tiny_encoder, tmp_path / "again", **{**SMALL, "workers": 2})
    assert hdf5_bytes(tmp_path / "again") == undisturbed


def test_no_views_at_all(source, tiny_encoder, tmp_path):
    extract(source, tiny_encoder, tmp_path / "cache", views=ViewRecipe(weak=0, strong=0), **SMALL)
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.views("weak").shape == cache.views("strong").shape == (8, 0, 8)
    assert cache.verify() == []


# -- plan


def test_shards_never_cross_a_split():
    rows = [Row(str(k), 0, split, "", 1) for k, split in enumerate(["train"] * 5 + ["val"] * 2 + ["test"])]
    plans = split_rows(rows, 3)
    assert [(p.number, p.split, p.first_row, p.rows) for p in plans] == [
        (0, "train", 0, 3),
        (1, "train", 3, 2),
        (2, "val", 5, 2),
        (3, "test", 7, 1),
    ]
    assert batches_of(rows[:3], 2) == [rows[:2], rows[2:3]]
    assert batches_of(rows[3:5], 64) == [rows[3:5]]


# -- stopped and continued


@pytest.mark.parametrize("index", [0, 2, 4, 10])
def test_a_stopped_run_continues_to_the_same_bytes(source, tiny_encoder, tmp_path, undisturbed, index):
    wire = Tripwire(source, source.rows[index].id, stop)
    with pytest.raises(KeyboardInterrupt, match=r"of 5 shards are finished in .* run the same command again"):
        extract(wire, tiny_encoder, tmp_path / "cache", **SMALL)
    before = finished(tmp_path / "cache")
    assert len(before) == {0: 0, 2: 0, 4: 1, 10: 4}[index]
    summary = extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    assert (summary.kept, summary.images) == (len(before), 11)
    assert summary.encoded == 11 - sum(FeatureCache.open(tmp_path / "cache").records[int(n)].rows for n in before)
    assert hdf5_bytes(tmp_path / "cache") == undisturbed


def test_an_unexpected_error_keeps_finished_shards(source, tiny_encoder, tmp_path, undisturbed):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        extract(Tripwire(source, source.rows[6].id, fail), tiny_encoder, tmp_path / "cache", **SMALL)
    assert finished(tmp_path / "cache") == ["00000", "00001"]
    extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    assert hdf5_bytes(tmp_path / "cache") == undisturbed


# The child stops for good at a chosen rename, says so by a file, and is killed there.
CHILD = """
import os, sys, threading
from pathlib import Path
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.shard import ShardRecord
from ulfine_fast.cache.sources import open_source

images, model, out, name, reached, workers = sys.argv[1:]
replace = os.replace
def halt(old, new):
    if Path(new).name == name:
        Path(reached).touch()
        threading.Event().wait()
    replace(old, new)
os.replace = halt
extract(open_source(images), load_encoder(model, device="cpu"), out, batch_size=2, shard_size=3,
        workers=int(workers), prompts=["a photo of a {}.", "{}"])
"""


def run_until(reached: Path, arguments: list[str], end: int) -> subprocess.Popen:
    """Starts a child, waits until it has made the file `reached`, and sends it the signal `end`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not reached.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.02)
            pytest.fail(f"the child ended by itself: {child.communicate()[1]}")
    child.send_signal(end)
    return child


@pytest.mark.parametrize(
    ("name", "workers", "done"),
    [("00001.h5", 0, ["00000"]), ("00002.json", 2, ["00000", "00001"]), ("manifest.json", 0, [])],
)
def test_kill_9_and_continue_gives_the_same_bytes(
    source, images, tiny_model, tiny_encoder, tmp_path, undisturbed, name, workers, done
):
    out, reached = tmp_path / "cache", tmp_path / "reached"
    arguments = [sys.executable, "-c", CHILD, images, tiny_model, out, name, reached, str(workers)]
    child = run_until(reached, [str(one) for one in arguments], signal.SIGKILL)
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert [path.name for path in out.rglob("*.tmp")] == [
        name + (".tmp" if name == "manifest.json" else f".{child.pid}.tmp")
    ]
    assert finished(out) == done
    assert extract(source, tiny_encoder, out, **SMALL).kept == len(done)
    assert hdf5_bytes(out) == undisturbed
    assert list(out.rglob("*.tmp")) == []


# -- what is manifest on resume


def test_nothing_is_done_twice(source, tiny_encoder, tmp_path, undisturbed):
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "undisturbed").rglob("*") if path.is_file()}
    wire = Tripwire(source, source.rows[0].id, stop)
    summary = extract(wire, tiny_encoder, tmp_path / "undisturbed", **SMALL)
    assert (summary.kept, summary.encoded, summary.images, summary.seconds) == (5, 0, 11, 0.0)
    assert summary.images_per_second == 0.0
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "undisturbed").rglob("*") if path.is_file()}


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _other_rows(path):
    record = path.with_suffix(".json")
    dataclasses.replace(ShardRecord.read(record), first_row=0).write(record)


@pytest.mark.parametrize(
    "harm",
    [Path.unlink, _flip, _cut, _other_rows, lambda path: path.with_suffix(".json").write_text("{")],
    ids=["missing", "flipped", "cut", "other rows", "record cut"],
)
def test_a_damaged_shard_is_redone(source, tiny_encoder, tmp_path, undisturbed, harm):
    out = tmp_path / "undisturbed"
    harm(out / "shards/00002.h5")
    summary = extract(source, tiny_encoder, out, **SMALL)
    assert (summary.kept, summary.encoded, summary.images) == (4, 3, 11)
    assert hdf5_bytes(out) == undisturbed
    assert FeatureCache.open(out).verify() == []


def test_damaged_text_is_redone(source, tiny_encoder, tmp_path, undisturbed):
    (tmp_path / "undisturbed/text.h5").write_bytes(b"cut")
    extract(source, tiny_encoder, tmp_path / "undisturbed", **SMALL)
    assert hdf5_bytes(tmp_path / "undisturbed") == undisturbed


# -- mismatches


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"views": ViewRecipe(weak=2)}, r"views\.weak = 1, the request says 2"),
        ({"views": ViewRecipe(seed=9)}, r"views\.seed = 0, the request says 9"),
        ({"batch_size": 4}, "batch_size = 2, the request says 4"),
        ({"dtype": "float32"}, "dtype = 'float16', the request says 'float32'"),
        ({"prompts": ["{}", "{}"]}, r"prompts\.0 = 'a photo of a {}\.', the request says '{}'"),
    ],
)
@pytest.mark.parametrize("mode", ["resume", "verify"])
def test_other_settings_are_refused_by_name(source, tiny_encoder, tmp_path, undisturbed, change, field, mode):
    with pytest.raises(CacheMismatch, match=field):
        extract(source, tiny_encoder, tmp_path / "undisturbed", **{**SMALL, **change, "mode": mode})
    assert hdf5_bytes(tmp_path / "undisturbed") == undisturbed


def test_another_model_is_refused_by_name(source, tmp_path, undisturbed, tiny_encoder):
    other = load_encoder(write_tiny_model(tmp_path / "other", seed=1), device="cpu")
    with pytest.raises(CacheMismatch, match=r"model\.name"):
        extract(source, other, tmp_path / "undisturbed", **SMALL)
    other.spec = dataclasses.replace(other.spec, name=tiny_encoder.spec.name)
    with pytest.raises(CacheMismatch, match=r"model\.sha256"):
        extract(source, other, tmp_path / "undisturbed", **SMALL)


def test_a_changed_source_is_refused(images, tiny_encoder, tmp_path, undisturbed):
    Image.new("RGB", (400, 400)).save(images / "val/dog/000.png")
    with pytest.raises(CacheMismatch, match=r"source\.fingerprint"):
        extract(open_source(images), tiny_encoder, tmp_path / "undisturbed", **SMALL)


def test_a_moved_source_is_the_same(images, tiny_encoder, tmp_path, undisturbed):
    moved = open_source(images.rename(tmp_path / "moved"))
    assert extract(moved, tiny_encoder, tmp_path / "undisturbed", **SMALL).kept == 5


# -- modes


def test_overwrite_starts_anew(source, tiny_encoder, tmp_path, undisturbed):
    out = tmp_path / "undisturbed"
    (out / "shards/00099.h5").write_bytes(b"of an older, longer cache")
    (out / "shards/notes.txt").write_text("mine")
    (out / "notes.txt").write_text("mine")
    summary = extract(source, tiny_encoder, out, **{**SMALL, "mode": "overwrite", "shard_size": 100})
    assert (summary.kept, summary.encoded, summary.shards) == (0, 11, 4)
    assert sorted(path.name for path in (out / "shards").glob("*.h5")) == [f"{k:05d}.h5" for k in range(4)]
    assert (out / "shards/notes.txt").read_text() == (out / "notes.txt").read_text() == "mine"
    assert FeatureCache.open(out).manifest.shard_size == 100


def test_overwrite_with_the_same_settings_gives_the_same_bytes(source, tiny_encoder, tmp_path, undisturbed):
    assert extract(source, tiny_encoder, tmp_path / "undisturbed", **SMALL, mode="overwrite").encoded == 11
    assert hdf5_bytes(tmp_path / "undisturbed") == undisturbed


def test_overwrite_replaces_a_cache_of_another_version(source, tiny_encoder, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/manifest.json").write_text('{"format": "ulfine-fast-cache", "version": 99}')
    with pytest.raises(InputError, match="format version 99"):
        extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    assert extract(source, tiny_encoder, tmp_path / "cache", **SMALL, mode="overwrite").encoded == 11


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
@pytest.mark.parametrize("name", ["thesis.tex", "manifest.json", "shards/00000.h5"])
def test_a_folder_of_something_else_is_left_alone(source, tiny_encoder, tmp_path, mode, name):
    other = tmp_path / "other"
    (other / name).parent.mkdir(parents=True)
    (other / name).write_text('{"format": "web-app"}')
    with pytest.raises(InputError, match="holds other files"):
        extract(source, tiny_encoder, other, **SMALL, mode=mode)
    assert [path for path in other.rglob("*") if path.is_file()] == [other / name]
    assert (other / name).read_text() == '{"format": "web-app"}'


def test_a_file_is_no_folder(source, tiny_encoder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        extract(source, tiny_encoder, tmp_path / "file", **SMALL, mode="overwrite")
    assert (tmp_path / "file").read_text() == "mine"


def test_verify_is_content_with_a_sound_cache(source, tiny_encoder, tmp_path, undisturbed):
    wire = Tripwire(source, source.rows[0].id, stop)
    summary = extract(wire, tiny_encoder, tmp_path / "undisturbed", **SMALL, mode="verify")
    assert (summary.shards, summary.images, summary.encoded) == (5, 11, 0)


def test_verify_lists_every_problem_and_repairs_none(source, tiny_encoder, tmp_path, undisturbed):
    out = tmp_path / "undisturbed"
    _flip(out / "shards/00001.h5")
    (out / "shards/00003.json").unlink()
    (out / "text.h5").unlink()
    with pytest.raises(InputError) as caught:
        extract(source, tiny_encoder, out, **SMALL, mode="verify")
    message = str(caught.value)
    assert all(part in message for part in ("shard 00001 is damaged", "shard 00003 is missing", "text.h5"))
    assert "shard 00000" not in message
    assert not (out / "text.h5").exists()
    assert finished(out) == ["00000", "00001", "00002", "00004"]


def test_verify_finds_a_record_of_other_rows(source, tiny_encoder, tmp_path, undisturbed):
    _other_rows(tmp_path / "undisturbed/shards/00001.h5")
    with pytest.raises(InputError, match="shard 00001 covers other rows"):
        extract(source, tiny_encoder, tmp_path / "undisturbed", **SMALL, mode="verify")


def test_verify_makes_no_cache(source, tiny_encoder, tmp_path):
    with pytest.raises(InputError, match="is not a feature cache"):
        extract(source, tiny_encoder, tmp_path / "cache", **SMALL, mode="verify")
    assert not (tmp_path / "cache").exists()


# -- images that cannot be read


def test_a_few_unreadable_images_are_skipped_and_listed(images, tiny_encoder, tmp_path):
    (images / "train/cat/001.png").write_bytes(b"")
    (images / "test/dog/000.png").write_bytes(b"no image")
    source = open_source(images)
    summary = extract(source, tiny_encoder, tmp_path / "cache", **SMALL, max_skipped=0.2)
    assert (summary.images, [one["id"] for one in summary.skipped]) == (9, ["train/cat/001.png", "test/dog/000.png"])
    assert all(one["reason"] for one in summary.skipped)
    record = json.loads((tmp_path / "cache/shards/00000.json").read_text())
    assert (record["rows_read"], record["rows"], len(record["skipped"])) == (3, 2, 1)
    cache = FeatureCache.open(tmp_path / "cache")
    assert "train/cat/001.png" not in cache.ids
    assert len(cache) == len(cache.plain) == 9
    assert cache.verify() == []


def test_a_batch_and_a_shard_without_any_readable_image(images, tiny_encoder, tmp_path):
    for number in range(3):
        (images / f"unlabeled/00{number}.png").write_bytes(b"cut")
    extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL, max_skipped=0.5)
    cache = FeatureCache.open(tmp_path / "cache")
    assert (len(cache), cache.records[2].rows, cache.view_rows.tolist()) == (8, 0, [0, 1, 2, 3, 4])
    assert cache.verify() == []


def test_too_many_unreadable_images_stop_at_once(images, tiny_encoder, tmp_path):
    (images / "unlabeled/000.png").write_bytes(b"cut")
    (images / "unlabeled/001.png").write_bytes(b"cut")
    source = open_source(images)
    wire = Tripwire(source, source.rows[8].id, lambda: pytest.fail("it went on"))
    with pytest.raises(InputError, match=r"2 of 11 .* fraction of 0\.1 .*led/000\.png: not an image.*--max-skipped"):
        extract(wire, tiny_encoder, tmp_path / "cache", **SMALL, max_skipped=0.1)
    assert finished(tmp_path / "cache") == ["00000", "00001"]
    # What is finished stays, and a larger share continues from there: the share is no part of the identity.
    assert extract(source, tiny_encoder, tmp_path / "cache", **SMALL, max_skipped=0.2).kept == 2


def test_skipped_images_of_finished_shards_count_on_resume(images, tiny_encoder, tmp_path):
    (images / "train/cat/000.png").write_bytes(b"cut")
    source = open_source(images)
    extract(source, tiny_encoder, tmp_path / "cache", **SMALL, max_skipped=0.1)
    with pytest.raises(InputError, match="1 of 11 images"):
        extract(source, tiny_encoder, tmp_path / "cache", **SMALL, max_skipped=0.05)


def test_the_limit_itself_is_allowed(tmp_path, tiny_encoder):
    root = write_images(tmp_path / "p", {"cat": 5, "dog": 5})
    (root / "dog/000.png").write_bytes(b"")
    assert len(extract(open_source(root), tiny_encoder, tmp_path / "cache", **SMALL, max_skipped=0.1).skipped) == 1


# -- sources that would make a useless cache


def test_a_class_without_a_labelled_image_is_named(images, tiny_encoder, tmp_path):
    write_images(images, {"val/emu": 1})
    with pytest.raises(InputError, match=r"class 'emu' cannot be learned: it has no labelled image in train"):
        extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL)
    assert not (tmp_path / "cache").exists()


def test_a_class_whose_images_are_all_unreadable_is_named(images, tiny_encoder, tmp_path):
    for path in (images / "train/dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"class 'dog' .* none of its labelled images can be read"):
        extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL, max_skipped=1.0)
    assert len(finished(tmp_path / "cache")) == 5


def test_a_source_without_training_rows_needs_no_labels(tmp_path, tiny_encoder):
    root = write_images(tmp_path / "p", {"cat": 1})
    source = open_source(root)
    source.class_names = ["cat", "dog"]
    source.rows = [dataclasses.replace(row, split="test") for row in source.rows]
    assert extract(source, tiny_encoder, tmp_path / "cache", **SMALL).images == 1


def test_two_rows_with_one_id_are_named(source, tiny_encoder, tmp_path):
    source.rows = [*source.rows, source.rows[2]]
    with pytest.raises(InputError, match=r"two images have the id 'train/cat/002\.png'"):
        extract(source, tiny_encoder, tmp_path / "cache", **SMALL)


@pytest.mark.parametrize("name", ["\udcff.png", "a\0b", ""])
def test_an_id_that_cannot_be_stored_is_named(source, tiny_encoder, tmp_path, name):
    source.rows[0] = dataclasses.replace(source.rows[0], id=name)
    with pytest.raises(InputError, match="cannot be stored"):
        extract(source, tiny_encoder, tmp_path / "cache", **SMALL)


def test_an_empty_source_is_refused(source, tiny_encoder, tmp_path):
    source.rows = []
    with pytest.raises(InputError, match="no images in the source"):
        extract(source, tiny_encoder, tmp_path / "cache", **SMALL)


# -- features that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_names_the_image(source, tiny_encoder, tmp_path, value):
    # A batch is one call, so the third one is that of the last two images of train.
    whole = OffEncoder(tiny_encoder, 1, lambda features: features.index_fill(0, torch.tensor([1]), value))
    with pytest.raises(InputError, match=r"not finite for the image 'train/cat/000\.png'"):
        extract(source, whole, tmp_path / "cache", **SMALL)
    later = OffEncoder(tiny_encoder, 3, lambda features: features.index_fill(0, torch.tensor([4]), value))
    with pytest.raises(InputError, match=r"not finite for the image 'train/dog/001\.png'"):
        extract(source, later, tmp_path / "cache", **SMALL)
    assert finished(tmp_path / "cache") == ["00000"]


def test_a_text_feature_that_is_not_finite_names_the_text(source, tiny_model, tmp_path):
    broken = load_encoder(tiny_model, device="cpu")
    broken.model.text_projection.data.fill_(float("nan"))
    with pytest.raises(InputError, match=r"not finite for the text 'a photo of a cat\.'"):
        extract(source, broken, tmp_path / "cache", **SMALL)


# -- disks


def test_a_full_disk_names_the_shard_and_keeps_the_rest(source, tiny_encoder, tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        extract(Tripwire(source, source.rows[4].id, stop), tiny_encoder, tmp_path / "cache", **SMALL)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system itself refuses to let a file grow beyond the limit.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*00001\.h5 \(File too large\).*what is finished stays"):
            extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert finished(tmp_path / "cache") == ["00000"]
    assert list((tmp_path / "cache").rglob("*.tmp")) == []
    extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    assert hdf5_bytes(tmp_path / "cache") == undisturbed


def test_no_space_for_a_record(source, tiny_encoder, tmp_path, monkeypatch, undisturbed):
    real = os.replace

    def full(old, new):
        if new.name == "00002.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(old, new)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"00002\.json \(No space left on device\)"):
        extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    monkeypatch.undo()
    assert finished(tmp_path / "cache") == ["00000", "00001"]
    assert extract(source, tiny_encoder, tmp_path / "cache", **SMALL).kept == 2
    assert hdf5_bytes(tmp_path / "cache") == undisturbed


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_output_that_cannot_be_written_is_named(source, tiny_encoder, tmp_path, mode):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*cache.*Not a directory"):
        extract(source, tiny_encoder, tmp_path / "file/cache", **SMALL, mode=mode)


def test_a_read_only_disk_is_named(source, tiny_encoder, tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(InputError, match=r"cannot write .*cache.* \(Read-only file system\)"):
        extract(source, tiny_encoder, tmp_path / "cache", **SMALL)


# -- options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int4"}, "dtype must be one of float16, float32, int8, got 'int4'; did you mean int8?"),
        ({"mode": "extend"}, "mode must be one of resume, overwrite, verify, got 'extend'"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"shard_size": -3}, "shard size must be at least 1, got -3"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"max_skipped": 1.5}, r"max skipped must be a fraction from 0 to 1, got 1\.5"),
        ({"max_skipped": float("nan")}, "max skipped"),
        ({"views": ViewRecipe(seed=2**63)}, "view seed must fit"),
        ({"prompts": []}, "at least one prompt"),
    ],
)
def test_values_out_of_range_are_refused(source, tiny_encoder, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        extract(source, tiny_encoder, tmp_path / "cache", **{**SMALL, **change})
    assert not (tmp_path / "cache").exists()


def test_a_bar_is_drawn_when_asked_for(source, tiny_encoder, tmp_path, capsys):
    extract(source, tiny_encoder, tmp_path / "cache", **SMALL, progress=True)
    shown = capsys.readouterr().err
    assert "11/11" in shown
    assert all(stage in shown for stage in ("read", "encode", "write"))


def test_nothing_is_drawn_where_there_is_no_terminal(source, tiny_encoder, tmp_path, capfd):
    extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    assert capfd.readouterr() == ("", "")
