"""`ulfine-fast forecast`: what a sweep's best settings would reach with more labels, views or steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ulfine_fast.cache.io.terminal import printable
from ulfine_fast.related.forecast import Budget


def forecast(
    sweep: Annotated[Path, typer.Argument(help="Folder of a finished sweep.", show_default=False)],
    over: Annotated[Budget, typer.Option(help="What there would be more of.")] = "labels",
    times: Annotated[float, typer.Option(help="How many times as many; above 1, at most 4.")] = 4.0,
    seeds: Annotated[
        int | None,
        typer.Option(help="Seeds of the runs, fresh ones; at least 3.", show_default="as many as the refit had, or 5"),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="The sweep's cache.", show_default="the one that the refit's runs name")
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option(help="The split.json that the sweep was given.", show_default="that of the refit's runs"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[
        Literal["auto", "fused", "specification"], typer.Option(help="How trials are trained; for comparisons.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print what is written to forecast.json.")] = False,
) -> None:
    """Forecast what a sweep's best settings would reach with more labels, views or steps.

    Fits them with 25, 35, 50, 71 and 100% of their budget and extrapolates on validation; the test split is not read.
    """
    from ulfine_fast.related.forecast.from_sweep import forecast_sweep  # start-up: it imports torch

    content = forecast_sweep(
        sweep,
        cache,
        over=over,
        times=times,
        seeds=seeds,
        split=split,
        device=device,
        engine=engine,
    )
    if as_json:
        typer.echo(json.dumps(content))
    else:
        print_forecast(content)


def print_forecast(content: dict[str, Any]) -> None:
    """Print the expected values in percent, or why there is no forecast."""
    from ulfine_fast.related.forecast.forecast import FORECASTERS  # start-up: it imports NumPy

    if content["forecast"] is None:
        typer.echo(f"no forecast: {printable(content['refused'])}")
        return
    largest = content["curve"]["budgets"][-1]
    target = content["forecast"]["target"]
    metric, over = printable(content["metric"]), printable(content["over"])
    typer.echo(f"{metric} on validation, forecast from {largest:g} to {target:g} {over}:")
    for name, estimate in content["forecast"]["figures"].items():
        value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
        typer.echo(f"  {FORECASTERS[name]}: {value:.1f} ({low:.1f} to {high:.1f})")
    if content["over"] == "steps":
        typer.echo("over steps the last value has been the best forecast (docs/related/forecast.md)")
