"""One head, M identical heads, M heads over random channels; and other voters on what the unlabelled images show.

python -m benchmarks.studies.channel_ensemble --data demo --data fashion_mnist --json channels.json

Two tables for each data set, means and 95% intervals over seeds, differences paired with the first line. The first
compares heads: M identical ones are the control, as they must train as one does. The second takes one head of the first
method and asks who else may vote on the pseudo-labels: cached views, prompts, heads over channels. Each voter's surest
guesses, the same number for all, then join the labels of a `linear_probe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.comparison.parts import write_json
from benchmarks.options import parse_methods, parse_seeds
from benchmarks.studies.storage import opened
from benchmarks.tables import print_table
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split, draw_split, labeled_counts
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.classification import classification, softmax
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.channel_ensemble.method import all_heads
from ulfine_fast.runs.run import Run

Row = dict[str, Any]
Floats = NDArray[np.floating[Any]]
_GROUPS = ("balanced_accuracy", "many", "medium", "few")
_HEADS = (*_GROUPS, "val", "guesses", "sure", "sure_rate")
_VOTES = ("guesses", "kept", *_GROUPS)
_OFF = {"low_bias": 0.0, "low_variance": 0.0}


def arms(heads: int, share: float, weight: float) -> dict[str, Row]:
    """Settings of what is compared, by name; the first is what the others are compared with."""
    many = {"ensemble_heads": heads, "ensemble_share": share}
    return {
        "one head": {},
        f"{heads} identical heads": {**many, **_OFF, "ensemble_share": 1.0},
        f"{heads} channel heads": {**many, **_OFF},
        "with low bias": {**many, **_OFF, "low_bias": weight},
        "with low variance": {**many, **_OFF, "low_variance": weight},
        "with both": {**many, "low_bias": weight, "low_variance": weight},
    }


def measure(cache: FeatureCache, method: str, seeds: Sequence[int], values: Row, compared: dict[str, Row]) -> list[Row]:
    """One row for each arm and seed."""
    rows = []
    for name, settings in compared.items():
        configs = [FitConfig.from_dict({**values, **settings, "method": method, "seed": seed}) for seed in seeds]
        for run in fit_many(cache, configs, progress=False):
            rows.append({"method": method, "arm": name, "seed": run.config.seed, **_figures(cache, run)})
    return rows


def _figures(cache: FeatureCache, run: Run) -> Row:
    """Of one run, on the test images and on what it says of the unlabelled ones."""
    unlabeled = draw_split(cache.labels, cache.splits, cache.class_names, run.config).unlabeled
    features, labels = cache.plain[unlabeled], cache.labels[unlabeled]
    return {
        **{name: run.metrics[name] for name in _GROUPS},
        "val": run.metrics["val"]["balanced_accuracy"],
        "guesses": float((run.predict(features) == labels).mean()),
        "sure": run.metrics["pseudo_label_precision"],
        "sure_rate": run.metrics["pseudo_label_rate"],
        "correlation": error_correlation(run, features, labels),
    }


def error_correlation(run: Run, features: Floats, labels: NDArray[np.int64]) -> float | None:
    """Mean correlation of two heads' errors on these images; None for a single head."""
    if not run.config.ensemble_heads:
        return None
    head = run.head()
    rows = normalize(torch.from_numpy(features.astype(np.float32))).unsqueeze(0)
    with torch.no_grad():
        logits = all_heads(head.trials, head.tensors, rows)[0]  # (n, M, K)
    wrong = torch.softmax(logits, -1) - torch.eye(logits.shape[-1])[torch.from_numpy(labels)].unsqueeze(1)
    between = np.corrcoef(wrong.transpose(0, 1).flatten(1).numpy())
    return float(between[~np.eye(len(between), dtype=bool)].mean())


def vote(cache: FeatureCache, method: str, seeds: Sequence[int], values: Row, ensemble: Row, keep: float) -> list[Row]:
    """One row for each voter and seed.

    Args:
        cache: features with views and texts.
        method: whose single head is asked.
        seeds: of split and training.
        values: settings of all trials.
        ensemble: settings of the heads over channels.
        keep: share of the unlabelled images whose guesses a probe learns from.
    """
    configs = [FitConfig.from_dict({**values, "method": method, "seed": seed}) for seed in seeds]
    single = fit_many(cache, configs, progress=False)
    several = fit_many(cache, [replace(config, **ensemble) for config in configs], progress=False)
    rows = []
    for one, many in zip(single, several, strict=True):
        split = draw_split(cache.labels, cache.splits, cache.class_names, one.config)
        for name, probabilities in voters(cache, one, many, split.unlabeled).items():
            found = taught(cache, split, one.config, probabilities, keep)
            rows.append({"method": method, "voter": name, "seed": one.config.seed, **found})
    return rows


def voters(cache: FeatureCache, one: Run, many: Run, rows: NDArray[np.int64]) -> dict[str, Floats]:
    """Probabilities (n, K) of each voter for these images; the first is one head's on one view."""
    plain, place = cache.plain[rows], np.searchsorted(cache.view_rows, rows)
    weak, strong = (np.moveaxis(cache.views(kind)[place], 1, 0) for kind in ("weak", "strong"))  # (V, n, D) each
    head = softmax(one.logits(plain))
    easy = np.stack([head, *(softmax(one.logits(view)) for view in weak)])
    every = np.concatenate([easy, [softmax(one.logits(view)) for view in strong]])
    prompts = prompt_probabilities(cache, plain)
    text = prompt_probabilities(cache, plain, together=True)[0]
    return {
        "one view": head,
        "channel heads": softmax(many.logits(plain)),
        "plain and weak views": easy.mean(0),
        "all views": every.mean(0),
        "head and mean prompt": (head + text) / 2,
        f"head and {len(prompts)} prompts": (head + prompts.mean(0)) / 2,
        "all views and prompts": (every.mean(0) + prompts.mean(0)) / 2,
    }


