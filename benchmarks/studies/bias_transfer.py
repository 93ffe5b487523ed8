"""What methods keep of the zero-shot classifier's bias between classes, and how far they follow labelled counts.

    python -m benchmarks.studies.bias_transfer --json bias.json

The measures of the report's section "Class bias", of methods that learn nothing (`tip_adapter`), that learn
with plain cross-entropy, and that adjust logits, over the same splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import typer

from benchmarks.data import open_features
from benchmarks.options import (
    DataOption,
    GammaOption,
    JsonOption,
    M1Option,
    MethodsOption,
    N1Option,
    SeedsOption,
    parse_methods,
    parse_seeds,
    split_options,
    trial_configs,
)
from benchmarks.results import Row, grouped, mean_text, print_table, write_rows
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.related.class_bias.bias import compare_bias

_METRICS = ("bias_correlation", "count_correlation", "drift", "spread")


def measure(cache: FeatureCache, methods: Sequence[str], seeds: Sequence[int], options: Row) -> list[Row]:
    """One row for each method and seed, compared with the zero-shot run of that seed."""
    runs = fit_many(cache, trial_configs(["zero_shot", *methods], seeds, options), progress=False)
    zero_shot = dict(zip(seeds, runs, strict=False))
    rows = []
    for run in runs[len(seeds) :]:
        counts = np.asarray(run.metrics["class_counts"], dtype=np.float64)
        reference = zero_shot[run.config.seed].test_probabilities
        comparison = asdict(compare_bias(reference, run.test_probabilities, run.test_labels, counts))
        rows.append(
            {
                "method": run.config.method,
                "seed": run.config.seed,
                **{name: comparison[name] for name in _METRICS},
                "balanced_accuracy": run.metrics["balanced_accuracy"],
            }
        )
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each method: means and 95% intervals over seeds."""
    return [
        [
            method,
            mean_text(own, "balanced_accuracy"),
            *(mean_text(own, name, factor=1.0, digits=2, half=True) for name in _METRICS),
        ]
        for (method,), own in grouped(rows, "method").items()
    ]


def bias_transfer(
    data: DataOption = "demo",
    methods: MethodsOption = (
        "tip_adapter,knn,cross_entropy,balanced_softmax,linear_probe,lightweight,ulfine,ulfine_plus"
    ),
    seeds: SeedsOption = "0-4",
    n1: N1Option = 100,
    m1: M1Option = 150,
    gamma: GammaOption = 50.0,
    as_json: JsonOption = None,
) -> None:
    """Fit methods and compare their bias between classes with the zero-shot classifier's."""
    rows = measure(open_features(data), parse_methods(methods), parse_seeds(seeds), split_options(n1, m1, gamma))
    write_rows(as_json, rows)
    titles = ["method", "balanced accuracy", "r with zero-shot bias", "r with log count", "drift", "spread"]
    print_table(titles, table(rows))


if __name__ == "__main__":
    typer.run(guarded(bias_transfer))
