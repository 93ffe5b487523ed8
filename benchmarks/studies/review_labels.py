"""How many labels the review's proposals save, against labelling at random and by margin.

    python -m benchmarks.studies.review_labels --data cifar10 --data fashion_mnist --json review_labels.json

A simulated person begins with one label a class, and answers for the images that a strategy proposes, 20 at a time, or
a tenth of the labels so far where that is more. After each round the review's quick fit is fitted again. The oracle is
the same fit with the labels of all images. Printed is how many labels it takes until balanced accuracy on the test
split is at most 3 points below the oracle's, for two rounds in a row; and what the review expected each round of its
own proposals to bring, beside what they brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, get_args

import numpy as np
import typer

from benchmarks.data import changed_cache, open_features
from benchmarks.options import DataListOption, JsonOption, SeedsOption, parse_numbers, parse_seeds
from benchmarks.results import Row, grouped, interval_text, mean_text, print_table, write_rows
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.data.splits import Rows, long_tail_counts
from ulfine_fast.metrics.classification import per_class_accuracy
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.review.proposals import PROPOSED, propose
from ulfine_fast.review.quick import QuickFit, quick_fit

Strategy = Literal["random", "margin", "proposed"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

_GROWTH = 0.1  # images of a round, as a fraction of the labels so far
_NONE: Rows = np.zeros(0, dtype=np.int64)


def long_tailed(cache: FeatureCache, gamma: float, seed: int) -> FeatureCache:
    """The test images, and training images whose class sizes fall from that of the smallest class to it over gamma.

    Raises:
        InputError: a class without training images, or no test image.
    """
    random = np.random.default_rng(seed)
    classes = len(cache.class_names)
    train = [
        random.permutation(np.flatnonzero((cache.splits == "train") & (cache.labels == k))) for k in range(classes)
    ]
    test = np.flatnonzero((cache.splits == "test") & (cache.labels >= 0))
    if not all(map(len, train)) or not len(test):
        raise InputError("the simulation needs training images of every class, and test images")
    counts = long_tail_counts(min(map(len, train)), gamma, classes, smallest=1)
    kept = [rows[:count] for rows, count in zip(train, counts[random.permutation(classes)], strict=True)]
    return changed_cache(cache, np.sort(np.concatenate([*kept, test])))


def baseline(strategy: Strategy, fit: QuickFit, pool: Rows, count: int, seed: int) -> Rows:
    """Rows of the pool to label next (count,), at random or of the least margin between the two likeliest classes."""
    if strategy == "random":
        return np.random.default_rng([seed, len(pool)]).choice(pool, count, replace=False)
    ordered = np.sort(fit.probabilities[pool], axis=1)
    return pool[np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")[:count]]


def accuracy(cache: FeatureCache, fit: QuickFit) -> float:
    """Balanced accuracy on the test split."""
    test = cache.splits == "test"
    recall = per_class_accuracy(cache.labels[test], fit.probabilities[test].argmax(1), fit.classes)
    return float(np.nanmean(recall))


def simulate(cache: FeatureCache, strategy: Strategy, seed: int, target: float) -> list[Row]:
    """A row for each round, until the target is reached in two rounds in a row, or all images are labelled."""
    everything = np.flatnonzero(cache.splits == "train")
    first = [np.flatnonzero((cache.splits == "train") & (cache.labels == k)) for k in range(len(cache.class_names))]
    random = np.random.default_rng(seed)
    labeled = np.sort([random.choice(rows) for rows in first])
    rounds: list[Row] = []
    expected = None
    scale = None
    scale_chosen_with = 0
    while True:
        # the scale is chosen again when there are twice as many labels, as the review does
        if len(labeled) >= 2 * scale_chosen_with:
            scale_chosen_with = len(labeled)
            scale = None
        fit = quick_fit(cache, labeled, _NONE, scale)
        scale = fit.scale
        rounds.append({"labels": len(labeled), "accuracy": accuracy(cache, fit), "expected": expected})
        reached = len(rounds) > 1 and min(row["accuracy"] for row in rounds[-2:]) >= target
        pool = np.setdiff1d(everything, labeled)
        if reached or not len(pool):
            return rounds
        count = min(len(pool), max(PROPOSED, int(_GROWTH * len(labeled))))
        if strategy == "proposed":
            proposal = propose(cache.plain, fit, pool, count)
            expected = proposal.gain
            labeled = np.union1d(labeled, proposal.rows)
        else:
            labeled = np.union1d(labeled, baseline(strategy, fit, pool, count, seed))


def needed(rounds: Sequence[Row], target: float) -> int:
    """Labels of the first of two rounds in a row that reach the target; all where none do."""
    for row, following in pairwise(rounds):
        if min(row["accuracy"], following["accuracy"]) >= target:
            return int(row["labels"])
    return int(rounds[-1]["labels"])


def measure(name: str, gammas: Sequence[float], seeds: Sequence[int], less: float) -> list[Row]:
    """A row for each imbalance, seed and strategy, with its rounds."""
    rows: list[Row] = []
    whole = open_features(name)
    for gamma in gammas:
        for seed in seeds:
            cache = long_tailed(whole, gamma, seed)
            train = np.flatnonzero(cache.splits == "train")
            oracle = accuracy(cache, quick_fit(cache, train, _NONE))
            about: Row = {"data": name, "gamma": gamma, "seed": seed, "images": len(train), "oracle": oracle}
            for strategy in STRATEGIES:
                rounds = simulate(cache, strategy, seed, oracle - less)
                labels = needed(rounds, oracle - less)
                rows.append({**about, "strategy": strategy, "labels": labels, "rounds": rounds})
                typer.echo(f"{name}, gamma {gamma:g}, seed {seed}: {strategy} needs {labels} labels", err=True)
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each data set, imbalance and strategy: labels needed, and how many percent fewer than at random."""
    lines = []
    for (data, gamma), group in grouped(rows, "data", "gamma").items():
        chance = [row["labels"] for row in group if row["strategy"] == "random"]
        for (strategy,), own in grouped(group, "strategy").items():
            # of means: a seed in which chance needs many labels counts more
            fewer = 1 - sum(row["labels"] for row in own) / sum(chance)
            each = mean_interval([1 - row["labels"] / other for row, other in zip(own, chance, strict=True)])
            lines.append(
                [
                    f"{data}, {gamma:g}",
                    strategy,
                    mean_text(own, "images", factor=1, digits=0),
                    mean_text(own, "oracle"),
                    mean_text(own, "labels", factor=1, digits=0, half=True),
                    f"{100 * fewer:.0f}%" if strategy != "random" else "",
                    interval_text(each, digits=0) if strategy != "random" else "",
                ]
            )
    return lines


