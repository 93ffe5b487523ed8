"""Random search with the same number of draws for every contender; it never sees a test image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.comparison.cells import Cell
from benchmarks.comparison.contenders import Metrics, Options, engine_method, fit_cell, without_test
from benchmarks.comparison.scikit_learn import SCIKIT_LEARN
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import options_of, own_options
from ulfine_fast.data.splits import Split
from ulfine_fast.methods import registry
from ulfine_fast.search.space import Range, Value, parse_space

Entry = Range | tuple[Value, ...]

_SCIKIT_LEARN_SPACES: dict[str, dict[str, Entry]] = {
    "sklearn_self_training": {
        "threshold": Range(0.5, 0.98),
        "inverse_penalty": Range(0.1, 100.0, log=True),
        "balanced": (False, True),
    },
    "sklearn_label_spreading": {"neighbors": (3, 5, 7, 10, 15, 25), "alpha": Range(0.01, 0.99)},
}


def space_of(contender: str) -> Mapping[str, Entry]:
    """What is searched: of a method of the engine every option that declares what a sweep tries and matters to it."""
    if contender in SCIKIT_LEARN:
        return _SCIKIT_LEARN_SPACES[contender]
    method = engine_method(contender)
    kind = registry.find(method).method
    options = options_of(method) if kind.trains else own_options(method)
    entries = {name: spec.metadata["search"] for name, spec in options.items()}
    if not kind.uses_unlabeled:
        entries.pop("warmup", None)
    searched = {name: entry for name, entry in entries.items() if entry is not None and name not in kind.not_read}
    return parse_space(searched, {"method": method}).searched if searched else {}


def draw(contender: str, i: int) -> Options:
    """Draw i of a contender's space; draw 0 is the defaults, so that tuning starts from what the untuned ones have.

    Contenders that share an option share its i-th value, where they try the same values.
    """
    return {name: draw_value(name, entry, i) for name, entry in space_of(contender).items()} if i else {}


def draw_value(name: str, entry: Entry, i: int) -> Value:
    """The i-th value of an option."""
    # a generator for each option, so that a space that gains an option draws the others as before
    random = np.random.default_rng([i, 0x5EA, *name.encode()])
    values = entry if isinstance(entry, tuple) else entry.grid() if entry.step is not None else ()
    if values:
        return values[int(random.integers(len(values)))]
    assert isinstance(entry, Range)
    if entry.log:
        value = math.exp(random.uniform(math.log(entry.low), math.log(entry.high)))
    else:
        value = float(random.uniform(entry.low, entry.high))
    return round(value) if entry.whole else value


def search(
    contender: str,
    cell: Cell,
    cache: FeatureCache,
    seeds: Sequence[int],
    splits: Sequence[Split],
    base: Options,
    trials: int,
    device: str,
) -> Options:
    """The drawn setting with the best validation balanced accuracy, averaged over the seeds.

    Args:
        contender: what is tuned.
        cell: where.
        cache: features of its data set.
        seeds: those of the final fit.
        splits: one for each seed; their test part is taken away first.
        base: options that hold for every draw.
        trials: how many settings are tried, at least 1. Ties go to the earlier draw.
        device: where the engine runs.
    """
    settings = [{**draw(contender, i), **base} for i in range(trials)]
    blind = [without_test(split) for split in splits]
    metrics = fit_cell(contender, cell, cache, seeds, blind, settings, device)
    return settings[int(np.argmax([_score(of_seeds) for of_seeds in metrics]))]


def _score(of_seeds: Sequence[Metrics]) -> float:
    """Mean over the seeds that have validation images; 0 without any, which leaves the defaults."""
    scores = [metrics["val"]["balanced_accuracy"] for metrics in of_seeds if metrics["val"]]
    return float(np.mean(scores)) if scores else 0.0
