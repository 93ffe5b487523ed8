"""`ulfine-fast log`: runs for TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def log(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that `fit` wrote, or folders above them.")],
    to: Annotated[
        Literal["tensorboard", "wandb", "mlflow"], typer.Option(help="Program that will show them.")
    ] = "tensorboard",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to add them to.", show_default="logs/TO")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write runs in the files of an experiment tracker, without a network."""
    from ulfine_fast.cache.io.progress import progress_bar
    from ulfine_fast.runs.files import load_runs
    from ulfine_fast.runs.loggers import log_run, refuse_unknown, run_name

    refuse_unknown(to)
    loaded = load_runs(runs)
    folder = out or Path("logs") / to
    with progress_bar() as bar:
        task = bar.add_task(to, total=len(loaded), unit="runs", note="")
        for run in loaded:
            log_run(run, to, folder)
            bar.advance(task)
    if as_json:
        typer.echo(json.dumps({"to": to, "out": str(folder), "runs": [run_name(run) for run in loaded]}))
        return
    typer.echo(f"{len(loaded)} runs: {folder}")
