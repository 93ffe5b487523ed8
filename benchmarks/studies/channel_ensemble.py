"""One head, M identical heads, M heads over random channels; and other voters on what the unlabelled images show.

    python -m benchmarks.studies.channel_ensemble --data demo --data fashion_mnist --json channels.json

Two tables for each data set, means and 95% intervals over seeds, differences paired with the first line. The first
compares heads: M identical ones are the control, as they must train as one does. The second takes one head of the first
method and asks what else may vote on the pseudo-labels: cached views, prompts, heads over channels. Each voter's most
confident guesses, the same number for all, then join the labels of a `linear_probe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.data import open_features, unit_rows
from benchmarks.options import (
    DataListOption,
    GammaOption,
    JsonOption,
    N1Option,
    SeedsOption,
    StepsOption,
    parse_names,
    parse_seeds,
    split_options,
    trial_configs,
)
from benchmarks.results import Row, grouped, mean_and_gap, mean_text, print_table, write_rows
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig, options_of
from ulfine_fast.data.splits import Split, draw_split, labeled_counts
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.classification import classification, softmax
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.channel_ensemble.method import all_heads
from ulfine_fast.runs.run import Run

Floats = NDArray[np.floating[Any]]

METHODS = ("fixmatch", "freematch", "ulfine")
"""Methods that have a form with several heads, `channel_` before the name."""

_ACCURACIES = ("balanced_accuracy", "many", "medium", "few")
_HEAD_METRICS = (*_ACCURACIES, "val", "guesses", "sure", "sure_rate")
_VOTER_METRICS = ("guesses", "kept", *_ACCURACIES)


def arms(heads: int, fraction: float, weight: float) -> dict[str, Row | None]:
    """What is compared, by name: options of the ensemble, None for a single head; others are compared with the first.

    Args:
        heads: M.
        fraction: of the channels that a head sees.
        weight: of each term of the ensemble's loss.
    """
    ensemble = {"ensemble_heads": heads, "ensemble_fraction": fraction, "low_bias": 0.0, "low_variance": 0.0}
    return {
        "one head": None,
        f"{heads} identical heads": {**ensemble, "ensemble_fraction": 1.0},
        f"{heads} channel heads": ensemble,
        "with low bias": {**ensemble, "low_bias": weight},
        "with low variance": {**ensemble, "low_variance": weight},
        "with both": {**ensemble, "low_bias": weight, "low_variance": weight},
    }


def arm_configs(method: str, seeds: Sequence[int], options: Row, ensemble: Row | None) -> list[FitConfig]:
    """A trial for each seed, of the method itself or of its form with several heads."""
    if ensemble is None:
        # with the defaults of the other arms
        own, form = options_of(method), options_of(f"channel_{method}")
        defaults = {name: form[name].default for name in own if form[name].default != own[name].default}
        return trial_configs([method], seeds, {**defaults, **options})
    return trial_configs([f"channel_{method}"], seeds, {**options, **ensemble})


def measure(
    cache: FeatureCache, method: str, seeds: Sequence[int], options: Row, compared: dict[str, Row | None]
) -> list[Row]:
    """One row for each arm and seed."""
    rows = []
    for name, ensemble in compared.items():
        for run in fit_many(cache, arm_configs(method, seeds, options, ensemble), progress=False):
            unlabeled = draw_split(cache.labels, cache.splits, cache.class_names, run.config).unlabeled
            features = cache.plain[unlabeled]
            labels = cache.labels[unlabeled]
            rows.append(
                {
                    "method": method,
                    "arm": name,
                    "seed": run.config.seed,
                    **{metric: run.metrics[metric] for metric in _ACCURACIES},
                    "val": run.metrics["val"]["balanced_accuracy"],
                    "guesses": float((run.predict(features) == labels).mean()),
                    "sure": run.metrics["pseudo_label_precision"],
                    "sure_rate": run.metrics["pseudo_label_rate"],
                    "correlation": None if ensemble is None else error_correlation(run, features, labels),
                }
            )
    return rows


def error_correlation(run: Run, features: Floats, labels: NDArray[np.int64]) -> float:
    """Mean correlation of the errors of two heads of an ensemble on these images."""
    head = run.head()
    rows = normalize(torch.from_numpy(features.astype(np.float32))).unsqueeze(0)
    with torch.no_grad():
        logits = all_heads(head.trials, head.tensors, rows)[0]  # (n, M, K)
    one_hot = torch.eye(logits.shape[-1])[torch.from_numpy(labels)].unsqueeze(1)
    errors = torch.softmax(logits, -1) - one_hot
    correlations = np.corrcoef(errors.transpose(0, 1).flatten(1).numpy())  # (M, M)
    return float(correlations[~np.eye(len(correlations), dtype=bool)].mean())


def vote(cache: FeatureCache, method: str, seeds: Sequence[int], options: Row, ensemble: Row, keep: float) -> list[Row]:
    """One row for each voter and seed.

    Args:
        cache: features with views and texts.
        method: whose single head votes.
        seeds: of split and training.
        options: of all trials.
        ensemble: options of the heads over channels.
        keep: fraction of the unlabelled images whose guesses a probe learns from.
    """
    single_runs = fit_many(cache, arm_configs(method, seeds, options, None), progress=False)
    ensemble_runs = fit_many(cache, arm_configs(method, seeds, options, ensemble), progress=False)
    rows = []
    for single, several in zip(single_runs, ensemble_runs, strict=True):
        split = draw_split(cache.labels, cache.splits, cache.class_names, single.config)
        for name, probabilities in voters(cache, single, several, split.unlabeled).items():
            metrics = probe_on_guesses(cache, split, single.config, probabilities, keep)
            rows.append({"method": method, "voter": name, "seed": single.config.seed, **metrics})
    return rows


def voters(cache: FeatureCache, single: Run, several: Run, rows: NDArray[np.int64]) -> dict[str, Floats]:
    """Probabilities (n, K) of each voter for these images; the first is one head's on one view."""
    plain = cache.plain[rows]
    view_position = np.searchsorted(cache.view_rows, rows)
    weak = np.moveaxis(cache.views("weak")[view_position], 1, 0)  # (Vw, n, D)
    strong = np.moveaxis(cache.views("strong")[view_position], 1, 0)  # (Vs, n, D)
    head = softmax(single.logits(plain))
    easy_views = np.stack([head, *(softmax(single.logits(view)) for view in weak)])
    all_views = np.concatenate([easy_views, [softmax(single.logits(view)) for view in strong]])
    prompts = prompt_probabilities(cache, plain)
    mean_prompt = prompt_probabilities(cache, plain, together=True)[0]
    return {
        "one view": head,
        "channel heads": softmax(several.logits(plain)),
        "plain and weak views": easy_views.mean(0),
        "all views": all_views.mean(0),
        "head and mean prompt": (head + mean_prompt) / 2,
        f"head and {len(prompts)} prompts": (head + prompts.mean(0)) / 2,
        "all views and prompts": (all_views.mean(0) + prompts.mean(0)) / 2,
    }


