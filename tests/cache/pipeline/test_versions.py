"""A cache that was begun in format version 1 or 2 stays in it, and programs of that time can read what is added."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.cache.samples import write_images
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.pipeline import extract as extracting
from ulfine_fast.cache.pipeline.append import append
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.merge import merge
from ulfine_fast.cache.shard import shard_path
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache

SMALL = {"batch_size": 2, "shard_size": 3, "workers": 0, "prompts": ["a {}.", "{}"]}
RECORD = ["bytes", "first_row", "rows", "rows_read", "seconds", "sha256", "shard", "skipped", "split"]


@pytest.fixture
def old(images, tiny_encoder, tmp_path, monkeypatch):
    """A cache of version 1."""
    real = extracting.make_manifest
    with monkeypatch.context() as patch:
        patch.setattr(
            extracting, "make_manifest", lambda *a, **k: dataclasses.replace(real(*a, **k), with_digests=False)
        )
        extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL)
    return tmp_path / "cache"


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def record_keys(folder):
    return [sorted(json.loads(path.read_text())) for path in sorted((folder / "shards").glob("*.json"))]


def test_an_old_cache_is_resumed_in_its_version(old, images, tiny_encoder):
    before = files_of(old)
    shard_path(old, 1).unlink()
    (old / "text.h5").unlink()
    summary = extract(open_source(images), tiny_encoder, old, **SMALL)
    assert (summary.kept, summary.encoded) == (4, 2)
    after = files_of(old)
    assert [str(name) for name in before if before[name] != after[name]] in ([], ["shards/00001.json"])  # seconds
    assert record_keys(old) == [RECORD] * 5
    assert extract(open_source(images), tiny_encoder, old, **SMALL, mode="verify").shards == 5
    assert extract(open_source(images), tiny_encoder, old, **SMALL, mode="overwrite").shards == 5
    assert json.loads((old / "manifest.json").read_text())["version"] == 3


def test_an_old_cache_grows_in_its_version(old, images, tiny_encoder):
    write_images(images, {"train/emu": 2}, seed=3)
    append(open_source(images), tiny_encoder, old, workers=0)
    manifest = json.loads((old / "manifest.json").read_text())
    assert (manifest["version"], "digest" in manifest, manifest["class_names"][2]) == (2, False, "emu")
    assert record_keys(old) == [RECORD] * 6
    assert FeatureCache.open(old).verify() == []


def test_an_old_and_a_new_cache_are_merged_to_a_new_one(old, images, tiny_encoder, tmp_path):
    extract(open_source(images), tiny_encoder, tmp_path / "new", **SMALL)
    merge([old, tmp_path / "new"], tmp_path / "all", prefix=True)
    assert json.loads((tmp_path / "all/manifest.json").read_text())["version"] == 3
    assert FeatureCache.open(tmp_path / "all").verify() == []


def test_files_of_a_new_cache_are_refused_in_an_old_one(old, images, tiny_encoder, tmp_path):
    extract(open_source(images), tiny_encoder, tmp_path / "new", **SMALL)
    for name, message in (("shards/00002.json", "shard 00002 was made for another cache"), ("text.h5", "not an HDF5")):
        kept = (old / name).read_bytes()
        (old / name).write_bytes((tmp_path / "new" / name).read_bytes())
        with pytest.raises(InputError, match=message):
            FeatureCache.open(old)
        (old / name).write_bytes(kept)
    assert FeatureCache.open(old).verify() == []


def test_a_shard_of_another_model_is_redone_by_resuming_and_found_by_verifying(images, tiny_encoder, tmp_path):
    from tests.cache.samples import write_tiny_model
    from ulfine_fast.cache.models.encoder import load_encoder

    other = load_encoder(write_tiny_model(tmp_path / "model", seed=1), device="cpu")
    extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL)
    extract(open_source(images), other, tmp_path / "other", **SMALL)
    wanted = shard_path(tmp_path / "cache", 1).read_bytes()
    for suffix in (".h5", ".json"):
        path = shard_path(tmp_path / "cache", 1).with_suffix(suffix)
        path.write_bytes(shard_path(tmp_path / "other", 1).with_suffix(suffix).read_bytes())
    with pytest.raises(InputError, match="has 1 problem: shard 00001 was made for another cache"):
        extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL, mode="verify")
    assert extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL).encoded == 2
    assert shard_path(tmp_path / "cache", 1).read_bytes() == wanted
