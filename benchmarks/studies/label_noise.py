"""What wrong labels cost, and what references that know the classes from texts save of it (PoFT).

    python -m benchmarks.studies.label_noise --data demo --data fashion_mnist --json label_noise.json

A fraction of the training images has labels drawn evenly from the other classes; validation and test keep theirs.
Nothing is tuned: all have the learning rate, steps and scale that they have by default, and the heads of the last step.
Splits, wrong labels and mini-batches of a seed are the same for all, so that differences are paired. Where texts know
little, `--trusted 10` takes class means of a few images with right labels instead, for all contenders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.data import changed_cache, open_features, unit_rows
from benchmarks.options import (
    DataListOption,
    GammaOption,
    JsonOption,
    M1Option,
    N1Option,
    SeedsOption,
    StepsOption,
    parse_numbers,
    parse_seeds,
    split_options,
)
from benchmarks.results import Row, gap_text, grouped, mean_text, print_table, where, write_rows
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.calibration import fit_temperature

Metric = Literal["balanced_accuracy", "few", "worst_class"]
METRICS: tuple[str, ...] = get_args(Metric)

_START = 25.0  # scale of cosines that the temperature is searched around

# name -> options; the others of a family are compared with its first
LABELED: dict[str, Row] = {
    "logit adjustment": {"method": "linear_probe"},
    "cross-entropy": {"method": "cross_entropy"},
    "poft": {"method": "poft"},
    "poft, equal gradient": {"method": "poft", "poft_form": "equal"},
    "weighted by references": {"method": "poft", "poft_form": "weighted"},
    "poft, blind references": {"method": "poft", "reference_scale": 0.0},
    "zero-shot": {"method": "zero_shot"},
}
PSEUDO_LABELED: dict[str, Row] = {
    "fixmatch": {"method": "fixmatch"},
    "fixmatch, preference": {"method": "preference_fixmatch", "pseudo_loss": "preference"},
    "fixmatch, equal gradient": {"method": "preference_fixmatch", "pseudo_loss": "equal"},
    "fixmatch, weighted": {"method": "preference_fixmatch", "pseudo_loss": "weighted"},
}
FAMILIES = (LABELED, PSEUDO_LABELED)


def with_trusted(cache: FeatureCache, count: int) -> FeatureCache:
    """A cache whose "texts" are means of images with right labels, to see what better references are worth.

    The first `count` training images of each class give its mean, as many after them the scale of the cosines. None
    of them remains in the cache.

    Raises:
        InputError: a class with too few training images.
    """
    mean_rows = []
    scale_rows = []
    for k, name in enumerate(cache.class_names):
        rows = np.flatnonzero((cache.splits == "train") & (cache.labels == k))
        if len(rows) <= 2 * count:
            raise InputError(f"--trusted {count} takes {2 * count} images of each class, {name!r} has {len(rows)}")
        mean_rows.append(rows[:count])
        scale_rows.append(rows[count : 2 * count])
    unit = unit_rows(cache.plain)
    texts: NDArray[Any] = unit_rows(np.stack([unit[rows].mean(0) for rows in mean_rows]))  # (K, D)
    judged = np.concatenate(scale_rows)
    temperature = fit_temperature(_START * unit[judged] @ texts.T, cache.labels[judged])
    kept = np.setdiff1d(np.arange(len(cache)), np.concatenate([*mean_rows, *scale_rows]))
    return changed_cache(cache, kept, text_features=texts, logit_scale=_START / temperature)


def measure(
    cache: FeatureCache,
    families: Sequence[dict[str, Row]],
    fractions: Sequence[float],
    seeds: Sequence[int],
    options: Row,
) -> list[Row]:
    """One row for each contender, fraction of wrong labels and seed.

    Args:
        cache: features.
        families: contenders by name.
        fractions: of wrong labels, in [0, 1].
        seeds: of split, wrong labels and training.
        options: of all trials.
    """
    rows: list[Row] = []
    for family in families:
        keys = [(name, fraction, seed) for name in family for fraction in fractions for seed in seeds]
        configs = [
            FitConfig.from_dict({**options, **family[name], "label_noise": fraction, "seed": seed})
            for name, fraction, seed in keys
        ]
        for (name, fraction, seed), run in zip(keys, fit_many(cache, configs), strict=True):
            about: Row = {"contender": name, "against": next(iter(family)), "noise": fraction, "seed": seed}
            results: Row = {metric: run.metrics[metric] for metric in METRICS}
            rows.append({**about, **results})
    return rows


def table(rows: Sequence[Row], metric: str) -> list[list[str]]:
    """A line for each contender: for each fraction of wrong labels its mean and paired gap to the family's first."""
    lines = []
    for (name,), of_contender in grouped(rows, "contender").items():
        cells = []
        for (fraction,), own in grouped(of_contender, "noise").items():
            first = where(rows, contender=own[0]["against"], noise=fraction)
            cells += [mean_text(own, metric), gap_text(own, first, metric)]
        lines.append([name, *cells])
    return lines


def label_noise(
    data: DataListOption = None,
    noise: Annotated[str, typer.Option(help="Wrong labels in percent.")] = "0,20,40,60",
    seeds: SeedsOption = "0-4",
    metric: Annotated[Metric, typer.Option(help="What is printed.")] = "balanced_accuracy",
    pseudo_labels: Annotated[bool, typer.Option(help="Pseudo-labels by the same losses, too.")] = True,
    trusted: Annotated[
        int, typer.Option(help="Take texts from so many right-labelled images of each class; 0 for the texts.", min=0)
    ] = 0,
    steps: StepsOption = 500,
    n1: N1Option = 100,
    m1: M1Option = 100,
    gamma: GammaOption = 10.0,
    as_json: JsonOption = None,
) -> None:
    """Fit under wrong labels; print means and paired 95% intervals, in percent."""
    fractions = [percentage / 100 for percentage in parse_numbers(noise, "percentages of --noise", 0, 100)]
    seed_numbers = parse_seeds(seeds)
    families = FAMILIES if pseudo_labels else FAMILIES[:1]
    options = {**split_options(n1, m1, gamma), "steps": steps, "eval_every": steps}
    results: list[Row] = []
    for name in data or ["demo"]:
        cache = open_features(name)
        if trusted:
            cache = with_trusted(cache, trusted)
        rows = measure(cache, families, fractions, seed_numbers, options)
        results += [{"data": name, "trusted": trusted, **row} for row in rows]
        typer.echo(f"\n{name}: {metric}, percent, by fraction of wrong labels")
        titles = [title for fraction in fractions for title in (f"{100 * fraction:g}%", "above first")]
        print_table(["", *titles], table(rows, metric))
    write_rows(as_json, results)


if __name__ == "__main__":
    typer.run(guarded(label_noise))
