"""`ulfine-fast demo`: the whole path on real images, without a network."""

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
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for images, cache, runs and report.")] = Path(
        "demo-output"
    ),
    seeds: Annotated[int, typer.Option(help="Seeds to average over, fitted in one pass.")] = 5,
    show: Annotated[bool, typer.Option("--open", help="Open the report in a browser at the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures and where the report is as JSON.")] = False,
) -> None:
    """Extract, fit and report on 3,000 real images of clothes: 10 classes, long-tailed labels, a small encoder."""
    started = time.perf_counter()
    page = (out / "report.html").resolve()
    with contextlib.redirect_stdout(io.StringIO()) if as_json else contextlib.nullcontext():
        _whole_path(out, seeds)
        typer.echo(f"\nreport: {page}\n{time.perf_counter() - started:.0f} s in all")
    if as_json:
        told = {"report": str(page), "seconds": time.perf_counter() - started, "methods": _summaries(out)}
        typer.echo(json.dumps(told))
    elif not show:
        typer.echo(f"open it with: ulfine-fast demo --out {shlex.quote(str(out))} --open")
    if show:
        typer.launch(page.as_uri())


def _whole_path(out: Path, seeds: int) -> None:
    """Images, commands, table."""
    from ulfine_fast.demo import unpack_images

    images = unpack_images(out / "images")
    commands = demo_commands(images, out, seeds)
    typer.echo("The encoder lite0-minilm is a small, weak image-text model, not CLIP; see docs/models.md.\n")
    for command in commands:
        _run(command)
    _print_table(out)
    typer.echo("\nThe same by hand:")
    for command in commands:
        typer.echo(f"  ulfine-fast {shlex.join(command)}")


def demo_commands(images: Path, out: Path, seeds: int) -> list[list[str]]:
    """The commands of the demo, as their arguments."""
    cache = str(out / "cache")
    extract = ["extract", str(images), "--out", cache, "--model", "lite0-minilm"]
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
    from ulfine_fast.cli.tables import print_metrics

    typer.echo("\nTest figures in percent, mean ± 95% interval over seeds:")
    print_metrics(_summaries(out), as_json=False)


def _summaries(out: Path) -> dict[str, Any]:
    """Figures of each method over the seeds, as its fit wrote them."""
    folders = {method: out / "runs" / method for method in METHODS}
    files = {method: (folder / "summary.json").read_text(encoding="utf-8") for method, folder in folders.items()}
    return {method: json.loads(text)["metrics"] for method, text in files.items()}
