"""Which images a person should look at: those whose label, once corrected, helps most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Rows, Split, labeled_counts
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics.classification import rank_thirds
from ulfine_fast.runs.run import Run

if TYPE_CHECKING:
    from ulfine_fast.cache.neighbors import Duplicates
    from ulfine_fast.cache.store import FeatureCache

Kind = Literal["likely_wrong", "duplicate", "rare"]

FOLDS = 4  # a label is checked by heads that were trained on three quarters of the labels
MOST = 200  # candidates of a kind: more than a person answers before fitting again
_RARE = 0.1  # least probability of a rare class for an image to be a candidate


@dataclass(frozen=True)
class Candidate:
    """An image to look at.

    Attributes:
        row: of the cache.
        kind: "likely_wrong", its label is probably wrong; "duplicate", a near-duplicate has another label; "rare", it
            is unlabelled and may be of a class that has few labels.
        label: class index that it trains with, -1 for none.
        suggested: class index that the heads find most likely; for "rare" the most likely rare class.
        probability: of the suggested class.
        duplicate: row of the near-duplicate, -1 for none.
    """

    row: int
    kind: Kind
    label: int
    suggested: int
    probability: float
    duplicate: int = -1


@dataclass(frozen=True)
class CrossValidation:
    """A fit on all labels, and predictions for labelled images by fits without their label.

    Attributes:
        run: the fit on all labels.
        split: of that fit.
        probabilities: (n, K) for every row; for a labelled row from the fit without it, NaN where there is none.
    """

    run: Run
    split: Split
    probabilities: NDArray[np.float32]


def cross_validate(cache: FeatureCache, config: FitConfig, split: Split, *, device: str = "auto") -> CrossValidation:
    """Fit on all labels and, in the same trial batch, without each quarter of them.

    Raises:
        InputError: the fit diverged, or see :func:`ulfine_fast.fit_many`.
    """
    # folds of the labelled rows: every class is spread over all folds, a class with one label is in none
    labels = cache.labels[split.labeled]
    fold = np.full(len(labels), -1)
    for k in np.unique(labels):
        members = np.flatnonzero(labels == k)
        if len(members) > 1:
            fold[members] = np.arange(len(members)) % FOLDS
    folds = [split.labeled[fold == number] for number in range(FOLDS) if (fold == number).any()]

    # the fit on all labels, and one without each fold
    splits = [split, *(replace(split, labeled=np.setdiff1d(split.labeled, rows)) for rows in folds)]
    runs = fit_many(cache, [config] * len(splits), split=splits, device=device)

    # every row by the first fit, the rows of a fold by the fit without it
    inputs = cache.tokens("plain") if config.reads_tokens else cache.plain
    probabilities = runs[0].predict_proba(inputs)
    probabilities[split.labeled[fold < 0]] = np.nan
    for run, rows in zip(runs[1:], folds, strict=True):
        probabilities[rows] = run.predict_proba(inputs[rows])
    return CrossValidation(runs[0], split, probabilities)


def rank_candidates(cache: FeatureCache, fitted: CrossValidation, duplicates: Duplicates) -> list[Candidate]:
    """The images to look at, kinds alternating, the most informative of each kind first.

    Images of the test split are not among them: correcting those that a classifier gets wrong would flatter it.

    Args:
        cache: with the labels of the fit.
        fitted: as :func:`cross_validate` returns it.
        duplicates: near-duplicates of the cache.
    """
    labels = np.full(len(cache), -1, dtype=np.int64)
    for rows in (fitted.split.labeled, fitted.split.val):
        labels[rows] = cache.labels[rows]
    conflicts: dict[int, Candidate] = {}
    for candidate in conflicting_duplicates(labels, fitted.probabilities, duplicates):
        conflicts.setdefault(candidate.row, candidate)
    # an image that is also likely wrong is shown once, beside its duplicate
    wrong = [candidate for candidate in likely_wrong(labels, fitted.probabilities) if candidate.row not in conflicts]
    unlabelled = maybe_rare(cache, fitted.split, fitted.probabilities)
    return list(_interleave([wrong, list(conflicts.values()), unlabelled]))


def likely_wrong(labels: Rows, probabilities: NDArray[np.float32]) -> list[Candidate]:
    """Labelled rows for which another class is more likely, by the difference in probability (confident learning).

    Args:
        labels: class index of every row (n,), -1 for none.
        probabilities: (n, K), as in :class:`CrossValidation`.
    """
    rows = np.flatnonzero((labels >= 0) & ~np.isnan(probabilities[:, 0]))
    best = probabilities[rows].argmax(1)
    margin = probabilities[rows, best] - probabilities[rows, labels[rows]]
    order = [i for i in np.argsort(-margin, kind="stable") if margin[i] > 0][:MOST]
    return [_candidate("likely_wrong", rows[i], labels, best[i], probabilities) for i in order]


def conflicting_duplicates(labels: Rows, probabilities: NDArray[np.float32], duplicates: Duplicates) -> list[Candidate]:
    """For each pair of near-duplicates with two labels the row whose label is less likely, the most similar first.

    Args:
        labels: class index of every row (n,), -1 for none.
        probabilities: (n, K), as in :class:`CrossValidation`.
        duplicates: near-duplicates of the cache.
    """
    first_label, second_label = labels[duplicates.first], labels[duplicates.second]
    conflicts = np.flatnonzero((first_label >= 0) & (second_label >= 0) & (first_label != second_label))
    candidates = []
    for pair in conflicts[np.argsort(-duplicates.cosine[conflicts], kind="stable")][:MOST]:
        row, other = int(duplicates.first[pair]), int(duplicates.second[pair])
        # a row without an out-of-fold prediction counts as certain of its label
        certainty, other_certainty = (np.nan_to_num(probabilities[r, labels[r]], nan=1.0) for r in (row, other))
        if certainty > other_certainty:
            row, other = other, row
        candidates.append(_candidate("duplicate", row, labels, labels[other], probabilities, duplicate=other))
    return candidates


def maybe_rare(cache: FeatureCache, split: Split, probabilities: NDArray[np.float32]) -> list[Candidate]:
    """Unlabelled rows that may be of the rarest third of the classes, classes alternating, the least certain first.

    Args:
        cache: with the labels of the fit.
        split: of the fit.
        probabilities: (n, K), as in :class:`CrossValidation`.
    """
    unlabelled = probabilities[split.unlabeled]
    labels = np.full(len(cache), -1, dtype=np.int64)
    by_class = []
    for k in rank_thirds(labeled_counts(cache.labels, split, len(cache.class_names)))[2]:
        probability = unlabelled[:, k]
        best_other = np.delete(unlabelled, k, axis=1).max(1, initial=0.0)
        order = np.argsort(np.abs(probability - best_other), kind="stable")
        chosen = [split.unlabeled[i] for i in order if probability[i] >= _RARE][:MOST]
        by_class.append([_candidate("rare", row, labels, k, probabilities) for row in chosen])
    return list(_interleave(by_class))[:MOST]


def _candidate(
    kind: Kind, row: int, labels: Rows, suggested: int, probabilities: NDArray[np.float32], duplicate: int = -1
) -> Candidate:
    return Candidate(
        row=int(row),
        kind=kind,
        label=int(labels[row]),
        suggested=int(suggested),
        probability=float(np.nan_to_num(probabilities[row, suggested])),
        duplicate=duplicate,
    )


def _interleave(lists: Sequence[Iterable[Candidate]]) -> Iterator[Candidate]:
    """The first of each list, then the second of each, and so on."""
    for candidates in zip_longest(*lists):
        yield from (candidate for candidate in candidates if candidate is not None)
