"""`ulfine-fast neighbors`: near-duplicates and nearest images of a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ulfine_fast.cache.io.terminal import printable


def neighbors(
    cache: Annotated[Path, typer.Argument(help="Folder of the cache.")],
    threshold: Annotated[float, typer.Option(help="Least cosine of a near-duplicate, above 0, at most 1.")] = 0.98,
    k: Annotated[int, typer.Option(help="Nearest images of each, for --out.", min=1)] = 10,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write each image's nearest ones to this .parquet.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(help="Pairs to print.", min=0)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with all pairs.")] = False,
) -> None:
    """Find images that are nearly the same, within and across splits."""
    from ulfine_fast.cache import neighbors as search
    from ulfine_fast.cache.store import FeatureCache

    if out is not None:
        search.check_table_name(out)
    opened = FeatureCache.open(cache)
    index = search.build_index(opened.plain)
    duplicates = search.near_duplicates(opened, threshold=threshold, index=index)
    summary = search.duplicates_summary(opened, duplicates)
    if out is not None:
        search.write_columns(out, search.nearest_columns(opened, index, k))
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print(summary, limit)


def _print(summary: dict[str, Any], limit: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    how = (
        "every pair was compared"
        if summary["exact"]
        else f"approximate, recall {summary['recall']:.1%} of the ten nearest"
    )
    console.print(
        f"{summary['pairs']} near-duplicates in {summary['groups']} groups among {summary['images']} images "
        f"(cosine {summary['threshold']:g} or more; {how})"
    )
    for splits, count in summary["by_splits"].items():
        console.print(f"  {splits}: {count}")
    if summary["different_labels"]:
        console.print(f"{summary['different_labels']} pairs have different labels: one of the two is likely wrong")
    if summary["leaks"]:
        console.print(
            f"{summary['leaks']} images of val or test are nearly in train or unlabeled: metrics on them are too good"
        )
    table = Table("first", "second", "cosine", "splits", "labels")
    for pair in summary["near_duplicates"][:limit]:
        table.add_row(
            escape(printable(pair["first"])),
            escape(printable(pair["second"])),
            f"{pair['cosine']:.4f}",
            " - ".join(pair["splits"]),
            "differ" if pair["different_labels"] else "",
        )
    if table.row_count:
        console.print(table)
