from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from tests.cache.samples import make_manifest, write_cache
from ulfine_fast.cache.digests import content_digest
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.manifest import Manifest, is_cache
from ulfine_fast.cache.shard import Layout
from ulfine_fast.cache.store import FeatureCache

V0_1 = Path(__file__).parents[1] / "fixtures/v0_1/cache"


def test_round_trip_and_exact_form(tmp_path):
    manifest = make_manifest()
    manifest.write(tmp_path)
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert Manifest.read(tmp_path).to_dict() == manifest.to_dict()
    assert text == json.dumps(manifest.to_dict(), indent=2, sort_keys=True) + "\n"
    assert (json.loads(text)["format"], json.loads(text)["version"]) == ("ulfine-fast-cache", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_layout_has_views_only_where_they_are_trained_on():
    manifest = make_manifest()
    assert manifest.layout("train") == manifest.layout("unlabeled") == Layout(4, "float16", 1, 2)
    assert manifest.layout("val") == manifest.layout("test") == Layout(4, "float16", 0, 0)
    assert (manifest.dim, manifest.rows) == (4, 11)


# -- identity


@pytest.mark.parametrize(
    ("change", "field", "found", "wanted"),
    [
        ({"model": {"name": "ViT-B-32"}}, "model.name", "ViT-B-16", "ViT-B-32"),
        ({"model": {"sha256": "00"}}, "model.sha256", "ab" * 32, "00"),
        ({"model": {"pretrained": None}}, "model.pretrained", "openai", None),
        ({"views": {"weak": 4}}, "views.weak", 1, 4),
        ({"views": {"seed": 1}}, "views.seed", 0, 1),
        ({"views": {"weak_scale": (0.2, 1.0)}}, "views.weak_scale.0", 0.5, 0.2),
        ({"source": {"fingerprint": "ee"}}, "source.fingerprint", "cd" * 32, "ee"),
        ({"source": {"rows": 12}}, "source.rows", 11, 12),
        ({"preprocessing": "Compose(Resize(336))"}, "preprocessing", "Compose(Resize(224))", "Compose(Resize(336))"),
        ({"std": [0.25, 0.25, 0.3]}, "std.2", 0.25, 0.3),
        ({"dtype": "float32"}, "dtype", "float16", "float32"),
        ({"precision": "bf16"}, "precision", "fp32", "bf16"),
        ({"batch_size": 32}, "batch_size", 64, 32),
        ({"shard_size": 32}, "shard_size", 1024, 32),
        ({"class_names": ["cat", "fox"]}, "class_names.1", "dog", "fox"),
        ({"class_names": ["cat"]}, "class_names.length", 2, 1),
        ({"prompts": ["{}"]}, "prompts.0", "a photo of a {}.", "{}"),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(change, field, found, wanted):
    base = make_manifest()
    merged = {
        name: {**getattr(base, name), **value} if isinstance(value, dict) else value for name, value in change.items()
    }
    with pytest.raises(CacheMismatch) as caught:
        base.refuse_mismatch(make_manifest(**merged))
    assert (caught.value.field, caught.value.found, caught.value.wanted) == (field, found, wanted)
    assert f"{field} = {found!r}" in str(caught.value)
    assert repr(wanted) in str(caught.value)


def test_the_first_of_several_differences_is_named():
    other = make_manifest(dtype="float32", batch_size=1, model={**make_manifest().model, "dim": 9})
    with pytest.raises(CacheMismatch, match=r"model\.dim = 4, the request says 9"):
        make_manifest().refuse_mismatch(other)


def test_an_extra_or_missing_key_is_a_mismatch():
    longer = make_manifest(model={**make_manifest().model, "tokens": True})
    with pytest.raises(CacheMismatch) as caught:
        make_manifest().refuse_mismatch(longer)
    assert (caught.value.field, caught.value.found) == ("model.tokens", None)
    with pytest.raises(CacheMismatch, match=r"model\.tokens"):
        longer.refuse_mismatch(make_manifest())


def test_what_is_no_identity_may_differ(tmp_path):
    source = {**make_manifest().source, "path": "/moved/pets"}
    other = make_manifest(libraries={"torch": "9"}, created_by="ulfine-fast 9", max_skipped=0.5, source=source)
    make_manifest().refuse_mismatch(other)
    make_manifest().write(tmp_path)
    Manifest.read(tmp_path).refuse_mismatch(other)


# -- what cannot be read


def test_a_folder_without_a_manifest_is_no_cache(tmp_path):
    with pytest.raises(InputError, match=r"is not a feature cache: it has no manifest\.json"):
        Manifest.read(tmp_path)
    with pytest.raises(InputError, match="is not a feature cache"):
        Manifest.read(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not a feature cache"):
        Manifest.read(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ('{"format": "ulfine', "cannot be read"),
        ("[]", "no manifest of a feature cache"),
        ('{"format": "other"}', "no manifest of a feature cache"),
        ('{"format": "ulfine-fast-cache", "version": 4}', "format version 4, this program reads 1, 2 and 3"),
        ('{"format": "ulfine-fast-cache", "version": 1}', "missing required field model"),
    ],
)
def test_a_damaged_manifest_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int4"},
        {"model": {"dim": "8"}},
        {"model": {}},
        {"source": {"rows": -1}},
        {"class_names": []},
        {"class_names": [1, 2]},
        {"class_names": None},
        {"views": {"weak": 1}},
        {"views": None},
        {"model": []},
        {"model": {**make_manifest().model, "logit_scale": 10**400}},
        {"model": {**make_manifest().model, "logit_scale": float("inf")}},
        {"model": {**make_manifest().model, "dim": 10**12}},
        {"views": {**make_manifest().views, "weak": 10**12}},
        {"views": {**make_manifest().views, "seed": 2**64}},
        {"source": {**make_manifest().source, "rows": 10**18}},
        {"source": {**make_manifest().source, "parts": "x"}},
        {"source": {**make_manifest().source, "appended": [{"rows": 1}]}},
        {"class_names": "cat"},
        {"mean": ["x"]},
        {"shard_size": True},
    ],
)
def test_impossible_values_are_refused(change):
    for base in (make_manifest(), make_manifest(with_digests=False)):
        values = base.to_dict() | change
        if base.with_digests:
            with pytest.raises(InputError, match="does not match its own digest"):
                Manifest.from_dict(values)
            values["digest"] = content_digest(values)
        with pytest.raises(InputError, match="the manifest cannot be read"):
            Manifest.from_dict(values)


def test_fields_of_a_later_program_are_left_aside():
    for base in (make_manifest(), make_manifest(with_digests=False)):
        values = base.to_dict() | {"later": 1}
        if base.with_digests:
            values["digest"] = content_digest(values)
        assert Manifest.from_dict(values).to_dict() == base.to_dict()


def test_a_manifest_of_an_older_version_stays_as_it_was():
    """Sweeps and checkpoints know a cache by this content."""
    older = json.loads((V0_1 / "manifest.json").read_text())
    assert Manifest.read(V0_1).to_dict() == older
    grown = dataclasses.replace(Manifest.read(V0_1), source={**older["source"], "appended": []})
    assert grown.to_dict()["version"] == 2


# -- digests


@pytest.mark.parametrize(
    "change",
    [
        {"model": {**make_manifest().model, "logit_scale": 50.0}},
        {"mean": [0.5, 0.5, 0.4]},
        {"prompts": ["a picture of a {}."]},
        {"class_names": ["dog", "cat"]},
        {"source": {**make_manifest().source, "rows": 10}},
        {"max_skipped": 0.5},
        {"created_by": "another"},
        {"digest": None},
        {"version": 2},
        {"more": 1},
    ],
)
def test_a_changed_manifest_is_refused(tmp_path, change):
    write_cache(tmp_path / "cache")
    path = tmp_path / "cache/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError):
        FeatureCache.open(tmp_path / "cache")


def test_a_shard_is_known_by_the_manifest_of_its_time():
    first = make_manifest(class_names=["cat"], source={**make_manifest().source, "rows": 4})
    images = {"kind": "folder", "fingerprint": "1", "rows": 7, "first_shard": 2, "classes": 0}
    second = dataclasses.replace(first, source={**first.source, "rows": 11, "appended": [images]})
    names = {"kind": "folder", "fingerprint": "2", "rows": 0, "first_shard": 3, "classes": 1}
    third = dataclasses.replace(
        second, class_names=["cat", "dog"], source={**second.source, "appended": [images, names]}
    )
    assert third.identity_of(0) == third.identity_of(1) == second.identity_of(1) == first.identity_of(0)
    assert third.identity_of(2) == second.identity_of(2) != first.identity_of(0)
    assert third.identity_of(3) not in (first.identity_of(0), second.identity_of(2))
    stream = dataclasses.replace(first, source={"kind": "tar", "fingerprint": "1", "parts": 2})
    longer = dataclasses.replace(stream, source={**stream.source, "parts": 3, "appended": [images]})
    assert longer.identity_of(1) == stream.identity_of(0) != longer.identity_of(2)
    assert dataclasses.replace(first, with_digests=False).identity_of(0) is None


def test_what_is_no_identity_leaves_shards_valid():
    source = {**make_manifest().source, "path": "/moved/pets"}
    other = make_manifest(libraries={"torch": "9"}, created_by="ulfine-fast 9", max_skipped=0.5, source=source)
    assert other.identity_of(0) == make_manifest().identity_of(0) != make_manifest(batch_size=1).identity_of(0)


@pytest.mark.parametrize("name", ["NUL \0", "half \ud800"])
def test_texts_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path, name):
    for change in ({"class_names": ["cat", name]}, {"prompts": [name]}):
        with pytest.raises(InputError):
            make_manifest(**change).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_is_cache(tmp_path):
    assert not is_cache(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "web-app"}')
    assert not is_cache(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    assert not is_cache(tmp_path)
    # Of another version it is ours all the same, so overwriting it is what the user means.
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "ulfine-fast-cache", "version": 99}))
    assert is_cache(tmp_path)


def test_a_refused_write_names_the_file(tmp_path, monkeypatch):
    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(InputError, match=r"manifest\.json \(Read-only file system\)"):
        make_manifest().write(Path(tmp_path))


def test_a_manifest_is_a_value():
    assert make_manifest() == make_manifest()
    assert make_manifest() != dataclasses.replace(make_manifest(), batch_size=1)
