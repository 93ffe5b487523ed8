"""How far off a forecast of the full run is, from runs with a quarter and with half of its budget.

    python -m benchmarks.studies.forecast --json forecast.json

The full run is held out and forecast by each forecaster of `ulfine-fast forecast` from runs of the same seeds at
smaller budgets. Errors are shown for refused forecasts too, beside the reason of the refusal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import typer

from benchmarks.data import changed_cache, digits, open_features
from benchmarks.options import (
    GammaOption,
    JsonOption,
    MethodsOption,
    N1Option,
    SeedsOption,
    parse_methods,
    parse_names,
    parse_seeds,
    split_options,
    trial_configs,
)
from benchmarks.results import Row, interval_text, print_table, where, write_rows
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.related.forecast import Budget
from ulfine_fast.related.forecast.forecast import FURTHEST, LEAST_SIZES, Curve, above_chance, forecast, predictions
from ulfine_fast.related.forecast.growth import BUDGETS, SIZES, grow

FORECASTERS = {"flp": "FLP", "last": "last value", "power_law": "power law", "log_line": "log line"}
METRICS = ("balanced_accuracy", "few")
FRACTIONS = (0.25, 0.5)
"""Of the full budget, that the forecast is made from."""

MANY_VIEWS = 16


def with_validation(cache: FeatureCache) -> FeatureCache:
    """A cache with every second test image, without a test split every third image, as validation.

    Such a validation split has all classes alike. A tenth of a long tail's labelled images, which validation is
    otherwise, hardly has an image of a rare class.
    """
    splits = cache.splits.copy()
    test = np.flatnonzero(splits == "test")
    splits[test[::2] if len(test) else np.arange(len(splits))[::3]] = "val"
    return changed_cache(cache, splits=splits.tolist())


def measure(cache: FeatureCache, method: str, over: Budget, seeds: Sequence[int], options: Row) -> list[Row]:
    """A row for each fraction of the budget and each metric."""
    configs = trial_configs([method], seeds, options)
    rows = []
    for fraction in FRACTIONS:
        curves = grow(cache, configs, over, METRICS, sizes=[*(fraction * size for size in SIZES), 1.0])
        for metric, curve in curves.items():
            about = {"method": method, "over": over, "share": fraction, "metric": metric}
            rows.append({**about, **evaluate(curve, over, len(cache.class_names))})
    return rows


def evaluate(curve: Curve, over: str, classes: int) -> Row:
    """What is forecast of a curve's last point from those before, of each seed alone and of the means over them.

    Returns:
        budgets: of the points before the last.
        target: the last budget.
        truth: values at the last point (R,).
        by_seed: forecaster -> values (R,).
        of_mean: forecaster -> value.
        inside: whether the forecast's interval contains the mean truth, by forecaster; None where it is refused.
        refused: why `forecast` gives nothing; None where it does.
    """
    before = Curve(curve.budgets[:-1], curve.losses[:-1], curve.values[:-1])
    means = Curve(before.budgets, before.losses.mean(1, keepdims=True), before.values.mean(1, keepdims=True))
    # a quarter of each class, rounded, may be a little less than a quarter of all
    target = float(min(curve.budgets[-1], FURTHEST * curve.budgets[-2]))
    truth = curve.values[-1]
    row: Row = {
        "budgets": before.budgets.tolist(),
        "target": target,
        "truth": truth.tolist(),
        "of_mean": {name: values[0] for name, values in _predictions(means, target, classes).items()},
        "by_seed": _predictions(before, target, classes),
        "refused": None,
        "inside": None,
    }
    try:
        intervals = forecast(before, target, chance=1 / classes, over=over).values
    except InputError as error:
        return {**row, "refused": str(error)}
    inside = {name: bool(own.low <= truth.mean() <= own.high) for name, own in intervals.items()}
    return {**row, "inside": inside}


def _predictions(curve: Curve, target: float, classes: int) -> dict[str, list[float | None]]:
    """Each forecaster's value by column; None of FLP where too few points are above chance to draw its line."""
    used = above_chance(curve, 1 / classes)
    enough = bool(used.sum() >= LEAST_SIZES)
    values = predictions(curve, target, used if enough else np.ones_like(used))
    return {
        name: [None] * len(values[name]) if name == "flp" and not enough else values[name].tolist()
        for name in FORECASTERS
    }


def errors(row: Row, name: str) -> list[float]:
    """Relative error of each seed's own forecast, |forecast - truth| / truth."""
    pairs = zip(row["by_seed"][name], row["truth"], strict=True)
    return [abs(value - truth) / truth for value, truth in pairs if value is not None and truth > 0]


