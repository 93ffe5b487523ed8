"""`ulfine-fast realign`: a run with its biased head repaired."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def realign(
    run: Annotated[Path, typer.Argument(help="Run folder that `fit` wrote, or one with a run for each seed.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")],
    by: Annotated[
        Literal["gaussians", "lda", "adjust"],
        typer.Option(help="gaussians (train the head on samples), lda (closed form) or adjust (shift logits)."),
    ] = "gaussians",
    kappa: Annotated[
        str, typer.Option(help="Weight of the text in class means, in images; of several, the best on validation.")
    ] = "0,5,20,100",
    tau: Annotated[float, typer.Option(help="Strength of adjust, in tau log pi.")] = 1.0,
    cache: Annotated[Path | None, typer.Option(help="The run's cache, where it has moved.")] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV of corrected labels that the run was fitted with.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Repair the head of a run that favours some classes; the result is a run folder as any other."""
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cli.tables import print_metrics
    from ulfine_fast.data.corrections import corrected, read_corrections
    from ulfine_fast.related.head_realignment.realign import realign as realign_runs
    from ulfine_fast.runs.evaluate import open_cache
    from ulfine_fast.runs.run import Run
    from ulfine_fast.runs.seeds import mean_metrics, refuse_other_content, save_runs

    try:
        kappas = [float(part) for part in kappa.split(",")]
    except ValueError:
        raise InputError(f"kappa is numbers separated by commas such as 0,5,20, got {kappa!r}") from None

    # the run itself, or those of its seeds
    inner = [] if (run / "config.json").exists() else sorted(run.glob("seed-*/config.json"))
    before = [Run.load(folder) for folder in [file.parent for file in inner] or [run]]
    refuse_other_content(out, [fitted.config.seed for fitted in before])
    features = open_cache(before[0], cache)
    if labels is not None:
        features = corrected(features, read_corrections(labels))

    after = realign_runs(before, features, by=by, kappas=kappas, tau=tau, device=device)
    means = save_runs(after, out)
    print_metrics({"before": mean_metrics([fitted.metrics for fitted in before]), by: means}, as_json=as_json)
    if not as_json:
        typer.echo(f"run: {out}")
    for old, new in zip(before, after, strict=True):
        was, now = ((fitted.metrics.get("val") or {}).get("balanced_accuracy") for fitted in (old, new))
        if was is not None and now is not None and now < was:
            typer.echo(
                f"seed {old.config.seed}: balanced accuracy on validation fell from {100 * was:.1f} to "
                f"{100 * now:.1f}; keep the run as it was, or try another --by",
                err=True,
            )
