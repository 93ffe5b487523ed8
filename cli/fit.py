"""`ulfine-fast fit`: train one method over a cache, several seeds in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ulfine_fast.cli.settings import settings_with_file, with_settings

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.config import FitConfig
    from ulfine_fast.data.splits import Split
    from ulfine_fast.runs.run import Run


@with_settings
def fit(
    context: typer.Context,
    cache: Annotated[Path, typer.Argument(help="Cache folder that `extract` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")] = Path("run"),
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings, such as a sweep's best.toml; options given here win.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds to fit in one pass, from --seed on.")] = 1,
    split: Annotated[Path | None, typer.Option(help="Use this saved split.json (or a run's) for every seed.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV of corrected labels, id and label, such as `review` writes.")
    ] = None,
    bags: Annotated[Path | None, typer.Option(help="CSV of bags of images, id and bag; with --proportions.")] = None,
    proportions: Annotated[
        Path | None, typer.Option(help="CSV of the class shares of bags: bag, class, share, or a column a class.")
    ] = None,
    log: Annotated[
        list[str] | None, typer.Option(help="Also write the runs for tensorboard, wandb or mlflow, to logs/NAME.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    **settings: Any,
) -> None:
    """Train a classifier over a cache; figures, heads and predictions go to a run folder.

    Interrupted, the same command goes on from the last evaluation.
    """
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cli.tables import print_metrics
    from ulfine_fast.config import FitConfig

    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    settings = settings_with_file(context, settings, config)
    first = FitConfig(**settings)
    configs = [FitConfig(**{**settings, "seed": first.seed + i}) for i in range(seeds)]

    from ulfine_fast.runs.loggers import refuse_unknown
    from ulfine_fast.runs.seeds import CHECKPOINT, refuse_other_content, save_runs

    # before minutes of training, not after
    refuse_other_content(out, [config.seed for config in configs])
    for name in log or []:
        refuse_unknown(name)
    if bags is None and proportions is None:
        features, given = _given(cache, split, labels)
    else:
        features, given = _in_bags(cache, split, labels, bags, proportions)
    runs = _fit(features, configs, given, device, out / CHECKPOINT)
    summary = save_runs(runs, out)
    failed = [run for run in runs if run.status == "failed"]
    if len(failed) < len(runs):
        _log(out, log or [])
        print_metrics({first.method: summary}, as_json=as_json)
        if not as_json:
            typer.echo(f"run: {out}")
    if failed:
        _end_with(failed, out)


def _given(cache: Path, split: Path | None, labels: Path | None) -> tuple[FeatureCache, Split | None]:
    """The features, under corrected labels where there are any, and the saved split that was asked for."""
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.data.corrections import corrected, corrected_split, read_corrections
    from ulfine_fast.data.splits import read_split

    features = FeatureCache.open(cache)
    saved = None if split is None else read_split(split, features.ids)
    if labels is None:
        return features, saved
    found = read_corrections(labels)
    features = corrected(features, found)
    return features, None if saved is None else corrected_split(saved, features, found)


def _in_bags(
    cache: Path, split: Path | None, labels: Path | None, bags: Path | None, proportions: Path | None
) -> tuple[FeatureCache, Split]:
    """The features, and the split that trains on the bags of two files."""
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.related.label_proportions.files import bag_split, read_bags

    if bags is None or proportions is None:
        given, other = ("--bags", "--proportions") if proportions is None else ("--proportions", "--bags")
        raise InputError(f"{given} says nothing without {other}; give both")
    if split is not None:
        raise InputError(f"--split {split} and --bags {bags} both say which images train; give one of them")
    features, _ = _given(cache, None, labels)
    return features, bag_split(features, read_bags(bags, proportions, features))


def _fit(
    cache: FeatureCache, configs: list[FitConfig], split: Split | None, device: str, checkpoint: Path
) -> list[Run]:
    """Fit, from where an interrupted fit of the same settings stood."""
    from ulfine_fast.engine.checkpoint import saved_step
    from ulfine_fast.engine.fit import fit_many

    step = saved_step(checkpoint)
    if step is not None:
        typer.echo(f"continuing from step {step}", err=True)
    return fit_many(cache, configs, split=split, device=device, checkpoint=checkpoint)


def _log(out: Path, names: list[str]) -> None:
    """Write the runs of a folder for other programs."""
    from ulfine_fast.runs.files import load_runs
    from ulfine_fast.runs.loggers import log_run

    for name in names:
        for run in load_runs([out]):
            log_run(run, name, Path("logs") / name)


def _end_with(failed: list[Run], out: Path) -> None:
    """Say which seeds diverged, and leave no empty folder."""
    from ulfine_fast.cache.io.errors import InputError

    for run in failed:
        try:
            run.refuse_failed()
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
    if not any(out.iterdir()):
        out.rmdir()
    raise typer.Exit(1)