def expectations(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each data set and imbalance: mean gain of a round that was expected, and that came."""
    lines = []
    for (data, gamma), group in grouped(
        [row for row in rows if row["strategy"] == "proposed"], "data", "gamma"
    ).items():
        pairs = [
            {"expected": row["expected"], "came": row["accuracy"] - before["accuracy"]}
            for run in group
            for before, row in pairwise(run["rounds"])
        ]
        lines.append(
            [
                f"{data}, {gamma:g}",
                str(len(pairs)),
                mean_text(pairs, "expected", digits=2),
                mean_text(pairs, "came", digits=2),
            ]
        )
    return lines


def review_labels(
    data: DataListOption = None,
    gamma: Annotated[str, typer.Option(help="Imbalances of the images to be labelled.")] = "1,100",
    less: Annotated[float, typer.Option(help="Points below the oracle that are enough.", min=0)] = 3.0,
    seeds: SeedsOption = "0-4",
    as_json: JsonOption = None,
) -> None:
    """Simulate a person who labels; print how many labels each strategy needs."""
    gammas = parse_numbers(gamma, "imbalances of --gamma", 1)
    seed_numbers = parse_seeds(seeds)
    rows: list[Row] = []
    for name in data or ["demo"]:
        rows += measure(name, gammas, seed_numbers, less / 100)
        write_rows(as_json, rows)
    titles = ["data, imbalance", "strategy", "images", "oracle", "labels", "fewer", "fewer, by seed"]
    print_table(titles, table(rows), texts=2)
    typer.echo("\nbalanced accuracy that a round of proposals brings, in points")
    print_table(["data, imbalance", "rounds", "expected", "came"], expectations(rows))


if __name__ == "__main__":
    typer.run(guarded(review_labels))
