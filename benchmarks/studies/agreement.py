"""How far the fast ways to read images agree with the model's own preprocessing, and what they save.

    python -m benchmarks.studies.agreement --json agreement.json

Features of the same images, plain and drawn views, once as open_clip prepares them and once as each way does: cosines
of the two. `reduced` is what an extraction on a processor does by default: images of twice the model's side or more
are reduced by a whole number before they are resized, JPEG files while they are decoded. `device` is what it does
beside a GPU: images travel whole, and batched products resize, crop and augment all views there. On a machine without
a GPU the same products run on the processor, for the pixels' sake alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.comparison.parts import write_json
from benchmarks.data import demo
from benchmarks.images import SHAPES, model_name
from benchmarks.options import parse_names
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.pipeline.plan import batches_of, is_listed
from ulfine_fast.cache.pipeline.read import Batch, ImageReader
from ulfine_fast.cache.pipeline.resample import by_products
from ulfine_fast.cache.pipeline.threads import one_core
from ulfine_fast.cache.pipeline.views import ViewRecipe, augmented
from ulfine_fast.cache.sources import ListedSource, Row, open_source, reopen_source
from ulfine_fast.cli.main import guarded

Figures = dict[str, Any]
WAYS = ("reduced", "device")
KINDS = ("plain", "weak", "strong")
_STAMPS = Path("/usr/share/tuxpaint/stamps")
_BATCH = 16


def images_of(data: str, count: int) -> ListedSource:
    """The demo's images, Tux Paint's stamps, one of `SHAPES`, or any folder; at most `count`, evenly chosen."""
    if data == "demo":
        source = reopen_source(demo().manifest.source)  # type: ignore[union-attr]
    elif data in SHAPES:
        source = open_source(SHAPES[data](min(count, 48) if data == "photograph" else count))
    else:
        source = open_source(_STAMPS if data == "tux_paint" else Path(data))
    if not is_listed(source):
        raise InputError(f"{data} is a stream; give a folder of images")
    rows = source.rows[:: max(1, len(source.rows) // count)][:count]
    # views are drawn of training images alone
    source.rows = [replace(row, split="train") for row in rows]
    return source


def measure(source: ListedSource, encoder: Encoder, ways: Sequence[str] = WAYS) -> list[Figures]:
    """One row for each way and kind of view.

    Args:
        source: images.
        encoder: the model; its preprocessing must have a form for devices.
        ways: of `WAYS`.
    """
    assert encoder.resampling is not None
    exact = ImageReader(source, encoder.resize, ViewRecipe(), encoder.spec.image_size)
    reduced = replace(exact, resampling=encoder.resampling)
    device = replace(reduced, later=True)
    makers: dict[str, tuple[ImageReader, Callable[[Batch], torch.Tensor]]] = {
        "exact": (exact, lambda batch: exact.pixels_on(encoder.device, batch)),
        "reduced": (reduced, lambda batch: reduced.pixels_on(encoder.device, batch)),
        "device": (device, lambda batch: _by_products(device, batch, encoder.device)),
    }
    with one_core():
        wanted, own_rate = _features(source.rows, encoder, *makers["exact"])
        rows = []
        for way in ways:
            found, rate = _features(source.rows, encoder, *makers[way])
            rows += list(_rows(way, wanted, found, rate / own_rate))
    return rows


def _by_products(reader: ImageReader, batch: Batch, device: torch.device) -> torch.Tensor:
    """A batch's views as a GPU makes them, wherever that is: uint8 (B V, H, W, 3)."""
    assert batch.sampling is not None
    assert reader.resampling is not None
    views = by_products(torch.as_tensor(batch.pixels).to(device), batch.sampling, reader.resampling)
    return augmented(views.flatten(0, 1), batch.drawn, reader.recipe).permute(0, 2, 3, 1)


def _features(
    rows: Sequence[Row], encoder: Encoder, reader: ImageReader, pixels: Callable[[Batch], torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """Features (N, V, D) of all rows, and images that one core reads and prepares in a second."""
    features, seconds = [], 0.0
    for batch_rows in batches_of(rows, _BATCH):
        started = time.perf_counter()
        batch = reader.read(batch_rows)
        made = pixels(batch)
        seconds += time.perf_counter() - started
        features.append(encoder.encode_pixels(made).unflatten(0, (len(batch.kept), -1)).cpu())
    return torch.cat(features), len(rows) / seconds


def _rows(way: str, wanted: torch.Tensor, found: torch.Tensor, faster: float) -> Iterator[Figures]:
    cosines = (wanted * found).sum(dim=-1)  # (N, V)
    for view, kind in enumerate(KINDS):
        own = cosines[:, view]
        figures = {"mean_cosine": float(own.mean()), "worst_cosine": float(own.min())}
        yield {"way": way, "view": kind, "images": len(own), **figures, "times_as_fast": faster}


def agreement(
    data: Annotated[
        str, typer.Option(help="demo, tux_paint, png28, jpeg500, photograph or folders, separated by commas.")
    ] = "demo,tux_paint,jpeg500,photograph",
    models: Annotated[str, typer.Option(help="lite0-minilm, ViT-B-32 (random weights) or both.")] = "lite0-minilm",
    ways: Annotated[str, typer.Option(help="reduced, device or both.")] = "reduced,device",
    count: Annotated[int, typer.Option(help="Images at most.", min=1)] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Compare features of images read fast with those of the model's own preprocessing."""
    chosen = parse_names(ways, WAYS, "ways")
    rows = []
    for model in parse_names(models, ("lite0-minilm", "ViT-B-32"), "models"):
        encoder = load_encoder(model_name(model), device=device)
        for name in data.split(","):
            measured = measure(images_of(name, count), encoder, chosen)
            rows += [{"model": model, "data": Path(name).name, **row} for row in measured]
    if as_json is not None:
        write_json(as_json, rows)
    titles = ["model", "data", "way", "view", "images", "mean cosine", "worst cosine", "reading, times as fast"]
    print_table(titles, map(_line, rows), texts=4)


def _line(row: Figures) -> list[str]:
    texts = [row["model"], row["data"], row["way"], row["view"], str(row["images"])]
    return [*texts, f"{row['mean_cosine']:.5f}", f"{row['worst_cosine']:.5f}", f"{row['times_as_fast']:.2f}"]


if __name__ == "__main__":
    typer.run(guarded(agreement))
