"""`ulfine-fast report`: run folders in, one HTML page out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ulfine_fast.cache.io.terminal import printable
from ulfine_fast.cli.options import with_old_name
from ulfine_fast.report.choices import Projection


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that `fit` wrote, or folders above them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    images: Annotated[
        str | None,
        typer.Option(help="Folder, table or data set with the images; default: where `extract` read them."),
    ] = None,
    pictures: Annotated[str | None, typer.Option(hidden=True)] = None,
    groups: Annotated[
        Path | None, typer.Option(help="CSV with the columns id and group: compares groups of test images.")
    ] = None,
    projection: Annotated[
        Projection, typer.Option("--map", help="Map of the test images' features; umap is an extra.")
    ] = "pca",
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write one self-contained HTML page about runs: tables, charts, confusion, images."""
    from ulfine_fast.cache.io.progress import working
    from ulfine_fast.report.feature_map import mapper
    from ulfine_fast.report.images import find_images, read_attributes
    from ulfine_fast.report.leakage import find_leakage
    from ulfine_fast.report.one_byte import rounder
    from ulfine_fast.report.page import render_page, write_page
    from ulfine_fast.report.sweeps import find_sweeps
    from ulfine_fast.runs.files import load_runs

    images = with_old_name("--images", images, "--pictures", pictures)
    with working("write the report"):
        map_run = mapper(projection)
        loaded = load_runs(runs)
        attributes = None if groups is None else read_attributes(groups)
        read_image, no_images_because = find_images(loaded, images)
        text = render_page(
            loaded,
            images=read_image,
            title=title,
            leakage=find_leakage(loaded),
            attributes=attributes,
            sweeps=find_sweeps(runs),
            map_run=map_run,
            rounding_cost=rounder(),
            page=out,
        )
        page = write_page(text, out)
    size = page.stat().st_size
    if as_json:
        written = {
            "report": str(page),
            "runs": len(loaded),
            "bytes": size,
            "images": read_image is not None,
            "no_images_because": no_images_because or None,
        }
        typer.echo(json.dumps(written))
        return
    if read_image is None:
        typer.echo(
            f"no images in the page: {printable(no_images_because)}; name their location with --images", err=True
        )
    typer.echo(f"report: {page} ({len(loaded)} runs, {size / 1e3:,.0f} kB)")
