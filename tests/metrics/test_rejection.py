"""Thresholds of rejection and of prediction sets: against counting by hand, and their promise by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ulfine_fast.metrics.rejection import (
    balanced_weights,
    exclusion_threshold,
    least_rows,
    rejection_threshold,
    set_thresholds,
)


def slow_is_excluded(score, scores, rate, weights):
    """The p-value of a new score, term by term: it counts itself, as heavy as the heaviest."""
    new = max(weights)
    below = new + sum(weight for other, weight in zip(scores, weights, strict=True) if other <= score)
    return below / (sum(weights) + new) <= rate + 1e-12


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rate", [0.02, 0.1, 1 - 0.9, 0.25, 0.5, 0.97])
@pytest.mark.parametrize("rows", [1, 3, 9, 10, 40])
def test_what_is_excluded_is_what_counting_excludes(rows, rate, weighted):
    random = np.random.default_rng(rows)
    # some equal
    scores = random.integers(0, 12, rows) / 4
    weights = random.uniform(0.2, 3, rows) if weighted else np.ones(rows)
    threshold = exclusion_threshold(scores, rate, weights if weighted else None)
    for score in np.arange(-2, 14) / 4 + 0.001:
        assert (score < threshold) == slow_is_excluded(score, scores, rate, weights), (score, threshold)


def test_without_images_or_with_too_few_nothing_is_excluded():
    assert exclusion_threshold(np.zeros(0), 0.5) == -math.inf
    assert [least_rows(rate) for rate in (0.05, 1 - 0.9, 0.1, 0.5, 0.3)] == [19, 9, 9, 1, 3]
    for rate in (0.05, 1 - 0.9, 0.3):
        least = least_rows(rate)
        assert exclusion_threshold(np.arange(least - 1), rate) == -math.inf
        assert exclusion_threshold(np.arange(least), rate) == 0


def slow_weights(labels, rate):
    """The first m of 1, 2, ... whose weights leave a threshold."""
    counts = {k: list(labels).count(k) for k in labels}
    for least in range(1, len(labels) + 1):
        weights = [1 / max(counts[k], least) for k in labels]
        if max(weights) / (sum(weights) + max(weights)) <= rate / 5 + 1e-12:
            return weights
    return [1.0] * len(labels)


@pytest.mark.parametrize("counts", [[50, 50], [90, 9, 1], [400, 40, 4, 2, 1], [12, 12, 12], [5, 3], [30, 1]])
def test_classes_weigh_the_same_as_far_as_the_rate_allows(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    for rate in (0.05, 0.2):
        weights = balanced_weights(labels, rate)
        expected = np.array(slow_weights(labels.tolist(), rate))
        np.testing.assert_allclose(weights / weights.sum(), expected / expected.sum())
        # what a threshold needs is there wherever equal weights have one
        scores = np.random.default_rng(0).normal(size=len(labels))
        assert math.isfinite(rejection_threshold(scores, labels, rate)) == (len(labels) >= least_rows(rate))
    many = np.repeat(np.arange(3), [400, 40, 20])
    sums = np.bincount(many, weights=balanced_weights(many, 0.1))
    np.testing.assert_allclose(sums, sums[0])


def test_balanced_rejection_keeps_its_rate_where_rare_classes_score_lower():
    random = np.random.default_rng(0)
    counts = np.array([300, 60, 20])
    labels = np.repeat(np.arange(3), counts)
    rates = []
    for _ in range(400):
        threshold = rejection_threshold(random.normal(size=len(labels)) - labels, labels, 0.1)
        # rejected of each class, exactly
        rates.append(np.mean([0.5 * math.erfc(-(threshold + k) / 2**0.5) for k in range(3)]))
    # the mean over draws is at most the rate, and not far below it
    assert 0.08 < np.mean(rates) <= 0.1 + 3 * np.std(rates) / 400**0.5
    # where all rows weigh the same it is exceeded, which is what the weights are for
    plain = [exclusion_threshold(random.normal(size=len(labels)) - labels, 0.1) for _ in range(400)]
    assert np.mean([[0.5 * math.erfc(-(t + k) / 2**0.5) for k in range(3)] for t in plain]) > 0.15


def test_sets_class_by_class_are_those_by_hand():
    # class 0 has rows enough for 0.8, classes 1 and 2 share, class 3 has none
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    own = np.array([0.9, 0.5, 0.7, 0.8, 0.4, 0.2, 0.3, 0.6])
    result = set_thresholds(own, labels, 4, 0.8)
    assert result.threshold.tolist() == [0.5, 0.2, 0.2, -math.inf]
    assert result.rows.tolist() == [4, 2, 2, 0]
    assert result.pooled.tolist() == [False, True, True, False]
    assert result.always.tolist() == [False, False, False, True]
    sets = result.sets(np.array([[0.5, 0.2, 0.19, 0.0], [0.1, 0.1, 0.1, 0.7], [0.49, 0.5, 0.01, 0.0]]))
    assert sets.tolist() == [[True, True, False, True], [False, False, False, True], [False, True, False, True]]


def test_rare_classes_that_are_too_few_together_are_in_every_set():
    result = set_thresholds(np.array([0.9] * 9 + [0.4, 0.2]), np.array([0] * 9 + [1, 2]), 3, 0.9)
    assert result.always.tolist() == [False, True, True]
    assert not result.pooled.any()


def test_sets_cover_every_class_and_the_rare_ones_together():
    random = np.random.default_rng(1)
    counts, classes = [200, 40, 12, 4, 4, 4], 6

    def draw(labels):
        """Probabilities that know frequent classes better."""
        logits = random.normal(size=(len(labels), classes))
        logits[np.arange(len(labels)), labels] += 3 - 0.4 * labels
        odds = np.exp(logits)
        return odds / odds.sum(1, keepdims=True)

    labels, new = np.repeat(np.arange(classes), counts), np.repeat(np.arange(classes), 200)
    covered = []
    for _ in range(100):
        thresholds = set_thresholds(draw(labels)[np.arange(len(labels)), labels], labels, classes, 0.9)
        hit = thresholds.sets(draw(new))[np.arange(len(new)), new]
        covered.append([hit[new == k].mean() for k in range(classes)])
    means = np.mean(covered, axis=0)
    tolerance = 3 * np.std(covered, axis=0) / 10
    assert (means[:3] >= 0.9 - tolerance[:3]).all()
    assert means[3:].mean() >= 0.9 - tolerance[3:].mean()
    assert means[0] < 0.92
