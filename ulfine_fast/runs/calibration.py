"""Labelled images that a run did not learn from: what rejection and prediction sets are calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.metrics.rejection import SetThresholds, least_rows, rejection_threshold, set_thresholds

SCORE = "energy"
"""The score by which images are rejected, see :meth:`ulfine_fast.runs.run.Run.scores`; recorded beside its values."""


@dataclass(frozen=True)
class Calibration:
    """Held-out labelled images as the run sees them.

    Attributes:
        ids: image ids (n,).
        labels: their classes (n,) int64.
        in_fold: whether an image is a labelled one, seen by a fit without its fold; else one of validation (n,) bool.
        probabilities: calibrated, of the image's own class (n,) float32.
        scores: how much an image looks like one of a known class (n,) float32.
    """

    ids: list[str]
    labels: NDArray[np.int64]
    in_fold: NDArray[np.bool_]
    probabilities: NDArray[np.float32]
    scores: NDArray[np.float32]

    @classmethod
    def held_out(
        cls,
        ids: list[str],
        labels: NDArray[np.int64],
        logits: NDArray[np.floating[Any]],
        scores: NDArray[np.floating[Any]],
        *,
        in_fold: bool,
    ) -> Calibration:
        """Images of a fold or of validation, from their calibrated logits (n, K) and scores (n,)."""
        own = metrics.softmax(logits)[np.arange(len(labels)), labels] if len(labels) else np.zeros(0)
        folds = np.full(len(labels), in_fold)
        return cls(ids, labels, folds, own.astype(np.float32), scores.astype(np.float32))

    def of_validation(self) -> Calibration:
        """Those of validation alone."""
        rows = np.flatnonzero(~self.in_fold)
        return Calibration(
            [self.ids[row] for row in rows],
            self.labels[rows],
            self.in_fold[rows],
            self.probabilities[rows],
            self.scores[rows],
        )

    def joined(self, other: Calibration) -> Calibration:
        """These images, then the other ones."""
        return Calibration(
            [*self.ids, *other.ids],
            np.concatenate([self.labels, other.labels]),
            np.concatenate([self.in_fold, other.in_fold]),
            np.concatenate([self.probabilities, other.probabilities]),
            np.concatenate([self.scores, other.scores]),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def rejection_threshold(self, rate: float) -> float:
        """The score below which images are rejected; -inf where too few labels were held out to reject any.

        Raises:
            InputError: a rate outside 0..1, or no held-out label.
        """
        if not 0 < rate < 1:
            raise InputError(f"the rate of false rejection must be above 0 and below 1, such as 0.05, got {rate:g}")
        self._refuse_none()
        return rejection_threshold(self.scores, self.labels, rate)

    def set_thresholds(self, classes: int, coverage: float) -> SetThresholds:
        """The probabilities below which each of K classes is left out of a set.

        Raises:
            InputError: a coverage outside 0..1, or no held-out label.
        """
        if not 0 < coverage < 1:
            raise InputError(f"the coverage of sets must be above 0 and below 1, such as 0.9, got {coverage:g}")
        self._refuse_none()
        return set_thresholds(self.probabilities, self.labels, classes, coverage)

    def _refuse_none(self) -> None:
        if not len(self):
            raise InputError(
                "this run held no labels out, so that nothing is calibrated; fit it again with val_fraction above 0, "
                "or with method ulfine_plus, which has folds"
            )


@dataclass(frozen=True)
class Rejected:
    """Which images are rejected as none of the classes.

    Attributes:
        rate: fraction of the known classes' images that may be rejected.
        threshold: lower scores are rejected; -inf where none can be.
        held_out: labels that it is calibrated on.
        rejected: (n,) bool.
    """

    rate: float
    threshold: float
    held_out: int
    rejected: NDArray[np.bool_]

    def summary(self) -> dict[str, Any]:
        """JSON values."""
        threshold = None if np.isneginf(self.threshold) else self.threshold
        return {
            "rate": self.rate,
            "threshold": threshold,
            "held_out": self.held_out,
            "rejected": int(self.rejected.sum()),
        }

    def lines(self) -> list[str]:
        """What a person should know of it."""
        if np.isneginf(self.threshold):
            least = least_rows(self.rate)
            return [f"no image is rejected: a rate of {self.rate:g} needs {least} held-out labels, got {self.held_out}"]
        return [
            f"{int(self.rejected.sum())} of {len(self.rejected)} images are rejected as none of the classes, at a rate "
            f"of false rejection of {self.rate:g} by {self.held_out} held-out labels"
        ]


@dataclass(frozen=True)
class ClassSets:
    """The classes of each image that cannot be excluded.

    Attributes:
        coverage: fraction of images whose set holds their class.
        thresholds: how classes are excluded.
        sets: (n, K) bool.
    """

    coverage: float
    thresholds: SetThresholds
    sets: NDArray[np.bool_]

    def summary(self, class_names: Sequence[str]) -> dict[str, Any]:
        """JSON values."""
        sizes = self.sets.sum(1)
        return {
            "coverage": self.coverage,
            "held_out": int(self.thresholds.rows.sum()),
            "mean_size": float(sizes.mean()) if len(sizes) else None,
            "empty": int((sizes == 0).sum()),
            "shared_threshold": [class_names[k] for k in np.flatnonzero(self.thresholds.pooled).tolist()],
            "in_every_set": [class_names[k] for k in np.flatnonzero(self.thresholds.always).tolist()],
        }

    def lines(self, class_names: Sequence[str]) -> list[str]:
        """What a person should know of them."""
        about = self.summary(class_names)
        size = "" if about["mean_size"] is None else f", {about['mean_size']:.1f} classes on average"
        lines = [f"sets at coverage {self.coverage:g}{size}; {about['empty']} are empty"]
        least = least_rows(1 - self.coverage)
        if about["shared_threshold"]:
            lines.append(
                f"fewer than {least} held-out labels: the coverage holds for these classes together, not for each: "
                f"{_some(about['shared_threshold'])}"
            )
        if about["in_every_set"]:
            lines.append(f"too few held-out labels to leave it out of any set: {_some(about['in_every_set'])}")
        return lines


def mean_calibration(calibrations: Sequence[Calibration]) -> Calibration:
    """What the mean of several runs says of the labels that all of them held out.

    Raises:
        InputError: they held other labels out.
    """
    first = calibrations[0]
    if len(calibrations) == 1:
        return first
    orders = [sorted(range(len(each)), key=each.ids.__getitem__) for each in calibrations]
    ids = [[each.ids[row] for row in order] for each, order in zip(calibrations, orders, strict=True)]
    if any(others != ids[0] for others in ids[1:]):
        raise InputError(
            f"these {len(calibrations)} runs held different labels out, so that their mean is not calibrated; name one "
            "of the runs, or fit them with one split_seed"
        )
    pairs = list(zip(calibrations, orders, strict=True))
    return Calibration(
        ids[0],
        first.labels[orders[0]],
        first.in_fold[orders[0]],
        np.mean([each.probabilities[order] for each, order in pairs], axis=0, dtype=np.float32),
        np.mean([each.scores[order] for each, order in pairs], axis=0, dtype=np.float32),
    )


def reject(calibration: Calibration, scores: NDArray[np.floating[Any]], rate: float) -> Rejected:
    """Rejects the images (n,) whose score is lower than those of nearly all held-out images.

    Raises:
        InputError: a rate outside 0..1, or no held-out label.
    """
    threshold = calibration.rejection_threshold(rate)
    return Rejected(rate, threshold, len(calibration), np.asarray(scores, np.float32) < np.float32(threshold))


def class_sets(calibration: Calibration, probabilities: NDArray[np.floating[Any]], coverage: float) -> ClassSets:
    """The classes of images with these calibrated probabilities (n, K) that cannot be excluded.

    Raises:
        InputError: a coverage outside 0..1, or no held-out label.
    """
    thresholds = calibration.set_thresholds(probabilities.shape[1], coverage)
    return ClassSets(coverage, thresholds, thresholds.sets(probabilities))


def _some(names: Sequence[str]) -> str:
    """The first ten names, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
