from __future__ import annotations

import numpy as np

from ulfine_fast.report.confusion import ClassPair, confusion_matrix, count_pairs, most_confused
from ulfine_fast.runs.files import Predictions


def rows(labels: list[int], predicted: list[int]) -> Predictions:
    n = len(labels)
    return Predictions([str(i) for i in range(n)], np.array(labels), np.array(predicted), np.ones(n), np.ones((n, 3)))


def test_pairs_are_counted_over_runs() -> None:
    pairs = count_pairs([rows([0, 0, 1, -1], [0, 1, 1, 2]), rows([0, 0, 2], [1, 0, 0])], 3)
    assert pairs == [ClassPair(0, 0, 2, 0.5), ClassPair(0, 1, 2, 0.5), ClassPair(1, 1, 1, 1.0), ClassPair(2, 0, 1, 1.0)]


def test_matrix_equals_a_slow_count() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    matrix = confusion_matrix(count_pairs([rows(labels.tolist(), predicted.tolist())], 5), 5)
    for t in range(5):
        for p in range(5):
            wanted = sum((labels == t) & (predicted == p)) / sum(labels == t)
            assert abs(matrix[t, p] - wanted) < 1e-12
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)


def test_a_class_without_rows_has_an_empty_row() -> None:
    assert confusion_matrix(count_pairs([rows([0, 0], [0, 2])], 3), 3).sum(axis=1).tolist() == [1.0, 0.0, 0.0]


def test_most_confused_are_sorted_by_fraction_then_count() -> None:
    pairs = [ClassPair(0, 0, 9, 0.9), ClassPair(0, 1, 1, 0.1), ClassPair(1, 0, 2, 0.4), ClassPair(2, 0, 4, 0.4)]
    assert most_confused(pairs, 2) == [ClassPair(2, 0, 4, 0.4), ClassPair(1, 0, 2, 0.4)]


def test_many_thousand_classes_need_no_matrix() -> None:
    pairs = count_pairs([rows([49_999, 3], [0, 3])], 50_000)
    assert [(p.true, p.predicted) for p in pairs] == [(3, 3), (49_999, 0)]


def test_no_labelled_rows() -> None:
    assert count_pairs([rows([-1, -1], [0, 1])], 3) == []
