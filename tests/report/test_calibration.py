from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ulfine_fast.report.calibration import pooled, raw_confidence, reliability
from ulfine_fast.report.load import Predictions, load_run

from .writer import slow_ece, softmax


def rows_of(logits: np.ndarray, labels: np.ndarray) -> Predictions:
    probabilities = softmax(logits).astype(np.float32)
    ids = [str(i) for i in range(len(labels))]
    return Predictions(ids, labels, logits.argmax(1), probabilities.max(1).astype(np.float64), probabilities)


@pytest.mark.parametrize("seed", range(5))
def test_ece_equals_the_slow_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence, right = rng.random(400), rng.random(400) < 0.6
    assert reliability(confidence, right).ece == pytest.approx(slow_ece(confidence.tolist(), right.tolist()), abs=1e-12)


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


def test_both_errors_are_those_the_run_wrote(single: Path) -> None:
    written = json.loads((single / "metrics.json").read_text())
    rows = load_run(single).predictions()
    assert pooled([rows]).ece == pytest.approx(written["ece_temperature_scaled"], abs=1e-6)
    assert pooled([rows], [written["temperature"]]).ece == pytest.approx(written["ece"], abs=1e-5)


def test_several_runs_are_taken_together_without_unknown_labels() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (30, 4))
    labels = np.arange(30) % 4
    labels[:10] = -1
    rows = rows_of(logits, labels)
    bins = pooled([rows, rows])
    assert bins.count.sum() == 40
    known = labels >= 0
    wanted = slow_ece(rows.confidence[known].tolist(), (rows.predicted == labels)[known].tolist())
    assert bins.ece == pytest.approx(wanted)
