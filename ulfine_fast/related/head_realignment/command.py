"""`ulfine-fast realign`: a run with its biased head repaired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.runs.run import Run


def realign(
    run: Annotated[Path, typer.Argument(help="Run folder that `fit` wrote, or one with a run for each seed.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")],
    by: Annotated[
        str, typer.Option(help="gaussians (train the head on samples), lda (closed form) or adjust (shift logits).")
    ] = "gaussians",
    kappa: Annotated[
        str, typer.Option(help="Weight of the text in class means, in images; of several, the best on validation.")
    ] = "0,5,20,100",
    tau: Annotated[float, typer.Option(help="Strength of adjust, in tau log pi.")] = 1.0,
    cache: Annotated[Path | None, typer.Option(help="The run's cache, where it is no longer where it was.")] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV of corrected labels that the run was fitted with.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Repair the head of a run that favours some classes; the result is a run folder as any other."""
    from ulfine_fast.related.head_realignment.realign import realign as realign_runs
    from ulfine_fast.runs.run import Run
    from ulfine_fast.runs.seeds import refuse_other_content, save_runs, summarize

    given = [Run.load(folder) for folder in _folders(run)]
    refuse_other_content(out, [one.config.seed for one in given])
    found = realign_runs(given, _cache(given[0], cache, labels), by=by, kappas=_kappas(kappa), tau=tau, device=device)
    summary = save_runs(found, out)
    _print({"before": summarize([one.metrics for one in given]), by: summary}, as_json)
    if not as_json:
        typer.echo(f"run: {out}")
    _warn(given, found)


def _folders(run: Path) -> list[Path]:
    """The run folder itself, or the folders of its seeds."""
    inner = [] if (run / "config.json").exists() else sorted(run.glob("seed-*/config.json"))
    return [path.parent for path in inner] or [run]


def _cache(run: Run, given: Path | None, labels: Path | None) -> FeatureCache:
    """The features that the run was fitted on, under corrected labels where there are any."""
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.data.corrections import corrected, read_corrections

    where = given or run.cache_path
    if where is None:
        raise InputError("this run was fitted on arrays in memory; name a cache with --cache")
    if not (where / "manifest.json").exists():
        raise InputError(f"the cache {where} is gone or no cache; extract it again, or name another with --cache")
    features = FeatureCache.open(where)
    return features if labels is None else corrected(features, read_corrections(labels))


def _kappas(text: str) -> list[float]:
    from ulfine_fast.cache.io.errors import InputError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"kappa is numbers separated by commas such as 0,5,20, got {text!r}") from None


def _print(rows: dict[str, dict[str, dict[str, float | int]]], as_json: bool) -> None:
    from ulfine_fast.cli.tables import print_summary

    if as_json:
        typer.echo(json.dumps(rows))
        return
    print_summary(rows, as_json=False)


def _warn(before: list[Run], after: list[Run]) -> None:
    """Say where validation speaks against the new head."""
    for old, new in zip(before, after, strict=True):
        was, now = ((one.metrics.get("val") or {}).get("balanced_accuracy") for one in (old, new))
        if was is not None and now is not None and now < was:
            typer.echo(
                f"seed {old.config.seed}: balanced accuracy on validation fell from {100 * was:.1f} to "
                f"{100 * now:.1f}; keep the run as it was, or try another --by",
                err=True,
            )
