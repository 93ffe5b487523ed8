from __future__ import annotations

import dataclasses
import json
import shutil

import h5py
import numpy as np
import pytest
import torch

from tests.cache.samples import LAYOUT, PARTS, make_manifest, make_shard, make_text, put_shard, write_cache
from ulfine_fast.cache import store
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.shard import Layout, shard_path
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cache.text import average, read_text, write_text


@pytest.fixture
def folder(tmp_path):
    write_cache(tmp_path / "cache")
    return tmp_path / "cache"


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# -- a folder


def test_rows_come_in_the_order_of_the_shards(tmp_path):
    written = write_cache(tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache")
    assert len(cache) == 11
    assert cache.ids == [name for shard in written for name in shard.ids]
    assert cache.labels.dtype == np.int64
    assert cache.labels.tolist() == [0, 0, 0, 1, -1, -1, 1, 1, 0, 0, 0]
    assert cache.splits.tolist() == [split for split, n in PARTS for _ in range(n)]
    assert cache.plain.dtype == np.float16
    assert np.array_equal(cache.plain, np.concatenate([shard.plain[:, 0] for shard in written]))


def test_views_belong_to_the_rows_of_train_and_unlabeled(tmp_path):
    written = write_cache(tmp_path / "cache")
    cache = FeatureCache.open(str(tmp_path / "cache"))
    assert cache.view_rows.tolist() == [0, 1, 2, 3, 4, 5]
    for kind, views in (("weak", 1), ("strong", 2)):
        assert cache.views(kind).shape == (6, views, 4)
        assert np.array_equal(cache.views(kind), np.concatenate([getattr(shard, kind) for shard in written[:3]]))
    with pytest.raises(InputError, match="weak or strong, got 'plain'"):
        cache.views("plain")


def test_view_rows_are_row_numbers_wherever_those_splits_lie(tmp_path):
    write_cache(tmp_path / "cache", [("val", 2), ("train", 2), ("test", 1), ("unlabeled", 1)], skipped=0)
    assert FeatureCache.open(tmp_path / "cache").view_rows.tolist() == [2, 3, 5]


def test_opening_reads_no_features(folder, monkeypatch):
    monkeypatch.setattr(store, "read_shard", lambda *_: pytest.fail("a shard was read"))
    cache = FeatureCache.open(folder)
    assert (len(cache), cache.dim, cache.class_names, cache.path) == (11, 4, ["cat", "dog"], folder)
    assert (cache.text_features.shape, cache.prototypes.shape) == ((2, 1, 4), (2, 4))
    assert cache.logit_scale == pytest.approx(100.0)


@pytest.mark.parametrize("read", ["plain", "labels", "ids", "tokens", "summary"])
def test_a_cache_overwritten_since_it_was_opened_is_refused(tmp_path, read):
    """Else new features would be used under the texts of the old model."""
    dtype = {"tokens": ["ln_post"], "token_width": 4} if read == "tokens" else {}
    for name, seed in (("cache", 1), ("other", 2)):
        (tmp_path / name / "shards").mkdir(parents=True)
        manifest = make_manifest(
            source={**make_manifest().source, "rows": 3}, views={"weak": 0, "strong": 0, "seed": 0}, **dtype
        )
        manifest.write(tmp_path / name)
        write_text(tmp_path / name, make_text(manifest))
        shard = make_shard(3, Layout(4, "float16"), seed=seed)
        tokens = shard.plain[:, :, None] if dtype else None  # (n, 1, 1, W)
        put_shard(tmp_path / name, dataclasses.replace(shard, labels=np.zeros(3, np.int32), tokens=tokens))
    cache = FeatureCache.open(tmp_path / "cache")
    shutil.copytree(tmp_path / "other", tmp_path / "cache", dirs_exist_ok=True)
    if read == "summary":
        assert "replaced after the cache was opened" in " ".join(cache.summary()["problems"])
        return
    with pytest.raises(InputError, match="shard 00000 is damaged, or was replaced after the cache was opened"):
        cache.tokens("plain") if read == "tokens" else getattr(cache, read)
    assert FeatureCache.open(tmp_path / "cache").verify() == []


def test_each_shard_is_read_once(folder, monkeypatch):
    seen = []
    real = store.read_shard
    monkeypatch.setattr(
        store, "read_shard", lambda path, *rest, **options: (seen.append(path.name), real(path, *rest, **options))[1]
    )
    cache = FeatureCache.open(folder)
    for _ in range(2):
        assert len(cache.ids) == len(cache.plain) == len(cache.labels) == 11
        assert len(cache.views("strong")) == 6
    assert sorted(seen) == [f"{number:05d}.h5" for number in range(5)]


def test_rows_of_ids(folder):
    cache = FeatureCache.open(folder)
    assert cache.row_of([cache.ids[4], cache.ids[0]]).tolist() == [4, 0]
    assert cache.row_of([]).dtype == np.int64
    assert cache.with_labels(cache.labels).row_of(iter(cache.ids)).tolist() == list(range(11))
    with pytest.raises(InputError) as caught:
        cache.row_of([cache.ids[1], "b.png", "c.png"], source="labels.csv", fix="remove its line")
    assert str(caught.value) == (
        f"labels.csv names 'b.png', which this cache lacks (its ids look like {cache.ids[0]!r}); remove its line"
    )
    empty = FeatureCache.from_arrays(np.empty((0, 2)), np.empty(0, int), class_names=["x"])
    with pytest.raises(InputError, match="the request names 'a', which this cache lacks; use another cache"):
        empty.row_of(["a"])


def test_many_more_shards_than_threads(tmp_path):
    written = write_cache(tmp_path / "cache", [("train", 1)] * 70, skipped=0)
    assert FeatureCache.open(tmp_path / "cache").ids == [shard.ids[0] for shard in written]


def test_prototypes_are_the_normalised_means():
    features = np.array([[[3.0, 0.0], [0.0, 3.0]], [[0.0, -1.0], [0.0, -1.0]]], dtype=np.float32)
    assert np.allclose(average(features), [[0.5**0.5, 0.5**0.5], [0.0, -1.0]], atol=1e-6)
    opposite = np.array([[[1.0, 0.0], [-1.0, 0.0]]], dtype=np.float32)
    assert np.array_equal(average(opposite), [[0.0, 0.0]])


# -- damage


def test_a_missing_shard_is_named(folder):
    shard_path(folder, 3).unlink()
    with pytest.raises(InputError, match="shard 00003 is missing"):
        FeatureCache.open(folder)


def test_an_unfinished_cache_names_the_first_unfinished_shard(folder):
    for number in (2, 4):
        shard_path(folder, number).with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"shard 00002 is missing: no 00002\.json.*run the same extract command again"):
        FeatureCache.open(folder)


