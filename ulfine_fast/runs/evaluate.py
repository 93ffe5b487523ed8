"""A run's metrics on images it did not train on: its own test split, or another cache of the same encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.names import did_you_mean, listed
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cache.two_encoders import beside
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.runs.run import Run, describe_encoder

_ENCODER_FIELDS = ("sha256", "dim", "image_size", "preprocessing")


def evaluate(run: Run, other: Path | None = None, second: Path | None = None) -> dict[str, Any]:
    """Classification metrics of a run, from its head and a cache.

    Args:
        run: the fitted run.
        other: a cache of other images through the same encoder; its labelled test images are taken, or all labelled
            images where it has no test split. None takes the run's own test split.
        second: of a run of two encoders, a cache of the same images by the second one, beside `other`.

    Returns:
        The metrics of :func:`ulfine_fast.metrics.classification.classification`, and test_rows. Of a run without a test
        split, where no cache is named, what its fit estimated under "cross_validation": the head has trained on every
        label, so that nothing can be computed again.

    Raises:
        InputError: the cache is gone, lacks the test images, or has a class the run does not know.
        CacheMismatch: its features come from another encoder.
    """
    estimate = run.metrics.get("cross_validation")
    if other is None and estimate:
        return {"cross_validation": estimate, "test_rows": 0}
    cache = open_cache(run, other, second)
    refuse_other_encoder(run, cache)
    if other is None:
        rows, labels = own_rows(run, cache)
    else:
        is_test = (cache.splits == "test") & (cache.labels >= 0)
        rows = np.flatnonzero(is_test if is_test.any() else cache.labels >= 0)
        if not len(rows):
            raise InputError("the cache has no labelled image to evaluate on")
        labels = _labels_by_name(run, [cache.class_names[k] for k in cache.labels[rows]])
    return {**evaluate_inputs(run, inputs_of(run, cache)[rows], labels), "test_rows": len(rows)}


def evaluate_inputs(run: Run, inputs: NDArray[Any], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Metrics (see `metrics.classification`) on what `Run.logits` takes (n, ...), labels (n,)."""
    counts = run.metrics.get("class_counts")
    if counts is None or None in counts:
        raise InputError("the run's metrics.json does not count the labelled images of each class; fit the run again")
    return metrics.classification(
        run.logits(inputs), labels, np.asarray(counts, dtype=np.int64), run.metrics.get("temperature", 1.0)
    )


def open_cache(run: Run, path: Path | None = None, second: Path | None = None) -> FeatureCache:
    """The cache at `path`, or the one that the run was fitted on; of a run of two encoders, both side by side.

    Raises:
        InputError: the run has no cache of its own, or there is none; or another number of caches than encoders.
    """
    if second is not None and run.second is None:
        raise InputError(f"this run has one encoder; leave out the second cache {second}")
    if run.second is not None and (path is None) != (second is None):
        raise InputError("this run has two encoders; name a cache of each with --cache and --with")
    first = _opened(path or run.cache_path)
    return first if run.second is None else beside(first, _opened(second or run.second.cache_path))


def _opened(path: Path | None) -> FeatureCache:
    """The cache in a folder that a run or its user names."""
    if path is None:
        raise InputError("this run was fitted on arrays in memory; name a cache with --cache")
    if not (path / "manifest.json").exists():
        raise InputError(f"the cache {path} is gone or no cache; extract it again, or name another with --cache")
    return FeatureCache.open(path)


def inputs_of(run: Run, cache: FeatureCache) -> NDArray[Any]:
    """What `Run.logits` takes of every image of a cache: plain features (N, D), or tokens (N, S, W)."""
    return cache.tokens("plain") if run.config.reads_tokens else cache.plain


def refuse_other_encoder(run: Run, cache: FeatureCache) -> None:
    """Refuse features that the run's head was not trained on.

    Raises:
        InputError: a cache of another number of encoders than the run has.
        CacheMismatch: naming the first field that differs.
    """
    if (run.second is None) != (cache.second is None):
        counts = ("one encoder", "two") if run.second is None else ("two encoders", "one")
        raise InputError(f"this run has {counts[0]} and the cache features of {counts[1]}; use the run's own cache")
    second = None if run.second is None else run.second.encoder
    pairs = [(run.encoder, describe_encoder(cache))]
    if second is not None and cache.second is not None:
        pairs.append((second, describe_encoder(cache.second)))
    for wanted, read in pairs:
        expected, actual = wanted or {}, read or {}
        for name in _ENCODER_FIELDS:
            if name in expected and expected[name] != actual.get(name):
                raise CacheMismatch(
                    f"model.{name}" if name != "preprocessing" else name,
                    actual.get(name),
                    expected[name],
                    fix="evaluate on a cache made with the run's own encoder",
                )


def own_rows(run: Run, cache: FeatureCache) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and labels (n,) of the run's test split.

    Raises:
        InputError: the cache lacks one of its images.
    """
    return rows_of(run.test_ids, cache), run.test_labels


def rows_of(ids: Sequence[str], cache: FeatureCache) -> NDArray[np.int64]:
    """Rows (n,) of a run's images in the cache.

    Raises:
        InputError: the cache lacks one of them.
    """
    return cache.row_of(ids, source="the run's split", fix="use the cache it was fitted on")


def _labels_by_name(run: Run, names: Sequence[str]) -> NDArray[np.int64]:
    """The run's class indices (n,) of class names."""
    index = {name: k for k, name in enumerate(run.class_names)}
    unknown = sorted(set(names) - set(index))
    if unknown:
        hint = did_you_mean(unknown[0], index)
        raise InputError(f"the cache has class {unknown[0]!r}, which the run does not know: {listed(index)}{hint}")
    return np.array([index[name] for name in names], dtype=np.int64)
