"""Semi-supervised classifiers of scikit-learn on the same features and splits, with the engine's metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import unit_rows
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.data.splits import Split, labeled_counts
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.metrics.calibration import fit_temperature

SCIKIT_LEARN = ("sklearn_self_training", "sklearn_label_spreading")


@dataclass(frozen=True)
class ScikitLearnClassifier:
    """One setting of a classifier: scikit-learn's defaults, except where they would make it needlessly weak.

    Its logistic regression, unweighted and with C = 1, puts rows of length one from a long tail into the head classes.

    Attributes:
        method: one of `SCIKIT_LEARN`.
        threshold: self-training: smallest probability of a pseudo-label.
        inverse_penalty: self-training: C of the logistic regression.
        balanced: self-training: weigh classes by their inverse frequency.
        neighbors: label spreading: edges of each image in the graph; the radial kernel would need an n x n matrix.
        alpha: label spreading: fraction of a label that comes from the neighbours.
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
        raise InputError(f"unknown method {self.method!r}; the methods of scikit-learn are {', '.join(SCIKIT_LEARN)}")


def fit_scikit_learn(classifier: ScikitLearnClassifier, cache: FeatureCache, split: Split) -> dict[str, Any]:
    """Fit one split on unit plain features, and return the metrics that the engine has of a run.

    Logarithms of the probabilities are taken as logits; self-training's pseudo-labels count over its threshold, those
    of label spreading all.
    """
    classes = len(cache.class_names)
    labels = cache.labels
    features = unit_rows(cache.plain)

    # fit; label -1 marks the unlabelled images
    started = time.perf_counter()
    rows = np.concatenate([split.labeled, split.unlabeled])
    visible = np.concatenate([labels[split.labeled], np.full(len(split.unlabeled), -1)])
    with np.errstate(invalid="ignore"):  # rows that no label has reached yet
        fitted = classifier.build().fit(features[rows], visible)
    seconds = time.perf_counter() - started

    # test and validation
    counts = labeled_counts(labels, split, classes)
    val = _log_probabilities(fitted, features[split.val], classes)
    test = _log_probabilities(fitted, features[split.test], classes)
    temperature = fit_temperature(val, labels[split.val])

    # pseudo-labels
    health: dict[str, Any] = {}
    if len(split.unlabeled):
        threshold = classifier.threshold if classifier.method == "sklearn_self_training" else 0.0
        probabilities = metrics.softmax(_log_probabilities(fitted, features[split.unlabeled], classes))
        health = metrics.pseudo_label_health(probabilities, labels[split.unlabeled], threshold, classes)
    return {
        "seconds": seconds,
        **metrics.classification(test, labels[split.test], counts, temperature),
        **health,
        "val": metrics.classification(val, labels[split.val], counts, temperature),
    }


def _log_probabilities(fitted: Any, features: NDArray[np.float32], classes: int) -> NDArray[np.float32]:
    """Log probabilities (n, K); a class that the estimator never saw is as good as impossible."""
    probabilities = np.zeros((len(features), classes))
    if len(features):
        # an image that no label has reached has a row of NaN
        with np.errstate(invalid="ignore"):
            probabilities[:, fitted.classes_] = np.nan_to_num(fitted.predict_proba(features), nan=1 / classes)
    return np.log(probabilities.clip(1e-9)).astype(np.float32)
