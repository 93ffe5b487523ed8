from __future__ import annotations

import json

import numpy as np
import pytest

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import (
    Split,
    draw_split,
    labeled_counts,
    long_tail_counts,
    read_split,
    training_labels,
    unlabeled_counts,
)

NAMES = ["a", "b", "c", "d", "e"]


def rows(per_class=200, test=20, unknown=0):
    labels = np.repeat(np.arange(5), per_class + test)
    splits = np.tile(np.array(["train"] * per_class + ["test"] * test), 5)
    labels = np.concatenate([labels, np.full(unknown, -1)])
    splits = np.concatenate([splits, np.full(unknown, "unlabeled")])
    return labels, splits


def test_counts_by_hand():
    # int(100 * 100 ** (-k / 4)) for k = 0..4
    assert long_tail_counts(100, 100.0, 5).tolist() == [100, 31, 10, 3, 1]
    assert long_tail_counts(100, 1.0, 3).tolist() == [100, 100, 100]
    assert long_tail_counts(50, 100.0, 2, smallest=1).tolist() == [50, 1]
    assert long_tail_counts(7, 100.0, 1).tolist() == [7]


def test_the_published_cells_have_their_known_sizes():
    # CIFAR-10-LT with N1 = 1500 and gamma = 100, as counted by the literature's formula
    assert long_tail_counts(1500, 100.0, 10).tolist() == [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("consistent", [100, 31, 10, 3, 1]),
        ("reversed", [1, 3, 10, 31, 100]),
        ("uniform", [100, 100, 100, 100, 100]),
        ("middle", [3, 31, 100, 10, 1]),
        ("head-tail", [31, 3, 1, 10, 100]),
    ],
)
def test_shapes_by_hand(shape, wanted):
    assert unlabeled_counts(100, 100.0, shape, 5).tolist() == wanted


@pytest.mark.parametrize("shape", ["consistent", "uniform", "reversed", "middle", "head-tail"])
def test_a_drawn_split_has_the_protocols_counts_and_no_row_twice(shape):
    labels, splits = rows()
    config = FitConfig(n1=60, gamma_l=20, m1=100, gamma_u=10, shape=shape, seed=3, val_fraction=0)
    split = draw_split(labels, splits, NAMES, config)
    by_rank = labeled_counts(labels, split, 5)[split.class_order]
    assert by_rank.tolist() == long_tail_counts(60, 20, 5).tolist()
    hidden = np.bincount(labels[split.unlabeled], minlength=5)[split.class_order]
    assert hidden.tolist() == unlabeled_counts(100, 10, shape, 5).tolist()
    every = np.concatenate([split.labeled, split.unlabeled, split.val, split.test])
    assert len(every) == len(set(every.tolist()))
    assert (splits[split.test] == "test").all()
    assert len(split.test) == 100


