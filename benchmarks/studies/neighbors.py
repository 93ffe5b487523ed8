"""What a cosine threshold says of copies, and what the approximate index costs and misses.

    python -m benchmarks.studies.neighbors --json neighbors.json
    python -m benchmarks.studies.neighbors --rows 100000,300000

The first compares images with variants of themselves: how alike a model finds a copy that was encoded again, made
smaller, cropped or mirrored, beside how alike the nearest other image is. The second searches rows between two of the
demo's, with a little noise, once with the flat index and once with that of cells.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from benchmarks.data import demo
from benchmarks.images import image_source
from benchmarks.options import JsonOption, parse_numbers, split_names
from benchmarks.results import Row, print_table, write_rows
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.neighbors import build_index
from ulfine_fast.cache.sources import ListedSource
from ulfine_fast.cli.main import guarded

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
    size = (max(1, 2 * image.width // 3), max(1, 2 * image.height // 3))
    return image.resize(size, Image.Resampling.BICUBIC)


def _cropped(image: Image.Image) -> Image.Image:
    across = max(1, image.width * 3 // 100)
    down = max(1, image.height * 3 // 100)
    return image.crop((across, down, image.width - across, image.height - down))


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


VARIANTS: dict[str, Variant] = {
    "JPEG of quality 90": _encoded_again(90),
    "JPEG of quality 50": _encoded_again(50),
    "two thirds of the size": _smaller,
    "cut by 3% on each side": _cropped,
    "mirrored": _mirrored,
}


def copies(source: ListedSource, encoder: Encoder) -> list[Row]:
    """One row for each variant, and one for the nearest other image: quantiles of cosines."""
    images = [source.read(row) for row in source.rows]
    features = _features(images, encoder)
    cosines = {
        name: (features * _features([make(image) for image in images], encoder)).sum(axis=1)
        for name, make in VARIANTS.items()
    }
    others = features @ features.T
    np.fill_diagonal(others, -1)
    cosines["nearest other image"] = others.max(axis=1)
    return [
        {
            "variant": name,
            "images": len(features),
            **{quantile: float(np.quantile(values, q)) for quantile, q in _QUANTILES.items()},
        }
        for name, values in cosines.items()
    ]


def _features(images: list[Image.Image], encoder: Encoder) -> NDArray[np.float32]:
    """Unit rows (N, D), of the plain view."""
    pixels = [np.asarray(encoder.resize(image)) for image in images]
    batches = [np.stack(pixels[start : start + _BATCH]) for start in range(0, len(pixels), _BATCH)]
    return np.concatenate([encoder.encode_pixels(torch.from_numpy(batch)).cpu().numpy() for batch in batches])


def between(features: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Rows (count, D) between two real ones each, so that they are distributed as features are, and a little noise."""
    random = np.random.default_rng(0)
    one, other = random.integers(0, len(features), (2, count))
    weight = random.random((count, 1), dtype=np.float32)
    noise = random.standard_normal((count, features.shape[1]), dtype=np.float32) * (0.1 / np.sqrt(features.shape[1]))
    return weight * features[one] + (1 - weight) * features[other] + noise


def search(rows: NDArray[np.float32], *, queries: int = 2000) -> list[Row]:
    """The flat index and the one of cells over rows (n, D): seconds to build, queries a second, recall of ten."""
    count = len(rows)
    results = []
    for name, exact_rows in (("flat", count), ("cells", 0)):
        started = time.perf_counter()
        index = build_index(rows, exact_rows=exact_rows)
        built = time.perf_counter()
        index.search(index.rows[:queries], 10)
        searched = time.perf_counter()
        results.append(
            {
                "index": name,
                "rows": count,
                "device": index.device,
                "seconds": built - started,
                "queries_per_second": min(queries, count) / (searched - built),
                "recall": index.recall,
            }
        )
    return results


def neighbors(
    data: Annotated[
        str, typer.Option(help="As of benchmarks.studies.agreement, separated by commas.")
    ] = "demo,tux_paint",
    count: Annotated[int, typer.Option(help="Images at most.", min=2)] = 1000,
    rows: Annotated[str, typer.Option(help="Compare both indexes over so many rows instead, such as 300000.")] = "",
    model: Annotated[str, typer.Option(help="As of extract.")] = "lite0-minilm",
    as_json: JsonOption = None,
) -> None:
    """Measure what near-duplicates look like to a model, or the approximate index against the exact one."""
    results: list[Row] = []
    if rows:
        features = demo().plain.astype(np.float32)
        for number in parse_numbers(rows, "numbers of rows", 1, kind=int):
            results += search(between(features, number))
        titles = ["index", "rows", "seconds to build", "queries/s", "recall of ten"]
        lines = [
            [
                row["index"],
                f"{row['rows']:,}",
                f"{row['seconds']:.1f}",
                f"{row['queries_per_second']:,.0f}",
                f"{row['recall']:.3f}",
            ]
            for row in results
        ]
        print_table(titles, lines)
    else:
        encoder = load_encoder(model)
        for name in split_names(data):
            results += [{"data": Path(name).name, **row} for row in copies(image_source(name, count), encoder)]
        titles = ["data", "variant", "images", "1st percentile", "median", "99th"]
        lines = [
            [row["data"], row["variant"], str(row["images"]), *(f"{row[name]:.3f}" for name in _QUANTILES)]
            for row in results
        ]
        print_table(titles, lines, texts=2)
    write_rows(as_json, results)


if __name__ == "__main__":
    typer.run(guarded(neighbors))
