"""`ulfine-fast fit`: train one method over a cache, several seeds in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ulfine_fast.cli.settings import with_settings


@with_settings
def fit(
    cache: Annotated[Path, typer.Argument(help="Cache folder that `extract` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")] = Path("run"),
    seeds: Annotated[int, typer.Option(help="How many seeds to fit in one pass, from --seed on.")] = 1,
    split: Annotated[Path | None, typer.Option(help="Use this saved split.json (or a run's) for every seed.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    **settings: Any,
) -> None:
    """Train a classifier over a cache; figures, heads and predictions go to a run folder."""
    from ulfine_fast.cache.errors import InputError
    from ulfine_fast.cli.tables import print_summary
    from ulfine_fast.config import FitConfig

    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    first = FitConfig(**settings)
    configs = [FitConfig(**{**settings, "seed": first.seed + i}) for i in range(seeds)]

    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.splits import read_split
    from ulfine_fast.summary import refuse_other_content, save_runs
    from ulfine_fast.train import fit_many

    # before minutes of training, not after
    refuse_other_content(out, [config.seed for config in configs])
    features = FeatureCache.open(cache)
    given = None if split is None else read_split(split, features.ids)
    runs = fit_many(features, configs, split=given, device=device)
    print_summary({first.method: save_runs(runs, out)}, as_json=as_json)
    if not as_json:
        typer.echo(f"run: {out}")