def test_records_that_do_not_join_up_are_refused(folder):
    path = shard_path(folder, 1).with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"first_row": 9}))
    with pytest.raises(InputError, match="shard 00001 does not follow"):
        FeatureCache.open(folder)


def test_a_flipped_byte_is_found_when_the_features_are_read(folder):
    flip(shard_path(folder, 2))
    cache = FeatureCache.open(folder)
    with pytest.raises(InputError, match="shard 00002 is damaged"):
        _ = cache.plain
    problems = cache.verify()
    assert problems
    assert all("00002" in problem for problem in problems)


def test_a_shard_that_vanishes_after_opening_is_named(folder):
    cache = FeatureCache.open(folder)
    shard_path(folder, 0).unlink()
    with pytest.raises(InputError, match="shard 00000 is missing"):
        _ = cache.labels


def test_nan_names_shard_and_image(tmp_path):
    written = write_cache(tmp_path, [("train", 2)], skipped=0)
    written[0].weak[1, 0, 0] = np.nan
    put_shard(tmp_path, written[0])
    with pytest.raises(InputError, match=r"shard 00000: the weak features of image 'train/0/1' are not finite"):
        _ = FeatureCache.open(tmp_path).plain
    # The other image of the shard went down with it, so make the cache anew without that image.
    assert "--mode overwrite" in FeatureCache.open(tmp_path).verify()[0]


def test_a_label_that_names_no_class_is_refused(tmp_path):
    written = write_cache(tmp_path, [("train", 2)], skipped=0)
    wrong = dataclasses.replace(written[0], labels=np.array([0, 7], dtype=np.int32))
    put_shard(tmp_path, wrong)
    with pytest.raises(InputError, match="below 2, got 7"):
        _ = FeatureCache.open(tmp_path).labels
    assert FeatureCache.open(tmp_path).verify() == ["labels [7] name no class, there are 2"]


