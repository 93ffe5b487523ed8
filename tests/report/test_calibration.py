from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.report.writer import slow_ece, softmax
from ulfine_fast.report.calibration import pooled_reliability
from ulfine_fast.runs.files import Predictions, load_run


def rows_of(logits: np.ndarray, labels: np.ndarray) -> Predictions:
    probabilities = softmax(logits).astype(np.float32)
    ids = [str(i) for i in range(len(labels))]
    return Predictions(ids, labels, logits.argmax(1), probabilities.max(1).astype(np.float64), probabilities)


def test_both_errors_are_those_the_run_wrote(single: Path) -> None:
    written = json.loads((single / "metrics.json").read_text())
    rows = load_run(single).predictions()
    assert pooled_reliability([rows]).ece == pytest.approx(written["ece_temperature_scaled"], abs=1e-6)
    assert pooled_reliability([rows], [written["temperature"]]).ece == pytest.approx(written["ece"], abs=1e-5)


def test_several_runs_are_taken_together_without_unknown_labels() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (30, 4))
    labels = np.arange(30) % 4
    labels[:10] = -1
    rows = rows_of(logits, labels)
    bins = pooled_reliability([rows, rows])
    assert bins.count.sum() == 40
    known = labels >= 0
    wanted = slow_ece(rows.confidence[known].tolist(), (rows.predicted == labels)[known].tolist())
    assert bins.ece == pytest.approx(wanted)
