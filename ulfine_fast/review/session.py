"""The state behind the page: a run, its cache, a file of corrected labels, and fits in the background."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.neighbors import near_duplicates
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.data.corrections import corrected, corrected_split, read_corrections, write_corrections
from ulfine_fast.data.splits import read_split
from ulfine_fast.report.images import find_images
from ulfine_fast.review.ranking import Candidate, CrossValidation, cross_validate, rank_candidates
from ulfine_fast.runs.files import load_run
from ulfine_fast.runs.run import Run

_KEYS = 10  # classes with a key of their own, 1 to 9 and 0


class Conflict(Exception):
    """An image's label is no longer the one that the page showed.

    Attributes:
        label: the label in the file, None without one.
    """

    def __init__(self, label: str | None) -> None:
        super().__init__("another page has changed the label of this image in the meantime")
        self.label = label


class Session:
    """One review of one run; all methods may be called from several threads.

    Attributes:
        run: the run under review, later the latest fit.
        labels: the file of corrected labels.
        out: where fits from the page are saved.
        device: of the fits.
        cache: the run's cache.
        split: the run's split.
        no_images: why there are no images, "" where there are.
        failure: why the last fit failed, "" where it did not.
        fits: validation metrics of the run as it was and of each fit since.

    Raises:
        InputError: the run's cache is gone, or does not match its split or the corrected labels.
    """

    def __init__(self, run: Path, labels: Path, out: Path, *, images: str | None = None, device: str = "auto") -> None:
        self.labels = labels
        self.out = out
        self.device = device
        self.run = Run.load(run)
        if self.run.cache_path is None:
            raise InputError(f"{run} was fitted on arrays in memory, and there are no images to look at")
        self.cache = FeatureCache.open(self.run.cache_path)
        self.split = read_split(run, self.cache.ids)
        self.failure = ""
        self.fits = [_validation_metrics(self.run, len(self.split.labeled))]
        self._read_image, self.no_images = find_images([load_run(run)], images)
        self._duplicates = near_duplicates(self.cache)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._fitted, self._candidates = self._cross_validate()

    # -- labels

    def corrections(self) -> dict[str, str]:
        """The content of the file of labels: id -> class name, "" for none of the classes."""
        return read_corrections(self.labels) if self.labels.exists() else {}

    def put(self, row: int, label: str | None, expected: str | None) -> None:
        """Save one label immediately, without losing what other programs write to the file.

        Args:
            row: of the cache.
            label: a class name, "" for none of the classes, None to remove the correction.
            expected: the label that the page showed for this image, None without a correction.

        Raises:
            Conflict: the file has another label.
            InputError: no such image or class, or the file cannot be written.
        """
        if not 0 <= row < len(self.cache):
            raise InputError(f"row must be below {len(self.cache)}, got {row}")
        if label is not None and label not in ("", *self.cache.class_names):
            raise InputError(f"label must be one of {', '.join(self.cache.class_names)} or empty, got {label!r}")
        name = self.cache.ids[row]
        # a separate file is locked, since the file of labels is replaced as a whole
        with FileLock(self.labels.with_name(f".{self.labels.name}.lock")):
            corrections = self.corrections()
            if corrections.get(name) != expected:
                raise Conflict(corrections.get(name))
            corrections.pop(name, None)
            if label is not None:
                corrections[name] = label
            write_corrections(self.labels, corrections)

    def image(self, row: int) -> Image.Image:
        """The image of a row.

        Raises:
            KeyError: no such row, or there are no images.
            OSError, ValueError: the image is damaged.
        """
        if self._read_image is None or not 0 <= row < len(self.cache):
            raise KeyError(row)
        return self._read_image(self.cache.ids[row])

    # -- fits

    def fit(self) -> bool:
        """Start a fit with the labels as they are; False where one is running."""
        with self._lock:
            if self.fitting:
                return False
            self.failure = ""
            self._thread = threading.Thread(target=self._fit, daemon=True)
            self._thread.start()
            return True

    @property
    def fitting(self) -> bool:
        """Whether a fit is running."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until no fit is running."""
        if self._thread is not None:
            self._thread.join()

    def _fit(self) -> None:
        try:
            fitted, candidates = self._cross_validate()
            fitted.run.save(self.out)
        except (InputError, OSError) as error:
            self.failure = str(error)
            return
        with self._lock:
            self.run = fitted.run
            self._fitted = fitted
            self._candidates = candidates
            self.fits.append(_validation_metrics(fitted.run, len(fitted.split.labeled)))

    def _cross_validate(self) -> tuple[CrossValidation, list[Candidate]]:
        corrections = self.corrections()
        cache = corrected(self.cache, corrections)
        split = corrected_split(self.split, cache, corrections)
        fitted = cross_validate(cache, self.run.config, split, device=self.device)
        fitted.run.refuse_failed()
        return fitted, rank_candidates(cache, fitted, self._duplicates)

    # -- the page

    def state(self) -> dict[str, Any]:
        """Everything that the page shows, in JSON's types."""
        corrections = self.corrections()
        with self._lock:
            candidates, probabilities, fits = self._candidates, self._fitted.probabilities, list(self.fits)
        items = []
        for candidate in candidates:
            name = self.cache.ids[candidate.row]
            classes = len(probabilities[candidate.row])
            likely = sorted(range(classes), key=lambda k: -float(probabilities[candidate.row][k]))[:_KEYS]
            duplicate = None
            if candidate.duplicate >= 0:
                duplicate = {"row": candidate.duplicate, "id": self.cache.ids[candidate.duplicate]}
            items.append(
                {
                    "row": candidate.row,
                    "id": name,
                    "kind": candidate.kind,
                    "label": candidate.label,
                    "suggested": candidate.suggested,
                    "probability": round(candidate.probability, 4),
                    # few classes stay in the same order, so that each keeps its key
                    "likely": sorted(likely) if classes <= _KEYS else likely,
                    "duplicate": duplicate,
                    "correction": corrections.get(name),
                }
            )
        return {
            "classes": self.cache.class_names,
            "items": items,
            "corrected": len(corrections),
            "fitting": self.fitting,
            "failure": self.failure,
            "fits": fits,
            "labels": self.labels.name,
            "out": str(self.out),
        }


def _validation_metrics(run: Run, labeled: int) -> dict[str, Any]:
    """A fit's metrics on validation; those on the test split must not be seen while labels are being corrected."""
    validation = run.metrics.get("val") or {}
    return {
        "labeled": labeled,
        "validation": len(run.split.get("val", [])),
        "balanced_accuracy": validation.get("balanced_accuracy"),
        "accuracy": validation.get("accuracy"),
    }
