"""`ulfine-fast methods`: all methods, what they need and where they come from."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its options.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the methods: what each does, what it needs and its source; or the options of one."""
    from ulfine_fast.config import own_options
    from ulfine_fast.methods import registry

    names = registry.names() if name is None else [name]
    rows: list[dict[str, Any]] = []
    for each in names:
        entry = registry.find(each)
        rows.append({"name": each, "summary": entry.summary, "needs": entry.needs, "source": entry.source})
    if name is not None:
        rows[0]["options"] = {
            option: {"default": spec.default, "help": spec.metadata["help"], "type": str(spec.type)}
            for option, spec in own_options(name).items()
        }
    if as_json:
        typer.echo(json.dumps(rows))
        return

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    # one line for each method where the output is no terminal
    console = Console(width=None if Console().is_terminal else 200)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("what it does", no_wrap=True, overflow="ellipsis")
    table.add_column("needs", no_wrap=True, overflow="ellipsis")
    table.add_column("source", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(row["name"], row["summary"], ", ".join(row["needs"]), row["source"])
    console.print(table)
    if name is None:
        typer.echo("`ulfine-fast methods NAME` shows the options of one")
        return
    options = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("option", "default", "help"):
        options.add_column(title)
    for option, spec in own_options(name).items():
        options.add_row(f"--{option.replace('_', '-')}", str(spec.default), spec.metadata["help"])
    console.print(options)
