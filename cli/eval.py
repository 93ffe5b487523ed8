"""`ulfine-fast eval`: metrics of a run, on its own test split or on another cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ulfine_fast.cache.io.terminal import printable


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder that `fit` wrote.")],
    cache: Annotated[
        Path | None, typer.Option(help="Evaluate on this cache's test images (all labelled ones if it has no test).")
    ] = None,
    second: Annotated[
        Path | None, typer.Option("--with", help="Of a run of two encoders: the same images' cache by the second one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Compute a run's metrics again from its head, on its own test split or another cache of the same encoder.

    A run without a test split has an estimate by cross-validation, which is printed as its fit made it.
    """
    from ulfine_fast.cache.io.progress import working
    from ulfine_fast.cli.tables import print_metrics
    from ulfine_fast.runs.estimate import estimate_lines
    from ulfine_fast.runs.evaluate import evaluate as evaluate_run
    from ulfine_fast.runs.run import Run
    from ulfine_fast.runs.seeds import mean_metrics

    fitted = Run.load(run)
    with working("evaluate"):
        metrics = evaluate_run(fitted, cache, second)
    if as_json:
        typer.echo(json.dumps(metrics))
        return
    print_metrics({fitted.config.method: mean_metrics([metrics])})
    lines = estimate_lines([metrics], fitted.class_names) or [f"{metrics['test_rows']} images"]
    for line in lines:
        typer.echo(printable(line))
