"""`ulfine-fast eval`: figures of a run, on its own test split or on another cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder that `fit` wrote.")],
    cache: Annotated[
        Path | None, typer.Option(help="Evaluate on this cache's test images (all labelled ones if it has no test).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Compute a run's figures again from its heads, on its own test split or another cache of the same encoder."""
    from ulfine_fast.cli.tables import print_summary
    from ulfine_fast.runs.evaluate import evaluate as evaluate_run
    from ulfine_fast.runs.run import Run
    from ulfine_fast.runs.seeds import summarize

    fitted = Run.load(run)
    figures = evaluate_run(fitted, cache)
    if as_json:
        typer.echo(json.dumps(figures))
        return
    print_summary({fitted.config.method: summarize([figures])}, as_json=False)
    typer.echo(f"{figures['test_rows']} images")
