"""The quick fit: what it predicts, and that a label is predicted by probes that did not see it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import make_clusters
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.review.quick import quick_fit

NONE = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="module")
def noisy():
    """Four well separated classes, ten labels of which are wrong; the right labels, the cache, and the wrong rows."""
    right = make_clusters(noise=0.4, text_noise=0.3)
    train = np.flatnonzero(right.splits == "train")
    hit = np.random.default_rng(3).permutation(train)[:10]
    wrong = right.labels.copy()
    wrong[hit] = (wrong[hit] + 1) % 4
    return right.labels, right.with_labels(wrong), np.sort(hit), train


def test_unlabelled_images_are_predicted():
    cache = make_clusters(noise=0.4, text_noise=0.3)
    train = np.flatnonzero(cache.splits == "train")
    fit = quick_fit(cache, train[::6], train[1::6])
    test = cache.splits == "test"
    assert (fit.probabilities[test].argmax(1) == cache.labels[test]).mean() > 0.95
    np.testing.assert_allclose(fit.probabilities.sum(1), 1, atol=1e-5)
    assert fit.counts.tolist() == [10] * 4
    rows, labels = fit.held_out()
    assert sorted(rows) == sorted([*train[::6], *train[1::6]])
    np.testing.assert_array_equal(labels, cache.labels[rows])


def test_a_label_is_predicted_by_probes_that_did_not_see_it(noisy):
    """With the label the probes learn it by heart; without it they find the right class."""
    right, cache, hit, train = noisy
    fit = quick_fit(cache, train, NONE)
    assert (fit.probabilities[hit].argmax(1) == right[hit]).sum() >= 9
    assert (fit.labels[hit] == cache.labels[hit]).all()
    # a row's own label changes nothing in its prediction
    other = cache.labels.copy()
    other[hit[0]] = (other[hit[0]] + 2) % 4
    again = quick_fit(cache.with_labels(other), train, NONE)
    assert again.probabilities[hit[0]].argmax() == right[hit[0]]


def test_the_only_label_of_a_class_has_no_prediction():
    cache = make_clusters(classes=3, noise=0.4)
    train = np.flatnonzero(cache.splits == "train")
    labeled = np.sort(np.concatenate([train[cache.labels[train] == k][:count] for k, count in enumerate((1, 5, 5))]))
    fit = quick_fit(cache, labeled, NONE)
    alone = labeled[cache.labels[labeled] == 0]
    assert np.isnan(fit.probabilities).any(1).nonzero()[0].tolist() == alone.tolist()
    assert alone[0] not in fit.held_out()[0]


def test_without_texts_it_begins_with_the_labelled_images():
    cache = make_clusters(noise=0.4, text=False)
    train = np.flatnonzero(cache.splits == "train")
    fit = quick_fit(cache, train[::6], NONE)
    test = cache.splits == "test"
    assert (fit.probabilities[test].argmax(1) == cache.labels[test]).mean() > 0.95


def test_the_scale_of_an_earlier_fit_is_kept(noisy):
    _, cache, _, train = noisy
    fit = quick_fit(cache, train, NONE)
    again = quick_fit(cache, train, NONE, fit.scale)
    assert again.scale == fit.scale
    np.testing.assert_allclose(again.probabilities, fit.probabilities, atol=1e-5)
    assert quick_fit(cache, train, NONE, 5.0).scale == 5.0


def test_without_texts_too():
    """Features that say nothing of the labels: a probe that knew the held-out ones would be better than chance."""
    features = np.random.default_rng(0).standard_normal((16, 1024)).astype(np.float32)
    cache = FeatureCache.from_arrays(features, np.arange(16) % 4, splits=["train"] * 16)
    fit = quick_fit(cache, np.arange(16), NONE, scale=10.0)
    assert fit.probabilities[np.arange(16), cache.labels].mean() < 0.3
