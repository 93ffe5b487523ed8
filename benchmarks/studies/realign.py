"""What realigning a biased head gives: a head trained by cross-entropy on a long tail, before and after each way.

    python -m benchmarks.studies.realign --data demo --json realign.json

Every way starts from the same runs, so that differences are paired. Kappa is given, and chosen on validation; a head
that was trained with adjusted logits stands beside it as the control, and is realigned as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.comparison.parts import write_json
from benchmarks.options import parse_seeds
from benchmarks.studies.storage import opened
from benchmarks.tables import print_table
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.related.head_realignment.realign import KAPPAS, realign
from ulfine_fast.runs.run import Run

Row = dict[str, Any]
HEADS = ("cross_entropy", "linear_probe")
_FIGURES = ("balanced_accuracy", "many", "medium", "few", "ece_temperature_scaled")


def measure(cache: FeatureCache, seeds: Sequence[int], values: Row) -> list[Row]:
    """One row for each head, way, kappa and seed; "chosen" is the kappa that validation takes."""
    rows = []
    for method in HEADS:
        runs = fit_many(
            cache, [FitConfig.from_dict({**values, "method": method, "seed": s}) for s in seeds], progress=False
        )
        rows += _rows(method, "before", "", runs)
        rows += _rows(method, "adjust", "", realign(runs, cache, by="adjust"))
        for by in ("lda", "gaussians"):
            for kappa in KAPPAS:
                rows += _rows(method, by, f"{kappa:g}", realign(runs, cache, by=by, kappas=[kappa], progress=False))
            rows += _rows(method, by, "chosen", realign(runs, cache, by=by, progress=False))
    return rows


def _rows(method: str, by: str, kappa: str, runs: Iterable[Run]) -> list[Row]:
    told = {"head": method, "by": by, "kappa": kappa}
    return [
        {
            **told,
            "seed": run.config.seed,
            **{name: run.metrics[name] for name in _FIGURES},
            "val": run.metrics["val"]["balanced_accuracy"],
        }
        for run in runs
    ]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each head, way and kappa: means, and the paired gain in balanced accuracy, in percent."""
    lines = []
    for head, by, kappa in dict.fromkeys((row["head"], row["by"], row["kappa"]) for row in rows):
        own = [row for row in rows if (row["head"], row["by"], row["kappa"]) == (head, by, kappa)]
        before = [row for row in rows if (row["head"], row["by"]) == (head, "before")]
        gains = ["balanced_accuracy", "few"]
        shown = [_gap(own, before, name) if by != "before" else "" for name in gains]
        lines.append([head, by, kappa, *(_mean(own, name) for name in _FIGURES), *shown])
    return lines


def _mean(rows: Sequence[Row], name: str) -> str:
    found = mean_interval(row[name] for row in rows)
    return "-" if found is None else f"{100 * found.mean:.1f}"


def _gap(rows: Sequence[Row], others: Sequence[Row], name: str) -> str:
    found = mean_interval(a[name] - b[name] for a, b in zip(rows, others, strict=True))
    return "-" if found is None else f"{100 * found.mean:+.1f} ±{100 * found.half:.1f}"


def realigned(
    data: Annotated[
        str, typer.Option(help="demo, a data set of benchmarks.studies.methods, or a cache's folder.")
    ] = "demo",
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    n1: Annotated[int, typer.Option(help="Labelled images of the largest class.", min=1)] = 150,
    gamma: Annotated[float, typer.Option(help="Imbalance of the labelled images.", min=1.0)] = 50.0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Fit biased heads, realign them in each way, and print all, many, medium and few on the test images."""
    rows = measure(opened(data), parse_seeds(seeds), {"n1": n1, "m1": 0, "gamma_l": gamma, "gamma_u": gamma})
    if as_json is not None:
        write_json(as_json, rows)
    titles = ["head", "way", "kappa", "all", "many", "medium", "few", "ECE scaled", "all, gain", "few, gain"]
    print_table(titles, table(rows), texts=3)


if __name__ == "__main__":
    typer.run(guarded(realigned))
