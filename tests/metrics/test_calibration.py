from __future__ import annotations

import numpy as np
import pytest

from tests.metrics.test_classification import draws
from ulfine_fast.metrics.calibration import fit_temperature, raw_confidence, reliability
from ulfine_fast.metrics.classification import softmax


def slow_ece(probabilities, labels, bins):
    """Bins one after the other, rows by comparison."""
    total = 0.0
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.sum() * abs(confidence[inside].mean() - right[inside].mean())
    return total / len(labels)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_equals_the_slow_one(bins):
    logits, labels = draws(seed=1)
    probabilities = softmax(logits)
    error = reliability(probabilities.max(1), probabilities.argmax(1) == labels, bins).ece
    assert error == pytest.approx(slow_ece(probabilities, labels, bins))


def test_certain_and_right_is_calibrated_certain_and_wrong_is_not():
    certain = np.eye(2)
    assert reliability(certain.max(1), np.array([True, True])).ece == 0
    assert reliability(certain.max(1), np.array([False, False])).ece == 1


def test_the_temperature_undoes_a_known_scale():
    random = np.random.default_rng(0)
    logits = random.normal(size=(20_000, 4))
    labels = np.array([random.choice(4, p=row) for row in softmax(logits)])
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)
    assert fit_temperature(0.5 * logits, labels) == pytest.approx(0.5, rel=0.05)


def test_the_temperature_stays_one_on_too_few_rows_and_in_its_range():
    logits, labels = np.eye(3)[[0, 1, 2] * 10] * 50, np.array([0, 1, 2] * 10)
    assert fit_temperature(logits[:19], labels[:19]) == 1
    assert 0.2 <= fit_temperature(logits, labels) <= 5


def test_bins_equal_a_slow_reference() -> None:
    rng = np.random.default_rng(7)
    confidence, right = rng.random(300) ** 0.3, rng.random(300) < 0.7
    bins = reliability(confidence, right)
    for i in range(15):
        inside = [j for j in range(300) if i / 15 < confidence[j] <= (i + 1) / 15]
        assert bins.count[i] == len(inside)
        if inside:
            assert bins.accuracy[i] == pytest.approx(sum(right[j] for j in inside) / len(inside))
            assert bins.confidence[i] == pytest.approx(sum(confidence[j] for j in inside) / len(inside))
        else:
            assert np.isnan(bins.accuracy[i])


def test_edges_belong_to_the_lower_bin() -> None:
    bins = reliability(np.array([0.0, 0.5, 1.0]), np.array([True, True, True]), bins=2)
    assert bins.count.tolist() == [2, 1]


def test_no_rows_have_no_error() -> None:
    assert reliability(np.empty(0), np.empty(0, dtype=bool)).ece == 0.0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_scaling_can_be_undone(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (50, 7))
    saved = softmax(logits / temperature)
    np.testing.assert_allclose(raw_confidence(saved, temperature), softmax(logits).max(axis=1), rtol=1e-9)


def test_classes_that_underflow_do_no_harm() -> None:
    saved = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(raw_confidence(saved, 4.0), [1.0, 0.5])
