"""The note that a forecast adds below its sweep's table in the report."""

from __future__ import annotations

from pathlib import Path

from ulfine_fast.related.forecast.forecast import FORECASTERS
from ulfine_fast.related.forecast.saved import read_forecast
from ulfine_fast.search.saved import earlier_summary


def forecast_note(folder: Path) -> str | None:
    """What the sweep's best trial is expected to reach, or why there is no forecast; None without a `forecast.json`.

    Raises:
        InputError, OSError: the file is damaged.
    """
    summary = earlier_summary(folder)
    saved = read_forecast(folder, None if summary is None else summary.owner)
    if saved is None:
        return None
    start = f"Forecast of trial {saved.trial} over {saved.over}"
    if saved.forecast is None or saved.curve is None:
        return f"{start}: refused, {saved.refused}."
    estimates = [
        f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f}) {FORECASTERS[name]}"
        for name, estimate in saved.forecast.figures.items()
    ]
    sizes = f"from {saved.curve.budgets[-1]:g} to {saved.forecast.target:g}"
    return f"{start}, {sizes}, {saved.metric}: {'; '.join(estimates)}."
