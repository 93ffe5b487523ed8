"""The reliability bins of several runs together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ulfine_fast.metrics.calibration import Reliability, raw_confidence, reliability
from ulfine_fast.runs.files import Predictions


def pooled(predictions: Sequence[Predictions], temperatures: Sequence[float] | None = None) -> Reliability:
    """Bins over the test rows of several runs together, rows without a label left out.

    Args:
        predictions: the runs' test rows.
        temperatures: of each run, to undo its scaling; None takes the confidences as they were saved.
    """
    confidence, right = [], []
    for i, rows in enumerate(predictions):
        known = rows.labels >= 0
        chosen = rows.confidence if temperatures is None else raw_confidence(rows.probabilities, temperatures[i])
        confidence.append(chosen[known])
        right.append((rows.labels == rows.predicted)[known])
    return reliability(np.concatenate(confidence), np.concatenate(right))
