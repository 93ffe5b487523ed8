"""A run's figures on images it did not train on: its own test split, or another cache of the same encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.engine.trial_batch import encoder_of
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.runs.run import Run

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

_SAME = ("sha256", "dim", "image_size", "preprocessing")


def evaluate(run: Run, other: Path | None = None) -> dict[str, Any]:
    """Classification figures of a run, from its heads and a cache.

    Args:
        run: the fitted run.
        other: a cache of other images through the same encoder; None takes the run's own test split.

    Returns:
        The figures of :func:`ulfine_fast.metrics.classification.classification` and test_rows.

    Raises:
        InputError: the cache is gone, lacks the test images, or has a class the run does not know.
        CacheMismatch: its features come from another encoder.
    """
    from ulfine_fast.cache.store import FeatureCache

    if other is None and run.cache_path is None:
        raise InputError("this run was fitted on arrays in memory; name a cache with --cache")
    where = other or run.cache_path
    assert where is not None
    if not (where / "manifest.json").exists():
        raise InputError(f"the cache {where} is gone or no cache; extract it again, or name another with --cache")
    cache = FeatureCache.open(where)
    refuse_other_encoder(run, cache)
    rows, labels = _other_rows(run, cache) if other else own_rows(run, cache)
    inputs = cache.tokens("plain") if run.config.reads_tokens else cache.plain
    return {**figures(run, inputs[rows], labels), "test_rows": len(rows)}


def figures(run: Run, features: NDArray[Any], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Metrics (see `metrics.classification`) on what `Run.logits` takes (n, ...), labels (n,)."""
    counts = np.asarray(run.metrics["class_counts"], dtype=np.int64)
    return metrics.classification(run.logits(features), labels, counts, run.metrics.get("temperature", 1.0))


def refuse_other_encoder(run: Run, cache: FeatureCache) -> None:
    """Refuse features that the run's heads were not trained on.

    Raises:
        CacheMismatch: naming the first field that differs.
    """
    mine, theirs = run.encoder or {}, encoder_of(cache) or {}
    for name in _SAME:
        if name in mine and mine[name] != theirs.get(name):
            raise CacheMismatch(
                f"model.{name}" if name != "preprocessing" else name,
                theirs.get(name),
                mine[name],
                fix="evaluate on a cache made with the run's own encoder",
            )


def own_rows(run: Run, cache: FeatureCache) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and labels (n,) of the run's test split.

    Raises:
        InputError: the cache lacks one of its images.
    """
    row_of = {name: row for row, name in enumerate(cache.ids)}
    missing = [name for name in run.test_ids if name not in row_of]
    if missing:
        raise InputError(f"the cache lacks {missing[0]!r} of the run's test split; use the cache it was fitted on")
    return np.array([row_of[name] for name in run.test_ids], dtype=np.int64), run.test_labels


def _other_rows(run: Run, cache: FeatureCache) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labelled test rows of another cache (all labelled rows where it has no test split), labels by class name."""
    index = {name: k for k, name in enumerate(run.class_names)}
    test = (cache.splits == "test") & (cache.labels >= 0)
    rows = np.flatnonzero(test if test.any() else cache.labels >= 0)
    if not len(rows):
        raise InputError("the cache has no labelled image to evaluate on")
    names = [cache.class_names[k] for k in cache.labels[rows]]
    unknown = sorted(set(names) - set(index))
    if unknown:
        raise InputError(f"the cache has class {unknown[0]!r}, which the run does not know: {', '.join(index)}")
    return rows.astype(np.int64), np.array([index[name] for name in names], dtype=np.int64)
