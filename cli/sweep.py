"""`ulfine-fast sweep`: hundreds of settings tried in trial batches, the best refit and tested once."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ulfine_fast.cli.options import explicit_options, with_method_options
from ulfine_fast.search.choices import Metric, Pruning, Sampler

if TYPE_CHECKING:
    from ulfine_fast.search.result import SweepResult

_ROWS = 10  # of the leaderboard that are printed


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
        list[Metric] | None,
        typer.Option(
            help="Metric on validation; several for a multi-objective search.", show_default="balanced_accuracy"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds a trial is averaged over, from --seed on.")] = 1,
    sampler: Annotated[Sampler, typer.Option(help="Who proposes trials.")] = "tpe",
    batch: Annotated[
        int | None,
        typer.Option(help="Trials proposed and trained together; default: 64 for tpe, cmaes and --ray, else all."),
    ] = None,
    pruning: Annotated[Pruning, typer.Option(help="Which trials stop early.")] = "none",
    refit: Annotated[int, typer.Option(help="How many of the best are refit and tested; 0 for none.")] = 1,
    refit_seeds: Annotated[int, typer.Option(help="Fresh seeds of each refit.")] = 5,
    split: Annotated[Path | None, typer.Option(help="Use this saved split.json (or a run's) for every trial.")] = None,
    storage: Annotated[str | None, typer.Option(help="Database URL; default: SQLite in the output folder.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study; default with --storage: the folder's.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Run trial batches on Ray: local, auto, or a cluster's address.", metavar="ADDRESS"),
    ] = None,
    ray_cpus: Annotated[float, typer.Option(help="CPU cores of a trial batch on Ray.", min=0)] = 1,
    ray_gpus: Annotated[float, typer.Option(help="GPUs of a trial batch on Ray.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[
        Literal["auto", "fused", "specification"], typer.Option(help="How trials are trained; for comparisons.")
    ] = "auto",
    forecast: Annotated[str | None, typer.Option(hidden=True, metavar="WHAT")] = None,
    forecast_times: Annotated[float, typer.Option(hidden=True)] = 4.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **options: Any,
) -> None:
    """Search for the best settings on validation; a setting given as an option holds for every trial."""
    # start-up: these import torch
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.data.splits import read_split
    from ulfine_fast.search.on_ray import RayWorkers
    from ulfine_fast.search.sweep import sweep as run_sweep

    features = FeatureCache.open(cache)
    # an option left at its default is not fixed: the space may search it
    fixed = explicit_options(context, {name: value for name, value in options.items() if name != "seed"})
    result = run_sweep(
        features,
        space,
        out=out,
        trials=trials,
        settings=fixed,
        metrics=[one.value for one in metric] if metric else ["balanced_accuracy"],
        seeds=seeds,
        seed=options["seed"],
        sampler=sampler,
        batch=batch,
        pruning=pruning,
        refit=refit,
        refit_seeds=refit_seeds,
        storage=storage,
        study=study,
        split=None if split is None else read_split(split, features.ids),
        device=device,
        engine=engine,
        ray=None if ray is None else RayWorkers(ray, ray_cpus, ray_gpus),
        forecast=forecast,
        forecast_times=forecast_times,
    )
    if forecast is not None:
        instead = f"ulfine-fast forecast {out} --over {forecast} --times {forecast_times:g}"
        typer.echo(f"warning: sweep --forecast is deprecated; use `{instead}` after the sweep", err=True)
    for sentence in result.warnings:
        typer.echo(f"warning: {sentence}", err=True)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    _print(result)
    if result.forecast is not None:
        typer.echo()
        # by name and only for this release, as `sweep --forecast` is
        pkgutil.resolve_name("ulfine_fast.related.forecast.command:print_forecast")(result.forecast)


def _print(result: SweepResult) -> None:
    """Print the best trials on validation, what mattered and the test metrics of the refits."""
    # start-up: Rich is slow to import
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ulfine_fast.cli.tables import print_metrics

    # the best trials: mean and 95% interval over seeds in percent, and their settings
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="on validation", title_justify="left")
    searched = list(result.leaderboard[0].params)
    for title in ("rank", "trial", *result.metrics, *searched):
        table.add_column(title, justify="right", no_wrap=True)
    for trial in result.leaderboard[:_ROWS]:
        intervals = [trial.metrics[name] for name in result.metrics]
        metrics = [f"{100 * i.mean:.1f}" + (f" ±{100 * i.half:.1f}" if i.n > 1 else "") for i in intervals]
        params = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial.params.values()]
        table.add_row(str(trial.rank), str(trial.trial), *metrics, *params)
    # wide enough for every column, so that a log file holds whole numbers
    Console(width=max(60 + 20 * len(table.columns), Console().width)).print(table)

    for metric, fractions in result.importance.items():
        settings = ", ".join(f"{name} {100 * fraction:.0f}%" for name, fraction in fractions.items())
        typer.echo(f"what moves {metric}: {settings}")
    if result.best:
        typer.echo("\nrefit with fresh seeds, on the test split:")
        tests = {f"best {refit['rank']} (trial {refit['trial']})": refit["test"] for refit in result.best}
        print_metrics(tests, as_json=False)
    counts = ", ".join(f"{count} {state}" for state, count in result.counts.items())
    typer.echo(f"trials: {counts}\nsweep: {result.out}")
