"""What methods keep of the zero-shot classifier's bias between classes, and how far they follow labelled counts.

python -m benchmarks.studies.bias_transfer --json bias.json

The measures of the report's section "Class bias", of methods that learn nothing (`tip_adapter`), that learn
with plain cross-entropy, and that adjust logits, over the same splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.comparison.parts import write_json
from benchmarks.options import parse_methods, parse_seeds
from benchmarks.studies.storage import opened
from benchmarks.tables import print_table
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.related.class_bias.bias import compare_bias

Row = dict[str, Any]
_FIGURES = ("bias_correlation", "count_correlation", "drift", "spread")


def measure(cache: FeatureCache, methods: Sequence[str], seeds: Sequence[int], values: Row) -> list[Row]:
    """One row for each method and seed, beside the zero-shot run of that seed."""
    names = ["zero_shot", *methods]
    configs = [FitConfig.from_dict({**values, "method": name, "seed": seed}) for name in names for seed in seeds]
    runs = fit_many(cache, configs, progress=False)
    references = dict(zip(seeds, runs, strict=False))
    rows = []
    for run in runs[len(seeds) :]:
        before = references[run.config.seed]
        counts = np.asarray(run.metrics["class_counts"], dtype=np.float64)
        found = compare_bias(before.test_probabilities, run.test_probabilities, run.test_labels, counts)
        told = {
            "method": run.config.method,
            "seed": run.config.seed,
            **{name: asdict(found)[name] for name in _FIGURES},
        }
        rows.append({**told, "balanced_accuracy": run.metrics["balanced_accuracy"]})
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each method: means and 95% intervals over seeds."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        accuracy = mean_interval(row["balanced_accuracy"] for row in own)
        shown = "-" if accuracy is None else f"{100 * accuracy.mean:.1f}"
        lines.append([method, shown, *(_cell(own, name) for name in _FIGURES)])
    return lines


def _cell(rows: Sequence[Row], name: str) -> str:
    found = mean_interval(row[name] for row in rows)
    return "-" if found is None else f"{found.mean:.2f} ±{found.half:.2f}"


def bias_transfer(
    data: Annotated[
        str, typer.Option(help="demo, a data set of benchmarks.studies.methods, or a cache's folder.")
    ] = "demo",
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas.")
    ] = "tip_adapter,knn,cross_entropy,balanced_softmax,linear_probe,lightweight,ulfine,ulfine_plus",
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    n1: Annotated[int, typer.Option(help="Labelled images of the largest class.", min=1)] = 100,
    m1: Annotated[int, typer.Option(help="Unlabelled images of the largest class.", min=0)] = 150,
    gamma: Annotated[float, typer.Option(help="Imbalance of both.", min=1.0)] = 50.0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Fit methods and compare their bias between classes with the zero-shot classifier's."""
    values = {"n1": n1, "m1": m1, "gamma_l": gamma, "gamma_u": gamma}
    rows = measure(opened(data), parse_methods(methods), parse_seeds(seeds), values)
    if as_json is not None:
        write_json(as_json, rows)
    titles = ["method", "balanced accuracy", "r with zero-shot bias", "r with log count", "drift", "spread"]
    print_table(titles, table(rows))


if __name__ == "__main__":
    typer.run(guarded(bias_transfer))
