"""Images that a page of the review shows together: one answer often fits most of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.data.splits import Rows
from ulfine_fast.metrics.classification import rank_thirds
from ulfine_fast.review.clusters import Clusters
from ulfine_fast.review.proposals import Proposal
from ulfine_fast.review.quick import QuickFit

if TYPE_CHECKING:
    from ulfine_fast.cache.neighbors import Duplicates

Tab = Literal["proposed", "cluster", "wrong", "rare", "nothing"]
TABS: tuple[Tab, ...] = get_args(Tab)

_RARE = 0.1  # least probability of a rare class for an image to be a candidate
_FAR = 0.01  # an image fits no class where so small a fraction of labelled ones is as far from all classes


@dataclass(frozen=True)
class Group:
    """Images to look at together, the most telling first.

    Attributes:
        name: of the class or the cluster.
        rows: of the cache (m,).
        suggested: class index that each image probably has (m,), -1 for none of the classes.
        duplicates: row of a near-duplicate with another label (m,), -1 for none.
    """

    name: str
    rows: Rows
    suggested: Rows
    duplicates: Rows


Groups = dict[Tab, list[Group]]


def make_groups(
    class_names: list[str],
    fit: QuickFit,
    pool: Rows,
    answered: Rows,
    clusters: Clusters,
    duplicates: Duplicates,
    proposal: Proposal,
) -> Groups:
    """The groups of every tab, without empty ones.

    Images of the test split are in none: correcting those that a classifier gets wrong would flatter it.

    Args:
        class_names: (K,).
        fit: of the labels so far.
        pool: unlabelled training rows without an answer, sorted (p,).
        answered: rows that have one, which are asked about no more (a,).
        clusters: of all rows.
        duplicates: near-duplicates of the cache.
        proposal: of images to label next.
    """
    labels = fit.labels.copy()
    labels[fit.val] = fit.val_labels
    labels[answered] = -1
    groups: Groups = {
        "proposed": [_group("", proposal.rows, fit.probabilities[proposal.rows].argmax(1))],
        "cluster": list(cluster_groups(class_names, fit, pool, clusters)),
        "wrong": [
            *likely_wrong(class_names, labels, fit.probabilities),
            conflicting_duplicates(labels, fit.probabilities, duplicates),
        ],
        "rare": list(maybe_rare(class_names, fit, pool)),
        "nothing": [far_from_all(fit, pool)],
    }
    return {tab: [group for group in of_tab if len(group.rows)] for tab, of_tab in groups.items()}


def cluster_groups(class_names: list[str], fit: QuickFit, pool: Rows, clusters: Clusters) -> Iterator[Group]:
    """Unlabelled images cluster by cluster, the most typical first; a cluster of k-means suggests its likeliest class.

    Those of k-means come in the order of their class, the surest first, so that similar pages follow each other.
    """
    number, typical = clusters.number[pool], clusters.typical[pool]
    ordered = []
    for k in np.unique(number):
        members = np.flatnonzero(number == k)
        rows = pool[members[np.argsort(-typical[members], kind="stable")]]
        mean = fit.probabilities[rows].mean(0)
        suggested = int(k) if clusters.of_classes else int(mean.argmax())
        ordered.append((suggested, float(mean[suggested]), rows))
    ordered.sort(key=lambda one: (one[0], -one[1]))
    seen: dict[int, int] = {}
    for suggested, _, rows in ordered:
        seen[suggested] = seen.get(suggested, 0) + 1
        name = class_names[suggested] if clusters.of_classes else f"{class_names[suggested]} {seen[suggested]}"
        yield _group(name, rows, np.full(len(rows), suggested))


def likely_wrong(class_names: list[str], labels: Rows, probabilities: NDArray[np.float32]) -> Iterator[Group]:
    """Labelled images for which another class is more likely, by that class, the largest difference first.

    This is confident learning (arXiv 1911.00068) with each label's probability by a probe that did not see it.

    Args:
        class_names: (K,).
        labels: class index of every row (n,), -1 for none.
        probabilities: (n, K), as in :class:`ulfine_fast.review.quick.QuickFit`.
    """
    rows = np.flatnonzero((labels >= 0) & ~np.isnan(probabilities[:, 0]))
    best = probabilities[rows].argmax(1)
    margin = probabilities[rows, best] - probabilities[rows, labels[rows]]
    for k, name in enumerate(class_names):
        members = np.flatnonzero((best == k) & (margin > 0))
        members = members[np.argsort(-margin[members], kind="stable")]
        yield _group(name, rows[members], np.full(len(members), k))


def conflicting_duplicates(labels: Rows, probabilities: NDArray[np.float32], duplicates: Duplicates) -> Group:
    """For each pair of near-duplicates with two labels the row whose label is less likely, the most similar first.

    Args:
        labels: class index of every row (n,), -1 for none.
        probabilities: (n, K), as in :class:`ulfine_fast.review.quick.QuickFit`.
        duplicates: near-duplicates of the cache.
    """
    first_label, second_label = labels[duplicates.first], labels[duplicates.second]
    conflicts = np.flatnonzero((first_label >= 0) & (second_label >= 0) & (first_label != second_label))
    pairs: dict[int, int] = {}
    for pair in conflicts[np.argsort(-duplicates.cosine[conflicts], kind="stable")]:
        row, other = int(duplicates.first[pair]), int(duplicates.second[pair])
        # a row without an out-of-fold prediction counts as certain of its label
        certainty, other_certainty = (np.nan_to_num(probabilities[r, labels[r]], nan=1.0) for r in (row, other))
        if certainty > other_certainty:
            row, other = other, row
        pairs.setdefault(row, other)
    rows, others = np.array(list(pairs), dtype=np.int64), np.array(list(pairs.values()), dtype=np.int64)
    return Group("near-duplicates with two labels", rows, labels[others], others)


def maybe_rare(class_names: list[str], fit: QuickFit, pool: Rows) -> Iterator[Group]:
    """Unlabelled images that may be of the rarest third of the classes, by class, the rarest class and likeliest first.

    Args:
        class_names: (K,).
        fit: of the labels so far.
        pool: unlabelled rows (p,).
    """
    probabilities = fit.probabilities[pool]
    for k in rank_thirds(fit.counts)[2][::-1]:
        likely = np.flatnonzero(probabilities[:, k] >= _RARE)
        likely = likely[np.argsort(-probabilities[likely, k], kind="stable")]
        yield _group(class_names[k], pool[likely], np.full(len(likely), k))


def far_from_all(fit: QuickFit, pool: Rows) -> Group:
    """Unlabelled images that are less similar to all classes than 99 of 100 held-out labelled ones, the farthest first.

    Args:
        fit: of the labels so far.
        pool: unlabelled rows (p,).
    """
    held_out, _ = fit.held_out()
    least = np.quantile(fit.similarity[held_out], _FAR) if len(held_out) else -np.inf
    rows = pool[fit.similarity[pool] < least]
    rows = rows[np.argsort(fit.similarity[rows], kind="stable")]
    return _group("", rows, np.full(len(rows), -1))


def _group(name: str, rows: Rows, suggested: Rows) -> Group:
    return Group(name, rows, suggested, np.full(len(rows), -1))
