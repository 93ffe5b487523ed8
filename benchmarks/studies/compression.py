"""What compression costs rare classes and calibration: of the stored features, and of the encoder itself.

    python -m benchmarks.studies.compression --json compression.json

The counterpart of *Uncovering the Hidden Cost of Model Compression* (arXiv 2308.14969) over cached features: the same
fits on the same splits and mini-batches, with features rounded or pruned by each encoding; and with features of an
encoder whose weights were rounded (`--encoder-bits`), or that ran in bf16, which are extracted for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.data import changed_cache, demo, open_features
from benchmarks.options import (
    DataOption,
    GammaOption,
    JsonOption,
    M1Option,
    MethodsOption,
    N1Option,
    SeedsOption,
    parse_methods,
    parse_seeds,
    split_names,
    split_options,
    trial_configs,
)
from benchmarks.results import Row, gap_text, grouped, mean_text, print_table, where, write_rows
from benchmarks.studies.storage import types_of
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.models.encoder import PRECISIONS, Encoder, load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import reopen_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.engine.fit import fit_many

Rows = NDArray[np.float32]
_METRICS = ("balanced_accuracy", "few", "ece", "ece_temperature_scaled")


def rounded(rows: Rows, bits: int, scales: Rows) -> Rows:
    """Numbers as whole multiples of a scale: 2^(bits - 1) - 1 on each side of zero.

    Args:
        rows: (..., D).
        bits: at least 2.
        scales: largest magnitudes, that broadcast to the rows.
    """
    steps = 2 ** (bits - 1) - 1
    unit = np.where(scales > 0, scales, 1) / steps
    return (np.rint(rows / unit).clip(-steps, steps) * unit).astype(np.float32)


def by_row(bits: int) -> Callable[[Rows, Rows], Rows]:
    """A scale for each row."""
    return lambda rows, _: rounded(rows, bits, np.abs(rows).max(axis=-1, keepdims=True))


def by_dimension(bits: int) -> Callable[[Rows, Rows], Rows]:
    """A scale for each dimension, from the training rows; larger magnitudes are clipped."""
    return lambda rows, train: rounded(rows, bits, np.abs(train).max(axis=0))


def signs(rows: Rows, _: Rows) -> Rows:
    """One bit a number, and the row's mean magnitude."""
    return np.sign(rows) * np.abs(rows).mean(axis=-1, keepdims=True)


def pruned(fraction: float) -> Callable[[Rows, Rows], Rows]:
    """Zeros in that fraction of the dimensions, those that vary least over the training rows."""

    def prune(rows: Rows, train: Rows) -> Rows:
        kept = np.argsort(-train.var(axis=0))[: max(1, round(train.shape[1] * (1 - fraction)))]
        result = np.zeros_like(rows)
        result[..., kept] = rows[..., kept]
        return result

    return prune


@dataclass(frozen=True)
class Encoding:
    """A way to store features.

    Attributes:
        decoded: what remains of rows (..., D), given the training rows (n, D).
        bytes_of: bytes of a feature of D numbers.
    """

    decoded: Callable[[Rows, Rows], Rows]
    bytes_of: Callable[[int], float]


ENCODINGS = {
    "float32": Encoding(lambda rows, _: rows, lambda dim: 4 * dim),
    "float16": Encoding(lambda rows, _: rows.astype(np.float16).astype(np.float32), lambda dim: 2 * dim),
    "int8 by row": Encoding(by_row(8), lambda dim: dim + 4),
    "int8 by dimension": Encoding(by_dimension(8), lambda dim: dim),
    "int4 by row": Encoding(by_row(4), lambda dim: dim / 2 + 4),
    "sign": Encoding(signs, lambda dim: dim / 8 + 4),
    "half the dimensions": Encoding(pruned(0.5), lambda dim: 2 * dim),
    "a quarter": Encoding(pruned(0.75), lambda dim: dim),
    "a tenth": Encoding(pruned(0.9), lambda dim: 0.4 * dim),
}


def encoded(cache: FeatureCache, name: str) -> FeatureCache:
    """A cache in memory with the same rows, encoded and decoded."""
    decoded = ENCODINGS[name].decoded
    plain = cache.plain.astype(np.float32)
    train = plain[cache.splits == "train"]
    return changed_cache(
        cache,
        plain=decoded(plain, train),
        weak=decoded(cache.views("weak").astype(np.float32), train),
        strong=decoded(cache.views("strong").astype(np.float32), train),
    )


