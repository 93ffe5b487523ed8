from __future__ import annotations

import math

import numpy as np
import pytest

from ulfine_fast.metrics.intervals import mean_interval


def test_interval_equals_the_one_computed_by_hand() -> None:
    interval = mean_interval([0.70, 0.80, 0.75])
    assert interval is not None
    # t with 2 degrees of freedom at 0.975 is 4.302653, the standard deviation 0.05
    assert (interval.mean, interval.n) == (pytest.approx(0.75), 3)
    assert interval.half == pytest.approx(4.302653 * 0.05 / math.sqrt(3), rel=1e-6)


def test_interval_of_twenty_values() -> None:
    values = np.linspace(0.1, 0.9, 20)
    interval = mean_interval(values)
    assert interval is not None
    assert interval.half == pytest.approx(2.093024 * values.std(ddof=1) / math.sqrt(20), rel=1e-6)


def test_undefined_values_are_left_out_of_the_interval() -> None:
    interval = mean_interval([math.nan, 0.5, math.nan])
    assert interval is not None
    assert (interval.mean, interval.n) == (0.5, 1)
    assert math.isnan(interval.half)
    assert mean_interval([math.nan]) is None
    assert mean_interval([]) is None
