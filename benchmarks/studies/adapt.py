"""Accuracy through a stream of shifted images: a run as it is, TENT and CLIPTTA, and whether they collapse.

    python -m benchmarks.studies.adapt --json adapt.json

Runs are fitted on the demo's images as they are. The stream holds those that are neither labelled nor validation
images of the run, under Gaussian noise, blurred, or with little contrast, in an order drawn by the seed;
`--order classes` lets one class come after the other, `--order tail` thins classes out as in training. Each loss is
measured without and with the marginal regulariser, at the paper's learning rate and at ten and a hundred times that:
here one norm is learned, there all of them.
`--open-set` leaves three classes out of the run and their images in the stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from benchmarks.data import NO_VIEWS, ChangedImages, demo, demo_source, extracted, with_unknown_classes
from benchmarks.options import (
    GammaOption,
    JsonOption,
    MethodsOption,
    N1Option,
    SeedsOption,
    parse_methods,
    parse_names,
    parse_numbers,
    parse_seeds,
    split_options,
    trial_configs,
)
from benchmarks.results import Row, grouped, interval_text, mean_text, print_table, write_rows
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.related.test_time_adaptation.adapt import Adaptation, adapt
from ulfine_fast.related.test_time_adaptation.metrics import stream_labels, stream_metrics
from ulfine_fast.runs.run import Run

if TYPE_CHECKING:
    from ulfine_fast.cache.sources import Source

Order = Literal["random", "classes", "tail"]
LOSSES = (("tent", 0.0), ("cliptta", 0.0), ("tent", 1.0), ("cliptta", 1.0))
"""Each loss with the weight of the marginal regulariser."""

_LEVEL = {"noise": 50.0, "blur": 1.5, "contrast": 0.3}
_METRICS = {
    "balanced": "balanced_accuracy",
    "classes": "classes_predicted",
    "effective": "effective_classes",
    "AUROC": "auroc",
    "FPR95": "fpr95",
}


def noisy(image: Image.Image, seed: int) -> Image.Image:
    """Gaussian noise of standard deviation 50 on each of 0..255, the same for a seed."""
    pixels = np.asarray(image, dtype=np.float64)
    noise = np.random.default_rng(seed).normal(0, _LEVEL["noise"], pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).round().astype(np.uint8))


CORRUPTIONS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "clean": lambda image, _: image,
    "noise": noisy,
    "blur": lambda image, _: image.filter(ImageFilter.GaussianBlur(_LEVEL["blur"])),
    "contrast": lambda image, _: ImageEnhance.Contrast(image).enhance(_LEVEL["contrast"]),
}


def corrupted_source(source: Source, corruption: str) -> ChangedImages:
    """A source whose images are corrupted; an image's noise is drawn from its id."""
    return ChangedImages(
        source,
        lambda image, row: CORRUPTIONS[corruption](image, zlib.crc32(row.id.encode())),
        {"corruption": corruption, "level": _LEVEL[corruption]},
    )


def corrupted(corruption: str) -> FeatureCache:
    """The demo's images under a corruption, extracted on the first call; `clean` is the demo's own cache."""
    if corruption == "clean":
        return demo()
    return extracted(f"demo-{corruption}", lambda: corrupted_source(demo_source(), corruption), views=NO_VIEWS)


def stream_of(run: Run, cache: FeatureCache, order: Order) -> NDArray[np.int64]:
    """Rows that the run was neither fitted nor chosen on, in an order drawn by its seed."""
    used = {*run.split["labeled"], *run.split["val"]}
    rows = np.array([row for row, name in enumerate(cache.ids) if name not in used], dtype=np.int64)
    rows = np.random.default_rng([run.config.seed, 0xADA]).permutation(rows)
    labels = cache.labels[rows]
    if order == "classes":
        return rows[np.argsort(labels, kind="stable")]
    return rows[_in_tail(run, labels)] if order == "tail" else rows


