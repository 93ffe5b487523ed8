"""`ulfine-fast multilabel`: images of several classes, from a cache and a table of labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ulfine_fast.cli.options import with_options_of
from ulfine_fast.related.multilabel.settings import MultiLabelConfig


@with_options_of(MultiLabelConfig)
def multilabel(
    cache: Annotated[Path, typer.Argument(help="Cache folder that `extract` wrote.")],
    labels: Annotated[Path, typer.Argument(help="CSV with a column id and one for each class: 1, 0, or empty.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")] = Path("run"),
    seeds: Annotated[int, typer.Option(help="How many seeds to fit together, from --seed on.", min=1, max=10_000)] = 1,
    table: Annotated[Literal["csv", "parquet"], typer.Option(help="Format of the predictions.")] = "csv",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    **settings: Any,
) -> None:
    """Train a classifier for images that show several classes, where some labels are unknown."""
    # start-up: these import torch
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.related.multilabel.labels import read_label_table
    from ulfine_fast.related.multilabel.run import refuse_other_folder, save_label_runs
    from ulfine_fast.related.multilabel.train import fit_labels

    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    first = MultiLabelConfig(**settings)
    configs = [MultiLabelConfig(**{**settings, "seed": first.seed + i}) for i in range(seeds)]
    refuse_other_folder(out)
    runs = fit_labels(FeatureCache.open(cache), read_label_table(labels), configs, device=device)
    summary = save_label_runs(runs, out, table=table)
    if as_json:
        typer.echo(json.dumps({first.method: summary}))
        return

    means = ", ".join(
        f"{name} {100 * metric['mean']:.1f}" + (f" ±{100 * metric['half_width']:.1f}" if metric["n"] > 1 else "")
        for name, metric in summary.items()
    )
    typer.echo(f"{first.method}, mean average precision in percent: {means or 'no test image to evaluate on'}")
    restored = sum(len(run.restored) for run in runs) / len(runs)
    if restored:
        typer.echo(f"{restored:.0f} unknown labels are taken for present: restored.csv")
    typer.echo(f"run: {out}")
