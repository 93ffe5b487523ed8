"""`ulfine-fast demo`: every step on real images, without a network."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

METHODS = ("zero_shot", "linear_probe", "lightweight", "ulfine", "ulfine_plus")
SPLIT = "--n1 100 --gamma-l 50 --m1 150 --gamma-u 50"


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for images, cache, runs and report.")] = Path(
        "demo-output"
    ),
    seeds: Annotated[int, typer.Option(help="Seeds to average over, fitted together.")] = 5,
    show: Annotated[bool, typer.Option("--open", help="Open the report in a browser at the end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the metrics and the report's path as JSON, and nothing else.")
    ] = False,
) -> None:
    """Extract, fit and report on 3,000 real images of clothes: 10 classes, long-tailed labels, a small encoder."""
    started = time.perf_counter()
    page = (out / "report.html").resolve()
    with contextlib.redirect_stdout(io.StringIO()) if as_json else contextlib.nullcontext():
        results = _run_commands(context, out, seeds)
        typer.echo(f"\nreport: {page}\n{time.perf_counter() - started:.0f} s in all")
    if as_json:
        typer.echo(json.dumps({"report": str(page), "seconds": time.perf_counter() - started, "methods": results}))
    elif not show:
        typer.echo(f"open it with: ulfine-fast demo --out {shlex.quote(str(out))} --open")
    if show:
        typer.launch(page.as_uri())


def _run_commands(context: typer.Context, out: Path, seeds: int) -> dict[str, Any]:
    """Unpack the images, run the commands in this process and print a table; returns each method's metrics.

    Raises:
        typer.Exit: a command failed.
    """
    # loaded on use: both take long to import
    from ulfine_fast.cli.tables import print_metrics
    from ulfine_fast.demo import unpack_images

    # the commands, by the program that this command is part of
    program = context.find_root().command
    commands = demo_commands(unpack_images(out / "images"), out, seeds)
    typer.echo("The encoder lite0-minilm is a small, weak image-text model, not CLIP; see docs/models.md.\n")
    for command in commands:
        typer.echo(f"$ ulfine-fast {shlex.join(command)}")
        # one table of all methods at the end replaces the table of each fit
        hidden = contextlib.redirect_stdout(io.StringIO()) if command[0] == "fit" else contextlib.nullcontext()
        try:
            with hidden:
                code = program.main(command, prog_name="ulfine-fast", standalone_mode=False)
        except typer.Exit as end:
            code = end.exit_code
        if code:
            raise typer.Exit(code)

    # the table, from the summaries that the fits wrote
    results = {}
    for method in METHODS:
        summary = (out / "runs" / method / "summary.json").read_text(encoding="utf-8")
        results[method] = json.loads(summary)["metrics"]
    typer.echo("\nTest metrics in percent, mean ± 95% interval over seeds:")
    print_metrics(results, as_json=False)
    typer.echo("\nThe same by hand:")
    for command in commands:
        typer.echo(f"  ulfine-fast {shlex.join(command)}")
    return results


def demo_commands(images: Path, out: Path, seeds: int) -> list[list[str]]:
    """The arguments of each command of the demo: extract, a fit for each method, report."""
    cache = str(out / "cache")
    runs = {method: str(out / "runs" / method) for method in METHODS}
    fits = [
        ["fit", cache, "--method", method, "--seeds", str(seeds), *SPLIT.split(), "--out", run]
        for method, run in runs.items()
    ]
    return [
        ["extract", str(images), "--out", cache, "--model", "lite0-minilm"],
        *fits,
        ["report", *runs.values(), "--out", str(out / "report.html")],
    ]
