"""COMIC, its parts and its baselines on mosaics of several classes with a long tail, some of whose labels are hidden.

python -m benchmarks.studies.multilabel --json multilabel.json

Of what a training mosaic shows a share is hidden, and nothing is known to be absent; validation and test labels are
whole. Each way has the learning rate that is best on validation, over all seeds; test mosaics only judge. "True labels"
is plain cross-entropy with nothing hidden.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.comparison.parts import write_json
from benchmarks.options import parse_seeds
from benchmarks.studies.mosaics import mosaics, truth
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.metrics.classification import rank_thirds
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.related.multilabel.labels import LabelTable
from ulfine_fast.related.multilabel.run import MultiLabelRun
from ulfine_fast.related.multilabel.settings import MultiLabelConfig
from ulfine_fast.related.multilabel.train import fit_labels

Row = dict[str, Any]
Labels = NDArray[np.int8]

FIGURES = ("map", "many", "medium", "few")
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


def hidden(shown: Labels, train: NDArray[np.bool_], share: float, seed: int) -> Labels:
    """Labels of all mosaics (n, K), those of training ones 1 or unknown.

    Args:
        shown: 1 or 0 (n, K).
        train: which rows are learned from (n,).
        share: how many of the classes that training mosaics show are hidden. A class keeps one mosaic at least.
        seed: draws them.
    """
    random = np.random.default_rng([seed, 0x41D])
    found = shown.copy()
    for k in range(shown.shape[1]):
        own = random.permutation(np.flatnonzero(train & (shown[:, k] == 1)))
        found[train, k] = -1
        found[own[min(len(own) - 1, round(share * len(own))) :], k] = 1
    return found


def measure(cache: FeatureCache, shown: Labels, share: float, seed: int, rates: Sequence[float]) -> list[Row]:
    """One row for each way and learning rate, on one seed's mosaics."""
    train = cache.splits == "train"
    given = hidden(shown, train, share, seed)
    found = []
    for whole in (False, True):
        table = LabelTable(cache.class_names, list(cache.ids), shown if whole else given)
        ways = [(name, lr) for name in WAYS if (name == TRUE) == whole for lr in rates]
        configs = [MultiLabelConfig(**{**WAYS[name], "seed": seed, "lr": lr}) for name, lr in ways]
        runs = fit_labels(cache, table, configs, progress=False)
        for (name, lr), run in zip(ways, runs, strict=True):
            about = {"share": share, "seed": seed, "way": name, "lr": lr, "val": run.metrics["val"]["map"]}
            told = grouped(run.metrics["per_class_ap"], (shown[train] == 1).sum(0))
            found.append({**about, **told, **recovered(run, cache, shown, given)})
    return found


def grouped(each: Sequence[float], counts: NDArray[np.int64]) -> Row:
    """Mean average precision of all classes and of thirds by how many training mosaics truly show them (K,)."""
    own, thirds = np.asarray(each), rank_thirds(counts)
    groups = {name: float(own[k].mean()) for name, k in zip(FIGURES[1:], thirds, strict=True)}
    return {"map": float(own.mean()), **groups}


def recovered(run: MultiLabelRun, cache: FeatureCache, shown: Labels, given: Labels) -> Row:
    """How many labels a run restored, the share of them that is right, and of the hidden ones that it found."""
    row, place = ({name: i for i, name in enumerate(names)} for names in (cache.ids, cache.class_names))
    right = sum(int(shown[row[one.id], place[one.class_name]]) for one in run.restored)
    lost = int(((shown == 1) & (given < 0)).sum())
    precision = right / len(run.restored) if run.restored else None
    return {"restored": len(run.restored), "precision": precision, "recall": right / lost if lost else None}


def chosen(rows: Sequence[Row]) -> list[Row]:
    """For each share and way the rows of the learning rate with the best mean on validation."""
    found = []
    for share, way in dict.fromkeys((row["share"], row["way"]) for row in rows):
        own = [row for row in rows if (row["share"], row["way"]) == (share, way)]
        rates = sorted({row["lr"] for row in own})
        best = max(rates, key=lambda lr: float(np.mean([row["val"] for row in own if row["lr"] == lr])))
        found += [row for row in own if row["lr"] == best]
    return found


def table(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A line for each share and way: means, paired differences to baselines and of COMIC to it, what was restored."""
    for share, way in dict.fromkeys((row["share"], row["way"]) for row in rows):
        by = {name: [row for row in rows if (row["share"], row["way"]) == (share, name)] for name in WAYS}
        own = by[way]
        gaps = [_gap(own, by[other], figure) for other in ("bce", "asymmetric") for figure in ("map", "few")]
        gaps.append(_gap(by["comic"], own, "map"))
        means = [_percent(own, figure) for figure in (*FIGURES, "precision", "recall")]
        yield [f"{share:g}", way, f"{own[0]['lr']:g}", *means[:4], *gaps, *means[4:]]


def _percent(rows: Sequence[Row], name: str) -> str:
    found = mean_interval(row[name] for row in rows if row[name] is not None)
    return "-" if found is None else f"{100 * found.mean:.1f}"


def _gap(rows: Sequence[Row], others: Sequence[Row], name: str) -> str:
    """Mean difference with its 95% interval, seed by seed; nothing of a way to itself."""
    found = mean_interval(a[name] - b[name] for a, b in zip(rows, others, strict=True))
    if found is None or rows is others:
        return ""
    return f"{100 * found.mean:+.1f}" + (f" ±{100 * found.half:.1f}" if found.n > 1 else "")


def multilabel(
    shares: Annotated[str, typer.Option(help="Shares of hidden labels, separated by commas.")] = "0,0.4,0.7",
    seeds: Annotated[str, typer.Option(help="Such as 0-4; each has mosaics of its own.")] = "0-4",
    rates: Annotated[str, typer.Option(help="Learning rates to choose from.")] = "0.03,0.1,0.3,1",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
    as_csv: Annotated[Path | None, typer.Option("--csv", help="Write all rows to this file.")] = None,
) -> None:
    """Fit COMIC, what is left of it without each part, and its baselines; print mean average precisions."""
    hide, speeds = _numbers(shares, 0, 0.99, "shares"), _numbers(rates, 1e-6, 1e3, "rates")
    rows = []
    for seed in parse_seeds(seeds):
        cache, shown = mosaics(seed), truth(seed)
        for share in hide:
            rows += measure(cache, shown, share, seed, speeds)
    rows.sort(key=lambda row: hide.index(row["share"]))
    if as_json is not None:
        write_json(as_json, rows)
    if as_csv is not None:
        with as_csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    gaps = ["over bce", "few over bce", "over asymmetric", "few over asymmetric", "comic over it"]
    titles = ["hidden", "way", "lr", *FIGURES, *gaps, "restored: right", "found"]
    print_table(titles, table(chosen(rows)), texts=2)


def _numbers(text: str, low: float, high: float, what: str) -> list[float]:
    """Numbers separated by commas, each once.

    Raises:
        InputError: none of that kind, or outside [low, high].
    """
    try:
        found = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = []
    if not found or not all(low <= one <= high for one in found):
        raise InputError(f"{what} are numbers from {low:g} to {high:g} separated by commas, got {text!r}")
    return found


if __name__ == "__main__":
    typer.run(guarded(multilabel))
