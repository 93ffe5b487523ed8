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

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from benchmarks.comparison.parts import write_json
from benchmarks.data import _named, demo, extracted
from benchmarks.data import opened as without_some_classes
from benchmarks.options import parse_methods, parse_seeds
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.pipeline.plan import is_listed
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.demo import unpack_images
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.related.test_time_adaptation.adapt import Adaptation, adapt
from ulfine_fast.related.test_time_adaptation.metrics import stream_labels, stream_metrics
from ulfine_fast.runs.run import Run

if TYPE_CHECKING:
    from ulfine_fast.cache.pipeline.views import ViewRecipe
    from ulfine_fast.cache.sources import Row as ImageRow
    from ulfine_fast.cache.sources import Source

Row = dict[str, Any]
RATES = "1e-4,1e-3,1e-2"
WAYS = (("tent", 0.0), ("cliptta", 0.0), ("tent", 1.0), ("cliptta", 1.0))
_LEVEL = {"noise": 50.0, "blur": 1.5, "contrast": 0.3}
ORDERS = ("random", "classes", "tail")
_FIGURES = ("accuracy", "balanced_accuracy", "classes_predicted", "effective_classes", "auroc", "fpr95")


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


class Corrupted:
    """A source whose images come corrupted; ids, labels and splits are the source's."""

    def __init__(self, source: Source, corruption: str) -> None:
        """See `CORRUPTIONS`."""
        assert is_listed(source)
        self._source, self._corruption = source, corruption
        self.kind, self.class_names, self.rows = source.kind, source.class_names, source.rows

    def read(self, row: ImageRow) -> Image.Image:
        """The image of `row`, before it is resized; its noise is drawn from its id."""
        return CORRUPTIONS[self._corruption](self._source.read(row), zlib.crc32(row.id.encode()))

    def describe(self) -> dict[str, Any]:
        """The source's description, and what was done to it."""
        return {**self._source.describe(), "corruption": self._corruption, "level": _LEVEL[self._corruption]}


def corrupted(name: str) -> FeatureCache:
    """The demo's images under a corruption, extracted on the first call; `clean` is the demo's own cache."""
    if name == "clean":
        return demo()

    def source() -> Corrupted:
        return Corrupted(_named(unpack_images(cache_home() / "datasets" / "demo")), name)

    return extracted(f"demo-{name}", source, views=_none)


def _none() -> ViewRecipe:
    from ulfine_fast.cache.pipeline.views import ViewRecipe

    return ViewRecipe(weak=0, strong=0)


def stream_of(run: Run, cache: FeatureCache, order: str) -> NDArray[np.int64]:
    """Rows that the run was neither fitted nor chosen on, in one of the `ORDERS`, drawn by its seed."""
    used = {*run.split["labeled"], *run.split["val"]}
    rows = np.array([row for row, name in enumerate(cache.ids) if name not in used], dtype=np.int64)
    rows = np.random.default_rng([run.config.seed, 0xADA]).permutation(rows)
    if order == "classes":
        return rows[np.argsort(cache.labels[rows], kind="stable")]
    return rows[_in_tail(run, cache.labels[rows])] if order == "tail" else rows


