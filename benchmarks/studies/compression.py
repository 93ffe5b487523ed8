"""What compression costs rare classes and calibration: of the stored features, and of the encoder itself.

    python -m benchmarks.studies.compression --json compression.json

The counterpart of *Uncovering the Hidden Cost of Model Compression* (arXiv 2308.14969) over cached features: the same
fits on the same splits and mini-batches, with features rounded, or cut, as each encoding leaves them; and with features
of an encoder whose weights were rounded (`--encoder-bits`), or that ran in bf16, which are extracted for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.comparison.parts import write_json
from benchmarks.data import demo
from benchmarks.options import parse_methods, parse_seeds
from benchmarks.studies.storage import opened, types_of
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.models.encoder import PRECISIONS, Encoder, load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import reopen_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.intervals import mean_interval

Row = dict[str, Any]
Rows = NDArray[np.float32]
_FIGURES = ("balanced_accuracy", "few", "ece", "ece_temperature_scaled")


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
    """A scale for each dimension, from the training rows; what lies beyond is cut."""
    return lambda rows, train: rounded(rows, bits, np.abs(train).max(axis=0))


def signs(rows: Rows, _: Rows) -> Rows:
    """One bit a number, and the row's mean magnitude."""
    return np.sign(rows) * np.abs(rows).mean(axis=-1, keepdims=True)


def pruned(share: float) -> Callable[[Rows, Rows], Rows]:
    """Only the dimensions that vary most over the training rows."""

    def keep(rows: Rows, train: Rows) -> Rows:
        kept = np.argsort(-train.var(axis=0))[: max(1, round(train.shape[1] * (1 - share)))]
        cut = np.zeros_like(rows)
        cut[..., kept] = rows[..., kept]
        return cut

    return keep


# Name -> what remains of rows (..., D) given the training rows (n, D), and bytes of a feature of D numbers.
ENCODINGS: dict[str, tuple[Callable[[Rows, Rows], Rows], Callable[[int], float]]] = {
    "float32": (lambda rows, _: rows, lambda dim: 4 * dim),
    "float16": (lambda rows, _: rows.astype(np.float16).astype(np.float32), lambda dim: 2 * dim),
    "int8 by row": (by_row(8), lambda dim: dim + 4),
    "int8 by dimension": (by_dimension(8), lambda dim: dim),
    "int4 by row": (by_row(4), lambda dim: dim / 2 + 4),
    "sign": (signs, lambda dim: dim / 8 + 4),
    "half the dimensions": (pruned(0.5), lambda dim: 2 * dim),
    "a quarter": (pruned(0.75), lambda dim: dim),
    "a tenth": (pruned(0.9), lambda dim: 0.4 * dim),
}


def encoded(cache: FeatureCache, name: str) -> FeatureCache:
    """A cache in memory with the same rows, as the encoding leaves them."""
    change = ENCODINGS[name][0]
    plain = cache.plain.astype(np.float32)
    train = plain[cache.splits == "train"]
    return FeatureCache.from_arrays(
        change(plain, train),
        cache.labels,
        class_names=cache.class_names,
        text_features=cache.text_features,
        weak=change(cache.views("weak").astype(np.float32), train),
        strong=change(cache.views("strong").astype(np.float32), train),
        splits=cache.splits.tolist(),
        ids=cache.ids,
        logit_scale=cache.logit_scale,
    )


def round_weights(encoder: Encoder, bits: int) -> None:
    """Rounds matrices and filters of the vision part, with a scale for each output, as quantised encoders have them."""
    with torch.no_grad():
        for weight in encoder.model.visual.parameters():
            if weight.ndim >= 2:
                flat = weight.flatten(1).cpu().numpy()
                near = rounded(flat, bits, np.abs(flat).max(axis=1, keepdims=True))
                weight.copy_(torch.from_numpy(near).view_as(weight))


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
        assert torch.equal(texts, encoder.encode_texts(["a"]))  # texts come from the part that was left alone
        views = ViewRecipe(original.views["weak"], original.views["strong"], original.views["seed"])
        extract(reopen_source(original.source), encoder, folder, views=views, prompts=original.prompts)
        (folder / "done").touch()
    return FeatureCache.open(folder)


