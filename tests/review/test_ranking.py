"""Which images come first: on worlds where it is known which labels are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, FitConfig
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.neighbors import Duplicates, near_duplicates
from ulfine_fast.data.splits import Split, draw_split
from ulfine_fast.review.ranking import candidates, doubtful, judge, rare, twins

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
def judged(noisy):
    cache = noisy[1]
    config = FitConfig(**QUICK)
    return judge(cache, config, draw_split(cache.labels, cache.splits, cache.class_names, config))


def test_wrong_labels_come_first_with_the_right_class(noisy, judged):
    right, cache, hit = noisy
    found = [one for one in candidates(cache, judged, near_duplicates(cache)) if one.kind == "doubt"]
    first = [one for one in found[:10] if one.row in hit]
    assert len(first) >= 8
    assert all(one.suggested == right.labels[one.row] != one.given for one in first)


def test_a_label_is_judged_by_heads_that_did_not_see_it(noisy, judged):
    """The heads of the whole fit are surer of wrong labels than those that never saw them."""
    cache, rows = noisy[1], np.array(sorted(noisy[2]))
    seen = judged.run.predict_proba(cache.plain[rows])
    given = cache.labels[rows]
    assert (judged.probabilities[rows, given] < seen[np.arange(len(rows)), given]).mean() >= 0.8
    assert judged.split.labeled.tolist() == sorted(judged.split.labeled.tolist())


def test_what_is_held_out_for_the_test_is_not_shown(noisy, judged):
    cache = noisy[1]
    shown = {one.row for one in candidates(cache, judged, near_duplicates(cache))}
    assert not shown & set(judged.split.test.tolist())


def test_a_lone_label_is_judged_by_nobody():
    cache = make_clusters(classes=3, noise=0.4)
    train = np.flatnonzero(cache.splits == "train")
    labeled = np.concatenate(
        [train[cache.labels[train] == 0][:1], *(train[cache.labels[train] == k][:5] for k in (1, 2))]
    )
    unlabeled = np.setdiff1d(train, labeled)
    split = Split(
        np.sort(labeled), unlabeled, np.array([], np.int64), np.flatnonzero(cache.splits == "test"), np.arange(3)
    )
    found = judge(cache, FitConfig(**QUICK), split)
    assert np.isnan(found.probabilities).any(1).nonzero()[0].tolist() == labeled[:1].tolist()
    assert labeled[0] not in {one.row for one in doubtful(cache.labels, found.probabilities)}


def test_doubt_is_by_how_far_another_class_is_ahead():
    probabilities = np.array([[0.5, 0.4, 0.1], [0.1, 0.0, 0.9], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1]], dtype=np.float32)
    found = doubtful(np.array([1, 1, 0, -1]), probabilities)
    assert [(one.row, one.given, one.suggested) for one in found] == [(1, 1, 2), (0, 1, 0)]
    assert found[0].probability == pytest.approx(0.9)


def test_of_twins_the_less_likely_label_is_asked_about():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [np.nan, np.nan], [0.5, 0.5]], dtype=np.float32)
    given = np.array([0, 1, -1, 0, 1])
    found = twins(given, probabilities, duplicates([(0, 1, 0.98), (0, 2, 0.99), (0, 3, 1.0), (3, 4, 0.99)]))
    assert [(one.row, one.twin, one.suggested) for one in found] == [(4, 3, 0), (1, 0, 0)]


def test_rare_classes_take_turns_and_the_unsure_come_first():
    cache = FeatureCache.from_arrays(
        np.eye(9),
        [0] * 3 + [1] * 2 + [2] + [-1] * 3,
        class_names=["a", "b", "c"],
        splits=["train"] * 6 + ["unlabeled"] * 3,
    )
    split = Split(np.arange(6), np.arange(6, 9), np.array([], np.int64), np.array([], np.int64), np.arange(3))
    probabilities = np.zeros((9, 3), dtype=np.float32)
    probabilities[6:] = [[0.1, 0.0, 0.9], [0.5, 0.1, 0.4], [0.95, 0.0, 0.05]]
    found = rare(cache, type("Judged", (), {"split": split, "probabilities": probabilities}))
    assert [(one.row, one.given, one.suggested) for one in found] == [(7, -1, 2), (6, -1, 2)]


def test_a_fit_that_diverges_says_so(noisy):
    cache = noisy[1]
    config = FitConfig(**{**QUICK, "lr": 1e38, "weight_decay": 1e3})
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    with pytest.raises(InputError, match="diverged"):
        judge(cache, config, split)
