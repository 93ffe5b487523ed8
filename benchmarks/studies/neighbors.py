"""What a cosine threshold says of copies, and what the approximate index costs and misses.

    python -m benchmarks.studies.neighbors --json neighbors.json
    python -m benchmarks.studies.neighbors --rows 100000,300000

The first compares images with variants of themselves: how alike a model finds a copy that was encoded again, made
smaller, cut or mirrored, beside how alike the nearest other image is. The second searches rows that lie between two
of the demo's, with a little noise, once flat and once in cells.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from benchmarks.comparison.parts import write_json
from benchmarks.data import demo
from benchmarks.studies.agreement import images_of
from benchmarks.tables import print_table
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.neighbors import build_index
from ulfine_fast.cache.sources import ListedSource
from ulfine_fast.cli.main import guarded

Figures = dict[str, Any]
Variant = Callable[[Image.Image], Image.Image]
_BATCH = 32
_QUANTILES = {"first_percentile": 0.01, "median": 0.5, "last_percentile": 0.99}


def _encoded_again(quality: int) -> Variant:
    def make(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return make


def _smaller(image: Image.Image) -> Image.Image:
    size = tuple(max(1, 2 * side // 3) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _cut(image: Image.Image) -> Image.Image:
    across, down = (max(1, side * 3 // 100) for side in image.size)
    return image.crop((across, down, image.width - across, image.height - down))


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


VARIANTS: dict[str, Variant] = {
    "JPEG of quality 90": _encoded_again(90),
    "JPEG of quality 50": _encoded_again(50),
    "two thirds of the size": _smaller,
    "cut by 3% on each side": _cut,
    "mirrored": _mirrored,
}


def copies(source: ListedSource, encoder: Encoder) -> list[Figures]:
    """One row for each variant, and one for the nearest other image: quantiles of cosines."""
    images = [source.read(row) for row in source.rows]
    own = _features(images, encoder)
    rows = [(name, (own * _features(list(map(make, images)), encoder)).sum(axis=1)) for name, make in VARIANTS.items()]
    alike = own @ own.T
    np.fill_diagonal(alike, -1)
    rows.append(("nearest other image", alike.max(axis=1)))
    return [{"variant": name, "images": len(own), **_quantiles(cosines)} for name, cosines in rows]


def _quantiles(cosines: NDArray[np.float32]) -> Figures:
    return {name: float(np.quantile(cosines, share)) for name, share in _QUANTILES.items()}


def _features(images: list[Image.Image], encoder: Encoder) -> NDArray[np.float32]:
    """Unit rows (N, D), of the plain view."""
    made = [np.asarray(encoder.resize(image)) for image in images]
    parts = [made[start : start + _BATCH] for start in range(0, len(made), _BATCH)]
    return np.concatenate([encoder.encode_pixels(torch.from_numpy(np.stack(part))).cpu().numpy() for part in parts])


def between(features: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Rows (count, D) between two real ones each, so that they lie as features do, and a little noise."""
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, len(features), (2, count))
    share = rng.random((count, 1), dtype=np.float32)
    noise = rng.standard_normal((count, features.shape[1]), dtype=np.float32) * (0.1 / np.sqrt(features.shape[1]))
    return share * features[one] + (1 - share) * features[other] + noise


def search(rows: NDArray[np.float32], *, queries: int = 2000) -> list[Figures]:
    """The flat index and the one of cells over rows (n, D): seconds to build, queries a second, recall of ten."""
    count = len(rows)
    found = []
    for exact in (True, False):
        started = time.perf_counter()
        index = build_index(rows, exact_rows=count if exact else 0)
        built = time.perf_counter()
        index.search(index.rows[:queries], 10)
        rate = min(queries, count) / (time.perf_counter() - built)
        told = {"index": "flat" if exact else "cells", "rows": count, "device": index.device}
        found.append({**told, "seconds": built - started, "queries_per_second": rate, "recall": index.recall})
    return found


def neighbors(
    data: Annotated[
        str, typer.Option(help="As of benchmarks.studies.agreement, separated by commas.")
    ] = "demo,tux_paint",
    count: Annotated[int, typer.Option(help="Images at most.", min=2)] = 1000,
    rows: Annotated[str, typer.Option(help="Compare both indexes over so many rows instead, such as 300000.")] = "",
    model: Annotated[str, typer.Option(help="As of extract.")] = "lite0-minilm",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Measure what near-duplicates look like to a model, or the approximate index against the exact one."""
    if rows:
        real = demo().plain.astype(np.float32)
        told = [row for text in rows.split(",") for row in search(between(real, int(text)))]
        lines = [[row["index"], f"{row['rows']:,}", *_shown(row)] for row in told]
        print_table(["index", "rows", "seconds to build", "queries/s", "recall of ten"], lines)
    else:
        encoder = load_encoder(model)
        names = [name.strip() for name in data.split(",")]
        told = [{"data": Path(name).name, **row} for name in names for row in copies(images_of(name, count), encoder)]
        lines = [
            [row["data"], row["variant"], str(row["images"]), *(f"{row[q]:.3f}" for q in _QUANTILES)] for row in told
        ]
        print_table(["data", "variant", "images", "1st percentile", "median", "99th"], lines, texts=2)
    if as_json is not None:
        write_json(as_json, told)


def _shown(row: Figures) -> list[str]:
    return [f"{row['seconds']:.1f}", f"{row['queries_per_second']:,.0f}", f"{row['recall']:.3f}"]


if __name__ == "__main__":
    typer.run(guarded(neighbors))