def test_same_seed_same_split_other_seed_other_classes():
    labels, splits = rows()
    first, again, other = (draw_split(labels, splits, NAMES, FitConfig(n1=50, seed=s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.labeled, again.labeled)
    assert first.class_order.tolist() != other.class_order.tolist()


def test_split_seed_overrides_the_seed():
    labels, splits = rows()
    one = draw_split(labels, splits, NAMES, FitConfig(n1=50, seed=1, split_seed=9))
    two = draw_split(labels, splits, NAMES, FitConfig(n1=50, seed=2, split_seed=9))
    np.testing.assert_array_equal(one.unlabeled, two.unlabeled)


def test_classes_keep_their_order_on_request():
    labels, splits = rows()
    split = draw_split(labels, splits, NAMES, FitConfig(n1=50, permute_classes=False))
    assert split.class_order.tolist() == [0, 1, 2, 3, 4]


def test_m1_by_default_is_the_largest_the_data_allow():
    labels, splits = rows(per_class=200)
    config = FitConfig(n1=60, gamma_l=20, gamma_u=20, val_fraction=0)
    split = draw_split(labels, splits, NAMES, config)
    hidden = np.bincount(labels[split.unlabeled], minlength=5)[split.class_order]
    assert hidden[0] == 140
    uniform = draw_split(labels, splits, NAMES, FitConfig(n1=60, gamma_l=20, shape="uniform", val_fraction=0))
    assert np.bincount(labels[uniform.unlabeled]).tolist() == [140] * 5


def test_validation_is_carved_from_the_labelled_images_and_leaves_small_classes_alone():
    labels, splits = rows()
    whole = draw_split(labels, splits, NAMES, FitConfig(n1=100, gamma_l=50, val_fraction=0))
    split = draw_split(labels, splits, NAMES, FitConfig(n1=100, gamma_l=50, val_fraction=0.1))
    assert set(split.val) | set(split.labeled) == set(whole.labeled)
    assert np.bincount(labels[split.val], minlength=5)[split.class_order].tolist() == [10, 4, 1, 1, 0]


def test_labelled_rows_join_the_unlabelled_ones_on_request():
    labels, splits = rows()
    split = draw_split(labels, splits, NAMES, FitConfig(n1=50, labeled_in_unlabeled=True))
    assert set(split.labeled) <= set(split.unlabeled)


def test_without_n1_the_data_is_taken_as_it_is():
    labels, splits = rows(per_class=30, unknown=7)
    split = draw_split(labels, splits, NAMES, FitConfig(val_fraction=0))
    assert len(split.labeled) == 150
    assert (labels[split.unlabeled] == -1).all()
    assert len(split.unlabeled) == 7
    part = draw_split(labels, splits, NAMES, FitConfig(labeled_fraction=0.1, val_fraction=0))
    assert len(part.labeled) == 15
    assert len(part.unlabeled) == 142


def test_unlabelled_rows_belong_to_natural_shapes_only():
    labels, splits = rows(unknown=9)
    natural = draw_split(labels, splits, NAMES, FitConfig(n1=20, shape="natural"))
    assert (labels[natural.unlabeled] == -1).sum() == 9
    assert (labels[draw_split(labels, splits, NAMES, FitConfig(n1=20)).unlabeled] >= 0).all()


def test_a_test_part_is_carved_where_there_is_none():
    labels, splits = rows(per_class=50, test=0)
    split = draw_split(labels, splits, NAMES, FitConfig(test_fraction=0.2, val_fraction=0))
    assert np.bincount(labels[split.test]).tolist() == [10] * 5
    assert not set(split.test) & set(split.labeled)


def test_given_validation_rows_are_used():
    labels, splits = rows()
    splits = splits.copy()
    splits[:4] = "val"
    split = draw_split(labels, splits, NAMES, FitConfig(n1=50))
    assert split.val.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FitConfig(n1=500), "n1 = 500 needs 500 labelled images of class"),
        (FitConfig(n1=150, m1=100), "m1 = 100 needs"),
    ],
)
def test_too_few_images(config, words):
    labels, splits = rows()
    with pytest.raises(InputError, match=words):
        draw_split(labels, splits, NAMES, config)


def test_a_class_without_a_labelled_image_is_named():
    labels, splits = rows()
    labels = np.where((labels == 2) & (splits == "train"), -1, labels)
    with pytest.raises(InputError, match="class 'c' has no labelled training image"):
        draw_split(labels, splits, NAMES, FitConfig())


def test_saved_by_id_and_loaded_on_reordered_rows(tmp_path):
    labels, splits = rows(per_class=20)
    ids = [f"image-{row}" for row in range(len(labels))]
    split = draw_split(labels, splits, NAMES, FitConfig(n1=10))
    (tmp_path / "split.json").write_text(json.dumps(split.to_dict(ids)))
    shuffled = ids[::-1]
    again = read_split(tmp_path, shuffled)
    for role in ("labeled", "unlabeled", "val", "test"):
        assert [shuffled[row] for row in getattr(again, role)] == [ids[row] for row in getattr(split, role)]
    np.testing.assert_array_equal(again.class_order, split.class_order)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"labeled": []'])
