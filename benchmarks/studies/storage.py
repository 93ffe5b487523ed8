"""What it costs to store features in fewer bytes: the same fits on the same rows as float32, float16 and int8.

    python -m benchmarks.studies.storage --data demo --data fashion_mnist --json storage.json

Each type is what a cache of that type would hand out: rounded as it is written, and read back. Splits, seeds and
mini-batches are the same for all types, so that differences are paired; the finest type that the cache itself holds is
what the others are compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.comparison.parts import write_json
from benchmarks.data import demo, open_data
from benchmarks.options import parse_methods, parse_seeds
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.quantized import quantized, restored
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.intervals import mean_interval

Row = dict[str, Any]

TYPES = ("float32", "float16", "int8")
_FIGURES = ("balanced_accuracy", "ece", "ece_temperature_scaled")


def bytes_of(dtype: str, dim: int) -> int:
    """Bytes of one feature of length `dim` in a shard; with int8 its scale is among them."""
    return {"float32": 4 * dim, "float16": 2 * dim, "int8": dim + 4}[dtype]


def as_stored(rows: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Features (..., D) as a cache of that type hands them out."""
    return restored(*quantized(rows.astype(np.float16))) if dtype == "int8" else rows.astype(dtype)


def types_of(cache: FeatureCache) -> tuple[str, ...]:
    """The cache's own type and those that take fewer bytes: what was rounded once has no finer values any more."""
    own = "int8" if cache.manifest is not None and cache.manifest.dtype == "int8" else cache.plain.dtype.name
    return TYPES[TYPES.index(own) :]


def stored(cache: FeatureCache, dtype: str) -> FeatureCache:
    """A cache in memory with the same rows, as one of that type would hand them out."""
    return FeatureCache.from_arrays(
        as_stored(cache.plain, dtype),
        cache.labels,
        class_names=cache.class_names,
        text_features=cache.text_features,
        weak=as_stored(cache.views("weak"), dtype),
        strong=as_stored(cache.views("strong"), dtype),
        splits=cache.splits.tolist(),
        ids=cache.ids,
        logit_scale=cache.logit_scale,
    )


def measure(cache: FeatureCache, methods: Sequence[str], seeds: Sequence[int], values: Row, device: str) -> list[Row]:
    """One row for each type, method and seed.

    Args:
        cache: features.
        methods: of the engine.
        seeds: of split and training.
        values: settings of all trials.
        device: where they run.
    """
    configs = [FitConfig.from_dict({**values, "method": method, "seed": seed}) for method in methods for seed in seeds]
    rows = []
    for dtype in types_of(cache):
        runs = fit_many(stored(cache, dtype), configs, device=device, progress=False)
        rows += [
            {
                "dtype": dtype,
                "method": run.config.method,
                "seed": run.config.seed,
                "bytes_per_feature": bytes_of(dtype, cache.dim),
                **{name: run.metrics[name] for name in _FIGURES},
            }
            for run in runs
        ]
    return rows


def opened(data: str) -> FeatureCache:
    """The demo's features, those of a data set by name, or the cache in a folder."""
    if (Path(data) / "manifest.json").exists():
        return FeatureCache.open(data)
    return demo() if data == "demo" else open_data(data)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each data set, method and type: means, and paired differences to the finest type, in percent."""
    lines = []
    groups = dict.fromkeys((row["data"], row["method"]) for row in rows)
    for data, method in groups:
        own = [row for row in rows if (row["data"], row["method"]) == (data, method)]
        finest = [row for row in own if row["dtype"] == own[0]["dtype"]]
        for dtype in dict.fromkeys(row["dtype"] for row in own):
            chosen = [row for row in own if row["dtype"] == dtype]
            figures = [cell for name in _FIGURES for cell in _cells(chosen, finest, name)]
            lines.append([data, method, dtype, str(chosen[0]["bytes_per_feature"]), *figures])
    return lines


def _cells(chosen: Sequence[Row], finest: Sequence[Row], name: str) -> tuple[str, str]:
    """Mean of a figure, and how far it is above the finest type's, seed by seed."""
    mean = mean_interval(row[name] for row in chosen)
    shown = "-" if mean is None else f"{100 * mean.mean:.2f}"
    if chosen[0]["dtype"] == finest[0]["dtype"]:
        return shown, ""
    gap = mean_interval(a[name] - b[name] for a, b in zip(chosen, finest, strict=True))
    return shown, "-" if gap is None else f"{100 * gap.mean:+.2f} ±{100 * gap.half:.2f}"


def storage(
    data: Annotated[
        list[str] | None,
        typer.Option(help="demo, a data set of benchmarks.studies.methods, or a cache's folder.", show_default="demo"),
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "linear_probe,ulfine_plus",
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    n1: Annotated[int, typer.Option(help="Labelled images of the largest class.", min=1)] = 100,
    m1: Annotated[int, typer.Option(help="Unlabelled images of the largest class.", min=0)] = 150,
    gamma: Annotated[float, typer.Option(help="Imbalance of both.", min=1.0)] = 50.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Fit on the same features stored as float32, float16 and int8; print what the smaller types cost."""
    values = {"n1": n1, "m1": m1, "gamma_l": gamma, "gamma_u": gamma}
    rows = list(_rows(data or ["demo"], parse_methods(methods), parse_seeds(seeds), values, device))
    if as_json is not None:
        write_json(as_json, rows)
    titles = ["data", "method", "type", "bytes", "balanced accuracy", "difference", "ECE", "difference"]
    print_table([*titles, "ECE scaled", "difference"], table(rows), texts=3)


def _rows(data: Iterable[str], methods: Sequence[str], seeds: Sequence[int], values: Row, device: str) -> Iterable[Row]:
    for name in data:
        cache = opened(name)
        if len(types_of(cache)) == 1:
            raise InputError(f"{name} holds int8 features, of which there is no smaller type; name a float cache")
        for row in measure(cache, methods, seeds, values, device):
            yield {"data": Path(name).name, **row}


if __name__ == "__main__":
    typer.run(guarded(storage))
