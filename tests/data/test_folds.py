"""The folds of cross-validation: every label is held out once a repeat, and none is lost."""

from __future__ import annotations

import numpy as np
import pytest

from ulfine_fast import FitConfig
from ulfine_fast.data import folds as module
from ulfine_fast.data.folds import draw_folds, fold_numbers, is_cross_validated
from ulfine_fast.data.splits import Split

LABELS = np.array([0] * 12 + [1] * 7 + [2] * 2 + [3], dtype=np.int64)


def split_of(labeled, unlabeled=()):
    none = np.empty(0, dtype=np.int64)
    return Split(np.asarray(labeled), np.asarray(unlabeled, dtype=np.int64), none, none, np.arange(4))


def test_every_class_is_spread_evenly_and_a_single_label_is_never_held_out():
    numbers = fold_numbers(LABELS, 5, 3, np.random.default_rng(0))
    assert numbers.shape == (3, len(LABELS))
    for repeat in numbers:
        assert (repeat[LABELS == 3] == -1).all()
        assert (repeat[LABELS < 3] >= 0).all()
        for k, largest in ((0, 3), (1, 2), (2, 1)):
            sizes = np.bincount(repeat[k == LABELS], minlength=5)
            assert (sizes.max(), sizes.min()) == (largest, largest - 1)
        # classes go on where the one before ended
        sizes = np.bincount(repeat[repeat >= 0], minlength=5)
        assert sizes.max() - sizes.min() <= 1
    assert not np.array_equal(numbers[0], numbers[1])


def test_a_fold_trains_on_all_other_labels():
    rows = np.arange(len(LABELS)) * 2
    labels = np.repeat(LABELS, 2)
    folds = draw_folds(labels, split_of(rows), 4, FitConfig(cv_folds=4, cv_repeats=2))
    assert folds.count == 4
    assert len(folds.splits) == 8
    for number, split in enumerate(folds.splits):
        np.testing.assert_array_equal(np.sort(np.concatenate([split.labeled, split.test])), rows)
        np.testing.assert_array_equal(split.test, rows[folds.numbers[number // 4] == number % 4])
        assert len(split.val) == 0
    for repeat in range(2):
        held_out = np.concatenate([split.test for split in folds.splits[4 * repeat : 4 * repeat + 4]])
        assert sorted(held_out) == rows[:-1].tolist()


def test_folds_are_drawn_from_the_split_seed_alone():
    rows = np.arange(len(LABELS))
    first, same = (draw_folds(LABELS, split_of(rows), 4, FitConfig(seed=seed, split_seed=7)) for seed in (0, 1))
    other = draw_folds(LABELS, split_of(rows), 4, FitConfig(seed=1))
    np.testing.assert_array_equal(first.numbers, same.numbers)
    assert not np.array_equal(first.numbers, other.numbers)


def test_a_held_out_image_is_no_unlabelled_one_and_of_many_a_part_is_read(monkeypatch):
    rows = np.arange(len(LABELS))
    labels = np.concatenate([LABELS, np.full(50, -1)])
    folds = draw_folds(labels, split_of(rows, np.arange(len(labels))), 4, FitConfig(cv_folds=3))
    for split in folds.splits:
        assert sorted([*split.unlabeled, *split.test]) == list(range(len(labels)))
    monkeypatch.setattr(module, "UNLABELED", 30)
    part = draw_folds(labels, split_of(rows, np.arange(len(LABELS), len(labels))), 2, FitConfig(cv_folds=3))
    assert {len(split.unlabeled) for split in part.splits} == {30}


def test_folds_are_as_many_as_the_largest_class_has_labels():
    labels = np.array([0, 0, 0, 1, 1])
    assert draw_folds(labels, split_of(range(5)), 2, FitConfig()).count == 3
    alone = draw_folds(np.array([0, 1, 2]), split_of(range(3)), 3, FitConfig())
    assert (alone.count, alone.splits) == (0, [])
    assert draw_folds(labels, split_of(range(5)), 2, FitConfig(cv_folds=0)).splits == []


def test_many_labels_need_one_repeat(monkeypatch):
    monkeypatch.setattr(module, "MOST_REPEATED", 20)
    assert len(draw_folds(LABELS, split_of(range(len(LABELS))), 4, FitConfig()).numbers) == 1


@pytest.mark.parametrize(
    ("splits", "options", "answer"),
    [
        ("train", {}, True),
        ("val", {}, True),
        ("test", {}, False),
        ("train", {"test_fraction": 0.2}, False),
        ("train", {"n1": 1}, False),
    ],
)
def test_what_is_cross_validated(splits, options, answer):
    assert is_cross_validated(np.array([0, 0]), np.array(["train", splits]), FitConfig(**options)) is answer


def test_test_images_without_a_label_test_nothing():
    assert is_cross_validated(np.array([0, -1]), np.array(["train", "test"]), FitConfig())
