"""The section about storage: what features in one byte a number would cost the runs of a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.report.groups import Group
from ulfine_fast.runs.files import RunFiles

_FIGURES = ("accuracy", "balanced_accuracy", "few", "ece", "ece_temperature_scaled")


@dataclass(frozen=True, slots=True)
class Cost:
    """Figures of a run on its test images, by name, NaN where not defined.

    Attributes:
        stored: with the features that the cache holds.
        rounded: with the same features in one byte a number.
    """

    stored: dict[str, float]
    rounded: dict[str, float]


def rounder() -> Callable[[RunFiles], Cost | None]:
    """A function that judges a run by its cache: the same heads on test features as stored, and as int8 has them.

    It gives None where the cache is gone, was only in memory, holds one byte a number already, or where the run reads
    tokens, which no cache rounds.
    """
    # the page itself needs neither features nor heads
    from ulfine_fast.cache.store import FeatureCache

    opened = lru_cache(maxsize=1)(FeatureCache.open)  # runs of one cache stand together
    return lambda run: None if run.cache is None else _cost(run, opened)


def cost_section(groups: Sequence[Group], rounded: Callable[[RunFiles], Cost | None] | None) -> list[dict[str, Any]]:
    """A row for each group whose runs can be judged: differences in points, means and intervals over seeds."""
    rows = []
    for group in groups if rounded is not None else ():
        costs = [cost for run in group.runs if rounded is not None and (cost := rounded(run)) is not None]
        if costs:
            rows.append({"label": group.label, "figures": [_difference(costs, name) for name in _FIGURES]})
    return rows


def _difference(costs: Sequence[Cost], name: str) -> tuple[str, str]:
    """Mean and half interval in points, the latter empty where there is none."""
    found = mean_interval(cost.rounded[name] - cost.stored[name] for cost in costs)
    if found is None:
        return "–", ""
    half = "" if math.isnan(found.half) else f"{100 * found.half:.2f}"
    return f"{round(100 * found.mean, 2) + 0.0:+.2f}", half  # no -0.00


def _cost(run: RunFiles, opened: Callable[[str], Any]) -> Cost | None:
    from ulfine_fast.cache.quantized import quantized, restored
    from ulfine_fast.runs.evaluate import evaluate_inputs, own_rows, refuse_other_encoder
    from ulfine_fast.runs.run import Run

    assert run.cache is not None
    try:
        cache = opened(run.cache)
        if cache.manifest is None or cache.manifest.dtype == "int8":
            return None
        fitted = Run.load(run.path)
        if fitted.config.reads_tokens:
            return None
        refuse_other_encoder(fitted, cache)
        rows, labels = own_rows(fitted, cache)
        features, known = cache.plain[rows], labels >= 0
        one_byte = restored(*quantized(features))
        both = (evaluate_inputs(fitted, part[known], labels[known]) for part in (features, one_byte))
        stored, rounded = ({name: _number(one.get(name)) for name in _FIGURES} for one in both)
    except InputError:
        return None
    return Cost(stored, rounded)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
