"""What a sweep wants: figures on validation, each with its direction, averaged over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ulfine_fast.cache.io.errors import InputError

LARGER = (
    "accuracy",
    "balanced_accuracy",
    "many",
    "medium",
    "few",
    "many_shot",
    "medium_shot",
    "few_shot",
    "worst_class",
    "macro_f1",
)
"""Figures of :func:`ulfine_fast.metrics.classification.classification` of which more is better."""

SMALLER = ("ece", "ece_temperature_scaled")
"""Figures of which less is better."""


def check_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """The metrics, once each.

    Raises:
        InputError: none, an unknown one, or one twice.
    """
    if not metrics:
        raise InputError(f"a sweep needs a metric; choose among {', '.join(LARGER + SMALLER)}")
    for i, name in enumerate(metrics):
        if name not in LARGER + SMALLER:
            raise InputError(f"metric must be one of {', '.join(LARGER + SMALLER)}, got {name!r}")
        if name in metrics[:i]:
            raise InputError(f"metric {name} is given twice; name each once")
    return tuple(metrics)


def direction(metric: str) -> Literal["minimize", "maximize"]:
    """What Optuna calls the metric's direction: "maximize" or "minimize"."""
    return "minimize" if metric in SMALLER else "maximize"


def sign(metric: str) -> int:
    """1 where more is better, -1 where less is: signed figures sort best last."""
    return -1 if metric in SMALLER else 1


def mean_figures(seeds: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[float] | None:
    """Mean of each metric over the seeds' validation figures; None where a seed has no such figure."""
    rows = [[figures.get(name) for name in metrics] for figures in seeds]
    if not rows or any(value is None for row in rows for value in row):
        return None
    return [float(value) for value in np.mean(np.asarray(rows, dtype=np.float64), axis=0)]
