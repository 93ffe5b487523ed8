"""`ulfine-fast report`: run folders in, one HTML page out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that `fit` wrote, or folders above them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    images: Annotated[
        str | None,
        typer.Option(help="Where the images are (folder, table or data set name); default: where the cache had them."),
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(help="CSV with the columns id and group: gaps between groups of test images.")
    ] = None,
    projection: Annotated[
        str, typer.Option("--map", help="Map of the test images' features: pca, umap (if installed) or none.")
    ] = "pca",
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write one self-contained HTML page about runs: tables, charts, confusion, images."""
    from ulfine_fast.related.class_bias.section import read_groups
    from ulfine_fast.report.feature_map import mapper
    from ulfine_fast.report.images import find_images
    from ulfine_fast.report.leakage import find_leakage
    from ulfine_fast.report.one_byte import rounder
    from ulfine_fast.report.page import render_page, write_page
    from ulfine_fast.report.sweeps import find_sweeps
    from ulfine_fast.runs.files import load_runs

    mapped = mapper(projection)
    loaded = load_runs(runs)
    attributes = None if groups is None else read_groups(groups)
    opened, reason = find_images(loaded, images)
    rendered = render_page(
        loaded,
        images=opened,
        title=title,
        leakage=find_leakage(loaded),
        attributes=attributes,
        sweeps=find_sweeps(runs),
        mapped=mapped,
        rounded=rounder(),
    )
    page = write_page(rendered, out)
    if as_json:
        facts = {"report": str(page), "runs": len(loaded), "bytes": page.stat().st_size}
        typer.echo(json.dumps(facts | {"images": opened is not None, "no_images_because": reason or None}))
        return
    if opened is None:
        typer.echo(f"no images in the page: {reason}; name their place with --images", err=True)
    typer.echo(f"report: {page} ({len(loaded)} runs, {page.stat().st_size / 1e3:,.0f} kB)")
