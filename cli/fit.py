"""`ulfine-fast fit`: train one method over a cache, several seeds in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ulfine_fast.cli.settings import settings_with_file, with_settings

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.config import FitConfig
    from ulfine_fast.run import Run
    from ulfine_fast.splits import Split


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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    **settings: Any,
) -> None:
    """Train a classifier over a cache; figures, heads and predictions go to a run folder.

    Interrupted, the same command goes on from the last evaluation.
    """
    from ulfine_fast.cache.errors import InputError
    from ulfine_fast.cli.tables import print_summary
    from ulfine_fast.config import FitConfig

    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    settings = settings_with_file(context, settings, config)
    first = FitConfig(**settings)
    configs = [FitConfig(**{**settings, "seed": first.seed + i}) for i in range(seeds)]

    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.splits import read_split
    from ulfine_fast.summary import CHECKPOINT, refuse_other_content, save_runs

    # before minutes of training, not after
    refuse_other_content(out, [config.seed for config in configs])
    features = FeatureCache.open(cache)
    given = None if split is None else read_split(split, features.ids)
    runs = _fit(features, configs, given, device, out / CHECKPOINT)
    summary = save_runs(runs, out)
    failed = [run for run in runs if run.status == "failed"]
    if len(failed) < len(runs):
        print_summary({first.method: summary}, as_json=as_json)
        if not as_json:
            typer.echo(f"run: {out}")
    if failed:
        _end_with(failed, out)


def _fit(
    cache: FeatureCache, configs: list[FitConfig], split: Split | None, device: str, checkpoint: Path
) -> list[Run]:
    """Fit, from where an interrupted fit of the same settings stood."""
    from ulfine_fast.checkpoint import saved_step
    from ulfine_fast.train import fit_many

    step = saved_step(checkpoint)
    if step is not None:
        typer.echo(f"continuing from step {step}", err=True)
    return fit_many(cache, configs, split=split, device=device, checkpoint=checkpoint)


def _end_with(failed: list[Run], out: Path) -> None:
    """Say which seeds diverged, and leave no empty folder."""
    from ulfine_fast.cache.errors import InputError

    for run in failed:
        try:
            run.refuse_failed()
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
    if not any(out.iterdir()):
        out.rmdir()
    raise typer.Exit(1)
