"""What cross-validation says of a trial that trains on every label: metrics, held-out predictions, a temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.data.folds import Folds
from ulfine_fast.data.splits import Split, labeled_counts
from ulfine_fast.methods.registry import method_of
from ulfine_fast.metrics.calibration import LEAST_ROWS, fit_temperature
from ulfine_fast.metrics.classification import softmax
from ulfine_fast.metrics.cross_validation import cross_validated
from ulfine_fast.runs.calibration import Calibration
from ulfine_fast.runs.evaluate import inputs_of
from ulfine_fast.runs.run import HeldOut, Run

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


def add_estimate(run: Run, cache: FeatureCache, split: Split, folds: Folds, fold_runs: Sequence[Run]) -> None:
    """Add to a run what the fits without each fold say of it, and calibrate it on their held-out images.

    Args:
        run: fitted on every label.
        cache: its features.
        split: of the run.
        folds: of its labelled images.
        fold_runs: the runs of `folds.splits`; one that diverged predicts nothing.
    """
    if run.status == "failed":
        return
    labels = cache.labels[split.labeled]  # (L,)
    logits = _held_out_logits(folds, fold_runs, len(run.class_names))  # (R, L, K)
    held_out = ~np.isnan(logits[:, :, 0])  # (R, L)

    # the temperature, unless the cache has validation images that it was fitted on
    if not len(split.val) and not method_of(run.config).calibrates:
        repeated = np.broadcast_to(labels, held_out.shape)
        least = LEAST_ROWS * max(len(logits), 1)
        run.metrics["temperature"] = fit_temperature(logits[held_out], repeated[held_out], least=least)

    # metrics
    counts = labeled_counts(cache.labels, split, len(run.class_names))
    temperature = run.metrics["temperature"]
    run.metrics["cross_validation"] = cross_validated(logits, labels, counts, folds.count, temperature)

    # what rejection and sets are calibrated on: each image by one fit, as new images are seen by one
    if len(logits):
        run.calibration = _calibration(run, cache, split, folds, fold_runs[: folds.count], logits[0] / temperature)

    # mean predictions of the images that were held out
    rows = np.flatnonzero(held_out.any(0))
    if not len(rows):
        return
    kept = logits[:, rows]  # (R, L', K)
    probabilities = softmax(kept.reshape(-1, kept.shape[-1]) / temperature).reshape(kept.shape)
    correct = np.where(held_out[:, rows], kept.argmax(-1) == labels[rows], np.nan)
    run.held_out = HeldOut(
        ids=[cache.ids[row] for row in split.labeled[rows]],
        labels=labels[rows],
        probabilities=np.nanmean(probabilities, axis=0).astype(np.float32),
        correct=np.nanmean(correct, axis=0),
    )


def _calibration(
    run: Run, cache: FeatureCache, split: Split, folds: Folds, fold_runs: Sequence[Run], logits: NDArray[np.float32]
) -> Calibration:
    """Validation images, and labelled ones by the fits (one repeat's) without them, of calibrated logits (L, K)."""
    inputs = inputs_of(run, cache)
    scores = np.full(len(logits), np.nan, dtype=np.float32)
    for fold, fitted in enumerate(fold_runs):
        rows = np.flatnonzero(folds.numbers[0] == fold)
        if fitted.status != "failed" and len(rows):
            scores[rows] = fitted.scores(inputs[split.labeled[rows]])
    known = np.flatnonzero(np.isfinite(scores) & ~np.isnan(logits[:, 0]))
    rows = split.labeled[known]
    by_folds = Calibration.held_out(
        [cache.ids[row] for row in rows], cache.labels[rows], logits[known], scores[known], in_fold=True
    )
    # folds of the method's own are of smaller fits
    return by_folds if run.calibration is None else run.calibration.of_validation().joined(by_folds)


def _held_out_logits(folds: Folds, fold_runs: Sequence[Run], classes: int) -> NDArray[np.float32]:
    """Log probabilities (R, L, K) of labelled images by the fits without them; NaN where there is none."""
    repeats, labels = folds.numbers.shape
    logits = np.full((repeats, labels, classes), np.nan, dtype=np.float32)
    for number, fitted in enumerate(fold_runs):
        if not len(fitted.test_probabilities):
            continue
        repeat, fold = divmod(number, folds.count)
        # before the temperature, which fits have where the cache has validation images
        log_probabilities = np.log(np.maximum(fitted.test_probabilities, np.finfo(np.float32).tiny))
        rows = np.flatnonzero(folds.numbers[repeat] == fold)
        logits[repeat, rows] = fitted.metrics["temperature"] * log_probabilities
    return logits
