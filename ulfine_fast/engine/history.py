"""Metrics of T trials at each validation: arrays, and rows for runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_ALWAYS = ("loss", "loss_labeled", "loss_unlabeled", "val_accuracy", "val_balanced_accuracy")


class History:
    """Validations of T trials.

    Attributes:
        steps: the step of each validation.
        metrics: by name, one array (T, ...) for each validation; NaN for None and for trials that had left.
        rows: how many validations each trial has seen (T,).
        judged: whether a trial has unlabelled rows, and so pseudo-label metrics (T,).
    """

    def __init__(self, judged: Sequence[bool]) -> None:
        self.steps: list[int] = []
        self.metrics: dict[str, list[Floats]] = {}
        self.rows = np.zeros(len(judged), dtype=np.int64)
        self.judged = np.asarray(judged)

    def add(self, step: int, members: Sequence[int], metrics: dict[str, Floats]) -> None:
        """Record metrics (t, ...) of the trials `members` (t,)."""
        self.steps.append(step)
        self.rows[list(members)] += 1
        for name, values in metrics.items():
            padded = np.full((len(self.rows), *values.shape[1:]), np.nan)
            padded[list(members)] = values
            self.metrics.setdefault(name, []).append(padded)

    def row(self, trial: int, validation: int) -> dict[str, Any]:
        """One trial's metrics at one validation, with None where there are no rows to compute one from."""
        names = [name for name in self.metrics if name in _ALWAYS or self.judged[trial]]
        metrics = {name: plain(self.metrics[name][validation][trial]) for name in names}
        return {"step": self.steps[validation], **metrics}

    def rows_of(self, trial: int) -> list[dict[str, Any]]:
        """All rows of one trial."""
        return [self.row(trial, i) for i in range(int(self.rows[trial]))]

    def arrays(self) -> dict[str, Floats]:
        """Metrics of all validations (E, T, ...), for saving."""
        return {name: np.stack(values) for name, values in self.metrics.items()}

    def restore(self, steps: Sequence[int], rows: Sequence[int], arrays: dict[str, Floats]) -> None:
        """The inverse of :meth:`arrays`."""
        self.steps = list(steps)
        self.rows = np.asarray(rows, dtype=np.int64)
        self.metrics = {name: list(values) for name, values in arrays.items()}


def plain(value: Floats | float) -> Any:
    """A float, or a list of them, with None for NaN."""
    array = np.asarray(value)
    if not np.isnan(array).any():
        return array.tolist()
    return [None if np.isnan(item) else float(item) for item in array] if array.ndim else None
