"""The note that a forecast adds below its sweep's table in the report."""

from __future__ import annotations

import json
from pathlib import Path

from ulfine_fast.related.forecast.forecast import FORECASTERS


def forecast_note(folder: Path) -> str | None:
    """What the sweep's best trial is expected to reach, or why there is no forecast; None without a `forecast.json`.

    Raises:
        OSError, ValueError, KeyError, TypeError: the file is damaged.
    """
    path = folder / "forecast.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    start = f"Forecast of trial {content['trial']} over {content['over']}"
    if content["forecast"] is None:
        return f"{start}: refused, {content['refused']}."
    estimates = [
        f"{estimate['value']:.4f} ({estimate['low']:.4f} to {estimate['high']:.4f}) {FORECASTERS[name]}"
        for name, estimate in content["forecast"]["figures"].items()
    ]
    sizes = f"from {content['curve']['budgets'][-1]:g} to {content['forecast']['target']:g}"
    return f"{start}, {sizes}, {content['metric']}: {'; '.join(estimates)}."