def error_of_mean(row: Row, name: str) -> float | None:
    """Relative error of the forecast from the means over seeds, None without one."""
    value = row["of_mean"][name]
    truth = float(np.mean(row["truth"]))
    return None if value is None or not truth else abs(value - truth) / truth


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each row: relative errors in percent, mean and 95% interval over seeds, and what the tool does."""
    return [
        [
            row["data"],
            row["method"],
            row["metric"],
            f"{row['budgets'][-1]:.0f} to {row['target']:.0f} {row['over']}",
            "forecast" if row["refused"] is None else "refused: " + reason(row["refused"]),
            f"{100 * np.mean(row['truth']):.1f}",
            *(interval_text(mean_interval(errors(row, name))) for name in FORECASTERS),
        ]
        for row in rows
    ]


def reason(sentence: str) -> str:
    """A refusal in a few words, or as it is."""
    known = {
        "does not fall": "loss does not fall",
        "does not rise": "no rise with the loss",
        "above chance": "at chance",
        "sizes, got": "too few sizes",
    }
    return next((short for words, short in known.items() if words in sentence), sentence)


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each forecaster: of all rows of a budget, and of those of all budgets that are not refused."""
    groups: dict[str, list[Row]] = {over: where(rows, over=over) for over in BUDGETS}
    groups["not refused"] = where(rows, refused=None)
    lines = []
    for title, group in groups.items():
        # where FLP has no line to draw, the others have nothing to be compared with
        own = [row for row in group if row["of_mean"]["flp"] is not None]
        if own:
            lines += [[title, shown, str(len(own)), *_comparison(own, name)] for name, shown in FORECASTERS.items()]
    return lines


def _comparison(rows: Sequence[Row], name: str) -> list[str]:
    """Error of means, how much larger it is than the last value's, how often it is smallest, and intervals that hold.

    In percent; the difference to the last value is paired over rows.
    """
    own_errors = [error for row in rows if (error := error_of_mean(row, name)) is not None]
    pairs = [(error_of_mean(row, name), error_of_mean(row, "last")) for row in rows]
    gap = mean_interval(error - last for error, last in pairs if error is not None and last is not None)
    smallest = [min(FORECASTERS, key=lambda other: error_of_mean(row, other) or 0.0) for row in rows]
    inside = [row["inside"][name] for row in rows if row["inside"] is not None]
    return [
        f"{100 * np.mean(own_errors):.1f}" if own_errors else "-",
        "-" if name == "last" else interval_text(gap, sign=True),
        str(smallest.count(name)),
        f"{sum(inside)} of {len(inside)}" if inside else "-",
    ]


def forecasts(
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="demo, a data set of benchmarks.studies.methods, or a cache's folder.",
            show_default="demo, fashion_mnist, digits",
        ),
    ] = None,
    over: Annotated[str, typer.Option(help="labels, steps, views, separated by commas.")] = "labels,steps,views",
    methods: MethodsOption = "linear_probe",
    seeds: SeedsOption = "0-4",
    n1: N1Option = 80,
    gamma: GammaOption = 10.0,
    as_json: JsonOption = None,
) -> None:
    """Hold out full runs and forecast them from a quarter and a half of their budget."""
    names = parse_methods(methods)
    seed_numbers = parse_seeds(seeds)
    options = split_options(n1, None, gamma)
    rows: list[Row] = []
    for name in data or ["demo", "fashion_mnist", "digits"]:
        for budget in parse_names(over, BUDGETS, "budgets"):
            # the other caches have too few views to hold half of them out
            many_views = name == "digits" and budget == "views"
            cache = with_validation(digits((MANY_VIEWS, MANY_VIEWS)) if many_views else open_features(name))
            views = cache.views("strong").shape[1]
            if budget == "views" and views < 2 * LEAST_SIZES:
                typer.echo(f"{name}: {views} strong views are too few to forecast from four sizes of half of them")
                continue
            for method in names:
                results = measure(cache, method, cast(Budget, budget), seed_numbers, options)
                rows += [{"data": Path(name).name, **row} for row in results]
    write_rows(as_json, rows)
    print_table(["data", "method", "metric", "from, to", "sweep", "truth", *FORECASTERS.values()], table(rows), texts=5)
    titles = ["rows", "forecaster", "n", "error of means", "minus last value", "smallest", "interval holds it"]
    print_table(titles, summary(rows), texts=2)


if __name__ == "__main__":
    typer.run(guarded(forecasts))
