"""What a sweep optimises: metrics on validation, each with its direction, averaged over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.search.choices import Metric

METRICS = tuple(metric.value for metric in Metric)
LOWER_IS_BETTER = ("ece", "ece_temperature_scaled")
HIGHER_IS_BETTER = tuple(name for name in METRICS if name not in LOWER_IS_BETTER)


def check_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics as a tuple.

    Raises:
        InputError: no metric, an unknown one, or one twice.
    """
    if not metrics:
        raise InputError(f"a sweep needs a metric; choose among {', '.join(METRICS)}")
    for i, name in enumerate(metrics):
        if name not in METRICS:
            raise one_of("metric", name, METRICS)
        if name in metrics[:i]:
            raise InputError(f"metric {name} is given twice; name each once")
    return tuple(metrics)


def direction(metric: str) -> Literal["minimize", "maximize"]:
    """Optuna's word for the metric's direction."""
    return "minimize" if metric in LOWER_IS_BETTER else "maximize"


def sign(metric: str) -> int:
    """1 where higher is better, -1 where lower is better."""
    return -1 if metric in LOWER_IS_BETTER else 1


def tell_importance(scores: Sequence[float]) -> bool:
    """Whether trials differ enough to say which settings matter; of each trial its score, higher is better."""
    # the best tenth, at least two, must not be all trials; small validation sets make many equal scores
    tenth = max(2, math.ceil(len(scores) / 10))
    return len(scores) >= 3 and min(scores) < sorted(scores, reverse=True)[tenth - 1]


def mean_metrics(seeds: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[float] | None:
    """Mean of each metric over the validation metrics of several seeds; None where a seed lacks one."""
    rows = [[values.get(name) for name in metrics] for values in seeds]
    if not rows or any(value is None for row in rows for value in row):
        return None
    return [float(value) for value in np.mean(np.asarray(rows, dtype=np.float64), axis=0)]
