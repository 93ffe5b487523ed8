"""Bags of images with class shares: stage one alone, both stages, and their controls; ULFine with transported labels.

    python -m benchmarks.studies.label_proportions --data demo --data fashion_mnist --json proportions.json

The first table puts all labelled images into bags, a size at a time. "labels" is a plain probe that is told every
image's own class, by the same steps over the same images; "wrong shares" are those of another bag. Differences are
paired with stage one of the same size. Beside the test figures stands how many of the bags' own images stage one
guesses, and how many once its guesses are transported onto the shares. The second table is the long-tailed protocol,
`ulfine` with its pseudo-labels as they are and transported onto P, by the shape of the unlabelled part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.comparison.parts import write_json
from benchmarks.options import parse_seeds
from benchmarks.studies.storage import opened
from benchmarks.tables import print_table
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split, draw_split
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.related.label_proportions.bags import PaddedBags, draw_bags
from ulfine_fast.related.label_proportions.losses import sinkhorn
from ulfine_fast.runs.run import Run

Row = dict[str, Any]
_FIRST = "stage one"
_ARMS: dict[str, Row] = {
    _FIRST: {"stage_one": 1.0},
    "both stages": {},
    "argmax labels": {"bag_labels": "argmax"},
    "no mixup": {"mixup": 0},
    "wrong shares": {},
}
_FIGURES = ("balanced_accuracy", "val", "guessed", "transported")
_TAIL = ("balanced_accuracy", "many", "medium", "few", "precision", "rate")


def measure(cache: FeatureCache, sizes: Sequence[int], seeds: Sequence[int], values: Row) -> list[Row]:
    """One row for each bag size, arm and seed; size 0 for what reads no bags."""
    configs = [FitConfig.from_dict({**values, "method": "proportions", "seed": seed}) for seed in seeds]
    splits = [draw_split(cache.labels, cache.splits, cache.class_names, config) for config in configs]
    rows = []
    for name, method in {"zero-shot": "zero_shot", "labels": "cross_entropy"}.items():
        own = [replace(config, method=method) for config in configs]
        rows += [_row(run, 0, name) for run in fit_many(cache, own, split=splits, progress=False)]
    for size in sizes:
        bagged = [in_bags(cache, split, size, config.data_seed) for split, config in zip(splits, configs, strict=True)]
        for name, settings in _ARMS.items():
            given = [shuffled(split) for split in bagged] if name == "wrong shares" else bagged
            own = [replace(config, **settings) for config in configs]
            runs = fit_many(cache, own, split=given, progress=False)
            told = zip(runs, bagged, strict=True)
            rows += [{**_row(run, size, name), **guesses(cache, run, split)} for run, split in told]
    return rows


def in_bags(cache: FeatureCache, split: Split, size: int, seed: int) -> Split:
    """The split with its labelled images in bags of a size."""
    labels = cache.labels[split.labeled]
    return replace(split, bags=draw_bags(split.labeled, labels, size, len(cache.class_names), seed))


def shuffled(split: Split) -> Split:
    """The split with each bag's shares given to the next bag."""
    assert split.bags is not None
    return replace(split, bags=replace(split.bags, shares=np.roll(split.bags.shares, 1, axis=0)))


def guesses(cache: FeatureCache, run: Run, split: Split) -> Row:
    """How many of the bags' images a run knows, alone and with the bags' shares; how far those are missed."""
    assert split.bags is not None
    bags = PaddedBags.of([split.bags], torch.device("cpu"))
    index, present = bags.index[0].numpy(), bags.present[0]
    logits = torch.from_numpy(run.logits(cache.plain[index.ravel()])).view(*index.shape, -1)  # (G, m, K)
    plan = sinkhorn(logits.unsqueeze(0), bags.shares, bags.present)[0]
    labels = torch.from_numpy(cache.labels[index])
    right = [float((found.argmax(-1) == labels)[present].float().mean()) for found in (logits, plan)]
    reached = (plan * present.unsqueeze(-1)).sum(1) / present.sum(1, keepdim=True)  # (G, K)
    return {"guessed": right[0], "transported": right[1], "missed": float((reached - bags.shares[0]).abs().max())}


