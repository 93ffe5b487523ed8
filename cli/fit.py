"""`ulfine-fast fit`: train one method over a cache, several seeds together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ulfine_fast.cache.io.terminal import printable
from ulfine_fast.cli.options import options_with_file, print_warnings, with_method_options


@with_method_options
def fit(
    context: typer.Context,
    cache: Annotated[Path, typer.Argument(help="Cache folder that `extract` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")] = Path("run"),
    config: Annotated[Path | None, typer.Option(help="TOML file of options, such as best.toml of a sweep.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds to fit together.", min=1, max=10_000)] = 1,
    second: Annotated[
        Path | None,
        typer.Option("--with", help="Cache of the same images by a second encoder; ulfine_plus reads both."),
    ] = None,
    split: Annotated[Path | None, typer.Option(help="Saved split.json, or a run, for every seed.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Table of corrected labels: id, label.")] = None,
    log: Annotated[list[str] | None, typer.Option(help="Also log for tensorboard, wandb or mlflow.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    **options: Any,
) -> None:
    """Train a classifier over a cache; metrics, heads and predictions go to a run folder.

    Interrupted, the same command goes on from the last validation. `ulfine-fast fit --method NAME --help` shows the
    options of a method too.
    """
    from ulfine_fast.cli.tables import print_metrics
    from ulfine_fast.config import FitConfig

    options = options_with_file(context, options, config)
    first = print_warnings(lambda: FitConfig(**options))
    configs = [FitConfig.from_dict({**first.to_dict(), "seed": first.seed + i}) for i in range(seeds)]

    from ulfine_fast.cache.io.progress import working
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.cache.two_encoders import beside
    from ulfine_fast.data.corrections import corrected, corrected_split, read_corrections
    from ulfine_fast.engine.checkpoint import saved_step
    from ulfine_fast.engine.fit import fit_many
    from ulfine_fast.runs.estimate import estimate_lines, next_steps, selection_lines
    from ulfine_fast.runs.evidence import evidence_lines, unread_lines
    from ulfine_fast.runs.files import load_runs, split_at
    from ulfine_fast.runs.folder import CHECKPOINT, locked
    from ulfine_fast.runs.loggers import log_run, refuse_unknown
    from ulfine_fast.runs.seeds import refuse_other_content, run_folders, save_runs

    # before minutes of training, not after
    refuse_other_content(out, [config.seed for config in configs])
    for name in log or []:
        refuse_unknown(name)

    # features and split, under corrected labels where there are any
    features = FeatureCache.open(cache)
    if second is not None:
        with working("join the caches"):
            features = beside(features, FeatureCache.open(second))
    saved_split = None if split is None else split_at(split, features.ids)
    if labels is not None:
        corrections = read_corrections(labels)
        features = corrected(features, corrections)
        if saved_split is not None:
            saved_split = corrected_split(saved_split, features, corrections)

    with locked(out):
        # training, from where an interrupted fit of the same options stopped
        checkpoint = out / CHECKPOINT
        step = saved_step(checkpoint)
        if step is not None:
            typer.echo(f"continuing from step {step}", err=True)
        runs = fit_many(features, configs, split=saved_split, device=device, checkpoint=checkpoint)

        # results
        summary = save_runs(runs, out)
        failed = [run for run in runs if run.status == "failed"]
        if len(failed) < len(runs):
            for name in log or []:
                for saved in load_runs([out]):
                    log_run(saved, name, Path("logs") / name)
            print_metrics({first.method: summary}, as_json=as_json)
            if not as_json:
                fitted = {
                    folder: run
                    for folder, run in zip(run_folders(out, [config.seed for config in configs]), runs, strict=True)
                    if run.status != "failed"
                }
                done = [run.metrics for run in fitted.values()]
                for line in [
                    *estimate_lines(done, features.class_names),
                    *selection_lines(list(fitted.values())),
                    *evidence_lines(done, features.class_names),
                    *unread_lines(features, runs[0].config),
                ]:
                    typer.echo(printable(line))
                typer.echo(f"run: {out}")
                for line in next_steps(done, features.class_names, next(iter(fitted))):
                    typer.echo(printable(line))
        if failed:
            for run in failed:
                typer.echo(f"error: {printable(run.failure)}", err=True)
            raise typer.Exit(1)
