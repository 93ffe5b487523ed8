from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from ulfine_fast.related.multilabel.metrics import average_precision, multilabel_metrics


def test_a_case_by_hand():
    precision = average_precision(np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False]))
    assert precision == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(average_precision(np.array([0.5]), np.array([True])))
    assert np.isnan(average_precision(np.array([0.5]), np.array([False])))


def test_as_scikit_learn_has_it_with_ties():
    random = np.random.default_rng(0)
    for _ in range(20):
        scores, present = random.integers(0, 6, 30) / 6, random.random(30) < 0.3
        assert average_precision(scores, present) == pytest.approx(average_precision_score(present, scores))


def test_groups_and_unknown_labels():
    labels = np.array([[1, 1, 1], [0, 0, 1], [-1, 1, 1]], dtype=np.int8)
    scores = np.array([[0.9, 0.2, 0.5], [0.1, 0.8, 0.5], [0.95, 0.1, 0.5]])
    metrics = multilabel_metrics(scores, labels, np.array([5, 200, 50]))
    # the unknown label of the first class would lower its image's precision to one half
    assert metrics["per_class_ap"] == [1.0, pytest.approx((1 / 2 + 2 / 3) / 2), None]
    assert metrics["map"] == pytest.approx((1 + 7 / 12) / 2)
    assert (metrics["many"], metrics["medium"], metrics["few"]) == (pytest.approx(7 / 12), None, 1.0)
    assert (metrics["many_shot"], metrics["few_shot"], metrics["medium_shot"]) == (pytest.approx(7 / 12), 1.0, None)
