from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score

from ulfine_fast.metrics import classification as metrics


def draws(rows=400, classes=6, seed=0):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, classes)) * 2
    labels = random.integers(0, classes, rows)
    # half of the rows are made right, so that no metric is trivial
    logits[np.arange(rows // 2), labels[: rows // 2]] += 4
    return logits, labels


def test_accuracies_equal_scikit_learns():
    logits, labels = draws()
    result = metrics.classification(logits, labels, np.array([500, 90, 60, 20, 19, 3]))
    predicted = logits.argmax(1)
    assert result["accuracy"] == pytest.approx((predicted == labels).mean())
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert result["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    recall = recall_score(labels, predicted, average=None)
    np.testing.assert_allclose(result["per_class_accuracy"], recall)
    assert result["worst_class"] == pytest.approx(recall.min())
    assert result["many"] == pytest.approx(recall[:2].mean())
    assert result["few"] == pytest.approx(recall[4:].mean())
    assert result["many_shot"] == pytest.approx(recall[0])
    assert result["medium_shot"] == pytest.approx(recall[1:4].mean())
    assert result["few_shot"] == pytest.approx(recall[4:].mean())


def test_metrics_without_rows_are_none_not_zero():
    result = metrics.classification(np.eye(3), np.array([0, 0, 1]), np.array([5, 5, 5]))
    assert result["per_class_accuracy"] == [0.5, 0.0, None]
    assert result["many_shot"] is None
    assert result["balanced_accuracy"] == pytest.approx(0.25)
    assert metrics.classification(np.zeros((0, 3)), np.zeros(0, dtype=int), np.ones(3, dtype=int)) == {}


def test_thirds_of_ten_classes_are_four_three_three():
    counts = np.array([1, 10, 9, 8, 7, 6, 5, 4, 3, 2])
    many, medium, few = metrics.rank_thirds(counts)
    assert many.tolist() == [1, 2, 3, 4]
    assert medium.tolist() == [5, 6, 7]
    assert few.tolist() == [8, 9, 0]


def test_softmax_survives_large_logits():
    np.testing.assert_allclose(metrics.softmax(np.array([[1e4, 0.0], [0.0, 0.0]])), [[1, 0], [0.5, 0.5]])


def test_pseudo_label_health_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.05, 0.95]])
    labels = np.array([0, 1, 1, 0, -1])
    result = metrics.pseudo_label_health(probabilities, labels, 0.7, 2)
    assert result["pseudo_label_rate"] == pytest.approx(4 / 5)
    assert result["pseudo_label_precision"] == pytest.approx(2 / 3)
    assert result["confidence_on_false"] == pytest.approx(0.8)
    assert result["per_class_pseudo_label_rate"] == pytest.approx([2 / 5, 2 / 5])
    assert result["per_class_pseudo_label_precision"] == pytest.approx([1 / 2, 1])
    assert result["per_class_pseudo_label_recall"] == pytest.approx([1 / 2, 1 / 2])


def test_health_when_none_passes_or_no_label_is_known():
    probabilities = np.full((4, 2), 0.5)
    none = metrics.pseudo_label_health(probabilities, np.array([0, 1, 0, 1]), 0.9, 2)
    assert none["pseudo_label_rate"] == 0
    assert none["pseudo_label_precision"] is None
    assert none["per_class_pseudo_label_precision"] == [None, None]
    assert none["per_class_pseudo_label_recall"] == [0, 0]
    unknown = metrics.pseudo_label_health(probabilities, np.full(4, -1), 0.5, 2)
    assert unknown["pseudo_label_rate"] == 1
    assert unknown["pseudo_label_precision"] is None
    assert unknown["confidence_on_false"] is None
