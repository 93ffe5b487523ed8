"""Numbers as text."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percent(value: float | None) -> str:
    """A fraction as percent with one decimal; a dash where it is not defined."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def number_range(values: Sequence[float]) -> str:
    """The defined values as "4" or "2–100", thousands separated; a dash without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    low, high = min(finite), max(finite)
    return f"{low:,.0f}" if low == high else f"{low:,.0f}–{high:,.0f}"