def test_damaged_text_features_are_refused(folder):
    data = (folder / "text.h5").read_bytes()
    position = data.index(make_text(make_manifest()).features.tobytes())
    flip(folder / "text.h5", position)
    with pytest.raises(InputError, match=r"text\.h5 cannot be used: features does not match its checksum"):
        FeatureCache.open(folder)
    (folder / "text.h5").unlink()
    with pytest.raises(InputError, match=r"text\.h5 cannot be used"):
        FeatureCache.open(folder)


def test_text_without_its_scale_or_with_nan_is_refused(folder):
    manifest = FeatureCache.open(folder).manifest
    write_text(folder, dataclasses.replace(make_text(manifest), logit_scale=float("nan")))
    with pytest.raises(InputError, match="not finite"):
        read_text(folder, manifest)
    with h5py.File(folder / "text.h5", "r+") as file:
        del file.attrs["logit_scale"]
    with pytest.raises(InputError, match=r"text\.h5"):
        read_text(folder, manifest)


def test_text_keeps_the_vision_head(folder):
    head = {"ln_post_weight": np.ones(3, np.float32), "projection": np.ones((3, 4), np.float32)}
    manifest = FeatureCache.open(folder).manifest
    write_text(folder, dataclasses.replace(make_text(manifest), head=head))
    text = read_text(folder, manifest)
    assert sorted(text.head) == ["ln_post_weight", "projection"]
    assert text.head["projection"].shape == (3, 4)
    assert text.prompts == [["a photo of a cat."], ["a photo of a dog."]]


def test_text_bytes_are_a_function_of_the_features(folder):
    first = (folder / "text.h5").read_bytes()
    write_text(folder, make_text(make_manifest()))
    assert (folder / "text.h5").read_bytes() == first


# -- the check and the summary


def test_a_sound_cache_has_no_problems(folder):
    assert FeatureCache.open(folder).verify() == []


def test_verify_lists_every_damaged_shard(folder):
    cache = FeatureCache.open(folder)
    flip(shard_path(folder, 0))
    shard_path(folder, 4).unlink()
    problems = cache.verify()
    assert [any(name in problem for problem in problems) for name in ("00000", "00004", "00001")] == [True, True, False]


def test_two_rows_with_one_id_are_a_problem(tmp_path):
    written = write_cache(tmp_path, [("train", 2)], skipped=0)
    put_shard(tmp_path, dataclasses.replace(written[0], ids=["a", "a"]))
    assert FeatureCache.open(tmp_path).verify() == ["two rows have the id 'a'"]