def prompt_probabilities(cache: FeatureCache, features: Floats, *, together: bool = False) -> Floats:
    """Zero-shot probabilities of each prompt (P, n, K), or of their mean alone (1, n, K)."""
    texts = cache.text_features
    assert texts is not None
    texts = _unit(texts.astype(np.float32))  # (K, P, D)
    texts = _unit(texts.mean(1, keepdims=True)) if together else texts
    rows = _unit(features.astype(np.float32))
    return np.stack([softmax(cache.logit_scale * rows @ own.T) for own in np.moveaxis(texts, 1, 0)])


def _unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def taught(cache: FeatureCache, split: Split, config: FitConfig, probabilities: Floats, keep: float) -> Row:
    """How right guesses (n, K) are, and what a probe makes of the labels and the surest of them."""
    rows, guesses = split.unlabeled, probabilities.argmax(1)
    right = guesses == cache.labels[rows]
    surest = np.argsort(-probabilities.max(1), kind="stable")[: max(1, round(keep * len(rows)))]
    labels = cache.labels.copy()
    labels[rows[surest]] = guesses[surest]
    both = np.concatenate([split.labeled, rows[surest]])
    again = replace(split, labeled=both, unlabeled=np.delete(rows, surest))
    probe = fit_many(cache.with_labels(labels), [replace(config, method="linear_probe")], split=again, progress=False)[
        0
    ]
    # groups by the labels that were given, not by guesses
    counts = labeled_counts(cache.labels, split, len(cache.class_names))
    figures = classification(np.log(probe.test_probabilities + 1e-12), probe.test_labels, counts)
    return {
        "guesses": float(right.mean()),
        "kept": float(right[surest].mean()),
        **{name: figures[name] for name in _GROUPS},
    }


def table(rows: Sequence[Row], by: str, figures: Sequence[str]) -> list[list[str]]:
    """A line for each name in the column `by`: means, and paired differences to the first name, in percent."""
    names = list(dict.fromkeys(row[by] for row in rows))
    groups = {name: [row for row in rows if row[by] == name] for name in names}
    lines = []
    for name in names:
        cells = [_cell(groups[name], None if name == names[0] else groups[names[0]], figure) for figure in figures]
        lines.append([name, *cells])
    return lines


def _cell(rows: Sequence[Row], first: Sequence[Row] | None, figure: str) -> str:
    mean = mean_interval(row[figure] for row in rows)
    shown = "-" if mean is None else f"{100 * mean.mean:.1f}"
    if first is None:
        return shown
    gap = mean_interval(a[figure] - b[figure] for a, b in zip(rows, first, strict=True))
    return shown if gap is None else f"{shown} ({100 * gap.mean:+.1f} ±{100 * gap.half:.1f})"


def channel_ensemble(
    data: Annotated[
        list[str] | None,
        typer.Option(help="demo, a data set of benchmarks.studies.methods, or a cache's folder.", show_default="demo"),
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods that take an ensemble.")] = "fixmatch,freematch,ulfine",
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    heads: Annotated[int, typer.Option(help="Heads M.", min=2, max=64)] = 5,
    share: Annotated[float, typer.Option(help="Share of the channels that a head sees.", min=0.01, max=1.0)] = 0.5,
    weight: Annotated[float, typer.Option(help="Weight of each term.", min=0.0)] = 1.0,
    keep: Annotated[float, typer.Option(help="Share of guesses a probe learns from.", min=0.01, max=1.0)] = 0.5,
    n1: Annotated[int, typer.Option(help="Labelled images of the largest class.", min=1)] = 100,
    m1: Annotated[int, typer.Option(help="Unlabelled images of the largest class.", min=1)] = 150,
    gamma: Annotated[float, typer.Option(help="Imbalance of both.", min=1.0)] = 50.0,
    steps: Annotated[int, typer.Option(help="Mini-batch steps.", min=1)] = 500,
    voting: Annotated[bool, typer.Option(help="Compare voters, too.")] = True,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Fit methods with one head and with several, and teach probes with the guesses of several voters."""
    values = {"n1": n1, "m1": m1, "gamma_l": gamma, "gamma_u": gamma, "steps": steps}
    names, numbers, compared = parse_methods(methods), parse_seeds(seeds), arms(heads, share, weight)
    kept: list[Row] = []
    for name in data or ["demo"]:
        cache = opened(name)
        for method in names:
            rows = measure(cache, method, numbers, values, compared)
            _print(f"{name}, {method}", rows, "arm", _HEADS)
            kept += [{"data": name, **row} for row in rows]
        if voting:
            rows = vote(cache, names[0], numbers, values, compared[f"{heads} channel heads"], keep)
            _print(f"{name}, voters beside {names[0]}", rows, "voter", _VOTES)
            kept += [{"data": name, **row} for row in rows]
    if as_json is not None:
        write_json(as_json, kept)


def _print(title: str, rows: Sequence[Row], by: str, figures: Sequence[str]) -> None:
    typer.echo(f"\n{title}: percent, mean and difference to the first line, 95% interval over seeds")
    lines = table(rows, by, figures)
    if by == "voter":
        print_table([by, *figures], lines)
        return
    told = [mean_interval(row["correlation"] or np.nan for row in rows if row[by] == line[0]) for line in lines]
    extra = ["-" if one is None else f"{one.mean:.3f}" for one in told]
    print_table([by, *figures, "correlation"], [[*line, cell] for line, cell in zip(lines, extra, strict=True)])


if __name__ == "__main__":
    typer.run(guarded(channel_ensemble))
