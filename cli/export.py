"""`ulfine-fast export`: a run as a folder that other programs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Run folder that `fit` wrote.")],
    folder: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write, new or empty.", show_default="RUN-export")
    ] = None,
    to: Annotated[
        Literal["safetensors", "onnx", "torchscript", "torch.export"], typer.Option(help="Format of the model file.")
    ] = "safetensors",
    with_encoder: Annotated[
        bool, typer.Option("--with-encoder", help="Put the encoder into the graph: images in, probabilities out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a run's classifier with its settings and a model card."""
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cache.io.progress import working
    from ulfine_fast.exports import FORMATS
    from ulfine_fast.exports import export as export_run
    from ulfine_fast.runs.predict import encoder_of_run
    from ulfine_fast.runs.run import Run

    if folder is not None and out is not None:
        raise InputError(f"the folder to write is named twice, {folder} and --out {out}; name it once")
    target = out or folder or run.resolve().with_name(f"{run.resolve().name}-export")
    fitted = Run.load(run)
    with working("export"):
        written = export_run(fitted, target, to=to, encoder=encoder_of_run(fitted, "cpu") if with_encoder else None)
    if as_json:
        typer.echo(json.dumps({"out": str(written), "to": to, "file": FORMATS[to], "with_encoder": with_encoder}))
        return
    typer.echo(f"{written / FORMATS[to]}, config.json and a model card")