def _row(run: Run, size: int, arm: str) -> Row:
    figures = {"balanced_accuracy": run.metrics["balanced_accuracy"], "val": run.metrics["val"]["balanced_accuracy"]}
    return {"bag": size, "arm": arm, "seed": run.config.seed, **figures, "seconds": run.metrics["seconds"]}


def long_tailed(cache: FeatureCache, shapes: Sequence[str], seeds: Sequence[int], values: Row) -> list[Row]:
    """One row for each shape of the unlabelled part, kind of pseudo-labels and seed."""
    rows = []
    for shape in shapes:
        for kind in ("argmax", "sinkhorn"):
            told = {**values, "shape": shape, "pseudo_labels": kind, "method": "ulfine"}
            configs = [FitConfig.from_dict({**told, "seed": seed}) for seed in seeds]
            for run in fit_many(cache, configs, progress=False):
                figures = {name: run.metrics[name] for name in _TAIL[:4]}
                drawn = {name: run.metrics[f"pseudo_label_{name}"] for name in _TAIL[4:]}
                rows.append({"shape": shape, "arm": kind, "seed": run.config.seed, **figures, **drawn})
    return rows


def table(rows: Sequence[Row], by: str, first: str, figures: Sequence[str]) -> list[list[str]]:
    """A line for each value of `by` and arm: means, and paired differences to the arm `first` of the same value."""
    lines = []
    for value, arm in dict.fromkeys((row[by], row["arm"]) for row in rows):
        own = [row for row in rows if (row[by], row["arm"]) == (value, arm)]
        base = [row for row in rows if (row[by], row["arm"]) == (value, first)] if arm != first else []
        lines.append([str(value or "-"), arm, *(_cell(own, base, name) for name in figures)])
    return lines


def _cell(rows: Sequence[Row], first: Sequence[Row], figure: str) -> str:
    mean = mean_interval(row.get(figure, math.nan) for row in rows)
    if mean is None:
        return "-"
    shown = f"{100 * mean.mean:.1f}"
    gap = mean_interval(a[figure] - b[figure] for a, b in zip(rows, first, strict=True)) if first else None
    return shown if gap is None else f"{shown} ({100 * gap.mean:+.1f} ±{100 * gap.half:.1f})"


def label_proportions(
    data: Annotated[
        list[str] | None,
        typer.Option(help="demo, a data set of benchmarks.studies.methods, or a cache's folder.", show_default="demo"),
    ] = None,
    sizes: Annotated[str, typer.Option(help="Images in a bag, separated by commas.")] = "4,16,64,256",
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    steps: Annotated[int, typer.Option(help="Mini-batch steps.", min=10)] = 500,
    batch: Annotated[int, typer.Option(help="Images in a mini-batch, in the first table.", min=1)] = 256,
    lr: Annotated[float, typer.Option(help="Learning rate, in the first table.", min=0.0)] = 0.03,
    shapes: Annotated[str, typer.Option(help="Shapes of the second table; none for no such table.")] = (
        "consistent,uniform,reversed"
    ),
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Learn from bags of several sizes, and compare pseudo-labels of ULFine."""
    numbers, kept = parse_seeds(seeds), []
    values = {"steps": steps, "batch_labeled": batch, "lr": lr, "eval_every": max(1, steps // 10)}
    tail = {"steps": steps, "n1": 100, "m1": 150, "gamma_l": 50.0, "gamma_u": 50.0}
    for name in data or ["demo"]:
        cache = opened(name)
        bagged = measure(cache, [int(size) for size in sizes.split(",")], numbers, values)
        typer.echo(name)
        print_table(
            ["bag", "arm", "balanced accuracy", "validation", "guessed", "transported"],
            table(bagged, "bag", _FIRST, _FIGURES),
        )
        rest = long_tailed(cache, [shape for shape in shapes.split(",") if shape], numbers, tail)
        if rest:
            print_table(["unlabelled", "pseudo-labels", *_TAIL], table(rest, "shape", "argmax", _TAIL))
        kept += [{"data": name, **row} for row in [*bagged, *rest]]
    if as_json is not None:
        write_json(as_json, kept)


if __name__ == "__main__":
    typer.run(guarded(label_proportions))
