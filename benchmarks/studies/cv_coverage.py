"""Whether the intervals of cross-validation hold what they promise.

    python -m benchmarks.studies.cv_coverage --data CACHE --json cv_coverage.json

A draw takes some labelled images of each class from the training images; the others are unlabelled. The true accuracy
is that of the classifier trained on all of the draw's labels, on all test images of the cache; its estimate and
interval are those that `fit` prints where there is no test split. An interval of 95% is good where it holds the true
accuracy in 95 of 100 draws, and is narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.data import open_features
from benchmarks.options import DataOption, JsonOption
from benchmarks.results import Row, grouped, print_table, write_rows
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.data.folds import draw_folds
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.cross_validation import add_estimate
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.intervals import fraction_interval
from ulfine_fast.runs.run import Run

_TOGETHER = 25  # draws whose folds are one call


def drawn(cache: FeatureCache, labels: tuple[int, int], unlabeled: int, draw: int) -> Split:
    """A draw of labelled and unlabelled training images; every test image of the cache tests.

    Args:
        cache: with a test split.
        labels: least and most labelled images of a class; how many each class has is drawn evenly between them.
        unlabeled: how many of the other training images are unlabelled ones.
        draw: its number.

    Raises:
        InputError: a class with too few training images.
    """
    random = np.random.default_rng([draw, *labels, 0xC0])
    pool = np.flatnonzero((cache.splits == "train") & (cache.labels >= 0))
    counts = random.integers(labels[0], labels[1] + 1, len(cache.class_names))
    chosen = []
    for k, count in enumerate(counts):
        rows = random.permutation(pool[cache.labels[pool] == k])
        if len(rows) < count:
            raise InputError(
                f"{count} labels of class {cache.class_names[k]!r} need as many images, it has {len(rows)}"
            )
        chosen.append(rows[:count])
    labeled = np.sort(np.concatenate(chosen))
    others = random.permutation(np.setdiff1d(pool, labeled))[:unlabeled]
    test = np.flatnonzero((cache.splits == "test") & (cache.labels >= 0))
    none = np.empty(0, dtype=np.int64)
    return Split(labeled, np.sort(others), none, test, np.argsort(-counts, kind="stable"))


def measure(
    cache: FeatureCache, labels: tuple[int, int], draws: Sequence[int], unlabeled: int, options: dict[str, Any]
) -> list[Row]:
    """A row for each draw: its true balanced accuracy, the estimate and its interval, and the same of the classes.

    Args:
        cache: features.
        labels: least and most labelled images of a class.
        draws: their numbers.
        unlabeled: unlabelled images of a draw.
        options: of all trials.
    """
    classes = len(cache.class_names)
    splits = [drawn(cache, labels, unlabeled, draw) for draw in draws]
    configs = [FitConfig(**options, seed=draw) for draw in draws]
    runs = fit_many(cache, configs, split=splits, progress=False)

    # the folds of all draws together, apart from the runs, whose many test images they would be padded with
    without_test = [replace(split, test=split.val) for split in splits]
    folds = [
        draw_folds(cache.labels, split, classes, config) for split, config in zip(without_test, configs, strict=True)
    ]
    trials = [config for config, own in zip(configs, folds, strict=True) for _ in own.splits]
    fold_runs = fit_many(cache, trials, split=[split for own in folds for split in own.splits], progress=False)

    rows = []
    for draw, run, split, own in zip(draws, runs, splits, folds, strict=True):
        add_estimate(run, cache, split, own, fold_runs[: len(own.splits)])
        fold_runs = fold_runs[len(own.splits) :]
        rows.append({"labels": "-".join(map(str, dict.fromkeys(labels))), "draw": draw, **_result(run)})
    return rows


def _result(run: Run) -> Row:
    estimate = run.metrics["cross_validation"]
    low, high = estimate["balanced_accuracy_interval"]
    of_classes = list(zip(run.metrics["per_class_accuracy"], estimate["per_class_interval"], strict=True))
    return {
        "true": run.metrics["balanced_accuracy"],
        "estimate": estimate["balanced_accuracy"],
        "low": low,
        "high": high,
        "classes_covered": sum(ends[0] <= accuracy <= ends[1] for accuracy, ends in of_classes) / len(of_classes),
        "classes_width": sum(ends[1] - ends[0] for _, ends in of_classes) / len(of_classes),
    }


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each number of labels, in percent: coverage and its interval, mean width, bias, true accuracy."""
    lines = []
    for (labels,), own in grouped(rows, "labels").items():
        covered = [row["low"] <= row["true"] <= row["high"] for row in own]
        coverage = sum(covered) / len(covered)
        low, high = fraction_interval(coverage, len(covered))
        means = {
            "width": np.mean([row["high"] - row["low"] for row in own]),
            "bias": np.mean([row["estimate"] - row["true"] for row in own]),
            "true": np.mean([row["true"] for row in own]),
            "classes": np.mean([row["classes_covered"] for row in own]),
            "classes_width": np.mean([row["classes_width"] for row in own]),
        }
        shown = [f"{100 * means[name]:.1f}" for name in ("width", "bias", "true", "classes", "classes_width")]
        lines.append(
            [str(labels), str(len(own)), f"{100 * coverage:.1f}", f"{100 * low:.1f} to {100 * high:.1f}", *shown]
        )
    return lines


def cv_coverage(
    data: DataOption = "demo",
    labels: Annotated[
        str, typer.Option(help="Labelled images of a class: numbers, or ranges of which each class draws one.")
    ] = "10,20,50,10-50",
    draws: Annotated[int, typer.Option(help="Draws of labels for each of them.", min=1)] = 200,
    method: Annotated[str, typer.Option(help="What is fitted.")] = "linear_probe",
    unlabeled: Annotated[int, typer.Option(help="Unlabelled images of a draw.", min=0)] = 500,
    steps: Annotated[int, typer.Option(help="Mini-batch steps.", min=1)] = 60,
    lr: Annotated[float, typer.Option(help="Learning rate.", min=0)] = 0.2,
    as_json: JsonOption = None,
) -> None:
    """Draw labels many times; print how often the 95% interval holds the true accuracy, in percent."""
    cache = open_features(data)
    options = {"method": method, "steps": steps, "lr": lr, "eval_every": steps}
    rows: list[Row] = []
    with progress_bar() as bar:
        for text in labels.split(","):
            ends = _ends(text)
            task = bar.add_task(f"{text} labels a class", total=draws, unit="draws", note="")
            for first in range(0, draws, _TOGETHER):
                numbers = range(first, min(first + _TOGETHER, draws))
                rows += measure(cache, ends, numbers, unlabeled, options)
                bar.advance(task, len(numbers))
                write_rows(as_json, rows)
    titles = ("labels", "draws", "coverage", "95% interval", "width", "bias", "true", "classes", "width")
    print_table(titles, table(rows))


def _ends(text: str) -> tuple[int, int]:
    """Reads 10 or 10-50.

    Raises:
        InputError: anything else, or fewer than two.
    """
    first, dash, last = text.strip().partition("-")
    numbers = (first, last if dash else first)
    if not all(number.isdecimal() for number in numbers) or not 2 <= int(numbers[0]) <= int(numbers[1]):
        raise InputError(f"--labels must be numbers of at least 2, or ranges such as 10-50, got {text!r}")
    return int(numbers[0]), int(numbers[1])


if __name__ == "__main__":
    typer.run(guarded(cv_coverage))