def test_what_is_no_split_is_refused(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(InputError, match="is not a saved split"):
        read_split(tmp_path / "split.json", [])


def test_a_split_of_other_images_names_one(tmp_path):
    split = Split(*(np.array([0]) for _ in range(5)))
    (tmp_path / "s.json").write_text(json.dumps(split.to_dict(["old.png"])))
    with pytest.raises(InputError, match=r"'old\.png', which this cache lacks"):
        read_split(tmp_path / "s.json", ["new.png"])


def shuffled(seed, **values):
    labels, splits = rows()
    config = FitConfig(n1=60, gamma_l=20, gamma_u=10, shape="shuffled", seed=seed, val_fraction=0, **values)
    split = draw_split(labels, splits, NAMES, config)
    return labels, split, np.bincount(labels[split.unlabeled], minlength=5)


def test_shuffled_counts_fall_along_another_order_of_the_classes():
    orders = set()
    for seed in range(12):
        labels, split, hidden = shuffled(seed, m1=100)
        assert labeled_counts(labels, split, 5)[split.class_order].tolist() == long_tail_counts(60, 20, 5).tolist()
        assert sorted(hidden.tolist(), reverse=True) == long_tail_counts(100, 10, 5).tolist()
        orders.add(tuple(np.argsort(-hidden[split.class_order]).tolist()))
    # ranks of the unlabelled classes among the labelled ones: neither one order nor only its reverse
    assert len(orders) > 6


def test_shuffled_repeats_with_its_seed_and_leaves_the_labelled_rows_alone():
    labels, first, _ = shuffled(3, m1=100)
    np.testing.assert_array_equal(first.unlabeled, shuffled(3, m1=100)[1].unlabeled)
    config = FitConfig(n1=60, gamma_l=20, gamma_u=10, m1=100, shape="consistent", seed=3, val_fraction=0)
    plain = draw_split(labels, rows()[1], NAMES, config)
    np.testing.assert_array_equal(first.labeled, plain.labeled)
    np.testing.assert_array_equal(first.test, plain.test)


def test_shuffled_takes_as_many_as_the_data_allow():
    labels, split, hidden = shuffled(5)
    left = 200 - labeled_counts(labels, split, 5)
    ranked = np.argsort(-hidden, kind="stable")
    assert (hidden <= left).all()
    more = long_tail_counts(int(hidden.max()) + 1, 10, 5)
    assert (more > left[ranked]).any()


def noisy(fraction, seed=0, split=None, classes=5):
    labels, splits = rows()
    config = FitConfig(n1=60, gamma_l=20, label_noise=fraction, seed=seed, split_seed=seed, val_fraction=0.1)
    split = draw_split(labels, splits, NAMES, config) if split is None else split
    return labels[split.labeled], training_labels(labels, split, classes, config), split


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6, 1.0])
def test_so_many_labelled_images_get_a_wrong_class(fraction):
    right, result, split = noisy(fraction)
    assert (right != result).sum() == round(fraction * len(right))
    assert set(result.tolist()) <= set(range(5))
    assert result.shape == split.labeled.shape


def test_wrong_labels_follow_the_split_seed_and_nest():
    _, some, split = noisy(0.2)
    right, more, _ = noisy(0.5)
    wrong = some != right
    assert np.array_equal(some[wrong], more[wrong])
    assert np.array_equal(noisy(0.2)[1], some)
    assert not np.array_equal(noisy(0.2, seed=1, split=split)[1], some)


def test_wrong_classes_are_equally_likely():
    labels = np.zeros(4000, dtype=np.int64)
    split = Split(np.arange(4000), *[np.empty(0, np.int64)] * 3, np.arange(5))
    counts = np.bincount(training_labels(labels, split, 5, FitConfig(label_noise=1.0)), minlength=5)
    assert counts[0] == 0
    assert abs(counts[1:] - 1000).max() < 120


def test_a_wrong_class_needs_a_second_one():
    split = Split(np.arange(3), *[np.empty(0, np.int64)] * 3, np.arange(1))
    with pytest.raises(InputError, match=r"label_noise = 0\.5 needs a second class"):
        training_labels(np.zeros(3, dtype=np.int64), split, 1, FitConfig(label_noise=0.5))
