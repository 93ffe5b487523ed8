"""COMIC, its parts and its baselines on mosaics of several classes with a long tail, some of whose labels are hidden.

    python -m benchmarks.studies.multilabel --json multilabel.json

A fraction of the classes that training mosaics show is hidden, and nothing is known to be absent; validation and test
labels are whole. Each way has the learning rate that is best on validation, over all seeds; test mosaics are read for
the results alone. "True labels" is plain cross-entropy with nothing hidden.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.options import JsonOption, SeedsOption, parse_numbers, parse_seeds
from benchmarks.results import Row, gap_text, grouped, mean_text, print_table, where, write_rows
from benchmarks.studies.mosaics import mosaics, truth
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.metrics.classification import rank_thirds
from ulfine_fast.related.multilabel.labels import LabelTable
from ulfine_fast.related.multilabel.run import MultiLabelRun
from ulfine_fast.related.multilabel.settings import MultiLabelConfig
from ulfine_fast.related.multilabel.train import fit_labels

Labels = NDArray[np.int8]

METRICS = ("map", "many", "medium", "few")
TRUE = "true labels"
_PLAIN = {"gamma_negative": 0.0, "clip": 0.0, "tail_negative": 0.0, "rarity_power": 0.0}
WAYS: dict[str, Row] = {
    "bce": {"method": "bce"},
    "asymmetric": {"method": "asymmetric"},
    "comic": {},
    "comic - correction": {"correction": 0.0},
    "comic - modification": _PLAIN,
    "comic - balance": {"balance": False},
    "modification alone": {"correction": 0.0, "balance": False},
    "bce + correction": {**_PLAIN, "balance": False},
    TRUE: {"method": "bce"},
}


def hidden(shown: Labels, train: NDArray[np.bool_], fraction: float, seed: int) -> Labels:
    """Labels of all mosaics (n, K), those of training ones 1 or unknown.

    Args:
        shown: 1 or 0 (n, K).
        train: which rows train (n,).
        fraction: of the classes that training mosaics show, hidden. Each class stays visible in one mosaic at least.
        seed: draws them.
    """
    random = np.random.default_rng([seed, 0x41D])
    labels = shown.copy()
    for k in range(shown.shape[1]):
        rows = random.permutation(np.flatnonzero(train & (shown[:, k] == 1)))
        labels[train, k] = -1
        labels[rows[min(len(rows) - 1, round(fraction * len(rows))) :], k] = 1
    return labels


def measure(cache: FeatureCache, shown: Labels, fraction: float, seed: int, rates: Sequence[float]) -> list[Row]:
    """One row for each way and learning rate, on one seed's mosaics."""
    train = cache.splits == "train"
    visible = hidden(shown, train, fraction, seed)
    rows = []
    for labels, names in ((visible, [name for name in WAYS if name != TRUE]), (shown, [TRUE])):
        table = LabelTable(cache.class_names, list(cache.ids), labels)
        trials = [(name, lr) for name in names for lr in rates]
        configs = [MultiLabelConfig(**{**WAYS[name], "seed": seed, "lr": lr}) for name, lr in trials]
        for (name, lr), run in zip(trials, fit_labels(cache, table, configs, progress=False), strict=True):
            rows.append(
                {
                    "share": fraction,
                    "seed": seed,
                    "way": name,
                    "lr": lr,
                    "val": run.metrics["val"]["map"],
                    **by_group(run.metrics["per_class_ap"], (shown[train] == 1).sum(0)),
                    **restored(run, cache, shown, visible),
                }
            )
    return rows


def by_group(average_precision: Sequence[float], counts: NDArray[np.int64]) -> Row:
    """Mean average precision of all classes and of thirds by how many training mosaics truly show them (K,)."""
    values = np.asarray(average_precision)
    thirds = dict(zip(("many", "medium", "few"), rank_thirds(counts), strict=True))
    return {"map": float(values.mean()), **{name: float(values[classes].mean()) for name, classes in thirds.items()}}


def restored(run: MultiLabelRun, cache: FeatureCache, shown: Labels, visible: Labels) -> Row:
    """How many labels a run restored, which fraction of them is right, and of the hidden ones restored."""
    row_of = {name: row for row, name in enumerate(cache.ids)}
    class_of = {name: k for k, name in enumerate(cache.class_names)}
    right = sum(int(shown[row_of[label.id], class_of[label.class_name]]) for label in run.restored)
    lost = int(((shown == 1) & (visible < 0)).sum())
    return {
        "restored": len(run.restored),
        "precision": right / len(run.restored) if run.restored else None,
        "recall": right / lost if lost else None,
    }


def chosen(rows: Sequence[Row]) -> list[Row]:
    """For each fraction and way the rows of the learning rate with the best mean on validation."""
    kept = []
    for own in grouped(rows, "share", "way").values():
        by_rate = {lr: of_rate for (lr,), of_rate in sorted(grouped(own, "lr").items())}
        kept += max(by_rate.values(), key=lambda of_rate: float(np.mean([row["val"] for row in of_rate])))
    return kept


def table(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A line for each fraction and way: means, paired differences to baselines and of COMIC to it, restored labels."""
    for (fraction, way), own in grouped(rows, "share", "way").items():
        of_fraction = where(rows, share=fraction)
        bce = where(of_fraction, way="bce")
        asymmetric = where(of_fraction, way="asymmetric")
        yield [
            f"{fraction:g}",
            way,
            f"{own[0]['lr']:g}",
            *(mean_text(own, name) for name in METRICS),
            *(gap_text(own, baseline, name) for baseline in (bce, asymmetric) for name in ("map", "few")),
            gap_text(where(of_fraction, way="comic"), own, "map"),
            mean_text(own, "precision"),
            mean_text(own, "recall"),
        ]


def multilabel(
    fractions: Annotated[
        str, typer.Option("--shares", help="Fractions of labels that are hidden, separated by commas.")
    ] = "0,0.4,0.7",
    seeds: SeedsOption = "0-4",
    rates: Annotated[str, typer.Option(help="Learning rates to choose from.")] = "0.03,0.1,0.3,1",
    as_json: JsonOption = None,
    as_csv: Annotated[Path | None, typer.Option("--csv", help="Write all rows to this file.")] = None,
) -> None:
    """Fit COMIC, what is left of it without each part, and its baselines; print mean average precisions.

    Each seed has its own mosaics.
    """
    hidden_fractions = parse_numbers(fractions, "fractions of --shares", 0, 0.99)
    learning_rates = parse_numbers(rates, "learning rates of --rates", 1e-6, 1e3)
    rows: list[Row] = []
    for seed in parse_seeds(seeds):
        cache = mosaics(seed)
        shown = truth(seed)
        for fraction in hidden_fractions:
            rows += measure(cache, shown, fraction, seed, learning_rates)
    rows.sort(key=lambda row: hidden_fractions.index(row["share"]))
    write_rows(as_json, rows)
    if as_csv is not None:
        with as_csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    gaps = ["over bce", "few over bce", "over asymmetric", "few over asymmetric", "comic over it"]
    titles = ["hidden", "way", "lr", *METRICS, *gaps, "restored: precision", "recall"]
    print_table(titles, table(chosen(rows)), texts=2)


if __name__ == "__main__":
    typer.run(guarded(multilabel))
