"""Rungs, brackets and the best third."""

from __future__ import annotations

from collections import Counter

import pytest

from ulfine_fast import InputError
from ulfine_fast.search.objective import check_metrics, direction, mean_metrics, sign
from ulfine_fast.search.pruning import bracket, check_pruning, outside_best_third, rungs


def test_rungs_are_evaluations_at_a_27th_a_9th_and_a_third():
    assert rungs(270, 10) == [10, 30, 90]
    assert rungs(500, 50) == [50, 100, 200]
    assert rungs(100, 50) == [50]
    assert rungs(10, 50) == []


def test_the_best_third_continues_and_equals_stay_together():
    assert outside_best_third({1: 0.1, 2: 0.5, 3: 0.3}) == {1, 3}
    assert outside_best_third({7: 0.2}) == set()
    assert outside_best_third({1: 0.5, 2: 0.5, 3: 0.5, 4: 0.1}) == {4}
    assert outside_best_third({n: n / 10 for n in range(9)}) == set(range(6))


def test_brackets():
    assert {bracket(n, "halving", 3) for n in range(20)} == {0}
    counts = Counter(bracket(n, "hyperband", 3) for n in range(1000))
    # 27 / 4, 9 / 3, 3 / 2 and 1, as fractions of their sum
    assert [counts[s] for s in range(4)] == pytest.approx([551, 245, 122, 82], abs=3)


def test_pruning_that_cannot_compare_is_refused():
    for arguments, words in {
        ("early", ("few",), False): "pruning must be one of none, halving, hyperband, got 'early'",
        ("halving", ("accuracy", "ece"), False): "pruning needs a single metric, got accuracy, ece",
        ("halving", ("few",), False): "pruning judges by accuracy or balanced_accuracy, got metric few",
        ("hyperband", ("accuracy",), True): "pruning compares trials at equal steps",
    }.items():
        with pytest.raises(InputError, match=words):
            check_pruning(*arguments)
    check_pruning("none", ("few", "ece"), True)


def test_metrics_and_their_directions():
    assert check_metrics(["few", "ece"]) == ("few", "ece")
    assert (direction("few"), direction("ece"), sign("few"), sign("ece")) == ("maximize", "minimize", 1, -1)
    for arguments, words in {
        (): "a sweep needs a metric",
        ("f1",): "got 'f1'",
        ("few", "few"): "few is given twice",
    }.items():
        with pytest.raises(InputError, match=words):
            check_metrics(arguments)


def test_metrics_are_means_over_seeds():
    assert mean_metrics([{"few": 0.2, "ece": 0.1}, {"few": 0.4, "ece": 0.3}], ["few", "ece"]) == pytest.approx(
        [0.3, 0.2]
    )
    assert mean_metrics([{"few": 0.2}, {"few": None}], ["few"]) is None
    assert mean_metrics([{}], ["few"]) is None
