"""What it costs to store features in fewer bytes: the same fits on the same rows as float32, float16 and int8.

    python -m benchmarks.studies.storage --data demo --data fashion_mnist --json storage.json

Features of each type are those that a cache of that type returns: rounded as it is written, and read back. Splits,
seeds and mini-batches are the same for all types, so that differences are paired; the others are compared with the
finest type that the cache itself holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.data import changed_cache, open_features
from benchmarks.options import (
    DataListOption,
    DeviceOption,
    GammaOption,
    JsonOption,
    M1Option,
    MethodsOption,
    N1Option,
    SeedsOption,
    parse_methods,
    parse_seeds,
    split_options,
    trial_configs,
)
from benchmarks.results import Row, gap_text, grouped, mean_text, print_table, where, write_rows
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.quantized import quantized, restored
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.engine.fit import fit_many

TYPES = ("float32", "float16", "int8")
_METRICS = ("balanced_accuracy", "ece", "ece_temperature_scaled")


def bytes_of(dtype: str, dim: int) -> int:
    """Bytes of one feature of length `dim` in a shard; with int8 its scale is among them."""
    return {"float32": 4 * dim, "float16": 2 * dim, "int8": dim + 4}[dtype]


def as_stored(rows: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Features (..., D) as a cache of that type returns them."""
    return restored(*quantized(rows.astype(np.float16))) if dtype == "int8" else rows.astype(dtype)


def types_of(cache: FeatureCache) -> tuple[str, ...]:
    """The cache's own type and those of fewer bytes: what was rounded once has no finer values."""
    own = "int8" if cache.manifest is not None and cache.manifest.dtype == "int8" else cache.plain.dtype.name
    return TYPES[TYPES.index(own) :]


def stored(cache: FeatureCache, dtype: str) -> FeatureCache:
    """A cache in memory with the same rows, as one of that type returns them."""
    return changed_cache(
        cache,
        plain=as_stored(cache.plain, dtype),
        weak=as_stored(cache.views("weak"), dtype),
        strong=as_stored(cache.views("strong"), dtype),
    )


def measure(cache: FeatureCache, methods: Sequence[str], seeds: Sequence[int], options: Row, device: str) -> list[Row]:
    """One row for each type, method and seed.

    Args:
        cache: features.
        methods: of the engine.
        seeds: of split and training.
        options: of all trials.
        device: where they run.
    """
    configs = trial_configs(methods, seeds, options)
    rows = []
    for dtype in types_of(cache):
        runs = fit_many(stored(cache, dtype), configs, device=device, progress=False)
        rows += [
            {
                "dtype": dtype,
                "method": run.config.method,
                "seed": run.config.seed,
                "bytes_per_feature": bytes_of(dtype, cache.dim),
                **{name: run.metrics[name] for name in _METRICS},
            }
            for run in runs
        ]
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each data set, method and type: means, and paired differences to the finest type, in percent."""
    lines = []
    for (data, method), of_method in grouped(rows, "data", "method").items():
        finest = where(of_method, dtype=of_method[0]["dtype"])
        for (dtype,), own in grouped(of_method, "dtype").items():
            cells = [
                cell
                for name in _METRICS
                for cell in (mean_text(own, name, digits=2), gap_text(own, finest, name, digits=2))
            ]
            lines.append([data, method, dtype, str(own[0]["bytes_per_feature"]), *cells])
    return lines


def storage(
    data: DataListOption = None,
    methods: MethodsOption = "linear_probe,ulfine_plus",
    seeds: SeedsOption = "0-4",
    n1: N1Option = 100,
    m1: M1Option = 150,
    gamma: GammaOption = 50.0,
    device: DeviceOption = "auto",
    as_json: JsonOption = None,
) -> None:
    """Fit on the same features stored as float32, float16 and int8; print what the smaller types cost."""
    names = parse_methods(methods)
    seed_numbers = parse_seeds(seeds)
    rows: list[Row] = []
    for name in data or ["demo"]:
        cache = open_features(name)
        if len(types_of(cache)) == 1:
            raise InputError(f"{name} holds int8 features, of which there is no smaller type; name a float cache")
        results = measure(cache, names, seed_numbers, split_options(n1, m1, gamma), device)
        rows += [{"data": Path(name).name, **row} for row in results]
    write_rows(as_json, rows)
    titles = ["data", "method", "type", "bytes", "balanced accuracy", "difference", "ECE", "difference"]
    print_table([*titles, "ECE scaled", "difference"], table(rows), texts=3)


if __name__ == "__main__":
    typer.run(guarded(storage))