def test_summary_says_what_is_in_it(folder):
    summary = json.loads(json.dumps(FeatureCache.open(folder).summary()))
    assert summary["counts"] == {
        "train": {"cat": 3, "dog": 1},
        "unlabeled": {"(unknown)": 2},
        "val": {"dog": 2},
        "test": {"cat": 3},
    }
    assert (summary["images"], summary["shards"], summary["dim"], summary["dtype"]) == (11, 5, 4, "float16")
    assert summary["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert [one["id"] for one in summary["skipped"]][:2] == ["train/0/lost0", "train/1/lost0"]
    assert (summary["problems"], summary["model"]["name"], summary["views"]["strong"]) == ([], "ViT-B-16", 2)


def test_summary_of_a_damaged_cache_counts_what_is_left(folder):
    cache = FeatureCache.open(folder)
    shard_path(folder, 4).write_bytes(b"gone")
    summary = cache.summary()
    assert "test" not in summary["counts"]
    assert summary["counts"]["train"] == {"cat": 3, "dog": 1}
    assert len(summary["problems"]) == 1


# -- arrays


def test_from_arrays_by_default():
    cache = FeatureCache.from_arrays(np.eye(3), [0, 1, -1])
    assert (cache.path, cache.manifest, cache.prototypes, cache.text_features) == (None, None, None, None)
    assert (len(cache), cache.dim, cache.class_names, cache.ids) == (3, 3, ["0", "1"], ["0", "1", "2"])
    assert cache.splits.tolist() == ["train", "train", "unlabeled"]
    assert (cache.plain.dtype, cache.labels.dtype) == (np.float32, np.int64)
    assert [cache.views(kind).shape for kind in ("weak", "strong")] == [(3, 0, 3), (3, 0, 3)]
    assert cache.verify() == []


def test_from_arrays_with_everything():
    plain = np.ones((4, 2), dtype=np.float16)
    weak = np.arange(6, dtype=np.float16).reshape(3, 1, 2)
    cache = FeatureCache.from_arrays(
        plain,
        np.array([0, 1, 1, 0], dtype=np.int32),
        class_names=["cat", "dog"],
        text_features=[[[2.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 1.0]]],
        weak=weak,
        splits=["train", "test", "unlabeled", "train"],
        ids=["a", "b", "c", "d"],
        logit_scale=20.0,
    )
    assert cache.view_rows.tolist() == [0, 2, 3]
    assert np.array_equal(cache.views("weak"), weak)
    assert cache.views("strong").shape == (3, 0, 2)
    assert np.allclose(cache.prototypes, [[0.5**0.5, 0.5**0.5], [0.0, 1.0]])
    assert (cache.logit_scale, cache.plain.dtype) == (20.0, np.float16)
    assert cache.summary()["counts"] == {"train": {"cat": 2}, "unlabeled": {"dog": 1}, "test": {"dog": 1}}


def test_one_prompt_may_come_without_its_axis():
    assert FeatureCache.from_arrays(np.eye(2), [0, 1], text_features=np.eye(2)).text_features.shape == (2, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plain": np.ones(3)}, "plain must have 2 axes"),
        ({"plain": [[1.0, 2.0], [np.nan, 0.0], [0.0, 0.0]]}, "plain must be finite, row 1 is not"),
        ({"labels": [0, 1]}, "labels must be 3 whole numbers"),
        ({"labels": [0.0, 1.0, 1.0]}, "whole numbers.*float64"),
        ({"labels": [0, 1, -2]}, "got -2"),
        ({"labels": [0, 1, 2], "class_names": ["a", "b"]}, "below 2, got 2"),
        ({"labels": [-1, -1, -1]}, "at least one class"),
        ({"splits": ["train", "train", "dev"]}, "dev"),
        ({"splits": ["train"]}, "splits must be 3"),
        ({"ids": ["a", "a", "b"]}, "ids must be 3 different"),
        ({"ids": ["a", "b"]}, "got 2"),
        ({"weak": np.ones((2, 1, 2))}, "m = 3"),
        ({"strong": np.ones((3, 1, 3))}, "D = 2"),
        ({"strong": np.full((3, 1, 2), np.inf)}, "strong must be finite, row 0"),
        ({"text_features": np.ones((3, 1, 2))}, r"\(2, P, 2\), got \(3, 1, 2\)"),
        ({"text_features": np.ones(3)}, r"text_features must have 3 axes, got shape \(3,\)"),
        ({"text_features": np.array([[1.0, 0.0], [np.nan, 1.0]])}, "text_features must be finite, row 1 is not"),
        ({"text_features": np.array([[np.inf, 0.0], [0.0, 1.0]])}, "text_features must be finite, row 0 is not"),
        ({"text_features": np.array([[1.0, 0.0], [1e300, 1.0]])}, "text_features must be finite, row 1 is not"),
    ],
)
def test_from_arrays_refuses_what_does_not_fit(change, message):
    arguments = {"plain": np.ones((3, 2)), "labels": [0, 1, 1]} | change
    with pytest.raises(InputError, match=message):
        FeatureCache.from_arrays(arguments.pop("plain"), arguments.pop("labels"), **arguments)


def test_arrays_that_are_read_backwards_are_like_any_other():
    features, labels = np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0, 1, 1])
    cache = FeatureCache.from_arrays(features[::-1, ::-1], labels[::-1], weak=features[::-1, None])
    assert cache.plain.tolist() == features[::-1, ::-1].tolist()
    for array in (cache.plain, cache.labels, cache.views("weak")):
        torch.from_numpy(array)  # which takes no negative strides
    assert np.shares_memory(FeatureCache.from_arrays(features, labels).plain, features)


def test_layout_of_the_helper_matches():
    assert make_manifest().layout("train") == LAYOUT
