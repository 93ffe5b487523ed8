"""The file forecast.json in a sweep's folder, as it is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from ulfine_fast.cache.io.digests import is_sealed
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import read_regular_file
from ulfine_fast.cache.io.json_files import MAX_BYTES, check_schema, parse_json
from ulfine_fast.related.forecast.forecast import FORECASTERS

FILE = "forecast.json"

_FIX = "run `ulfine-fast forecast` again"

_Number = Annotated[float, msgspec.Meta(ge=-1e18, le=1e18)]
_Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Loss = Annotated[float, msgspec.Meta(gt=0, le=1e18)]


class SavedCurve(msgspec.Struct):
    """See :class:`Curve`."""

    budgets: Annotated[list[_Number], msgspec.Meta(min_length=1)]
    losses: list[list[_Loss]] = []
    figures: list[list[_Fraction]] = []


class SavedEstimate(msgspec.Struct):
    """See :class:`Estimate`."""

    value: _Number
    low: _Number
    high: _Number


class SavedValues(msgspec.Struct):
    """Part of :class:`Forecast`: the target, and the metric expected by forecaster."""

    target: _Number
    figures: dict[str, SavedEstimate]


class SavedForecast(msgspec.Struct):
    """What :func:`forecast_sweep` returns, as far as it is read again; version 0.1 wrote no `sweep`."""

    trial: int
    over: str
    metric: str
    curve: SavedCurve | None = None
    refused: str | None = None
    forecast: SavedValues | None = None
    seeds: list[int] = []
    sizes: list[_Number] = []
    sweep: str | None = None


def read_forecast(folder: Path, owner: str | None) -> SavedForecast | None:
    """Read the forecast in a sweep's folder; None where there is none.

    Args:
        folder: of the sweep.
        owner: the sweep's id, as sweep.json has it; None in version 1.

    Raises:
        InputError: a file that is damaged, was changed after it was written (version 0.1 wrote no digest), or is of
            another sweep.
        OSError: not a regular file.
    """
    path = folder / FILE
    try:
        data = read_regular_file(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    content = parse_json(data, dict[str, Any], name=str(path), fix=_FIX)
    if "digest" in content and not is_sealed(data):
        raise InputError(f"{path} was changed after it was written; {_FIX}")
    saved = check_schema(content, SavedForecast, name=str(path), fix=_FIX)
    if saved.sweep is not None and saved.sweep != owner:
        raise InputError(f"{path} is of another sweep; {_FIX}")
    unknown = [] if saved.forecast is None else sorted(saved.forecast.figures.keys() - FORECASTERS)
    if unknown or (saved.refused is None) == (saved.forecast is None) or (saved.forecast and not saved.curve):
        raise InputError(f"{path} has neither a forecast by {', '.join(FORECASTERS)} nor the reason for none; {_FIX}")
    return saved
