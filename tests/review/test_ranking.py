"""Which images come first: on data of which it is known which labels are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, FitConfig
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.neighbors import Duplicates, near_duplicates
from ulfine_fast.data.splits import Split, draw_split
from ulfine_fast.review.ranking import (
    conflicting_duplicates,
    cross_validate,
    likely_wrong,
    maybe_rare,
    rank_candidates,
)

QUICK = {"method": "linear_probe", "val_fraction": 0.0, "steps": 60, "eval_every": 30}


def duplicates(pairs):
    first, second, cosine = (np.array(column) for column in zip(*pairs, strict=True))
    return Duplicates(first, second, cosine, np.full(9, -1), 0.98, True, 1.0)


def relabeled(cache, labels):
    return cache.with_labels(labels)


@pytest.fixture(scope="module")
def noisy():
    """Four well separated classes, ten labels of which are wrong."""
    right = make_clusters(noise=0.4, text_noise=0.3)
    train = np.flatnonzero(right.splits == "train")
    hit = np.random.default_rng(3).permutation(train)[:10]
    wrong = right.labels.copy()
    wrong[hit] = (wrong[hit] + 1) % 4
    return right, relabeled(right, wrong), set(hit.tolist())


@pytest.fixture(scope="module")
def fitted(noisy):
    cache = noisy[1]
    config = FitConfig(**QUICK)
    return cross_validate(cache, config, draw_split(cache.labels, cache.splits, cache.class_names, config))


def test_wrong_labels_come_first_with_the_right_class(noisy, fitted):
    right, cache, hit = noisy
    candidates = [c for c in rank_candidates(cache, fitted, near_duplicates(cache)) if c.kind == "likely_wrong"]
    first = [c for c in candidates[:10] if c.row in hit]
    assert len(first) >= 8
    assert all(c.suggested == right.labels[c.row] != c.label for c in first)


def test_a_label_is_checked_by_heads_that_did_not_see_it(noisy, fitted):
    """The heads of the fit on all labels are more certain of wrong labels than those that never saw them."""
    cache, rows = noisy[1], np.array(sorted(noisy[2]))
    seen = fitted.run.predict_proba(cache.plain[rows])
    labels = cache.labels[rows]
    assert (fitted.probabilities[rows, labels] < seen[np.arange(len(rows)), labels]).mean() >= 0.8
    assert fitted.split.labeled.tolist() == sorted(fitted.split.labeled.tolist())


def test_images_of_the_test_split_are_not_shown(noisy, fitted):
    cache = noisy[1]
    shown = {c.row for c in rank_candidates(cache, fitted, near_duplicates(cache))}
    assert not shown & set(fitted.split.test.tolist())


def test_the_only_label_of_a_class_is_not_checked():
    cache = make_clusters(classes=3, noise=0.4)
    train = np.flatnonzero(cache.splits == "train")
    labeled = np.concatenate(
        [train[cache.labels[train] == 0][:1], *(train[cache.labels[train] == k][:5] for k in (1, 2))]
    )
    unlabeled = np.setdiff1d(train, labeled)
    split = Split(
        np.sort(labeled), unlabeled, np.array([], np.int64), np.flatnonzero(cache.splits == "test"), np.arange(3)
    )
    fitted = cross_validate(cache, FitConfig(**QUICK), split)
    assert np.isnan(fitted.probabilities).any(1).nonzero()[0].tolist() == labeled[:1].tolist()
    assert labeled[0] not in {c.row for c in likely_wrong(cache.labels, fitted.probabilities)}


def test_likely_wrong_labels_are_sorted_by_the_difference_in_probability():
    probabilities = np.array([[0.5, 0.4, 0.1], [0.1, 0.0, 0.9], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1]], dtype=np.float32)
    candidates = likely_wrong(np.array([1, 1, 0, -1]), probabilities)
    assert [(c.row, c.label, c.suggested) for c in candidates] == [(1, 1, 2), (0, 1, 0)]
    assert candidates[0].probability == pytest.approx(0.9)


def test_of_two_duplicates_the_less_likely_label_is_shown():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [np.nan, np.nan], [0.5, 0.5]], dtype=np.float32)
    labels = np.array([0, 1, -1, 0, 1])
    pairs = duplicates([(0, 1, 0.98), (0, 2, 0.99), (0, 3, 1.0), (3, 4, 0.99)])
    candidates = conflicting_duplicates(labels, probabilities, pairs)
    assert [(c.row, c.duplicate, c.suggested) for c in candidates] == [(4, 3, 0), (1, 0, 0)]


def test_rare_classes_alternate_and_the_uncertain_come_first():
    cache = FeatureCache.from_arrays(
        np.eye(9),
        [0] * 3 + [1] * 2 + [2] + [-1] * 3,
        class_names=["a", "b", "c"],
        splits=["train"] * 6 + ["unlabeled"] * 3,
    )
    split = Split(np.arange(6), np.arange(6, 9), np.array([], np.int64), np.array([], np.int64), np.arange(3))
    probabilities = np.zeros((9, 3), dtype=np.float32)
    probabilities[6:] = [[0.1, 0.0, 0.9], [0.5, 0.1, 0.4], [0.95, 0.0, 0.05]]
    candidates = maybe_rare(cache, split, probabilities)
    assert [(c.row, c.label, c.suggested) for c in candidates] == [(7, -1, 2), (6, -1, 2)]


def test_a_fit_that_diverges_is_reported(noisy):
    cache = noisy[1]
    config = FitConfig(**{**QUICK, "lr": 1e38, "weight_decay": 1e3})
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    with pytest.raises(InputError, match="diverged"):
        cross_validate(cache, config, split)
