"""`ulfine-fast push`: an export folder to the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that `export` wrote.")],
    repo: Annotated[str, typer.Argument(help="Model repository, owner/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Hide a repository that is created.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the commit's address as JSON.")] = False,
) -> None:
    """Send an export folder to a model repository, with the token of `hf auth login` or HF_TOKEN."""
    from ulfine_fast.exports import push as push_folder

    address = push_folder(folder, repo, private=private, message=message)
    typer.echo(json.dumps({"repo": repo, "commit": address}) if as_json else address)
