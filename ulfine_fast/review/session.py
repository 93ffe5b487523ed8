"""The state behind the page: a run, its cache, a file of corrected labels, and fits in the background."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.cache.neighbors import near_duplicates
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.data.corrections import corrected, corrected_split, read_corrections, write_corrections
from ulfine_fast.data.splits import Rows, read_split
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.report.images import find_images
from ulfine_fast.review.clusters import Clusters, find_clusters
from ulfine_fast.review.estimates import Estimate, Interval, change, estimate
from ulfine_fast.review.groups import TABS, Group, Groups, Tab, make_groups
from ulfine_fast.review.proposals import Outcome, Proposal, outcome, propose
from ulfine_fast.review.quick import QuickFit, quick_fit
from ulfine_fast.runs.files import load_run
from ulfine_fast.runs.run import Run

PAGE = 30
"""Images on a page."""

_KEYS = 10  # classes with a key of their own, 1 to 9 and 0
_KEPT = 4  # views that pages may still be turned in
_HISTORY = 200  # quick fits that the curve shows


class Conflict(Exception):
    """Images' labels are no longer those that the page showed.

    Attributes:
        labels: what the file has for each of them, None without a label; by row.
    """

    def __init__(self, labels: dict[int, str | None]) -> None:
        images = "this image" if len(labels) == 1 else f"{len(labels)} of these images"
        super().__init__(f"another page has changed the label of {images} in the meantime")
        self.labels = labels


@dataclass(frozen=True)
class Change:
    """A label to be saved.

    Attributes:
        row: of the cache.
        label: a class name, "" for none of the classes, None to remove the correction.
        expected: the label that the page showed for this image, None without a correction.
    """

    row: int
    label: str | None
    expected: str | None


@dataclass(frozen=True)
class View:
    """A quick fit and the groups made of it; a page that was opened in it is turned in it.

    Attributes:
        version: counts quick fits, from 1.
        fit: the quick fit.
        estimate: on its held-out labels.
        changed: balanced accuracy beyond that of the view before; None for the first, or with too few labels.
        moved: unlabelled images whose likeliest class is another than in the view before.
        groups: of each tab.
        proposal: of images to label next.
    """

    version: int
    fit: QuickFit
    estimate: Estimate
    changed: Interval | None
    moved: int
    groups: Groups
    proposal: Proposal


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
        # an unlabelled image may have a label in the cache, which the page must not show
        self._labeled = np.isin(np.arange(len(self.cache)), np.concatenate([self.split.labeled, self.split.val]))
        self._passed = np.zeros(0, dtype=np.int64)
        self._duplicates = near_duplicates(self.cache)
        self._clusters = self._find_clusters()
        self._lock = threading.Lock()
        self._read: tuple[tuple[int, int, int], dict[str, str]] | None = None
        self._fit_thread: threading.Thread | None = None
        self._refit_thread: threading.Thread | None = None
        self._stale = False
        self._scale_chosen_with = 0
        self._views: OrderedDict[int, View] = OrderedDict()
        self._history: list[dict[str, Any]] = []
        self._outcome: Outcome | None = None
        self._publish(*self._quick_fit())

    # -- labels

    def corrections(self) -> dict[str, str]:
        """The content of the file of labels: id -> class name, "" for none of the classes."""
        try:
            status = os.stat(self.labels)
        except FileNotFoundError:
            return {}
        except OSError:
            # what is wrong with it is said by the reader
            return read_corrections(self.labels)
        # the file is replaced as a whole, so that it is a new one after each change
        known = (status.st_ino, status.st_mtime_ns, status.st_size)
        read = self._read
        if read is None or read[0] != known:
            read = (known, read_corrections(self.labels))
            self._read = read
        return dict(read[1])

    def put(self, changes: Sequence[Change]) -> None:
        """Save labels immediately, all or none, without losing what other programs write to the file.

        A quick fit with them starts in the background.

        Args:
            changes: one for each image.

        Raises:
            Conflict: the file has another label for one of the images.
            InputError: no such image or class, or the file cannot be written.
        """
        names = self.cache.class_names
        for one in changes:
            if not 0 <= one.row < len(self.cache):
                raise InputError(f"row must be below {len(self.cache)}, got {one.row}")
            if one.label is not None and one.label not in ("", *names):
                raise one_of("label, unless it is empty,", one.label, names)
        # a separate file is locked, since the file of labels is replaced as a whole
        with FileLock(self.labels.with_name(f".{self.labels.name}.lock")):
            corrections = self.corrections()
            present = {one.row: corrections.get(self.cache.ids[one.row]) for one in changes}
            conflicts = {one.row: present[one.row] for one in changes if present[one.row] != one.expected}
            if conflicts:
                raise Conflict(conflicts)
            for one in changes:
                corrections.pop(self.cache.ids[one.row], None)
                if one.label is not None:
                    corrections[self.cache.ids[one.row]] = one.label
            write_corrections(self.labels, corrections)
        self.refit()

    def image(self, row: int) -> Image.Image:
        """The image of a row.

        Raises:
            KeyError: no such row, or there are no images.
            OSError, ValueError: the image is damaged.
        """
        if self._read_image is None or not 0 <= row < len(self.cache):
            raise KeyError(row)
        return self._read_image(self.cache.ids[row])

    # -- quick fits

    def propose_others(self) -> None:
        """Propose other images than those that have no answer yet, which are not proposed again."""
        with self._lock:
            self._passed = np.union1d(self._passed, self._latest().proposal.rows)
        self.refit()

    def refit(self) -> None:
        """Fit quickly with the labels as they are, in the background; once more where labels come in meanwhile."""
        with self._lock:
            self._stale = True
            if self._refit_thread is None:
                self._refit_thread = threading.Thread(target=self._refit, daemon=True)
                self._refit_thread.start()

    @property
    def refitting(self) -> bool:
        """Whether a quick fit is running."""
        return self._refit_thread is not None

    def _refit(self) -> None:
        while True:
            with self._lock:
                if not self._stale:
                    self._refit_thread = None
                    return
                self._stale = False
            try:
                self._publish(*self._quick_fit())
                self.failure = ""
            except (InputError, OSError) as error:
                self.failure = str(error)
            except BaseException:
                with self._lock:
                    self._refit_thread = None
                raise

    def _quick_fit(self) -> tuple[QuickFit, dict[str, str]]:
        corrections = self.corrections()
        cache = corrected(self.cache, corrections)
        split = corrected_split(self.split, cache, corrections)
        # the scale that is best changes little, and trying all of them takes twice as long
        last = self._latest().fit if self._views else None
        if last is None or len(split.labeled) >= 2 * self._scale_chosen_with:
            self._scale_chosen_with = len(split.labeled)
            last = None
        return quick_fit(cache, split.labeled, split.val, last.scale if last else None), corrections

    def _publish(self, fit: QuickFit, corrections: dict[str, str]) -> None:
        """Make the groups of a fit and show them from now on."""
        before = self._latest() if self._views else None
        answered = self.cache.row_of(list(corrections), source="the corrected labels", fix="remove its line")
        pool = np.setdiff1d(np.setdiff1d(self.split.unlabeled, answered), np.flatnonzero(fit.labels >= 0))

        # what came of the last proposal, and the next one; it stays until all of its images have an answer
        proposal = None
        came = self._outcome
        if before is not None:
            proposal = before.proposal
            if len(proposal.rows) and np.isin(proposal.rows, answered).all():
                came = outcome(proposal, fit, self._classes_of(proposal.rows, corrections))
                proposal = None
        if proposal is None or not len(proposal.rows) or np.isin(proposal.rows, self._passed).any():
            others = np.setdiff1d(pool, self._passed)
            # those that were passed over come again when no other is left
            if not len(others):
                self._passed = others
                others = pool
            proposal = propose(self.cache.plain, fit, others)

        groups = make_groups(self.cache.class_names, fit, pool, answered, self._clusters, self._duplicates, proposal)
        measured = estimate(fit)
        moved = 0
        if before is not None:
            moved = int((fit.probabilities[pool].argmax(1) != before.fit.probabilities[pool].argmax(1)).sum())
        with self._lock:
            view = View(
                version=1 + (before.version if before else 0),
                fit=fit,
                estimate=measured,
                changed=change(before.fit, fit) if before else None,
                moved=moved,
                groups=groups,
                proposal=proposal,
            )
            self._views[view.version] = view
            while len(self._views) > _KEPT:
                self._views.popitem(last=False)
            self._outcome = came
            point = {"labels": int(fit.counts.sum()), "balanced_accuracy": _interval(measured.balanced)}
            self._history = [*self._history, point][-_HISTORY:]

    def _classes_of(self, rows: Rows, corrections: dict[str, str]) -> Rows:
        """Class index of the answer of each row, -1 for none of the classes."""
        index = {name: k for k, name in enumerate(self.cache.class_names)}
        return np.array([index.get(corrections[self.cache.ids[row]], -1) for row in rows], dtype=np.int64)

    def _latest(self) -> View:
        return self._views[next(reversed(self._views))]

    def _find_clusters(self) -> Clusters:
        inputs = self.cache.tokens("plain") if self.run.config.reads_tokens else self.cache.plain
        return find_clusters(self.run, inputs, self.cache.plain)

    # -- fits

    def fit(self) -> bool:
        """Start a fit of the run's method with the labels as they are; False where one is running."""
        with self._lock:
            if self.fitting:
                return False
            self.failure = ""
            self._fit_thread = threading.Thread(target=self._fit, daemon=True)
            self._fit_thread.start()
            return True

    @property
    def fitting(self) -> bool:
        """Whether a fit is running."""
        return self._fit_thread is not None and self._fit_thread.is_alive()

    def wait(self) -> None:
        """Wait until no fit is running, quick or not."""
        for thread in (self._fit_thread, self._refit_thread):
            if thread is not None:
                thread.join()

    def _fit(self) -> None:
        try:
            corrections = self.corrections()
            cache = corrected(self.cache, corrections)
            split = corrected_split(self.split, cache, corrections)
            run = fit_many(cache, [self.run.config], split=[split], device=self.device)[0]
            run.refuse_failed()
            run.save(self.out)
        except (InputError, OSError) as error:
            self.failure = str(error)
            return
        with self._lock:
            self.run = run
            self.fits = [*self.fits, _validation_metrics(run, len(split.labeled))]
        self._clusters = self._find_clusters()
        self.refit()

    # -- the page

    def state(self) -> dict[str, Any]:
        """What the page shows beside the images, in JSON's types."""
        corrections = self.corrections()
        with self._lock:
            view, history, came, fits = self._latest(), self._history, self._outcome, self.fits
        names, measured = self.cache.class_names, view.estimate
        return {
            "version": view.version,
            "busy": self.refitting,
            "fitting": self.fitting,
            "failure": self.failure,
            "corrected": len(corrections),
            "labels": self.labels.name,
            "out": str(self.out),
            "classes": [
                {
                    "name": name,
                    "labels": int(view.fit.counts[k]),
                    "accuracy": _number(measured.accuracy[k]),
                    "low": _number(measured.low[k]),
                    "high": _number(measured.high[k]),
                }
                for k, name in enumerate(names)
            ],
            "balanced_accuracy": _interval(measured.balanced),
            "unknown": [name for name, known in zip(names, measured.known, strict=True) if not known],
            "changed": _interval(view.changed),
            "moved": view.moved,
            "history": history,
            "proposal": {
                "images": len(view.proposal.rows),
                "gain": round(view.proposal.gain, 5),
                "classes": _counts(names, view.proposal.classes),
            },
            "outcome": None if came is None else _outcome(names, came),
            "fits": fits,
            "tabs": {
                tab: [{"name": group.name, "images": len(group.rows)} for group in view.groups[tab]] for tab in TABS
            },
        }

    def page(self, tab: Tab, number: int, page: int, version: int | None = None) -> dict[str, Any]:
        """A page of a group, in JSON's types.

        Args:
            tab: of the group.
            number: of the group in its tab.
            page: from 0; the last one where there are fewer.
            version: of the view in which the group was opened; the latest where it is gone, or for None.
        """
        corrections = self.corrections()
        with self._lock:
            latest = self._latest()
            view = latest if version is None else self._views.get(version, latest)
        groups = view.groups[tab]
        empty = Group("", *[np.zeros(0, dtype=np.int64)] * 3)
        group = groups[number] if 0 <= number < len(groups) else empty
        pages = max(1, -(-len(group.rows) // PAGE))
        page = min(max(page, 0), pages - 1)
        part = slice(page * PAGE, (page + 1) * PAGE)
        items = [
            self._item(view.fit, row, suggested, duplicate, corrections)
            for row, suggested, duplicate in zip(
                group.rows[part].tolist(), group.suggested[part].tolist(), group.duplicates[part].tolist(), strict=True
            )
        ]
        shown = np.nan_to_num(view.fit.probabilities[group.rows[part]])
        return {
            "tab": tab,
            "group": number,
            "name": group.name,
            "images": len(group.rows),
            "page": page,
            "pages": pages,
            "version": view.version,
            "items": items,
            "likely": _likely(shown.sum(0)) if len(shown) else list(range(min(_KEYS, view.fit.classes))),
        }

    def _item(
        self, fit: QuickFit, row: int, suggested: int, duplicate: int, corrections: dict[str, str]
    ) -> dict[str, Any]:
        label = int(self.cache.labels[row]) if self._labeled[row] else -1
        probability = None if suggested < 0 else _number(fit.probabilities[row, suggested])
        return {
            "row": row,
            "id": self.cache.ids[row],
            "label": label,
            "suggested": suggested,
            "probability": probability,
            "likely": _likely(np.nan_to_num(fit.probabilities[row])),
            "duplicate": None if duplicate < 0 else {"row": duplicate, "id": self.cache.ids[duplicate]},
            "correction": corrections.get(self.cache.ids[row]),
        }


def _likely(scores: Any) -> list[int]:
    """The likeliest classes, those with a key of their own."""
    likely: list[int] = np.argsort(-scores, kind="stable")[:_KEYS].tolist()
    # few classes stay in the same order, so that each keeps its key
    return sorted(likely) if len(scores) <= _KEYS else likely


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def _interval(value: Interval | None) -> dict[str, Any] | None:
    if value is None:
        return None
    rounded = {name: round(getattr(value, name), 4) for name in ("value", "low", "high")}
    return {**rounded, "labels": value.labels}


def _counts(names: list[str], counts: Any) -> list[dict[str, Any]]:
    """Classes with at least half an image, most first."""
    order = [k for k in np.argsort(-counts, kind="stable") if counts[k] >= 0.5]
    return [{"name": names[k], "images": round(float(counts[k]), 1)} for k in order]


def _outcome(names: list[str], came: Outcome) -> dict[str, Any]:
    return {
        "images": len(came.proposal.rows),
        "expected": round(came.proposal.gain, 5),
        "expected_classes": _counts(names, came.proposal.classes),
        "gained": _interval(came.gained),
        "classes": _counts(names, came.classes),
        "none": came.none,
        "labels": came.labels,
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
