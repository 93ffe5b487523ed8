"""`ulfine-fast review`: a local page to label images and correct labels on."""

from __future__ import annotations

import json
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ulfine_fast.cache.io.terminal import printable
from ulfine_fast.cli.options import with_old_name


def review(
    run: Annotated[Path, typer.Argument(help="Run folder that `fit` wrote.")],
    labels: Annotated[
        Path | None,
        typer.Option(help="CSV of corrected labels, read and written; default: labels.csv beside the run's folder."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder of fits from the page; default: RUN-reviewed.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Folder, table or data set with the images; default: where `extract` read them."),
    ] = None,
    pictures: Annotated[str | None, typer.Option(hidden=True)] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 for any free one.", min=0, max=65535)] = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the page's address as JSON.")] = False,
) -> None:
    """Label many images together on a local page: clusters, likely wrong labels, rare classes; Ctrl-C ends it.

    Each label is saved immediately; `fit --labels FILE` reads them.
    """
    from ulfine_fast.cache.io.errors import InputError

    if find_spec("flask") is None:
        raise InputError("the review needs Flask, which is not installed; pip install 'ulfine-fast[review]'")
    from ulfine_fast.review.app import HOST, make_server, new_token
    from ulfine_fast.review.session import Session

    images = with_old_name("--images", images, "--pictures", pictures)
    folder = run.resolve()  # the run may be "."
    labels = labels or folder.parent / "labels.csv"
    out = out or folder.with_name(f"{folder.name}-reviewed")
    session = Session(run, labels, out, images=images, device=device)
    token = new_token()
    server = make_server(session, token, port)
    address = f"http://{HOST}:{server.port}/{token}/"
    if session.no_images:
        typer.echo(
            f"no images on the page: {printable(session.no_images)}; name their location with --images", err=True
        )
    typer.echo(json.dumps({"address": address, "labels": str(labels)}) if as_json else f"review: {address}")
    if open_page:
        webbrowser.open(address)
    try:
        server.serve_forever()
    finally:
        server.server_close()
