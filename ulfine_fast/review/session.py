"""What the page stands on: a run, its cache, a file of labels, and fits in the background."""

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
from ulfine_fast.review.ranking import Candidate, Judged, candidates, judge
from ulfine_fast.runs.files import load_run
from ulfine_fast.runs.run import Run

_LIKELY = 10  # classes with a key of their own, 1 to 9 and 0


class Conflict(Exception):
    """An image's label is no longer what the page showed.

    Attributes:
        label: what the file says now, None where it says nothing.
    """

    def __init__(self, label: str | None) -> None:
        super().__init__("another page has given this image a label meanwhile")
        self.label = label


class Session:
    """One review of one run; all methods may be called from several threads.

    Attributes:
        run: the run that is reviewed, later the latest fit. labels: the file of corrections.
        out: where fits from the page are saved. figures: one for each fit, the first of the run as it was.

    Raises:
        InputError: the run has no cache any more, or one that its split or the labels do not fit.
    """

    def __init__(self, run: Path, labels: Path, out: Path, *, images: str | None = None, device: str = "auto") -> None:
        self.labels, self.out, self.device = labels, out, device
        self.run = Run.load(run)
        if self.run.cache_path is None:
            raise InputError(f"{run} was fitted on arrays in memory, and there are no images to look at")
        self.cache = FeatureCache.open(self.run.cache_path)
        self.split = read_split(run, self.cache.ids)
        self.image, self.no_images = find_images([load_run(run)], images)
        self.figures = [_figures(self.run, len(self.split.labeled))]
        self.twins = near_duplicates(self.cache)
        self._lock = threading.Lock()
        self._fit: threading.Thread | None = None
        self.failure = ""
        self.judged, self.queue = self._judged()

    # -- labels

    def corrections(self) -> dict[str, str]:
        """What the file says now: id -> class name, "" for none."""
        return read_corrections(self.labels) if self.labels.exists() else {}

    def put(self, row: int, label: str | None, seen: str | None) -> None:
        """Save one label at once; the file may have other writers, of whom nothing is lost.

        Args:
            row: of the cache.
            label: a class name, "" for none of the classes, None to take a correction back.
            seen: what the page took the file to say of this image.

        Raises:
            Conflict: the file says something else.
            InputError: no such image or class, or the file cannot be written.
        """
        if not 0 <= row < len(self.cache):
            raise InputError(f"row must be below {len(self.cache)}, got {row}")
        if label is not None and label not in ("", *self.cache.class_names):
            raise InputError(f"label must be one of {', '.join(self.cache.class_names)} or empty, got {label!r}")
        name = self.cache.ids[row]
        # a lock of its own: the labels' file is replaced as a whole, and with it what is locked
        with FileLock(self.labels.with_name(f".{self.labels.name}.lock")):
            found = self.corrections()
            if found.get(name) != seen:
                raise Conflict(found.get(name))
            found.pop(name, None)
            write_corrections(self.labels, found if label is None else {**found, name: label})

    def image(self, row: int) -> Image.Image:
        """The image of a row.

        Raises:
            KeyError: no such row, or its image is not to be had.
        """
        if self.image is None or not 0 <= row < len(self.cache):
            raise KeyError(row)
        return self.image(self.cache.ids[row])

    # -- fits

    def fit(self) -> bool:
        """Fit again in the background with the labels as they are; False where a fit is under way."""
        with self._lock:
            if self.fitting:
                return False
            self.failure = ""
            self._fit = threading.Thread(target=self._refit, daemon=True)
            self._fit.start()
            return True

    @property
    def fitting(self) -> bool:
        """Whether a fit is under way."""
        return self._fit is not None and self._fit.is_alive()

    def wait(self) -> None:
        """Until no fit is under way."""
        if self._fit is not None:
            self._fit.join()

    def _refit(self) -> None:
        try:
            judged, queue = self._judged()
            judged.run.save(self.out)
        except (InputError, OSError) as error:
            self.failure = str(error)
            return
        with self._lock:
            self.run, self.judged, self.queue = judged.run, judged, queue
            self.figures.append(_figures(judged.run, len(judged.split.labeled)))

    def _judged(self) -> tuple[Judged, list[Candidate]]:
        labels = self.corrections()
        cache = corrected(self.cache, labels)
        judged = judge(cache, self.run.config, corrected_split(self.split, cache, labels), device=self.device)
        judged.run.refuse_failed()
        return judged, candidates(cache, judged, self.twins)

    # -- what the page is told

    def told(self) -> dict[str, Any]:
        """The whole state in JSON's types."""
        labels = self.corrections()
        with self._lock:
            queue, judged, figures = self.queue, self.judged, list(self.figures)
        return {
            "classes": self.cache.class_names,
            "items": [self._told(one, judged, labels) for one in queue],
            "corrected": len(labels),
            "fitting": self.fitting,
            "failure": self.failure,
            "figures": figures,
            "labels": self.labels.name,
            "out": str(self.out),
        }

    def _told(self, one: Candidate, judged: Judged, labels: dict[str, str]) -> dict[str, Any]:
        name, probabilities = self.cache.ids[one.row], judged.probabilities[one.row]
        likely = sorted(range(len(probabilities)), key=lambda k: -float(probabilities[k]))[:_LIKELY]
        # few classes keep their places, so that fingers learn them
        likely = sorted(likely) if len(probabilities) <= _LIKELY else likely
        twin = None if one.twin < 0 else {"row": one.twin, "id": self.cache.ids[one.twin]}
        return {
            "row": one.row,
            "id": name,
            "kind": one.kind,
            "given": one.given,
            "suggested": one.suggested,
            "probability": round(one.probability, 4),
            "likely": likely,
            "twin": twin,
            "now": labels.get(name),
        }


def _figures(run: Run, labeled: int) -> dict[str, Any]:
    """What a fit came to on validation: the test split is no place to look while labels are being mended."""
    told = run.metrics.get("val") or {}
    return {
        "labeled": labeled,
        "validation": len(run.split.get("val", [])),
        "balanced_accuracy": told.get("balanced_accuracy"),
        "accuracy": told.get("accuracy"),
    }
