"""What wrong labels cost, and what references that know the classes from texts save of it (PoFT).

    python -m benchmarks.studies.label_noise --data demo --data fashion_mnist --json label_noise.json

Labels of so many training images are drawn evenly from the other classes; validation and test keep theirs. Nothing is
tuned: all have the learning rate, steps and scale that they have by default, and the heads of the last step. Splits,
wrong labels and mini-batches of a seed are the same for all, so that differences are paired. Where texts know little,
`--trusted 10` has class means of a few images with right labels in their place, for all contenders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.comparison.parts import write_json
from benchmarks.options import parse_seeds
from benchmarks.studies.storage import opened
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.calibration import fit_temperature
from ulfine_fast.metrics.intervals import mean_interval

Row = dict[str, Any]
Rows = NDArray[Any]

_START = 25.0  # scale of cosines that the temperature is searched around

# Name -> settings. Each family is told in percent, and apart from its first by how far it is above that one.
LABELED: dict[str, Row] = {
    "logit adjustment": {"method": "linear_probe"},
    "cross-entropy": {"method": "cross_entropy"},
    "poft": {"method": "poft"},
    "poft, equal gradient": {"method": "poft", "poft_form": "equal"},
    "weighted by references": {"method": "poft", "poft_form": "weighted"},
    "poft, blind references": {"method": "poft", "reference_scale": 0.0},
    "zero-shot": {"method": "zero_shot"},
}
GUESSED: dict[str, Row] = {
    "fixmatch": {"method": "fixmatch"},
    "fixmatch, preference": {"method": "fixmatch", "pseudo_loss": "preference"},
    "fixmatch, equal gradient": {"method": "fixmatch", "pseudo_loss": "equal"},
    "fixmatch, weighted": {"method": "fixmatch", "pseudo_loss": "weighted"},
}
FAMILIES = (LABELED, GUESSED)
FIGURES = ("balanced_accuracy", "few", "worst_class")


def with_trusted(cache: FeatureCache, count: int) -> FeatureCache:
    """A cache whose "texts" are means of images with right labels, to see what better references are worth.

    The first `count` training images of each class give its mean, as many after them the scale of the cosines. None
    of them remains in the cache.

    Raises:
        InputError: a class with too few training images.
    """
    means, judges = (np.concatenate(rows) for rows in zip(*_halves(cache, count), strict=True))
    unit = cache.plain.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    texts = np.stack([unit[means][cache.labels[means] == k].mean(0) for k in range(len(cache.class_names))])
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    temperature = fit_temperature(_START * unit[judges] @ texts.T, cache.labels[judges])
    return _without(cache, np.concatenate([means, judges]), texts, _START / temperature)


def _halves(cache: FeatureCache, count: int) -> Iterator[tuple[Rows, Rows]]:
    """Of each class, the rows of the images its mean is taken of, and of those the scale is fitted on."""
    for k, name in enumerate(cache.class_names):
        rows = np.flatnonzero((cache.splits == "train") & (cache.labels == k))
        if len(rows) <= 2 * count:
            raise InputError(f"--trusted {count} takes {2 * count} images of each class, {name!r} has {len(rows)}")
        yield rows[:count], rows[count : 2 * count]


def _without(cache: FeatureCache, gone: Rows, texts: Rows, logit_scale: float) -> FeatureCache:
    """The other rows, in memory, beside new texts (K, D)."""
    kept = np.setdiff1d(np.arange(len(cache)), gone)
    seen = ~np.isin(cache.view_rows, gone)
    return FeatureCache.from_arrays(
        cache.plain[kept],
        cache.labels[kept],
        class_names=cache.class_names,
        text_features=texts,
        weak=cache.views("weak")[seen],
        strong=cache.views("strong")[seen],
        splits=cache.splits[kept].tolist(),
        ids=[cache.ids[row] for row in kept],
        logit_scale=logit_scale,
    )


def measure(
    cache: FeatureCache, families: Sequence[dict[str, Row]], noise: Sequence[float], seeds: Sequence[int], values: Row
) -> list[Row]:
    """One row for each contender, share of wrong labels and seed.

    Args:
        cache: features.
        families: contenders by name.
        noise: shares of wrong labels in [0, 1].
        seeds: of split, wrong labels and training.
        values: settings of all trials.
    """
    rows = []
    for family in families:
        keys = [(name, share, seed) for name in family for share in noise for seed in seeds]
        configs = [
            FitConfig.from_dict({**values, **family[name], "label_noise": share, "seed": seed})
            for name, share, seed in keys
        ]
        for (name, share, seed), run in zip(keys, fit_many(cache, configs), strict=True):
            figures = {figure: run.metrics[figure] for figure in FIGURES}
            rows.append({"contender": name, "against": next(iter(family)), "noise": share, "seed": seed, **figures})
    return rows


def table(rows: Sequence[Row], figure: str) -> list[list[str]]:
    """A line for each contender: for each share of wrong labels its mean, and what it is above its family's first."""
    lines = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells: list[str] = []
        for share in dict.fromkeys(row["noise"] for row in rows):
            there = [row for row in rows if row["noise"] == share]
            own = [row for row in there if row["contender"] == name]
            first = [row for row in there if row["contender"] == own[0]["against"]]
            cells += _cells(own, first, figure)
        lines.append([name, *cells])
    return lines


