"""Which images a person should look at: those whose label, once right, helps most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

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

FOLDS = 4  # a label is judged by heads that three quarters of the labels trained
MOST = 200  # images of a kind: more than anybody looks at before fitting again
_RARE = 0.1  # least probability of a rare class for an image to be a candidate


@dataclass(frozen=True)
class Candidate:
    """An image to look at.

    Attributes:
        row: of the cache.
        kind: "doubt", its label is probably wrong; "twins", a near-duplicate has another label; "rare", unlabelled
            and perhaps of a class that has few labels.
        given: class index it trains with, -1 for none.
        suggested: class index that the heads find likeliest, of a rare one the likeliest rare class.
        probability: of the suggested class.
        twin: row of the near-duplicate, -1 for none.
    """

    row: int
    kind: str
    given: int
    suggested: int
    probability: float
    twin: int = -1


@dataclass(frozen=True)
class Judged:
    """A fit, and what heads say that did not see an image's label.

    Attributes:
        run: the fit on all labels. split: what it was given.
        probabilities: (n, K) for every row; of a labelled one from a fit without it, NaN where there is none.
    """

    run: Run
    split: Split
    probabilities: NDArray[np.float32]


def judge(cache: FeatureCache, config: FitConfig, split: Split, *, device: str = "auto") -> Judged:
    """Fit on all labels, and in the same pass without each quarter of them.

    Raises:
        InputError: the fit diverged, or see :func:`ulfine_fast.fit_many`.
    """
    hidden = list(_folds(cache.labels, split))
    parts = [replace(split, labeled=np.setdiff1d(split.labeled, rows)) for rows in hidden]
    runs = fit_many(cache, [config] * (1 + len(parts)), split=[split, *parts], device=device)
    inputs = cache.tokens("plain") if config.reads_tokens else cache.plain
    probabilities = runs[0].predict_proba(inputs)
    alone = np.setdiff1d(split.labeled, np.concatenate(hidden)) if hidden else split.labeled
    probabilities[alone] = np.nan
    for run, rows in zip(runs[1:], hidden, strict=True):
        probabilities[rows] = run.predict_proba(inputs[rows])
    return Judged(runs[0], split, probabilities)


def candidates(cache: FeatureCache, judged: Judged, found: Duplicates) -> list[Candidate]:
    """What to look at, in turn one of each kind; of each kind the most telling first.

    Images of the test split are not among them: to mend those that a classifier gets wrong would flatter it.

    Args:
        cache: with the labels that were fitted on.
        judged: what :func:`judge` made of it.
        found: near-duplicates of the cache.
    """
    given = np.full(len(cache), -1, dtype=np.int64)
    for rows in (judged.split.labeled, judged.split.val):
        given[rows] = cache.labels[rows]
    alike: dict[int, Candidate] = {}
    for one in twins(given, judged.probabilities, found):
        alike.setdefault(one.row, one)
    # an image that is in doubt too is shown beside its twin
    doubts = [one for one in doubtful(given, judged.probabilities) if one.row not in alike]
    return list(_in_turn((doubts, list(alike.values()), rare(cache, judged))))


def doubtful(given: Rows, probabilities: NDArray[np.float32]) -> list[Candidate]:
    """Labelled rows that the heads give another class, by how far it is ahead of the label (confident learning)."""
    rows = np.flatnonzero((given >= 0) & ~np.isnan(probabilities[:, 0]))
    best = probabilities[rows].argmax(1)
    ahead = probabilities[rows, best] - probabilities[rows, given[rows]]
    order = np.argsort(-ahead, kind="stable")
    chosen = [i for i in order if ahead[i] > 0][:MOST]
    return [_candidate("doubt", rows[i], given, best[i], probabilities) for i in chosen]


def twins(given: Rows, probabilities: NDArray[np.float32], found: Duplicates) -> list[Candidate]:
    """Of each pair of near-duplicates with two labels the row whose label is less likely, the most alike first."""
    one, other = given[found.first], given[found.second]
    differ = np.flatnonzero((one >= 0) & (other >= 0) & (one != other))
    pairs = differ[np.argsort(-found.cosine[differ], kind="stable")][:MOST]
    return [_twin(int(found.first[pair]), int(found.second[pair]), given, probabilities) for pair in pairs]


def rare(cache: FeatureCache, judged: Judged) -> list[Candidate]:
    """Unlabelled rows that may be of the rarest third of the classes, in turn one of each class, least sure first."""
    rows, found = judged.split.unlabeled, judged.probabilities
    few = rank_thirds(labeled_counts(cache.labels, judged.split, len(cache.class_names)))[2]
    none = np.full(len(cache), -1, dtype=np.int64)
    lists = []
    for k in few if len(rows) else []:
        own = found[rows, k]
        others = np.delete(found[rows], k, axis=1).max(1, initial=0.0)
        order = np.argsort(np.abs(own - others), kind="stable")
        chosen = [i for i in order if own[i] >= _RARE][:MOST]
        lists.append([_candidate("rare", rows[i], none, k, found) for i in chosen])
    return list(_in_turn(lists))[:MOST]


def _folds(labels: Rows, split: Split) -> Iterator[Rows]:
    """Labelled rows to leave out, a part of each class at a time, never a whole class."""
    fold = np.full(len(split.labeled), -1)
    for k in np.unique(labels[split.labeled]):
        own = np.flatnonzero(labels[split.labeled] == k)
        if len(own) > 1:
            fold[own] = np.arange(len(own)) % FOLDS
    for number in range(FOLDS):
        if (fold == number).any():
            yield split.labeled[fold == number]


def _twin(one: int, other: int, given: Rows, probabilities: NDArray[np.float32]) -> Candidate:
    # a row that no other head judges is taken as sure of its label
    sure = [np.nan_to_num(probabilities[row, given[row]], nan=1.0) for row in (one, other)]
    row, twin = (one, other) if sure[0] <= sure[1] else (other, one)
    return replace(_candidate("twins", row, given, given[twin], probabilities), twin=twin)


def _candidate(kind: str, row: int, given: Rows, suggested: int, probabilities: NDArray[np.float32]) -> Candidate:
    probability = float(np.nan_to_num(probabilities[row, suggested]))
    return Candidate(int(row), kind, int(given[row]), int(suggested), probability)


def _in_turn(lists: Sequence[Iterable[Candidate]]) -> Iterator[Candidate]:
    for several in zip_longest(*lists):
        yield from (one for one in several if one is not None)
