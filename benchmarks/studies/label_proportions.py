"""Bags of images with class proportions: stage one alone, both stages, and their controls; ULFine with transport.

    python -m benchmarks.studies.label_proportions --data demo --data fashion_mnist --json proportions.json

The first table puts all labelled images into bags, a size at a time. "labels" is a plain probe that reads every image's
own class, by the same steps over the same images; "wrong shares" are the proportions of another bag. Differences are
paired with stage one of the same size. Beside the test metrics are the fractions of the bags' own images that stage one
guesses, and that it guesses once its predictions are transported onto the proportions. The second table is the
long-tailed protocol, `ulfine` with its pseudo-labels as they are and transported onto P, by the shape of the unlabelled
part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
import typer

from benchmarks.data import open_features
from benchmarks.options import (
    DataListOption,
    JsonOption,
    SeedsOption,
    parse_names,
    parse_numbers,
    parse_seeds,
    split_options,
    trial_configs,
)
from benchmarks.results import Row, grouped, mean_and_gap, print_table, where, write_rows
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import SHAPES
from ulfine_fast.data.splits import Split, draw_split
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.ops.transport import sinkhorn
from ulfine_fast.related.label_proportions.bags import Bags, PaddedBags, draw_bags
from ulfine_fast.runs.run import Run

_STAGE_ONE = "stage one"
_WRONG = "wrong shares"
_ARMS: dict[str, Row] = {
    _STAGE_ONE: {"stage_one": 1.0},
    "both stages": {},
    "argmax labels": {"bag_labels": "argmax"},
    "no mixup": {"mixup": 0},
    _WRONG: {},
}
_BAG_METRICS = ("balanced_accuracy", "val", "guessed", "transported")
_TAIL_METRICS = ("balanced_accuracy", "many", "medium", "few", "precision", "rate")


def measure(cache: FeatureCache, sizes: Sequence[int], seeds: Sequence[int], options: Row) -> list[Row]:
    """One row for each bag size, arm and seed; size 0 for methods that read no bags."""
    configs = trial_configs(["proportions"], seeds, options)
    splits = [draw_split(cache.labels, cache.splits, cache.class_names, config) for config in configs]
    rows = []
    for arm, method in {"zero-shot": "zero_shot", "labels": "cross_entropy"}.items():
        without_bags = [config.with_method(method) for config in configs]
        rows += [_row(run, 0, arm) for run in fit_many(cache, without_bags, split=splits, progress=False)]
    for size in sizes:
        bagged = [in_bags(cache, split, size, config.data_seed) for split, config in zip(splits, configs, strict=True)]
        for arm, changes in _ARMS.items():
            arm_splits = [with_wrong_proportions(split) for split in bagged] if arm == _WRONG else bagged
            arm_configs = [replace(config, **changes) for config in configs]
            runs = fit_many(cache, arm_configs, split=arm_splits, progress=False)
            rows += [
                {**_row(run, size, arm), **guesses(cache, run, split)} for run, split in zip(runs, bagged, strict=True)
            ]
    return rows


def in_bags(cache: FeatureCache, split: Split, size: int, seed: int) -> Split:
    """The split with its labelled images in bags of a size."""
    bags = draw_bags(split.labeled, cache.labels[split.labeled], size, len(cache.class_names), seed)
    return replace(split, extra={**split.extra, "bags": bags.to_list(cache.ids)})


def with_wrong_proportions(split: Split) -> Split:
    """The split in which each bag has the proportions of the one before."""
    bags = split.extra["bags"]
    moved = [{**bag, "shares": other["shares"]} for bag, other in zip(bags, [bags[-1], *bags[:-1]], strict=True)]
    return replace(split, extra={**split.extra, "bags": moved})


def guesses(cache: FeatureCache, run: Run, split: Split) -> Row:
    """How many of the bags' images a run guesses, alone and with the bags' proportions; how far those are missed."""
    bags = PaddedBags.pad([Bags.from_list(split.extra["bags"], cache.row_of)], torch.device("cpu"))
    index = bags.index[0].numpy()  # (G, m)
    present = bags.present[0]  # (G, m)
    logits = torch.from_numpy(run.logits(cache.plain[index.ravel()])).view(*index.shape, -1)  # (G, m, K)
    plan = sinkhorn(logits.unsqueeze(0), bags.proportions, bags.present)[0]  # (G, m, K)
    labels = torch.from_numpy(cache.labels[index])
    reached = (plan * present.unsqueeze(-1)).sum(1) / present.sum(1, keepdim=True)  # (G, K)
    return {
        "guessed": float((logits.argmax(-1) == labels)[present].float().mean()),
        "transported": float((plan.argmax(-1) == labels)[present].float().mean()),
        "missed": float((reached - bags.proportions[0]).abs().max()),
    }


def _row(run: Run, size: int, arm: str) -> Row:
    return {
        "bag": size,
        "arm": arm,
        "seed": run.config.seed,
        "balanced_accuracy": run.metrics["balanced_accuracy"],
        "val": run.metrics["val"]["balanced_accuracy"],
        "seconds": run.metrics["seconds"],
    }


def long_tailed(cache: FeatureCache, shapes: Sequence[str], seeds: Sequence[int], options: Row) -> list[Row]:
    """One row for each shape of the unlabelled part, kind of pseudo-labels and seed."""
    rows = []
    for shape in shapes:
        for kind in ("argmax", "sinkhorn"):
            configs = trial_configs(["ulfine"], seeds, {**options, "shape": shape, "pseudo_labels": kind})
            for run in fit_many(cache, configs, progress=False):
                rows.append(
                    {
                        "shape": shape,
                        "arm": kind,
                        "seed": run.config.seed,
                        **{name: run.metrics[name] for name in ("balanced_accuracy", "many", "medium", "few")},
                        "precision": run.metrics["pseudo_label_precision"],
                        "rate": run.metrics["pseudo_label_rate"],
                    }
                )
    return rows


def table(rows: Sequence[Row], by: str, first: str, metrics: Sequence[str]) -> list[list[str]]:
    """A line for each value of `by` and arm: means, and paired differences to the arm `first` of the same value."""
    lines = []
    for (value, arm), own in grouped(rows, by, "arm").items():
        reference = where(rows, **{by: value, "arm": first})
        lines.append([str(value or "-"), arm, *(mean_and_gap(own, reference, name) for name in metrics)])
    return lines


def label_proportions(
    data: DataListOption = None,
    sizes: Annotated[str, typer.Option(help="Images in a bag, separated by commas.")] = "4,16,64,256",
    seeds: SeedsOption = "0-4",
    steps: Annotated[int, typer.Option(help="Mini-batch steps.", min=10)] = 500,
    batch: Annotated[int, typer.Option(help="Images in a mini-batch, in the first table.", min=1)] = 256,
    lr: Annotated[float, typer.Option(help="Learning rate, in the first table.", min=0.0)] = 0.03,
    shapes: Annotated[str, typer.Option(help="Shapes of the second table; empty for no such table.")] = (
        "consistent,uniform,reversed"
    ),
    as_json: JsonOption = None,
) -> None:
    """Learn from bags of several sizes, and compare pseudo-labels of ULFine."""
    seed_numbers = parse_seeds(seeds)
    bag_sizes = parse_numbers(sizes, "sizes", 1, kind=int)
    shape_names = parse_names(shapes, SHAPES, "shapes") if shapes else []
    bag_options = {"steps": steps, "batch_labeled": batch, "lr": lr, "eval_every": max(1, steps // 10)}
    tail_options = {"steps": steps, **split_options(100, 150, 50.0)}
    results: list[Row] = []
    for name in data or ["demo"]:
        cache = open_features(name)
        typer.echo(name)
        bag_rows = measure(cache, bag_sizes, seed_numbers, bag_options)
        print_table(
            ["bag", "arm", "balanced accuracy", "validation", "guessed", "transported"],
            table(bag_rows, "bag", _STAGE_ONE, _BAG_METRICS),
        )
        tail_rows = long_tailed(cache, shape_names, seed_numbers, tail_options)
        if tail_rows:
            titles = ["unlabelled", "pseudo-labels", *_TAIL_METRICS]
            print_table(titles, table(tail_rows, "shape", "argmax", _TAIL_METRICS))
        results += [{"data": name, **row} for row in [*bag_rows, *tail_rows]]
    write_rows(as_json, results)


if __name__ == "__main__":
    typer.run(guarded(label_proportions))