def _in_tail(run: Run, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the labels (n,) stay when classes thin out as those of the run's labelled images do."""
    kept, classes = np.zeros(len(labels), dtype=bool), run.split["class_order"]
    for rank, k in enumerate(classes):
        theirs = np.flatnonzero(labels == k)
        share = run.config.gamma_l ** -(rank / max(len(classes) - 1, 1))
        kept[theirs[: max(1, round(share * len(theirs)))]] = True
    return kept


def measure(
    run: Run, cache: FeatureCache, rows: NDArray[np.int64], rates: Sequence[float], start: Adaptation
) -> list[Row]:
    """One row without adaptation, and one for each loss, with and without the regulariser, and learning rate."""
    ways = [replace(start, by="none")]
    ways += [replace(start, by=by, marginal=marginal, lr=lr) for lr in rates for by, marginal in WAYS]
    if start.open_set:
        ways += [replace(start, exposure=0.0, lr=lr) for lr in rates]
    labels = stream_labels(run, cache)[rows]
    found = []
    for way in ways:
        told = stream_metrics(adapt(run, cache, way, rows=rows, progress=False), labels, open_set=way.open_set)
        told |= {"by": way.by, "marginal": way.marginal, "exposure": way.exposure}
        found.append({**told, "lr": None if way.by == "none" else way.lr})
    return found


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each run, stream and way: means over seeds, and how far accuracy is above no adaptation, paired."""
    lines = []
    keys = ("method", "stream", "by", "marginal", "exposure", "lr")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in keys) == key]
        gap = mean_interval(row["accuracy"] - row["accuracy_before"] for row in own)
        shown = "" if gap is None or key[2] == "none" else f"{100 * gap.mean:+.1f} ±{100 * gap.half:.1f}"
        cells = [_cell(own, name) for name in _FIGURES if name in own[0]]
        lines.append([*(("-" if part is None else f"{part}") for part in key), cells[0], shown, *cells[1:]])
    return lines


def _cell(rows: Sequence[Row], name: str) -> str:
    found, share = mean_interval(float(row[name]) for row in rows), "classes" not in name
    return "-" if found is None else f"{(100 if share else 1) * found.mean:.1f}"


def adapting(
    methods: Annotated[str, typer.Option(help="What adapts, separated by commas.")] = "zero_shot,linear_probe",
    streams: Annotated[str, typer.Option(help="Of clean, noise, blur, contrast.")] = ",".join(CORRUPTIONS),
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    rates: Annotated[str, typer.Option(help="Learning rates.")] = RATES,
    order: Annotated[str, typer.Option(help="random, classes: one after the other, or tail: uneven.")] = "random",
    batch: Annotated[int, typer.Option(help="Images that arrive together.", min=1)] = 128,
    shots: Annotated[int, typer.Option(help="Images of each class in the memory.", min=0)] = 4,
    open_set: Annotated[bool, typer.Option("--open-set", help="Leave three classes out of the run.")] = False,
    exposure: Annotated[float, typer.Option(help="Weight of the outlier exposure.", min=0.0)] = 1.0,
    n1: Annotated[int, typer.Option(help="Labelled images of the largest class.", min=1)] = 100,
    gamma: Annotated[float, typer.Option(help="Imbalance of both.", min=1.0)] = 50.0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Let runs follow streams of shifted images; print accuracy and how many classes are predicted at the end."""
    _refuse_unknown(order, streams.split(","))
    start = Adaptation(batch=batch, shots=shots, open_set=open_set, exposure=exposure)
    values = {"n1": n1, "m1": n1, "gamma_l": gamma, "gamma_u": gamma}
    runs = list(_runs(parse_methods(methods), parse_seeds(seeds), values, open_set))
    speeds, rows = [float(rate) for rate in rates.split(",")], []
    for stream, run in itertools.product(streams.split(","), runs):
        about = {"method": run.config.method, "stream": stream, "order": order, "seed": run.config.seed}
        cache = corrupted(stream)
        rows += [{**about, **row} for row in measure(run, cache, stream_of(run, cache, order), speeds, start)]
    if as_json is not None:
        write_json(as_json, rows)
    titles = [
        "method",
        "stream",
        "by",
        "marginal",
        "exposure",
        "lr",
        "accuracy",
        "gain",
        "balanced",
        "classes",
        "effective",
    ]
    print_table([*titles, "AUROC", "FPR95"] if open_set else titles, table(rows), texts=3)


def _refuse_unknown(order: str, streams: Sequence[str]) -> None:
    if order not in ORDERS:
        raise InputError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if unknown := set(streams) - set(CORRUPTIONS):
        raise InputError(f"streams are {', '.join(CORRUPTIONS)}, got {', '.join(sorted(unknown))}")


def _runs(methods: Sequence[str], seeds: Sequence[int], values: Row, open_set: bool) -> Iterator[Run]:
    """The fits; with `open_set` three classes, drawn by the seed, are unknown to each."""
    for seed in seeds:
        cache = without_some_classes(demo(), seed) if open_set else demo()
        configs = [FitConfig.from_dict({**values, "method": method, "seed": seed}) for method in methods]
        yield from fit_many(cache, configs, progress=False)


if __name__ == "__main__":
    typer.run(guarded(adapting))
