"""`ulfine-fast distill`: a small network that takes images, trained on a run's soft labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ulfine_fast.cache.io.terminal import printable
from ulfine_fast.cli.filling import Workers, print_notes


def distill(
    run: Annotated[Path, typer.Argument(help="Run folder that `fit` wrote; several seeds are averaged.")],
    images: Annotated[
        Path, typer.Argument(help="The run's images: the folder or table that its cache was extracted from.")
    ],
    student: Annotated[str, typer.Option(help="Model of timm, such as mobilenetv3_small_050.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new or empty folder.")] = Path("student"),
    image_size: Annotated[
        int | None, typer.Option(help="Height and width of its input in pixels.", show_default="as timm's model")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Times that each image is seen (at least 1).")] = 30,
    batch_size: Annotated[int, typer.Option(help="Images of a step (at least 2).")] = 64,
    lr: Annotated[float, typer.Option(help="Largest learning rate of AdamW (above 0).")] = 2e-3,
    label_weight: Annotated[
        float, typer.Option(help="Part of a labelled image's target that is its label (0 to 1).")
    ] = 0.5,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from timm's weights, which are downloaded.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Start from a safetensors file of the same network.", show_default=False)
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx too: images in, probabilities out.")] = False,
    cache: Annotated[Path | None, typer.Option(help="The run's cache, where it has moved.", show_default=False)] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Table of corrected labels that the run was fitted with.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and views (at least 0).")] = 0,
    workers: Workers = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print what it reached as JSON.")] = False,
) -> None:
    """Train a small network on a run's soft labels over all images; it needs no encoder.

    Interrupted, the same command goes on after the last finished epoch.
    """
    from ulfine_fast.distillation import distill as distill_runs
    from ulfine_fast.distillation.distill import cache_of_runs
    from ulfine_fast.distillation.teaching import images_of_run
    from ulfine_fast.runs.seeds import load_seeds

    runs, source = load_seeds(run), images_of_run(images)
    print_notes(source)
    made = distill_runs(
        runs,
        source,
        out,
        student=student,
        cache=cache_of_runs(runs, cache, labels),
        image_size=image_size,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        label_weight=label_weight,
        seed=seed,
        pretrained=pretrained,
        weights=weights,
        onnx=onnx,
        device=device,
        workers=workers,
    )
    if as_json:
        typer.echo(json.dumps({"out": str(made.folder), **made.about}))
        return
    for line in made.lines():
        typer.echo(printable(line))
