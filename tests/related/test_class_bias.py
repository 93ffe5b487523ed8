from __future__ import annotations

import math

import numpy as np
import pytest

from ulfine_fast.related.class_bias.bias import class_bias, compare_bias, correlation

LABELS = np.array([0, 0, 0, 1, 2, 2])


def test_bias_by_hand_whatever_the_number_of_images_of_a_class():
    probabilities = np.array([[0.8, 0.1, 0.1]] * 3 + [[0.5, 0.4, 0.1]] + [[0.3, 0.1, 0.6]] * 2)
    means = [(0.8 + 0.5 + 0.3) / 3, (0.1 + 0.4 + 0.1) / 3, (0.1 + 0.1 + 0.6) / 3]
    np.testing.assert_allclose(class_bias(probabilities, LABELS), np.log(np.array(means) * 3), atol=1e-12)
    np.testing.assert_allclose(class_bias(np.full((6, 3), 1 / 3), LABELS), 0, atol=1e-12)


def test_an_unchanged_classifier_keeps_all_bias_and_drifts_nowhere():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(5), 60)
    comparison = compare_bias(probabilities, probabilities, np.arange(60) % 5, np.arange(1.0, 6.0))
    assert (comparison.bias_correlation, comparison.drift) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert math.isnan(comparison.group_gap)


def test_a_classifier_that_follows_counts_is_comparison():
    counts = np.array([100.0, 30.0, 10.0, 3.0])
    skewed = np.tile(counts / counts.sum(), (40, 1))
    fair = np.random.default_rng(0).dirichlet(np.ones(4), 40)
    comparison = compare_bias(fair, skewed, np.arange(40) % 4, counts)
    assert comparison.count_correlation == pytest.approx(1)
    assert abs(comparison.bias_correlation) < 1
    assert comparison.spread == pytest.approx(np.log(counts).std())
    assert 0 < comparison.drift < 1


def test_gaps_between_groups():
    adapted = np.eye(2)[[0, 0, 1, 1]]
    labels = np.array([0, 0, 1, 0])  # the last one is wrong
    groups = np.array(["day", "day", "night", "night"])
    assert compare_bias(adapted, adapted, labels, np.ones(2), groups).group_gap == 0.5
    assert math.isnan(compare_bias(adapted, adapted, labels, np.ones(2), np.array(["day", "", "", ""])).group_gap)


def test_correlation_of_what_does_not_vary_is_not_a_number():
    assert math.isnan(correlation(np.ones(3), np.arange(3.0)))
    assert math.isnan(correlation(np.array([np.nan, 1, 2]), np.arange(3.0)))
    assert correlation(np.arange(4.0), -np.arange(4.0)) == pytest.approx(-1)
