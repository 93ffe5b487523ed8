"""How far off a forecast of the full run is, from runs with a quarter and with half of its budget.

    python -m benchmarks.studies.forecast --json forecast.json

The full run is held out and forecast by each forecaster of `ulfine-fast forecast` from runs of the same seeds at
smaller budgets. What it refuses is told beside what it would have said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from benchmarks.data import digits
from benchmarks.options import parse_methods, parse_names, parse_seeds
from benchmarks.parts import write_json
from benchmarks.speed.storage import opened
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.related.forecast import Budget
from ulfine_fast.related.forecast.forecast import FURTHEST, LEAST_SIZES, Curve, above_chance, forecast, predictions
from ulfine_fast.related.forecast.growth import BUDGETS, SIZES, grow

Row = dict[str, Any]
FORECASTERS = {"flp": "FLP", "last": "last value", "power_law": "power law", "log_line": "log line"}
METRICS = ("balanced_accuracy", "few")
SHARES = (0.25, 0.5)
MANY_VIEWS = 16


def with_validation(cache: FeatureCache) -> FeatureCache:
    """Every second test image, without a test split every third image, as validation that counts classes the same.

    A tenth of a long tail's labelled images, which validation is otherwise, has hardly one of a rare class.
    """
    splits = cache.splits.copy()
    test = np.flatnonzero(splits == "test")
    held = test[::2] if len(test) else np.arange(len(splits))[::3]
    kept = ~np.isin(cache.view_rows, held)
    splits[held] = "val"
    return FeatureCache.from_arrays(
        cache.plain,
        cache.labels,
        class_names=cache.class_names,
        text_features=cache.text_features,
        weak=cache.views("weak")[kept],
        strong=cache.views("strong")[kept],
        splits=splits.tolist(),
        ids=cache.ids,
        logit_scale=cache.logit_scale,
    )


def measure(cache: FeatureCache, method: str, over: Budget, seeds: Sequence[int], values: Row) -> list[Row]:
    """A row for each share of the budget and each figure."""
    configs = [FitConfig.from_dict({**values, "method": method, "seed": seed}) for seed in seeds]
    rows = []
    for share in SHARES:
        curves = grow(cache, configs, over, METRICS, sizes=[*(share * size for size in SIZES), 1.0])
        told = {"method": method, "over": over, "share": share}
        rows += [{**told, "metric": m, **judged(c, over, len(cache.class_names))} for m, c in curves.items()]
    return rows


def judged(curve: Curve, over: str, classes: int) -> Row:
    """What is forecast of a curve's last point from those before, of each seed alone and of the means over them.

    Returns:
        budgets, target, truth (R,), by_seed: forecaster -> (R,), of_mean: forecaster -> value, inside: whether the
        forecast's interval holds the mean truth, by forecaster; refused: why `forecast` would say nothing.
    """
    seen = Curve(curve.budgets[:-1], curve.losses[:-1], curve.values[:-1])
    # a quarter of each class, rounded, may be a little less than a quarter of all
    target, truth = float(min(curve.budgets[-1], FURTHEST * curve.budgets[-2])), curve.values[-1]
    means = Curve(seen.budgets, seen.losses.mean(1, keepdims=True), seen.values.mean(1, keepdims=True))
    of_mean = {name: values[0] for name, values in _all(means, target, classes).items()}
    told = {"budgets": seen.budgets.tolist(), "target": target, "truth": truth.tolist(), "of_mean": of_mean}
    told["by_seed"] = _all(seen, target, classes)
    try:
        found = forecast(seen, target, chance=1 / classes, over=over).values
    except InputError as error:
        return {**told, "refused": str(error), "inside": None}
    inside = {name: one.low <= truth.mean() <= one.high for name, one in found.items()}
    return {**told, "refused": None, "inside": {name: bool(held) for name, held in inside.items()}}


def _all(curve: Curve, target: float, classes: int) -> dict[str, list[float | None]]:
    """Each forecaster's value by column; None of FLP where too few points are above chance to draw its line."""
    used = above_chance(curve, 1 / classes)
    enough = bool(used.sum() >= LEAST_SIZES)
    found = predictions(curve, target, used if enough else np.ones_like(used))
    return {
        name: found[name].tolist() if enough or name != "flp" else [None] * len(found[name]) for name in FORECASTERS
    }


def errors(row: Row, name: str) -> list[float]:
    """Relative error of each seed's own forecast, |forecast - truth| / truth."""
    pairs = zip(row["by_seed"][name], row["truth"], strict=True)
    return [abs(one - true) / true for one, true in pairs if one is not None and true > 0]


