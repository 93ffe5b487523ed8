"""Corrected labels: the file, the cache under them, and a split whose images move."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, FitConfig, Run, fit
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.data.corrections import corrected, corrected_split, read_corrections, write_corrections
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.checkpoint import cache_fingerprint

IDS = [f"{row}.png" for row in range(8)]


@pytest.fixture
def cache():
    """Rows 0 1 labelled a, 2 b, 3 4 unlabelled, 5 val b, 6 7 test a b."""
    random = np.random.default_rng(0)
    splits = ["train"] * 3 + ["unlabeled"] * 2 + ["val", "test", "test"]
    return FeatureCache.from_arrays(
        random.normal(size=(8, 4)), [0, 0, 1, -1, -1, 1, 0, 1], class_names=["a", "b"], splits=splits, ids=IDS
    )


@pytest.fixture
def split():
    return Split(*(np.array(rows) for rows in ([0, 1, 2], [3, 4], [5], [6, 7], [0, 1])))


def rows_of(split):
    return [getattr(split, role).tolist() for role in ("labeled", "unlabeled", "val", "test")]


def test_the_file_round_trips_with_any_name(tmp_path):
    labels = {'a,"b"\n.png': "cat, the", "ü": "", " x ": "<script>"}
    write_corrections(tmp_path / "labels.csv", labels)
    assert read_corrections(tmp_path / "labels.csv") == labels
    assert (tmp_path / "labels.csv").read_bytes().startswith(b'id,label\n"a,""b""\n.png","cat, the"\n')
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels.csv"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "got none"),
        ("id,class\nx,a\n", "got id, class"),
        ("id,label,note\nx,a,b\n", "got id, label, note"),
        ("id,Label\nx,a\n", "'Label', which looks like label"),
        ("id,label\nx\n", "line 2"),
        ("id,label\nx,a\nx,b\n", "two labels"),
    ],
)
def test_another_file_is_refused(tmp_path, text, words):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_corrections(tmp_path / "labels.csv")


def test_a_spreadsheets_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "labels.csv").write_bytes("id,label\r\nx,a\r\n".encode("utf-8-sig"))
    assert read_corrections(tmp_path / "labels.csv") == {"x": "a"}


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv"])
def test_tables_of_either_delimiter(tmp_path, name):
    mark = "\t" if name.endswith(".tsv") else ","
    labels = {"x, y": "a", "z\t": ""}
    write_corrections(tmp_path / name, labels)
    assert (tmp_path / name).read_text().startswith(f"id{mark}label\n")
    assert read_corrections(tmp_path / name) == labels
    (tmp_path / name).write_text(f" label{mark}id \na{mark}x\n\n")
    assert read_corrections(tmp_path / name) == {"x": "a"}


def test_numbers_as_pandas_writes_them_and_minus_one():
    cache = FeatureCache.from_arrays(np.eye(4), [0, 1, 2, 3], class_names=["0", "1", "2", "3.0"], ids=list("abcd"))
    other = corrected(cache, {"a": "1.0", "b": "-1", "c": " 0", "d": "3.0"})
    assert other.labels.tolist() == [1, -1, 0, 3]  # the last class is called 3.0


def test_labels_stand_over_the_caches_own(cache):
    other = corrected(cache, {"0.png": "b", "3.png": "a", "6.png": ""})
    assert other.labels.tolist() == [1, 0, 1, 0, -1, 1, -1, 1]
    assert other.splits.tolist() == ["train"] * 4 + ["unlabeled", "val", "test", "test"]
    assert cache.labels.tolist() == [0, 0, 1, -1, -1, 1, 0, 1]
    assert cache.splits.tolist()[3] == "unlabeled"
    assert np.shares_memory(other.plain, cache.plain)
    assert cache_fingerprint(other) != cache_fingerprint(cache)
    assert (cache.relabeled, len(other.relabeled)) == (None, 64)


@pytest.mark.parametrize(("labels", "words"), [({"9.png": "a"}, "9.png"), ({"0.png": "c"}, "none of a, b")])
def test_what_the_cache_does_not_know_is_refused(cache, labels, words):
    with pytest.raises(InputError, match=words):
        corrected(cache, labels)


@pytest.mark.parametrize("wrong", [[0] * 7, [0.0] * 8, [2] * 8, [-2] * 8, [True] * 8])
def test_labels_that_are_none_are_refused(cache, wrong):
    with pytest.raises(InputError, match="labels"):
        cache.with_labels(np.array(wrong))


def test_images_move_within_training_and_out_of_what_is_held_out(cache, split):
    labels = {"0.png": "", "3.png": "b", "4.png": "", "5.png": "a", "7.png": ""}
    moved = corrected_split(split, corrected(cache, labels), labels)
    assert rows_of(moved) == [[1, 2, 3], [0, 4], [5], [6]]
    again = corrected_split(moved, corrected(cache, labels), labels)
    assert rows_of(again) == rows_of(moved)


def test_a_class_keeps_a_label(cache, split):
    with pytest.raises(InputError, match="'b' without a labelled"):
        corrected_split(split, corrected(cache, {"2.png": "a"}), {"2.png": "a"})


def test_corrected_labels_make_a_better_classifier_and_are_noted(tmp_path):
    """Half the labels are wrong: a fit on the corrected ones equals one on the right ones, to the bit."""
    right = make_clusters(views=False)
    random = np.random.default_rng(1)
    train = np.flatnonzero(right.splits == "train")
    wrong = right.labels.copy()
    hit = random.permutation(train)[: len(train) // 2]
    wrong[hit] = (wrong[hit] + 1 + random.integers(0, 3, len(hit))) % 4
    noisy = FeatureCache.from_arrays(
        right.plain,
        wrong,
        class_names=right.class_names,
        text_features=right.text_features,
        splits=right.splits.tolist(),
        ids=right.ids,
    )
    config = FitConfig(method="linear_probe", val_fraction=0.0, steps=60, eval_every=60)
    first = fit(noisy, config, progress=False)
    labels = {right.ids[row]: right.class_names[right.labels[row]] for row in hit}
    corrected_run = fit(corrected(noisy, labels), config, progress=False)
    assert corrected_run.metrics["accuracy"] > first.metrics["accuracy"] + 0.05
    assert torch.equal(corrected_run.tensors["linear"], fit(right, config, progress=False).tensors["linear"])
    assert first.relabeled is None
    corrected_run.save(tmp_path / "run")
    assert Run.load(tmp_path / "run").relabeled == corrected_run.relabeled
    assert json.loads((tmp_path / "run" / "config.json").read_text())["relabeled"] == corrected_run.relabeled