def round_weights(encoder: Encoder, bits: int) -> None:
    """Round matrices and filters of the vision part, with a scale for each output, as quantised encoders have them."""
    with torch.no_grad():
        for weight in encoder.model.visual.parameters():
            if weight.ndim >= 2:
                flat = weight.flatten(1).cpu().numpy()
                nearest = rounded(flat, bits, np.abs(flat).max(axis=1, keepdims=True))
                weight.copy_(torch.from_numpy(nearest).view_as(weight))


def of_rounded_encoder(bits: str) -> FeatureCache:
    """The demo's images by an encoder whose weights have so many bits, or that runs in "bf16" or "fp16".

    Extracted once, below `cache_home()`.
    """
    original = demo().manifest
    assert original is not None
    folder = cache_home() / "benchmarks" / f"demo-encoder-{bits}-bits"
    if not (folder / "done").exists():
        precision = bits if bits in PRECISIONS else "fp32"
        encoder = load_encoder(original.model["name"], original.model["pretrained"], precision=precision)
        texts = encoder.encode_texts(["a"])
        if precision == "fp32":
            round_weights(encoder, int(bits))
        assert torch.equal(texts, encoder.encode_texts(["a"]))  # the text part must not have changed
        views = ViewRecipe(original.views["weak"], original.views["strong"], original.views["seed"])
        extract(reopen_source(original.source), encoder, folder, views=views, prompts=original.prompts)
        (folder / "done").touch()
    return FeatureCache.open(folder)


def measure(
    cache: FeatureCache, encoding: str, methods: Sequence[str], seeds: Sequence[int], options: Row
) -> list[Row]:
    """One row for each method and seed."""
    return [
        {
            "encoding": encoding,
            "method": run.config.method,
            "seed": run.config.seed,
            "temperature": run.metrics["temperature"],
            **{name: run.metrics[name] for name in _METRICS},
        }
        for run in fit_many(cache, trial_configs(methods, seeds, options), progress=False)
    ]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each method and encoding: means, and paired differences to the method's first encoding, in percent."""
    lines = []
    for (method,), of_method in grouped(rows, "method").items():
        first = where(of_method, encoding=of_method[0]["encoding"])
        for (encoding,), own in grouped(of_method, "encoding").items():
            cells = [cell for name in _METRICS for cell in (mean_text(own, name), gap_text(own, first, name))]
            lines.append([method, encoding, f"{own[0]['bytes']:.0f}", *cells])
    return lines


def compression(
    data: DataOption = "demo",
    methods: MethodsOption = "linear_probe,ulfine_plus",
    seeds: SeedsOption = "0-4",
    encoder_bits: Annotated[
        str,
        typer.Option(help="Encoder with weights of so many bits, or in bf16, such as 8,4,bf16; for the demo alone."),
    ] = "",
    n1: N1Option = 100,
    m1: M1Option = 150,
    gamma: GammaOption = 50.0,
    as_json: JsonOption = None,
) -> None:
    """Fit on features that were compressed in several ways; print accuracy, rare classes and calibration, paired."""
    if encoder_bits and data != "demo":
        raise InputError(f"--encoder-bits reads the demo's images again, got --data {data}; leave one of them out")
    encoders = split_names(encoder_bits)
    for bits in encoders:
        if bits not in PRECISIONS and not (bits.isdecimal() and int(bits) > 1):
            raise InputError(f"--encoder-bits takes numbers from 2, bf16 and fp16, got {bits!r}")
    names = parse_methods(methods)
    seed_numbers = parse_seeds(seeds)
    options = split_options(n1, m1, gamma)
    rows: list[Row] = []

    # encodings, from the one that the cache has; a cache of bytes has no finer values
    cache = open_features(data)
    encodings = list(ENCODINGS)
    finest = types_of(cache)[0]
    first = encodings.index(finest) if finest in ENCODINGS else encodings.index("int8 by row")
    for encoding in encodings[first:]:
        size = ENCODINGS[encoding].bytes_of(cache.dim)
        results = measure(encoded(cache, encoding), encoding, names, seed_numbers, options)
        rows += [{"data": Path(data).name, "bytes": size, **row} for row in results]

    # encoders
    for bits in encoders:
        encoding = f"encoder in {bits}" if bits in PRECISIONS else f"encoder of {bits} bits"
        results = measure(of_rounded_encoder(bits), encoding, names, seed_numbers, options)
        rows += [{"data": Path(data).name, "bytes": 2 * cache.dim, **row} for row in results]
    write_rows(as_json, rows)
    titles = ["method", "encoding", "bytes", "balanced accuracy", "difference", "few", "difference"]
    print_table([*titles, "ECE", "difference", "ECE scaled", "difference"], table(rows), texts=2)


if __name__ == "__main__":
    typer.run(guarded(compression))
