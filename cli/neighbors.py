"""`ulfine-fast neighbors`: near-duplicates and nearest images of a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def neighbors(
    cache: Annotated[Path, typer.Argument(help="Folder of the cache.")],
    threshold: Annotated[float, typer.Option(help="Least cosine of a near-duplicate, above 0, at most 1.")] = 0.98,
    k: Annotated[int, typer.Option(help="Nearest images of each, for --out.", min=1)] = 10,
    out: Annotated[
        Path | None, typer.Option(help="Write each image's nearest ones to this .parquet.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(help="Pairs to print.", min=0)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with all pairs.")] = False,
) -> None:
    """Find images that are nearly the same, within and across splits."""
    from ulfine_fast.cache.neighbors import build_index, near_duplicates, nearest_columns, summary_of
    from ulfine_fast.cache.store import FeatureCache

    opened = FeatureCache.open(cache)
    index = build_index(opened.plain)
    found = near_duplicates(opened, threshold=threshold, index=index)
    told = summary_of(opened, found)
    if out is not None:
        _write(out, nearest_columns(opened, index, k))
    if as_json:
        typer.echo(json.dumps(told))
    else:
        _print(told, limit)


def _print(told: dict[str, Any], limit: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    how = "every pair was compared" if told["exact"] else f"approximate, recall {told['recall']:.1%} of the ten nearest"
    console.print(
        f"{told['pairs']} near-duplicates in {told['groups']} groups among {told['images']} images "
        f"(cosine {told['threshold']:g} or more; {how})"
    )
    for splits, count in told["by_splits"].items():
        console.print(f"  {splits}: {count}")
    if told["different_labels"]:
        console.print(f"{told['different_labels']} pairs have different labels: one of the two is likely wrong")
    if told["leaks"]:
        console.print(
            f"{told['leaks']} images of val or test are nearly in train or unlabeled: figures on them flatter"
        )
    table = Table("first", "second", "cosine", "splits", "labels")
    for pair in told["near_duplicates"][:limit]:
        cells = [escape(pair["first"]), escape(pair["second"]), f"{pair['cosine']:.4f}", " - ".join(pair["splits"])]
        table.add_row(*cells, "differ" if pair["different_labels"] else "")
    if table.row_count:
        console.print(table)


def _write(out: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    from ulfine_fast.cache.io.errors import InputError

    if out.suffix != ".parquet":
        raise InputError(f"out must end in .parquet, got {out.name!r}")
    try:
        parquet.write_table(pa.table(columns), out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
