"""Which images come together, and in which order: on data of which it is known which labels are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import make_clusters
from ulfine_fast import FitConfig
from ulfine_fast.cache.neighbors import Duplicates, near_duplicates
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.review.clusters import Clusters, find_clusters
from ulfine_fast.review.groups import (
    cluster_groups,
    conflicting_duplicates,
    far_from_all,
    likely_wrong,
    make_groups,
    maybe_rare,
)
from ulfine_fast.review.proposals import propose
from ulfine_fast.review.quick import QuickFit, quick_fit

NONE = np.zeros(0, dtype=np.int64)
NAMES = ["a", "b", "c"]


def duplicates(pairs):
    first, second, cosine = (np.array(column) for column in zip(*pairs, strict=True))
    return Duplicates(first, second, cosine, np.full(9, -1), 0.98, True, 1.0)


def fit_of(probabilities, labels, similarity=None):
    rows = np.array(probabilities, dtype=np.float32)
    near = np.ones(len(rows), np.float32) if similarity is None else np.array(similarity, np.float32)
    return QuickFit(rows, near, np.array(labels, np.int64), NONE, NONE, rows.shape[1], 10.0)


def test_likely_wrong_labels_by_the_class_that_they_look_like():
    probabilities = np.array([[0.5, 0.4, 0.1], [0.1, 0.0, 0.9], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1]], dtype=np.float32)
    groups = [group for group in likely_wrong(NAMES, np.array([1, 1, 0, -1]), probabilities) if len(group.rows)]
    assert [(group.name, group.rows.tolist(), group.suggested.tolist()) for group in groups] == [
        ("a", [0], [0]),
        ("c", [1], [2]),
    ]


def test_the_clearest_wrong_label_comes_first():
    right = make_clusters(noise=0.4, text_noise=0.3)
    train = np.flatnonzero(right.splits == "train")
    hit = np.random.default_rng(3).permutation(train)[:10]
    wrong = right.labels.copy()
    wrong[hit] = (wrong[hit] + 1) % 4
    cache = right.with_labels(wrong)
    fit = quick_fit(cache, train, NONE)
    groups = list(likely_wrong(cache.class_names, fit.labels, fit.probabilities))
    first = {int(row) for group in groups for row in group.rows[:4]}
    assert len(first & set(hit.tolist())) >= 8
    for group in groups:
        for row, suggested in zip(group.rows, group.suggested, strict=True):
            assert row not in hit or suggested == right.labels[row]


def test_of_two_duplicates_the_less_likely_label_is_shown():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [np.nan, np.nan], [0.5, 0.5]], dtype=np.float32)
    labels = np.array([0, 1, -1, 0, 1])
    pairs = duplicates([(0, 1, 0.98), (0, 2, 0.99), (0, 3, 1.0), (3, 4, 0.99)])
    group = conflicting_duplicates(labels, probabilities, pairs)
    assert group.rows.tolist() == [4, 1]
    assert group.duplicates.tolist() == [3, 0]
    assert group.suggested.tolist() == [0, 0]


def test_rare_classes_are_the_third_with_fewest_labels():
    fit = fit_of([[0.3, 0.3, 0.4]] * 3 + [[0.1, 0.0, 0.9], [0.5, 0.1, 0.4], [0.95, 0.0, 0.05]], [0, 0, 1, -1, -1, -1])
    groups = list(maybe_rare(NAMES, fit, np.array([3, 4, 5])))
    assert [(group.name, group.rows.tolist()) for group in groups] == [("c", [3, 4])]


def test_images_far_from_all_classes():
    near = np.linspace(0.5, 0.9, 100)
    fit = fit_of([[1, 0]] * 103, [0] * 100 + [-1] * 3, [*near, 0.45, 0.6, 0.3])
    group = far_from_all(fit, np.array([100, 101, 102]))
    assert group.rows.tolist() == [102, 100]
    assert group.suggested.tolist() == [-1, -1]


def test_clusters_come_by_class_and_most_typical_first():
    fit = fit_of([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.6, 0.4], [0.2, 0.8]], [-1] * 5)
    clusters = Clusters(np.array([2, 2, 0, 1, 0]), np.array([0.5, 0.9, 0.3, 1.0, 0.8], np.float32), 3, of_classes=False)
    groups = list(cluster_groups(["a", "b"], fit, np.arange(5), clusters))
    assert [(group.name, group.rows.tolist()) for group in groups] == [("a 1", [1, 0]), ("a 2", [3]), ("b 1", [4, 2])]
    # answered images are gone
    groups = list(cluster_groups(["a", "b"], fit, np.array([0, 4]), clusters))
    assert [group.rows.tolist() for group in groups] == [[0], [4]]


@pytest.mark.parametrize("method", ["ulfine_plus", "linear_probe"])
def test_clusters_are_mostly_of_one_class(clusters, quick, method):
    """Those of ulfine_plus are its classes, those of other methods come from k-means."""
    [run] = fit_many(clusters, [quick(method=method)])
    assigned = find_clusters(run, clusters.plain, clusters.plain)
    assert assigned.of_classes == (method == "ulfine_plus")
    assert len(assigned.number) == len(clusters)
    assert set(assigned.number) <= set(range(assigned.count))
    purity = [np.bincount(clusters.labels[assigned.number == k]).max() for k in np.unique(assigned.number)]
    assert sum(purity) / len(clusters) > 0.7


def test_test_images_and_answered_ones_are_in_no_group():
    cache = make_clusters(noise=0.9)
    train = np.flatnonzero(cache.splits == "train")
    labeled, pool = train[::3], np.setdiff1d(train, train[::3])
    fit = quick_fit(cache, labeled, NONE)
    [run] = fit_many(cache, [FitConfig(method="linear_probe", steps=5, eval_every=5)])
    clusters = find_clusters(run, cache.plain, cache.plain)
    answered = labeled[:10]
    groups = make_groups(
        cache.class_names,
        fit,
        pool,
        answered,
        clusters,
        near_duplicates(cache),
        propose(cache.plain, fit, pool),
    )
    shown = {int(row) for of_tab in groups.values() for group in of_tab for row in group.rows}
    assert shown
    assert shown <= set(train.tolist()) - set(answered.tolist())
    assert {int(row) for group in groups["cluster"] for row in group.rows} == set(pool.tolist())
    assert all(len(group.rows) for of_tab in groups.values() for group in of_tab)
