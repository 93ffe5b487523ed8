"""Semi-supervised classifiers of scikit-learn on the same features, splits and figures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.data.splits import Split, labeled_counts
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.metrics.calibration import fit_temperature

OUTSIDE = ("sklearn_self_training", "sklearn_label_spreading")


@dataclass(frozen=True)
class OutsideClassifier:
    """One setting of an outside part: scikit-learn's defaults, but where they would make a straw man of it.

    Its logistic regression, unweighed and with C = 1, puts rows of length one from a long tail into the head classes.

    Attributes:
        method: one of `OUTSIDE`.
        threshold: self-training: smallest probability of a pseudo-label.
        inverse_penalty: self-training: C of the logistic regression.
        balanced: self-training: weigh classes by their inverse frequency.
        neighbors: label spreading: edges of each image in the graph; the radial kernel's n x n matrix is left alone.
        alpha: label spreading: share of a label that comes from the neighbours.
    """

    method: str
    threshold: float = 0.75
    inverse_penalty: float = 10.0
    balanced: bool = True
    neighbors: int = 7
    alpha: float = 0.2

    def build(self) -> Any:
        """The unfitted scikit-learn estimator.

        Raises:
            InputError: an unknown method.
        """
        if self.method == "sklearn_self_training":
            from sklearn.linear_model import LogisticRegression
            from sklearn.semi_supervised import SelfTrainingClassifier

            weight = "balanced" if self.balanced else None
            inner = LogisticRegression(C=self.inverse_penalty, class_weight=weight, max_iter=200)
            return SelfTrainingClassifier(inner, threshold=self.threshold)
        if self.method == "sklearn_label_spreading":
            from sklearn.semi_supervised import LabelSpreading

            return LabelSpreading(kernel="knn", n_neighbors=self.neighbors, alpha=self.alpha)
        raise InputError(f"unknown outside method {self.method!r}; the outside methods are {', '.join(OUTSIDE)}")


def fit_outside(setting: OutsideClassifier, cache: FeatureCache, split: Split) -> dict[str, Any]:
    """Fit one split on unit plain features and take the engine's figures of it.

    Logarithms of the probabilities stand for logits; self-training's pseudo-labels count over its threshold, those of
    label spreading all.
    """
    features = np.asarray(cache.plain, dtype=np.float32)
    features = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)  # (n, D)
    started = time.perf_counter()
    rows = np.concatenate([split.labeled, split.unlabeled])
    given = np.concatenate([cache.labels[split.labeled], np.full(len(split.unlabeled), -1)])
    with np.errstate(invalid="ignore"):  # rows that no label has reached yet
        fitted = setting.build().fit(features[rows], given)
    seconds = time.perf_counter() - started

    def logits(part: NDArray[np.int64]) -> NDArray[np.float32]:
        return _log_probabilities(fitted, features[part], len(cache.class_names))

    return {
        "seconds": seconds,
        **_figures(setting, cache, split, logits(split.val), logits(split.test), logits(split.unlabeled)),
    }


def _log_probabilities(fitted: Any, features: NDArray[np.float32], classes: int) -> NDArray[np.float32]:
    """Log probabilities (n, K); a class the estimator never saw is as good as impossible."""
    found = np.zeros((len(features), classes))
    if len(features):
        # an image that no label has reached has a row of NaN
        with np.errstate(invalid="ignore"):
            found[:, fitted.classes_] = np.nan_to_num(fitted.predict_proba(features), nan=1 / classes)
    return np.log(found.clip(1e-9)).astype(np.float32)


def _figures(
    setting: OutsideClassifier,
    cache: FeatureCache,
    split: Split,
    val: NDArray[np.float32],
    test: NDArray[np.float32],
    hidden: NDArray[np.float32],
) -> dict[str, Any]:
    """What the engine says of a run, of these log probabilities."""
    classes, labels = len(cache.class_names), cache.labels
    counts = labeled_counts(labels, split, classes)
    temperature = fit_temperature(val, labels[split.val])
    threshold = setting.threshold if setting.method == "sklearn_self_training" else 0.0
    health: dict[str, Any] = {}
    if len(split.unlabeled):
        health = metrics.pseudo_label_health(metrics.softmax(hidden), labels[split.unlabeled], threshold, classes)
    return {
        **metrics.classification(test, labels[split.test], counts, temperature),
        **health,
        "val": metrics.classification(val, labels[split.val], counts, temperature),
    }
