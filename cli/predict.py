"""`ulfine-fast predict`: classes of new images, by a run's head and the encoder named in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ulfine_fast.cache.io.terminal import printable
from ulfine_fast.cli.filling import print_notes


def predict(
    run: Annotated[
        Path,
        typer.Argument(help="Run folder that `fit` wrote, of which seeds are averaged, or what `export` wrote."),
    ],
    images: Annotated[
        Path, typer.Argument(help="An image, a folder of images at any depth, a csv or parquet table, or a cache.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Table to write: .csv or .parquet.")] = Path(
        "predictions.csv"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Images encoded together (at least 1).")] = 32,
    five_crops: Annotated[
        bool, typer.Option("--five-crops", help="Average the logits of four corners and the middle, as LIFT does.")
    ] = False,
    reject: Annotated[
        float | None,
        typer.Option(
            help="Mark images that are none of the classes, at this rate of false rejection, such as 0.05 (between 0 "
            "and 1)."
        ),
    ] = None,
    sets: Annotated[
        float | None,
        typer.Option(
            help="List every class that cannot be excluded, so that this fraction of the lists, such as 0.9, holds the "
            "true class (between 0 and 1)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts as JSON.")] = False,
) -> None:
    """Predict the class of each image: id, class, probability and the five likeliest classes."""
    from ulfine_fast.exports.load import open_predictor
    from ulfine_fast.runs.predict import inputs_at, refuse_output, write_predictions

    refuse_output(out)
    predictor, source = open_predictor(run), inputs_at(images)
    print_notes(source)
    predictions = predictor.predict(
        source, device=device, batch_size=batch_size, five_crops=five_crops, rate=reject, coverage=sets
    )
    write_predictions(predictions, out)
    if as_json:
        typer.echo(json.dumps({**predictions.summary(), "seeds": predictor.seeds, "out": str(out)}))
        return
    seeds = f", mean of {predictor.seeds} seeds" if predictor.seeds > 1 else ""
    typer.echo(f"{len(predictions.ids)} images{seeds}: {out}")
    for line in predictions.lines():
        typer.echo(printable(line))
    for name, reason in predictions.skipped:
        typer.echo(f"skipped {printable(name)}: {printable(reason)}", err=True)