def error_of_mean(row: Row, name: str) -> float | None:
    """Relative error of the forecast from the means over seeds, None without one."""
    value, truth = row["of_mean"][name], float(np.mean(row["truth"]))
    return None if value is None or not truth else abs(value - truth) / truth


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each row: relative errors in percent, mean and 95% interval over seeds, and what the tool does."""
    lines = []
    for row in rows:
        path = f"{row['budgets'][-1]:.0f} to {row['target']:.0f} {row['over']}"
        cells = [_cell(errors(row, name)) for name in FORECASTERS]
        told = "told" if row["refused"] is None else "refused: " + reason(row["refused"])
        truth = f"{100 * np.mean(row['truth']):.1f}"
        lines.append([row["data"], row["method"], row["metric"], path, told, truth, *cells])
    return lines


def reason(sentence: str) -> str:
    """A refusal in a few words, or as it is."""
    known = {
        "does not fall": "loss does not fall",
        "does not rise": "no rise with the loss",
        "above chance": "at chance",
        "sizes, got": "too few sizes",
    }
    return next((short for words, short in known.items() if words in sentence), sentence)


def _cell(values: Sequence[float]) -> str:
    found = mean_interval(values)
    return "-" if found is None else f"{100 * found.mean:.1f} ±{100 * found.half:.1f}"


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each forecaster: of all rows of a budget, and of those of all budgets that are not refused."""
    groups: dict[str, list[Row]] = {what: [row for row in rows if row["over"] == what] for what in BUDGETS}
    groups["not refused"] = [row for row in rows if row["refused"] is None]
    lines = []
    for title, own in groups.items():
        # where FLP has no line to draw the others have nothing to be compared with
        whole = [row for row in own if row["of_mean"]["flp"] is not None]
        lines += [[title, shown, str(len(whole)), *_standing(whole, name)] for name, shown in FORECASTERS.items()]
    return [line for line in lines if line[2] != "0"]


def _standing(rows: Sequence[Row], name: str) -> list[str]:
    """Error of means, how much larger it is than the last value's, how often the smallest; how many intervals hold."""
    found = [error for row in rows if (error := error_of_mean(row, name)) is not None]
    best = [_nearest(row) for row in rows]
    told = [row["inside"][name] for row in rows if row["inside"] is not None]
    mean = f"{100 * np.mean(found):.1f}" if found else "-"
    inside = f"{sum(told)} of {len(told)}" if told else "-"
    return [mean, _against(rows, name), str(best.count(name)), inside]


def _nearest(row: Row) -> str:
    """The forecaster with the smallest error of means."""
    return min(FORECASTERS, key=lambda name: error_of_mean(row, name) or 0.0)


def _against(rows: Sequence[Row], name: str) -> str:
    """How much larger an error of means is than that of the last value carried on, paired over rows, in percent."""
    pairs = [(error_of_mean(row, name), error_of_mean(row, "last")) for row in rows]
    found = mean_interval(a - b for a, b in pairs if a is not None and b is not None)
    return "-" if found is None or name == "last" else f"{100 * found.mean:+.1f} ±{100 * found.half:.1f}"


def forecasts(
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="demo, a data set of benchmarks.studies.methods, or a cache's folder.",
            show_default="demo, fashion_mnist, digits",
        ),
    ] = None,
    over: Annotated[str, typer.Option(help="labels, steps, views, separated by commas.")] = "labels,steps,views",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "linear_probe",
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    n1: Annotated[int, typer.Option(help="Labelled images of the largest class.", min=1)] = 80,
    gamma: Annotated[float, typer.Option(help="Imbalance of labelled and unlabelled images.", min=1.0)] = 10.0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Hold out full runs and forecast them from a quarter and a half of their budget."""
    values = {"n1": n1, "gamma_l": gamma, "gamma_u": gamma}
    rows: list[Row] = []
    for name in data or ["demo", "fashion_mnist", "digits"]:
        for what in parse_names(over, BUDGETS, "budgets"):
            # the other caches have too few views to hold half of them out
            wide = (name, what) == ("digits", "views")
            cache = with_validation(digits((MANY_VIEWS, MANY_VIEWS)) if wide else opened(name))
            if what == "views" and (there := cache.views("strong").shape[1]) < 2 * LEAST_SIZES:
                typer.echo(f"{name}: {there} strong views are too few to forecast from four sizes of half of them")
                continue
            for method in parse_methods(methods):
                found = measure(cache, method, cast(Budget, what), parse_seeds(seeds), values)
                rows += [{"data": Path(name).name, **row} for row in found]
    if as_json is not None:
        write_json(as_json, rows)
    print_table(["data", "method", "figure", "from, to", "sweep", "truth", *FORECASTERS.values()], table(rows), texts=5)
    titles = ["rows", "forecaster", "n", "error of means", "minus last value", "smallest", "interval holds it"]
    print_table(titles, summary(rows), texts=2)


if __name__ == "__main__":
    typer.run(guarded(forecasts))