def prompt_probabilities(cache: FeatureCache, features: Floats, *, together: bool = False) -> Floats:
    """Zero-shot probabilities of each prompt (P, n, K), or of their mean alone (1, n, K)."""
    assert cache.text_features is not None
    texts = unit_rows(cache.text_features)  # (K, P, D)
    if together:
        texts = unit_rows(texts.mean(1, keepdims=True))
    rows = unit_rows(features)
    return np.stack([softmax(cache.logit_scale * rows @ prompt.T) for prompt in np.moveaxis(texts, 1, 0)])


def probe_on_guesses(cache: FeatureCache, split: Split, config: FitConfig, probabilities: Floats, keep: float) -> Row:
    """How right guesses (n, K) are, and what a probe makes of the labels and the most confident of them."""
    rows = split.unlabeled
    guesses = probabilities.argmax(1)
    right = guesses == cache.labels[rows]
    most_confident = np.argsort(-probabilities.max(1), kind="stable")[: max(1, round(keep * len(rows)))]

    # a probe on the labels and these guesses
    labels = cache.labels.copy()
    labels[rows[most_confident]] = guesses[most_confident]
    with_guesses = replace(
        split,
        labeled=np.concatenate([split.labeled, rows[most_confident]]),
        unlabeled=np.delete(rows, most_confident),
    )
    probe_config = config.with_method("linear_probe")
    [probe] = fit_many(cache.with_labels(labels), [probe_config], split=with_guesses, progress=False)

    # groups of classes are those of the labels, without guesses
    counts = labeled_counts(cache.labels, split, len(cache.class_names))
    metrics = classification(np.log(probe.test_probabilities + 1e-12), probe.test_labels, counts)
    return {
        "guesses": float(right.mean()),
        "kept": float(right[most_confident].mean()),
        **{name: metrics[name] for name in _ACCURACIES},
    }


