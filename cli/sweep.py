"""`ulfine-fast sweep`: hundreds of settings tried in batched passes, the best refit and tested once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ulfine_fast.cli.options import given_options, with_method_options

if TYPE_CHECKING:
    from ulfine_fast.search.result import SweepResult

_SHOWN = 10


@with_method_options
def sweep(
    context: typer.Context,
    cache: Annotated[Path, typer.Argument(help="Cache folder that `extract` wrote.")],
    space: Annotated[
        Path | None, typer.Option(help="TOML file of what may be tried; default: the space shipped for the method.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials in all, those of an earlier call included.")] = 512,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; the same one continues.")] = Path(
        "sweep"
    ),
    metric: Annotated[
        list[str] | None, typer.Option(help="Figure on validation; several for a multi-objective search.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds a trial is averaged over, from --seed on.")] = 1,
    sampler: Annotated[str, typer.Option(help="tpe, random, grid, cmaes or qmc.")] = "tpe",
    batch: Annotated[
        int | None, typer.Option(help="Trials asked and told together; default: 64 for tpe, cmaes and --ray, else all.")
    ] = None,
    pruning: Annotated[str, typer.Option(help="none, halving or hyperband.")] = "none",
    refit: Annotated[int, typer.Option(help="How many of the best are refit and tested; 0 for none.")] = 1,
    refit_seeds: Annotated[int, typer.Option(help="Fresh seeds of each refit.")] = 5,
    split: Annotated[Path | None, typer.Option(help="Use this saved split.json (or a run's) for every trial.")] = None,
    storage: Annotated[str | None, typer.Option(help="Database URL; default: SQLite in the output folder.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study; default with --storage: the folder's.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Run passes on Ray: local, auto, or a cluster's address.", metavar="ADDRESS")
    ] = None,
    ray_cpus: Annotated[float, typer.Option(help="CPU cores of a pass on Ray.", min=0)] = 1,
    ray_gpus: Annotated[float, typer.Option(help="GPUs of a pass on Ray.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[str, typer.Option(help="auto, fused or specification.")] = "auto",
    forecast: Annotated[
        str | None, typer.Option(help="Also forecast the best trial with more labels, views or steps.", metavar="WHAT")
    ] = None,
    forecast_times: Annotated[float, typer.Option(help="How many times as many; above 1, at most 4.")] = 4.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **options: Any,
) -> None:
    """Search for the best settings on validation; a setting given as an option holds for every trial."""
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.data.splits import read_split
    from ulfine_fast.search.on_ray import RayWorkers
    from ulfine_fast.search.sweep import sweep as search

    features = FeatureCache.open(cache)
    # a default on the command line is no wish: the space may search it
    fixed = given_options(context, {name: value for name, value in options.items() if name != "seed"})
    how: Any = {"trials": trials, "seeds": seeds, "sampler": sampler, "batch": batch, "pruning": pruning}
    where: Any = {"out": out, "storage": storage, "study": study, "device": device, "engine": engine}
    result = search(
        features,
        space,
        settings=fixed,
        metrics=metric or ["balanced_accuracy"],
        seed=options["seed"],
        refit=refit,
        refit_seeds=refit_seeds,
        split=None if split is None else read_split(split, features.ids),
        ray=None if ray is None else RayWorkers(ray, ray_cpus, ray_gpus),
        forecast=forecast,
        forecast_times=forecast_times,
        **how,
        **where,
    )
    _print(result, as_json)


def _print(result: SweepResult, as_json: bool) -> None:
    """The warnings on stderr; the board, what mattered and the test figures on stdout."""
    for sentence in result.warnings:
        typer.echo(f"warning: {sentence}", err=True)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    from ulfine_fast.cli.tables import print_summary

    _print_board(result)
    for metric, shares in result.importance.items():
        words = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items())
        typer.echo(f"what moves {metric}: {words}")
    if result.best:
        typer.echo("\nrefit with fresh seeds, on the test split:")
        print_summary({f"best {one['rank']} (trial {one['trial']})": one["test"] for one in result.best}, as_json=False)
    if result.forecast is not None:
        _print_forecast(result.forecast)
    counts = ", ".join(f"{count} {state}" for state, count in result.counts.items())
    typer.echo(f"trials: {counts}\nsweep: {result.out}")


def _print_board(result: SweepResult) -> None:
    """The best trials on validation: mean and 95% interval over seeds in percent, and their settings."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="on validation", title_justify="left")
    searched = list(result.leaderboard[0].params)
    for title in ("rank", "trial", *result.metrics, *searched):
        table.add_column(title, justify="right", no_wrap=True)
    for place in result.leaderboard[:_SHOWN]:
        figures = [_percent(place.figures[name].mean, place.figures[name].half) for name in result.metrics]
        values = [_short(place.params[name]) for name in searched]
        table.add_row(str(place.rank), str(place.trial), *figures, *values)
    # wide enough for every column, so that a log file holds whole figures
    Console(width=max(60 + 20 * len(table.columns), Console().width)).print(table)


def _print_forecast(told: dict[str, Any]) -> None:
    """What was measured at the largest size and what is expected beyond it, in percent; or why nothing is."""
    if told["forecast"] is None:
        typer.echo(f"\nno forecast: {told['refused']}")
        return
    from ulfine_fast.related.forecast.forecast import FORECASTERS

    largest, target = told["curve"]["budgets"][-1], told["forecast"]["target"]
    typer.echo(f"\n{told['metric']} on validation, forecast from {largest:g} to {target:g} {told['over']}:")
    for name, one in told["forecast"]["figures"].items():
        low, high = 100 * one["low"], 100 * one["high"]
        typer.echo(f"  {FORECASTERS[name]}: {100 * one['value']:.1f} ({low:.1f} to {high:.1f})")
    if told["over"] == "steps":
        typer.echo("over steps the last value has been the best forecast (docs/related/forecast.md)")


def _percent(mean: float, half: float) -> str:
    return f"{100 * mean:.1f}" + (f" ±{100 * half:.1f}" if half == half else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
