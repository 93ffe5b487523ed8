"""What held-out labels say: unknown classes, intervals that cover, changes on the same labels, expected gains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ulfine_fast.review.estimates import change, estimate, expected_gain, gain_per_label
from ulfine_fast.review.quick import QuickFit


def make_fit(labels, predicted, classes=3, sure=0.8):
    """A fit that predicts these classes for labelled rows; None for the only label of a class."""
    probabilities = np.full((len(labels), classes), (1 - sure) / (classes - 1), dtype=np.float32)
    for row, k in enumerate(predicted):
        probabilities[row] = np.nan if k is None else probabilities[row]
        if k is not None:
            probabilities[row, k] = sure
    empty = np.zeros(0, dtype=np.int64)
    return QuickFit(
        probabilities, np.ones(len(labels), np.float32), np.array(labels, np.int64), empty, empty, classes, 10.0
    )


def test_one_label_is_unknown_and_not_zero():
    measured = estimate(make_fit([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, None]))
    assert measured.known.tolist() == [True, True, False]
    np.testing.assert_allclose(measured.accuracy, [2 / 3, 1, np.nan])
    assert np.isnan([measured.low[2], measured.high[2]]).all()
    assert measured.balanced.value == pytest.approx(5 / 6)
    assert measured.balanced.labels == 5


def test_nothing_is_known_of_single_labels():
    measured = estimate(make_fit([0, 1, 2], [None] * 3))
    assert measured.balanced is None
    assert np.isnan(measured.accuracy).all()


def test_two_right_labels_do_not_make_a_class_certain():
    measured = estimate(make_fit([0, 0, *[1] * 20, *[2] * 20], [0, 0, *[1] * 15, *[0] * 5, *[2] * 20]))
    assert measured.high[0] == measured.accuracy[0] == 1
    assert measured.low[0] < 0.7
    assert measured.low[2] > 0.75


@pytest.mark.parametrize("labels", [4, 10, 40])
def test_the_interval_covers_the_truth(labels):
    """Of labels that are right with known probabilities, rarely outside."""
    random = np.random.default_rng(labels)
    truth = np.array([0.95, 0.8, 0.7, 0.9, 0.6])
    covered = []
    for _ in range(200):
        right = random.random((5, labels)) < truth[:, None]
        predicted = [k if right[k, i] else (k + 1) % 5 for k in range(5) for i in range(labels)]
        balanced = estimate(make_fit(np.repeat(np.arange(5), labels).tolist(), predicted, classes=5)).balanced
        covered.append(balanced.low <= truth.mean() <= balanced.high)
    assert 0.88 <= np.mean(covered) < 1


def test_a_change_is_measured_on_labels_of_both():
    before = make_fit([0] * 4 + [1] * 4 + [2] * 4 + [-1] * 6, [0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 0, 0] + [0] * 6)
    # all of them right, and six new labels that are wrong
    after = make_fit([0] * 4 + [1] * 4 + [2] * 4 + [1] * 6, [0] * 4 + [1] * 4 + [2] * 4 + [0] * 6)
    changed = change(before, after)
    assert (changed.value, changed.labels) == (pytest.approx(0.5), 12)
    assert changed.low < 0.5 < changed.high
    # a label that was corrected in between is not compared
    corrected = replace(after, labels=np.where(np.arange(18) == 0, 1, after.labels))
    assert change(before, corrected).labels == 11
    assert change(before, make_fit([-1] * 18, [0] * 18)) is None


def test_rare_and_bad_classes_gain_most():
    labels = [0] * 20 + [1] * 20 + [2] * 2
    same = make_fit(labels, labels)
    assert gain_per_label(same).argmax() == 2
    bad = make_fit(labels, [0] * 20 + [0] * 20 + [2] * 2)
    assert gain_per_label(bad)[1] > 5 * gain_per_label(bad)[0]
    gains = gain_per_label(bad)
    assert 0 < expected_gain(bad, np.array([0.0, 1, 0])) == pytest.approx(gains[1])
    # labels bring less and less
    assert gains[1] < expected_gain(bad, np.array([0.0, 10, 0])) < 10 * gains[1]
