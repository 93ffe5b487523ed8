"""How far the fast ways to read images agree with the model's own preprocessing, and what they save.

    python -m benchmarks.studies.agreement --json agreement.json
    python -m benchmarks.studies.agreement --ways exact --precision bf16     # products of less precision alone

Features of the same images, plain and drawn views, once as open_clip prepares them and once as each way does: cosines
of the two. `reduced` is what an extraction on a processor does by default: images of twice the model's side or more
are reduced by a whole number before they are resized, JPEG files while they are decoded. `device` is what it does
beside a GPU: images travel whole, and batched products resize, crop and augment all views there. On a machine without
a GPU the same products run on the processor, for the pixels' sake alone. `exact` reads as open_clip does: what remains
is the difference between the model at `--precision` and in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.images import VIT, image_source, model_name
from benchmarks.options import DeviceOption, JsonOption, parse_names, split_names
from benchmarks.results import Row, print_table, write_rows
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.models.lite0_minilm import NAME as LITE0
from ulfine_fast.cache.pipeline.plan import batches_of
from ulfine_fast.cache.pipeline.read import Batch, ImageReader
from ulfine_fast.cache.pipeline.resample import by_products
from ulfine_fast.cache.pipeline.threads import one_core
from ulfine_fast.cache.pipeline.views import ViewRecipe, augmented
from ulfine_fast.cache.sources import ListedSource
from ulfine_fast.cache.sources import Row as ImageRow
from ulfine_fast.cli.main import guarded

WAYS = ("exact", "reduced", "device")
VIEW_KINDS = ("plain", "weak", "strong")
_BATCH = 16


def measure(
    source: ListedSource, encoder: Encoder, ways: Sequence[str] = WAYS[1:], rounded: Encoder | None = None
) -> list[Row]:
    """One row for each way and kind of view.

    Args:
        source: images.
        encoder: the model; its preprocessing must have a form for devices.
        ways: of `WAYS`.
        rounded: the same model at another precision, with which the ways' features are made.
    """
    assert encoder.resampling is not None
    exact = ImageReader(source, encoder.resize, ViewRecipe(), encoder.spec.image_size)
    reduced = replace(exact, resampling=encoder.resampling)
    on_device = replace(reduced, on_device=True)

    def pixels_of(way: str) -> tuple[ImageReader, Callable[[Batch], torch.Tensor]]:
        if way == "device":
            return on_device, lambda batch: _by_products(on_device, batch, encoder.device)
        reader = reduced if way == "reduced" else exact
        return reader, lambda batch: reader.pixels_on(encoder.device, batch)

    rows: list[Row] = []
    with one_core():
        exact_features, exact_rate = _features(source.rows, encoder, *pixels_of("exact"))
        for way in ways:
            features, rate = _features(source.rows, rounded or encoder, *pixels_of(way))
            cosines = (exact_features * features).sum(dim=-1)  # (N, V)
            rows += [
                {
                    "way": way,
                    "view": kind,
                    "images": len(cosines),
                    "mean_cosine": float(of_view.mean()),
                    "worst_cosine": float(of_view.min()),
                    "times_as_fast": rate / exact_rate,
                }
                for kind, of_view in zip(VIEW_KINDS, cosines.unbind(dim=1), strict=True)
            ]
    return rows


def _by_products(reader: ImageReader, batch: Batch, device: torch.device) -> torch.Tensor:
    """A batch's views as a GPU makes them, on any device: uint8 (B V, H, W, 3)."""
    assert batch.sampling is not None
    assert reader.resampling is not None
    views = by_products(torch.as_tensor(batch.pixels).to(device), batch.sampling, reader.resampling)
    return augmented(views.flatten(0, 1), batch.drawn, reader.recipe).permute(0, 2, 3, 1)


def _features(
    rows: Sequence[ImageRow], encoder: Encoder, reader: ImageReader, pixels_of: Callable[[Batch], torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """Features (N, V, D) of all rows, and images that one core reads and prepares in a second."""
    features = []
    seconds = 0.0
    for batch_rows in batches_of(rows, _BATCH):
        started = time.perf_counter()
        batch = reader.read(batch_rows)
        pixels = pixels_of(batch)
        seconds += time.perf_counter() - started
        features.append(encoder.encode_pixels(pixels).unflatten(0, (len(batch.kept), -1)).cpu())
    return torch.cat(features), len(rows) / seconds


def agreement(
    data: Annotated[
        str, typer.Option(help="demo, tux_paint, png28, jpeg500, photograph or folders, separated by commas.")
    ] = "demo,tux_paint,jpeg500,photograph",
    models: Annotated[str, typer.Option(help="lite0-minilm, ViT-B-32 (random weights) or both.")] = "lite0-minilm",
    ways: Annotated[str, typer.Option(help="Of exact, reduced, device.")] = "reduced,device",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of the model that is compared.")] = "fp32",
    count: Annotated[int, typer.Option(help="Images at most.", min=1)] = 1000,
    device: DeviceOption = "auto",
    as_json: JsonOption = None,
) -> None:
    """Compare features of images read fast with those of the model's own preprocessing."""
    chosen_ways = parse_names(ways, WAYS, "ways")
    rows: list[Row] = []
    for model in parse_names(models, (LITE0, VIT), "models"):
        encoder = load_encoder(model_name(model), device=device)
        rounded = load_encoder(model_name(model), device=device, precision=precision)
        for name in split_names(data):
            measured = measure(image_source(name, count), encoder, chosen_ways, rounded)
            rows += [{"model": model, "precision": precision, "data": Path(name).name, **row} for row in measured]
    write_rows(as_json, rows)
    lines = [
        [
            *(str(row[name]) for name in ("model", "data", "way", "view", "images")),
            f"{row['mean_cosine']:.5f}",
            f"{row['worst_cosine']:.5f}",
            f"{row['times_as_fast']:.2f}",
        ]
        for row in rows
    ]
    titles = ["model", "data", "way", "view", "images", "mean cosine", "worst cosine", "reading, times as fast"]
    print_table(titles, lines, texts=4)


if __name__ == "__main__":
    typer.run(guarded(agreement))