def measure(cache: FeatureCache, name: str, methods: Sequence[str], seeds: Sequence[int], values: Row) -> list[Row]:
    """One row for each method and seed."""
    configs = [FitConfig.from_dict({**values, "method": method, "seed": seed}) for method in methods for seed in seeds]
    return [
        {
            "encoding": name,
            "method": run.config.method,
            "seed": run.config.seed,
            "temperature": run.metrics["temperature"],
            **{figure: run.metrics[figure] for figure in _FIGURES},
        }
        for run in fit_many(cache, configs, progress=False)
    ]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each method and encoding: means, and paired differences to the method's first encoding, in percent."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        first = [row for row in own if row["encoding"] == own[0]["encoding"]]
        for name in dict.fromkeys(row["encoding"] for row in own):
            chosen = [row for row in own if row["encoding"] == name]
            figures = [cell for figure in _FIGURES for cell in _cells(chosen, first, figure)]
            lines.append([method, name, f"{chosen[0]['bytes']:.0f}", *figures])
    return lines


def _cells(chosen: Sequence[Row], first: Sequence[Row], figure: str) -> tuple[str, str]:
    mean = mean_interval(row[figure] for row in chosen)
    shown = "-" if mean is None else f"{100 * mean.mean:.1f}"
    if chosen[0]["encoding"] == first[0]["encoding"]:
        return shown, ""
    gap = mean_interval(a[figure] - b[figure] for a, b in zip(chosen, first, strict=True))
    return shown, "-" if gap is None else f"{100 * gap.mean:+.1f} ±{100 * gap.half:.1f}"


def compression(
    data: Annotated[
        str, typer.Option(help="demo, a data set of benchmarks.studies.methods, or a cache's folder.")
    ] = "demo",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "linear_probe,ulfine_plus",
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    encoder_bits: Annotated[
        str,
        typer.Option(help="Encoder with weights of so many bits, or in bf16, such as 8,4,bf16; for the demo alone."),
    ] = "",
    n1: Annotated[int, typer.Option(help="Labelled images of the largest class.", min=1)] = 100,
    m1: Annotated[int, typer.Option(help="Unlabelled images of the largest class.", min=0)] = 150,
    gamma: Annotated[float, typer.Option(help="Imbalance of both.", min=1.0)] = 50.0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Fit on features that were compressed in several ways; print accuracy, rare classes and calibration, paired."""
    if encoder_bits and data != "demo":
        raise InputError(f"--encoder-bits reads the demo's images again, got --data {data}; leave one of them out")
    ways = [one for one in encoder_bits.split(",") if one]
    if wrong := [one for one in ways if one not in PRECISIONS and not (one.isdecimal() and int(one) > 1)]:
        raise InputError(f"--encoder-bits takes numbers from 2, bf16 and fp16, got {wrong[0]!r}")
    values = {"n1": n1, "m1": m1, "gamma_l": gamma, "gamma_u": gamma}
    rows = list(_rows(data, parse_methods(methods), parse_seeds(seeds), values, ways))
    if as_json is not None:
        write_json(as_json, rows)
    titles = ["method", "encoding", "bytes", "balanced accuracy", "difference", "few", "difference"]
    print_table([*titles, "ECE", "difference", "ECE scaled", "difference"], table(rows), texts=2)


def _rows(data: str, methods: Sequence[str], seeds: Sequence[int], values: Row, ways: Sequence[str]) -> Iterator[Row]:
    cache = opened(data)
    finest = types_of(cache)[0]
    for name in list(ENCODINGS)[list(ENCODINGS).index(finest) if finest in ENCODINGS else 2 :]:
        for row in measure(encoded(cache, name), name, methods, seeds, values):
            yield {"data": Path(data).name, "bytes": ENCODINGS[name][1](cache.dim), **row}
    for one in ways:
        name = f"encoder in {one}" if one in PRECISIONS else f"encoder of {one} bits"
        for row in measure(of_rounded_encoder(one), name, methods, seeds, values):
            yield {"data": Path(data).name, "bytes": 2 * cache.dim, **row}


if __name__ == "__main__":
    typer.run(guarded(compression))
