"""`ulfine-fast demo`: the whole path on real pictures, without a network."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

METHODS = ("zero_shot", "linear_probe", "lightweight", "ulfine", "ulfine_plus")
SPLIT = "--n1 100 --gamma-l 50 --m1 150 --gamma-u 50"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for pictures, cache, runs and report.")] = Path(
        "demo-output"
    ),
    seeds: Annotated[int, typer.Option(help="Seeds to average over, fitted in one pass.")] = 5,
) -> None:
    """Extract, fit and report on 3,000 real pictures of clothes: 10 classes, long-tailed labels, a small encoder."""
    from ulfine_fast.demo import unpack_pictures

    started = time.perf_counter()
    pictures = unpack_pictures(out / "pictures")
    commands = demo_commands(pictures, out, seeds)
    typer.echo("The encoder lite0-minilm is a small, weak image-text model, not CLIP; see docs/models.md.\n")
    for command in commands:
        _run(command)
    _print_table(out)
    typer.echo("\nThe same by hand:")
    for command in commands:
        typer.echo(f"  ulfine-fast {shlex.join(command)}")
    typer.echo(f"\nreport: {(out / 'report.html').resolve()}\n{time.perf_counter() - started:.0f} s in all")


def demo_commands(pictures: Path, out: Path, seeds: int) -> list[list[str]]:
    """The commands of the demo, as their arguments."""
    cache = str(out / "cache")
    extract = ["extract", str(pictures), "--out", cache, "--model", "lite0-minilm"]
    runs = [str(out / "runs" / method) for method in METHODS]
    fits = [
        ["fit", cache, "--method", method, "--seeds", str(seeds), *SPLIT.split(), "--out", run]
        for method, run in zip(METHODS, runs, strict=True)
    ]
    return [extract, *fits, ["report", *runs, "--out", str(out / "report.html")]]


def _run(command: list[str]) -> None:
    """Run a command as the shell would, in this process; a failure ends the demo."""
    from ulfine_fast.cli.main import app

    typer.echo(f"$ ulfine-fast {shlex.join(command)}")
    # the table of all methods comes at the end
    quiet = contextlib.redirect_stdout(io.StringIO()) if command[0] == "fit" else contextlib.nullcontext()
    try:
        with quiet:
            code = app(command, standalone_mode=False)
    except typer.Exit as end:
        code = end.exit_code
    if code:
        raise typer.Exit(code)


def _print_table(out: Path) -> None:
    """All methods side by side, from the summaries that the fits wrote."""
    from ulfine_fast.cli.tables import print_summary

    summaries = {
        method: json.loads((out / "runs" / method / "summary.json").read_text(encoding="utf-8"))["metrics"]
        for method in METHODS
    }
    typer.echo("\nTest figures in percent, mean ± 95% interval over seeds:")
    print_summary(summaries, as_json=False)