def _in_tail(run: Run, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the labels (n,) stay when classes thin out as those of the run's labelled images do."""
    kept = np.zeros(len(labels), dtype=bool)
    classes = run.split["class_order"]
    for rank, k in enumerate(classes):
        of_class = np.flatnonzero(labels == k)
        fraction = run.config.gamma_l ** -(rank / max(len(classes) - 1, 1))
        kept[of_class[: max(1, round(fraction * len(of_class)))]] = True
    return kept


def measure(
    run: Run, cache: FeatureCache, rows: NDArray[np.int64], rates: Sequence[float], base: Adaptation
) -> list[Row]:
    """One row without adaptation, and one for each loss, with and without the regulariser, and learning rate."""
    adaptations = [replace(base, by="none")]
    adaptations += [replace(base, by=by, marginal=marginal, lr=lr) for lr in rates for by, marginal in LOSSES]
    if base.open_set:
        adaptations += [replace(base, exposure=0.0, lr=lr) for lr in rates]
    labels = stream_labels(run, cache)[rows]
    results = []
    for adaptation in adaptations:
        stream = adapt(run, cache, adaptation, rows=rows, progress=False)
        results.append(
            {
                **stream_metrics(stream, labels, open_set=adaptation.open_set),
                "by": adaptation.by,
                "marginal": adaptation.marginal,
                "exposure": adaptation.exposure,
                "lr": None if adaptation.by == "none" else adaptation.lr,
            }
        )
    return results


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each run, stream and adaptation: means over seeds, and the paired gain over no adaptation."""
    lines = []
    for key, own in grouped(rows, "method", "stream", "by", "marginal", "exposure", "lr").items():
        gain = mean_interval(row["accuracy"] - row["accuracy_before"] for row in own)
        metrics = [name for name in _METRICS.values() if name in own[0]]
        lines.append(
            [
                *("-" if value is None else f"{value}" for value in key),
                mean_text(own, "accuracy"),
                "" if own[0]["by"] == "none" else interval_text(gain, sign=True),
                *(mean_text(own, name, factor=1.0 if "classes" in name else 100.0) for name in metrics),
            ]
        )
    return lines


def adapting(
    methods: MethodsOption = "zero_shot,linear_probe",
    streams: Annotated[str, typer.Option(help="Of clean, noise, blur, contrast.")] = ",".join(CORRUPTIONS),
    seeds: SeedsOption = "0-4",
    rates: Annotated[str, typer.Option(help="Learning rates.")] = "1e-4,1e-3,1e-2",
    order: Annotated[Order, typer.Option(help="classes: one after the other; tail: uneven.")] = "random",
    batch: Annotated[int, typer.Option(help="Images that arrive together.", min=1)] = 128,
    shots: Annotated[int, typer.Option(help="Images of each class in the memory.", min=0)] = 4,
    open_set: Annotated[bool, typer.Option("--open-set", help="Leave three classes out of the run.")] = False,
    exposure: Annotated[float, typer.Option(help="Weight of the outlier exposure.", min=0.0)] = 1.0,
    n1: N1Option = 100,
    gamma: GammaOption = 50.0,
    as_json: JsonOption = None,
) -> None:
    """Let runs follow streams of shifted images; print accuracy and how many classes are predicted at the end."""
    stream_names = parse_names(streams, CORRUPTIONS, "streams")
    learning_rates = parse_numbers(rates, "rates", 0)
    names = parse_methods(methods)
    base = Adaptation(batch=batch, shots=shots, open_set=open_set, exposure=exposure)

    # runs; with an open set, three classes drawn by the seed are unknown to each
    runs = []
    for seed in parse_seeds(seeds):
        cache = with_unknown_classes(demo(), seed) if open_set else demo()
        runs += fit_many(cache, trial_configs(names, [seed], split_options(n1, n1, gamma)), progress=False)

    # streams
    rows: list[Row] = []
    for name in stream_names:
        cache = corrupted(name)
        for run in runs:
            about = {"method": run.config.method, "stream": name, "order": order, "seed": run.config.seed}
            results = measure(run, cache, stream_of(run, cache, order), learning_rates, base)
            rows += [{**about, **row} for row in results]
    write_rows(as_json, rows)
    titles = ["method", "stream", "by", "marginal", "exposure", "lr", "accuracy", "gain", *_METRICS]
    print_table(titles if open_set else titles[:-2], table(rows), texts=3)


if __name__ == "__main__":
    typer.run(guarded(adapting))
