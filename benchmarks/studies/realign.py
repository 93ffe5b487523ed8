"""What realigning a biased head gives: a head trained by cross-entropy on a long tail, before and after each way.

    python -m benchmarks.studies.realign --data demo --json realign.json

Every way starts from the same runs, so that differences are paired. Kappa is fixed, and chosen on validation; a head
that was trained with adjusted logits is the control, and is realigned as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import typer

from benchmarks.data import open_features
from benchmarks.options import (
    DataOption,
    GammaOption,
    JsonOption,
    N1Option,
    SeedsOption,
    parse_seeds,
    split_options,
    trial_configs,
)
from benchmarks.results import Row, gap_text, grouped, mean_text, print_table, where, write_rows
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.related.head_realignment.realign import KAPPAS, realign
from ulfine_fast.runs.run import Run

HEADS = ("cross_entropy", "linear_probe")
_METRICS = ("balanced_accuracy", "many", "medium", "few", "ece_temperature_scaled")


def measure(cache: FeatureCache, seeds: Sequence[int], options: Row) -> list[Row]:
    """One row for each head, way, kappa and seed; "chosen" is the kappa that is best on validation."""
    rows = []
    for method in HEADS:
        runs = fit_many(cache, trial_configs([method], seeds, options), progress=False)
        rows += _rows(method, "before", "", runs)
        rows += _rows(method, "adjust", "", realign(runs, cache, by="adjust"))
        for by in ("lda", "gaussians"):
            for kappa in KAPPAS:
                realigned_runs = realign(runs, cache, by=by, kappas=[kappa], progress=False)
                rows += _rows(method, by, f"{kappa:g}", realigned_runs)
            rows += _rows(method, by, "chosen", realign(runs, cache, by=by, progress=False))
    return rows


def _rows(method: str, by: str, kappa: str, runs: Iterable[Run]) -> list[Row]:
    return [
        {
            "head": method,
            "by": by,
            "kappa": kappa,
            "seed": run.config.seed,
            **{name: run.metrics[name] for name in _METRICS},
            "val": run.metrics["val"]["balanced_accuracy"],
        }
        for run in runs
    ]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each head, way and kappa: means, and the paired gain over the head before, in percent."""
    lines = []
    for (head, by, kappa), own in grouped(rows, "head", "by", "kappa").items():
        before = where(rows, head=head, by="before")
        means = [mean_text(own, name) for name in _METRICS]
        gains = [gap_text(own, before, name) for name in ("balanced_accuracy", "few")]
        lines.append([head, by, kappa, *means, *gains])
    return lines


def realigned(
    data: DataOption = "demo",
    seeds: SeedsOption = "0-4",
    n1: N1Option = 150,
    gamma: GammaOption = 50.0,
    as_json: JsonOption = None,
) -> None:
    """Fit biased heads, realign them in each way, and print all, many, medium and few on the test images."""
    rows = measure(open_features(data), parse_seeds(seeds), split_options(n1, 0, gamma))
    write_rows(as_json, rows)
    titles = ["head", "way", "kappa", "all", "many", "medium", "few", "ECE scaled", "all, gain", "few, gain"]
    print_table(titles, table(rows), texts=3)


if __name__ == "__main__":
    typer.run(guarded(realigned))
