"""What was seen of T trials at each evaluation, as arrays; and the rows that a run keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_ALWAYS = ("loss", "loss_labeled", "loss_unlabeled", "val_accuracy", "val_balanced_accuracy")


class History:
    """Evaluations of T trials.

    Attributes:
        steps: after which step each evaluation was.
        figures: by name, one array (T, ...) for each evaluation; NaN for None and for trials that had left.
        rows: how many evaluations each trial has seen (T,).
        judged: whether a trial has unlabelled rows, and so pseudo-label figures (T,).
    """

    def __init__(self, judged: Sequence[bool]) -> None:
        self.steps: list[int] = []
        self.figures: dict[str, list[Floats]] = {}
        self.rows, self.judged = np.zeros(len(judged), dtype=np.int64), np.asarray(judged)

    def add(self, step: int, members: Sequence[int], figures: dict[str, Floats]) -> None:
        """Note figures (t, ...) of the trials `members` (t,)."""
        self.steps.append(step)
        self.rows[list(members)] += 1
        for name, values in figures.items():
            whole = np.full((len(self.rows), *values.shape[1:]), np.nan)
            whole[list(members)] = values
            self.figures.setdefault(name, []).append(whole)

    def row(self, trial: int, evaluation: int) -> dict[str, Any]:
        """One trial's figures at one evaluation, with None for what has no rows to stand on."""
        names = [name for name in self.figures if name in _ALWAYS or self.judged[trial]]
        figures = {name: plain(self.figures[name][evaluation][trial]) for name in names}
        return {"step": self.steps[evaluation], **figures}

    def rows_of(self, trial: int) -> list[dict[str, Any]]:
        """All rows of one trial."""
        return [self.row(trial, i) for i in range(int(self.rows[trial]))]

    def arrays(self) -> dict[str, Floats]:
        """Figures of all evaluations (E, T, ...), for saving."""
        return {name: np.stack(values) for name, values in self.figures.items()}

    def restore(self, steps: Sequence[int], rows: Sequence[int], arrays: dict[str, Floats]) -> None:
        """The inverse of :meth:`arrays`."""
        self.steps, self.rows = list(steps), np.asarray(rows, dtype=np.int64)
        self.figures = {name: list(values) for name, values in arrays.items()}


def plain(value: Floats | float) -> Any:
    """A float, or a list of them, with None for NaN."""
    found = np.asarray(value)
    if not np.isnan(found).any():
        return found.tolist()
    return [None if np.isnan(one) else float(one) for one in found] if found.ndim else None