def _cells(own: Sequence[Row], first: Sequence[Row], figure: str) -> Iterator[str]:
    """Mean of a figure in percent; and, paired by seed, how far it is above the first's."""
    mean = mean_interval(row[figure] for row in own)
    yield "-" if mean is None else f"{100 * mean.mean:.1f}"
    gap = mean_interval(a[figure] - b[figure] for a, b in zip(own, first, strict=True))
    same = own[0]["contender"] == first[0]["contender"]
    yield "" if same or gap is None else f"{100 * gap.mean:+.1f} ±{100 * gap.half:.1f}"


def parse_shares(text: str) -> list[float]:
    """Percentages separated by commas, as shares.

    Raises:
        InputError: something that is no percentage.
    """
    try:
        shares = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise InputError(f"--noise must be percentages such as 0,20,40,60, got {text!r}")
    return shares


def label_noise(
    data: Annotated[
        list[str] | None,
        typer.Option(help="demo, a data set of benchmarks.studies.methods, or a cache's folder; repeatable."),
    ] = None,
    noise: Annotated[str, typer.Option(help="Wrong labels in percent.")] = "0,20,40,60",
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    figure: Annotated[str, typer.Option(help=f"What is printed: {', '.join(FIGURES)}.")] = FIGURES[0],
    pseudo_labels: Annotated[bool, typer.Option(help="Pseudo-labels by the same losses, too.")] = True,
    trusted: Annotated[
        int, typer.Option(help="Take texts from so many right-labelled images of each class; 0 for the texts.", min=0)
    ] = 0,
    steps: Annotated[int, typer.Option(help="Mini-batch steps.", min=1)] = 500,
    n1: Annotated[int, typer.Option(help="Labelled images of the largest class.", min=1)] = 100,
    m1: Annotated[int, typer.Option(help="Unlabelled images of the largest class.", min=0)] = 100,
    gamma: Annotated[float, typer.Option(help="Imbalance of both.", min=1.0)] = 10.0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Fit under wrong labels; print means and paired 95% intervals, in percent."""
    if figure not in FIGURES:
        raise InputError(f"--figure must be one of {', '.join(FIGURES)}, got {figure!r}")
    shares, seen, rows = parse_shares(noise), parse_seeds(seeds), []
    values = {"n1": n1, "m1": m1, "gamma_l": gamma, "gamma_u": gamma, "steps": steps, "eval_every": steps}
    for name in data or ["demo"]:
        cache = opened(name) if not trusted else with_trusted(opened(name), trusted)
        own = measure(cache, FAMILIES[: 1 + pseudo_labels], shares, seen, values)
        rows += [{"data": name, "trusted": trusted, **row} for row in own]
        typer.echo(f"\n{name}: {figure}, percent, by share of wrong labels")
        titles = [title for share in shares for title in (f"{100 * share:g}%", "above first")]
        print_table(["", *titles], table(own, figure))
    if as_json is not None:
        write_json(as_json, rows)


if __name__ == "__main__":
    typer.run(guarded(label_noise))