def table(rows: Sequence[Row], by: str, metrics: Sequence[str]) -> list[list[str]]:
    """A line for each name in the column `by`: means, and paired differences to the first name, in percent."""
    groups = grouped(rows, by)
    first = next(iter(groups.values()))
    return [[name, *(mean_and_gap(own, first, metric) for metric in metrics)] for (name,), own in groups.items()]


def channel_ensemble(
    data: DataListOption = None,
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(METHODS)}.")] = ",".join(METHODS),
    seeds: SeedsOption = "0-4",
    heads: Annotated[int, typer.Option(help="Heads M.", min=2, max=64)] = 5,
    fraction: Annotated[
        float, typer.Option("--share", help="Fraction of the channels that a head sees.", min=0.01, max=1.0)
    ] = 0.5,
    weight: Annotated[float, typer.Option(help="Weight of each term.", min=0.0)] = 1.0,
    keep: Annotated[float, typer.Option(help="Fraction of guesses a probe learns from.", min=0.01, max=1.0)] = 0.5,
    n1: N1Option = 100,
    m1: Annotated[int, typer.Option(help="Unlabelled images of the largest class.", min=1)] = 150,
    gamma: GammaOption = 50.0,
    steps: StepsOption = 500,
    voting: Annotated[bool, typer.Option(help="Compare voters, too.")] = True,
    as_json: JsonOption = None,
) -> None:
    """Fit methods with one head and with several, and train probes on the guesses of several voters."""
    options = {**split_options(n1, m1, gamma), "steps": steps}
    names = parse_names(methods, METHODS, "methods with a form of several heads")
    seed_numbers = parse_seeds(seeds)
    compared = arms(heads, fraction, weight)
    results: list[Row] = []
    for name in data or ["demo"]:
        cache = open_features(name)
        for method in names:
            rows = measure(cache, method, seed_numbers, options, compared)
            results += [{"data": name, **row} for row in rows]
            _print_title(f"{name}, {method}")
            lines = table(rows, "arm", _HEAD_METRICS)
            for line, own in zip(lines, grouped(rows, "arm").values(), strict=True):
                line.append(mean_text(own, "correlation", factor=1.0, digits=3))
            print_table(["arm", *_HEAD_METRICS, "correlation"], lines)
        if voting:
            ensemble = compared[f"{heads} channel heads"]
            assert ensemble is not None
            rows = vote(cache, names[0], seed_numbers, options, ensemble, keep)
            results += [{"data": name, **row} for row in rows]
            _print_title(f"{name}, voters beside {names[0]}")
            print_table(["voter", *_VOTER_METRICS], table(rows, "voter", _VOTER_METRICS))
    write_rows(as_json, results)


def _print_title(title: str) -> None:
    typer.echo(f"\n{title}: percent, mean and difference to the first line, 95% interval over seeds")


if __name__ == "__main__":
    typer.run(guarded(channel_ensemble))
