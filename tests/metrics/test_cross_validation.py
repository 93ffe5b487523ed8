"""Metrics of cross-validation by hand, and its intervals against known values and simulated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from ulfine_fast.metrics.cross_validation import cross_validated
from ulfine_fast.metrics.intervals import balanced_difference, balanced_interval, fraction_interval

RIGHT, WRONG = [2.0, 0.0, 0.0], [0.0, 2.0, 0.0]


def test_metrics_are_those_of_all_repeats_and_unknown_classes_have_none():
    logits = np.array([[RIGHT, RIGHT, WRONG, RIGHT, [np.nan] * 3], [RIGHT, WRONG, WRONG, WRONG, [np.nan] * 3]])
    labels = np.array([0, 0, 1, 1, 2])
    result = cross_validated(logits, labels, np.array([2, 2, 1]), 2)
    # class 0: 3 of 4 right; class 1: 3 of 4 right; class 2 has one label, which is never held out
    assert result["per_class_accuracy"] == [0.75, 0.75, None]
    assert (result["folds"], result["repeats"], result["rows"]) == (2, 2, 4)
    assert result["balanced_accuracy"] == result["accuracy"] == 0.75
    assert result["per_class_interval"][2] is None
    assert result["per_class_interval"][0] == pytest.approx(fraction_interval(0.75, 1))
    low, high = result["balanced_accuracy_interval"]
    assert 0 < low < 0.75 < high < 1


def test_nothing_held_out_has_no_metrics():
    result = cross_validated(np.empty((0, 2, 2)), np.array([0, 1]), np.array([1, 1]), 0)
    assert (result["rows"], result["per_class_accuracy"], result["per_class_interval"]) == (0, [None] * 2, [None] * 2)
    assert "balanced_accuracy" not in result


def test_a_fraction_has_wilsons_interval():
    known = binomtest(7, 10).proportion_ci(method="wilson")
    assert fraction_interval(0.7, 10) == pytest.approx((known.low, known.high))
    low, high = fraction_interval(1.0, 12)
    assert (high, low) == (1.0, pytest.approx(0.757506, abs=1e-6))


@pytest.mark.parametrize("rows", [[8, 8, 8], [30, 30, 30, 30], [40, 20, 10, 5, 5]])
def test_the_interval_of_a_mean_of_recalls_covers_it(rows):
    random = np.random.default_rng(0)
    recalls = np.array([0.95, 0.6, 0.75, 0.4, 0.9])[: len(rows)]
    draws = random.binomial(rows, recalls, (2000, len(rows))) / rows
    ends = np.array([balanced_interval(draw, np.array(rows), 10) for draw in draws])
    covered = ((ends[:, 0] <= recalls.mean()) & (recalls.mean() <= ends[:, 1])).mean()
    # fixed classifiers: those of cross-validation differ from fold to fold, which the interval allows for
    assert 0.95 <= covered <= 0.985


def test_all_or_none_right_is_no_certainty():
    low, high = balanced_interval(np.array([1.0, 1.0]), np.array([5, 5]), 5)
    assert high > 0.999
    assert low < 0.8
    assert balanced_interval(np.array([0.0, 0.0]), np.array([5, 5]), 5) == pytest.approx((1 - high, 1 - low))


def test_fewer_folds_and_fewer_rows_are_less_certain():
    def width(rows, folds):
        low, high = balanced_interval(np.array([0.5, 0.8]), np.array(rows), folds)
        return high - low

    assert width([20, 20], 10) < width([20, 20], 2) < width([10, 10], 2)


def test_a_difference_in_one_class_has_the_t_interval():
    difference = np.array([1.0, 0.0, 0.0, -1.0, 1.0, 1.0])
    interval = balanced_difference(difference, np.zeros(6, dtype=np.int64))
    assert interval is not None
    low, high = ttest_1samp(difference, 0).confidence_interval(0.95)
    assert (interval.mean - interval.half, interval.mean + interval.half) == pytest.approx((low, high))


def test_a_difference_weighs_classes_alike():
    interval = balanced_difference(np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 0, 0, 2, 2]))
    assert interval is not None
    assert (interval.mean, interval.half, interval.n) == (0.5, 0.0, 6)
    assert balanced_difference(np.array([1.0, 0.0]), np.array([0, 1])) is None
    assert not math.isnan(interval.half)
