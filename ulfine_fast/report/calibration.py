"""The section about calibration: reliability diagrams before and after temperature scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ulfine_fast.metrics.calibration import Reliability, raw_confidence, reliability
from ulfine_fast.report.charts import reliability_chart
from ulfine_fast.report.formats import percent
from ulfine_fast.report.groups import Group
from ulfine_fast.runs.files import Predictions


def calibration_section(shown: Group, predictions: Sequence[Predictions]) -> dict[str, Any]:
    """Template values: a diagram and a table each, two where every run has a temperature and one of them is not 1.

    Args:
        shown: the group.
        predictions: the test rows of its runs.
    """
    saved = pooled_reliability(predictions)
    diagrams = [("as predicted", saved)]
    temperatures = [run.number("temperature") for run in shown.runs]
    if all(math.isfinite(t) and t > 0 for t in temperatures) and any(t != 1 for t in temperatures):
        raw = pooled_reliability(predictions, temperatures)
        diagrams = [("before temperature scaling", raw), ("after temperature scaling", saved)]

    tables = []
    for title, bins in diagrams:
        n = len(bins.count)
        table = [
            {
                "range": f"{100 * i / n:.1f}–{100 * (i + 1) / n:.1f}",
                "rows": f"{bins.count[i]:,}",
                "confidence": percent(float(bins.confidence[i])),
                "accuracy": percent(float(bins.accuracy[i])),
            }
            for i in range(n)
            if bins.count[i]
        ]
        tables.append((title, table))

    # the lowest and the highest temperature, once if they are equal as printed; one throughout is none
    known = sorted(t for t in temperatures if math.isfinite(t)) if any(t != 1 for t in temperatures) else []
    ends = dict.fromkeys(f"{t:.2f}" for t in (known[0], known[-1])) if known else ()
    return {
        "charts": [reliability_chart(f"{title}: ECE {percent(bins.ece)}%", bins) for title, bins in diagrams],
        "tables": tables,
        "rows": int(saved.count.sum()),
        "temperature": "–".join(ends),
    }


def pooled_reliability(predictions: Sequence[Predictions], temperatures: Sequence[float] | None = None) -> Reliability:
    """Bins over the test rows of several runs together, without rows of unknown label.

    Args:
        predictions: the runs' test rows.
        temperatures: one a run, to undo its scaling; None takes the confidences as saved.
    """
    confidence, correct = [], []
    for i, rows in enumerate(predictions):
        known = rows.labels >= 0
        values = rows.confidence if temperatures is None else raw_confidence(rows.probabilities, temperatures[i])
        confidence.append(values[known])
        correct.append((rows.labels == rows.predicted)[known])
    return reliability(np.concatenate(confidence), np.concatenate(correct))
