"""`ulfine-fast inspect`: the content of a cache, and whether it is undamaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ulfine_fast.cache.io.terminal import printable

if TYPE_CHECKING:
    from rich.table import Table


def inspect(
    cache: Annotated[Path, typer.Argument(help="Folder of the cache.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what is in a cache and check every byte of it."""
    from rich.console import Console

    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cache.io.progress import working
    from ulfine_fast.cache.neighbors import leakage_warning
    from ulfine_fast.cache.store import FeatureCache

    with working("check every byte"):
        opened = FeatureCache.open(cache)
        summary = opened.summary()
        # A damaged cache has nothing to compare.
        warning = None if summary["problems"] else leakage_warning(opened)
    if as_json:
        typer.echo(json.dumps({**summary, "leakage": warning}))
    else:
        console = Console()
        console.print(_about(summary))
        console.print(_counts(summary))
        if summary["skipped"]:
            console.print(_skipped(summary))
        console.print("check: every checksum, shape and value is right" if not summary["problems"] else "check: failed")
        if warning is not None:
            console.print(f"warning: {printable(warning)}", style="yellow", markup=False, soft_wrap=True)
    problems = summary["problems"]
    if problems:
        raise InputError(f"{cache} has {len(problems)} problem{'s' * (len(problems) > 1)}: {'; '.join(problems)}")


def _about(summary: dict[str, Any]) -> Table:
    """Model, features, prompts, views, size: two columns."""
    from rich.markup import escape
    from rich.table import Table

    model, views, source = summary["model"], summary["views"], summary["source"]
    tag = f" ({model['pretrained']})" if model["pretrained"] else ""
    tokens = f", tokens {' and '.join(summary['tokens'])}" if summary["tokens"] else ""
    table = Table(title=escape(printable(summary["path"])), show_header=False, title_justify="left")
    rows = {
        "model": f"{model['name']}{tag}, weights {model['sha256'][:12]}, {summary['precision']}",
        "images": f"{summary['images']} from {source['kind']} {source.get('path') or source.get('name')}",
        "features": f"{summary['dim']} x {summary['dtype']}{tokens}, logit scale {model['logit_scale']:.4g}",
        "views": f"1 plain, {views['weak']} weak, {views['strong']} strong, seed {views['seed']}",
        "prompts": "\n".join(summary["prompts"]),
        "size": f"{summary['bytes'] / 1e6:.1f} MB in {summary['shards']} shards",
        "made by": summary["created_by"],
    }
    for name, value in rows.items():
        table.add_row(name, "\n".join(escape(printable(line)) for line in value.split("\n")))
    return table


def _counts(summary: dict[str, Any]) -> Table:
    """Rows per class and split."""
    from rich.markup import escape
    from rich.table import Table

    counts = summary["counts"]
    table = Table("class", title="rows per class and split", title_justify="left")
    for split in counts:
        table.add_column(split, justify="right")
    # Rows without a known class come last.
    others = {name for by_class in counts.values() for name in by_class} - set(summary["class_names"])
    for name in [*summary["class_names"], *sorted(others)]:
        table.add_row(escape(printable(name)), *(str(by_class.get(name, 0)) for by_class in counts.values()))
    table.add_section()
    table.add_row("all", *(str(sum(by_class.values())) for by_class in counts.values()))
    return table


def _skipped(summary: dict[str, Any]) -> Table:
    """The images left out and why."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("image", "reason", title=f"{len(summary['skipped'])} images skipped", title_justify="left")
    for image in summary["skipped"]:
        table.add_row(escape(printable(image["id"])), escape(printable(image["reason"])))
    return table
