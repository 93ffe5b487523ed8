"""The section about storage: what int8 features would cost the runs of a page."""

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

_METRICS = ("accuracy", "balanced_accuracy", "few", "ece", "ece_temperature_scaled")


@dataclass(frozen=True, slots=True)
class RoundingCost:
    """Metrics of a run on its test images, by name, NaN where not defined.

    Attributes:
        stored: with the features as the cache holds them.
        rounded: with the same features rounded to int8.
    """

    stored: dict[str, float]
    rounded: dict[str, float]


def rounder() -> Callable[[RunFiles], RoundingCost | None]:
    """A function that evaluates a run's heads on its test features, as stored and rounded as an int8 cache does.

    It returns None where the cache is gone, was only in memory or is int8 already, and where the run reads tokens,
    which no cache rounds.
    """
    # loaded on use: the page itself needs neither features nor heads
    from ulfine_fast.cache.store import FeatureCache

    open_cache = lru_cache(maxsize=1)(FeatureCache.open)  # runs of one cache follow each other
    return lambda run: None if run.local_cache is None else _rounding_cost(run, open_cache)


def one_byte_section(
    groups: Sequence[Group], rounding_cost: Callable[[RunFiles], RoundingCost | None] | None
) -> list[dict[str, Any]]:
    """Template values: for each group with a cost the differences in points, "mean" and "half width" over seeds.

    Args:
        groups: the page's runs.
        rounding_cost: as :func:`rounder` returns it; None for no row at all.
    """
    if rounding_cost is None:
        return []
    rows = []
    for group in groups:
        costs = [cost for run in group.runs if (cost := rounding_cost(run)) is not None]
        if not costs:
            continue
        cells = []
        for name in _METRICS:
            interval = mean_interval(cost.rounded[name] - cost.stored[name] for cost in costs)
            if interval is None:
                cells.append(("–", ""))
                continue
            half = "" if math.isnan(interval.half) else f"{100 * interval.half:.2f}"
            cells.append((f"{round(100 * interval.mean, 2) + 0.0:+.2f}", half))  # + 0.0: no -0.00
        rows.append({"label": group.label, "metrics": cells})
    return rows


def _rounding_cost(run: RunFiles, open_cache: Callable[[str], Any]) -> RoundingCost | None:
    from ulfine_fast.cache.quantized import quantized, restored
    from ulfine_fast.runs.evaluate import evaluate_inputs, own_rows, refuse_other_encoder
    from ulfine_fast.runs.run import Run

    assert run.local_cache is not None
    try:
        cache = open_cache(run.local_cache)
        if cache.manifest is None or cache.manifest.dtype == "int8":
            return None
        fitted = Run.load(run.path)
        if fitted.config.reads_tokens:
            return None
        refuse_other_encoder(fitted, cache)
        rows, labels = own_rows(fitted, cache)
        features, known = cache.plain[rows], labels >= 0
        stored = evaluate_inputs(fitted, features[known], labels[known])
        rounded = evaluate_inputs(fitted, restored(*quantized(features))[known], labels[known])
    except InputError:
        return None
    return RoundingCost(
        stored={name: _or_nan(stored.get(name)) for name in _METRICS},
        rounded={name: _or_nan(rounded.get(name)) for name in _METRICS},
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
