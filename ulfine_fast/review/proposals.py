"""Which images to label next: those whose labels most reduce what is uncertain, rare classes first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.neighbors import THRESHOLD
from ulfine_fast.data.splits import Rows
from ulfine_fast.review.estimates import Floats, Interval, change, expected_gain, gain_per_label
from ulfine_fast.review.quick import QuickFit

PROPOSED = 20
"""Images proposed together."""

_MOST = 10_000  # images of the pool that are considered; of more, evenly drawn ones
_CANDIDATES = 3000  # of them that are chosen from: a chosen image only lowers the gain of others
_COPY = 1e-3  # weight of a near-duplicate of a chosen image: it comes after all others
_LEAST_VARIANCE = 0.02  # of a label: a fit is never quite certain
_LEAST_DOUBT = 1e-4
_PRIOR_STEPS = 30
_EVEN = 0.01


@dataclass(frozen=True)
class Proposal:
    """Images proposed together, and what their labels should bring.

    Attributes:
        fit: from which they were chosen.
        rows: of the cache (m,).
        gain: expected gain in balanced accuracy, a fraction.
        classes: how many of them are expected to be of each class (K,).
    """

    fit: QuickFit
    rows: Rows
    gain: float
    classes: Floats


@dataclass(frozen=True)
class Outcome:
    """What came of a proposal.

    Attributes:
        proposal: of which.
        gained: balanced accuracy that came, on labels that both fits were measured on; None where too few.
        classes: how many of its images are of each class (K,).
        none: how many of them show none of the classes.
        labels: labels that came in the meantime, those of other images too.
    """

    proposal: Proposal
    gained: Interval | None
    classes: Rows
    none: int
    labels: int


def propose(features: NDArray[np.generic], fit: QuickFit, pool: Rows, count: int = PROPOSED) -> Proposal:
    """Choose the images whose labels most reduce the variance of predictions for all images, rare classes first.

    A linear head fitted to labels has the precision M = I + sum of v x x' over labelled images x, where v is the
    variance of their label, sum of p (1 - p). The variance of the predictions is the trace of T / M. T is the mean of
    w x x' over the pool, w being an image's own variance times what the next label of its class gains, each class
    counted by the pool's images of it. One label more at x, in as much as the two likeliest classes of x are close,
    u = 1 - (p1 - p2), reduces that variance by u x' M^-1 T M^-1 x / (1 + u x' M^-1 x), which counts by what a label
    of the class of x gains. Images are chosen one by one, so that each is unlike those before it. The criterion is
    that of V-optimal design, as in BAIT (arXiv 2106.09675), whose Fisher matrix is replaced by one for all classes; the
    weights are ours.

    Args:
        features: of the whole cache (n, D).
        fit: of the labels so far.
        pool: rows to choose from (p,), unlabelled.
        count: how many; fewer where the pool is smaller.
    """
    if not len(pool):
        return Proposal(fit, pool, 0.0, np.zeros(fit.classes))

    # what a label of each image of the pool is worth
    if len(pool) > _MOST:
        pool = pool[np.linspace(0, len(pool) - 1, _MOST).astype(np.int64)]
    probabilities = fit.probabilities[pool]
    highest = np.sort(probabilities, axis=1)[:, -2:] if fit.classes > 1 else np.ones((len(pool), 2), np.float32)
    doubt = 1 - (highest[:, 1] - highest[:, 0]) + _LEAST_DOUBT
    gains = (gain_per_label(fit) / gain_per_label(fit).max()).astype(np.float32)
    members, prior = pool_classes(probabilities)
    weight = _variance(probabilities) * (members @ (gains / prior))
    weight /= weight.mean()
    worth = members @ gains

    # the precision that the labels give, and the directions in which it is wanted
    rows = _unit(features[pool])  # (p, D)
    labeled = np.flatnonzero(fit.labels >= 0)
    known = _unit(features[labeled])
    by_label = _variance(np.nan_to_num(fit.probabilities[labeled], nan=1 / fit.classes))
    precision = np.eye(rows.shape[1], dtype=np.float32) + (known * by_label[:, None]).T @ known
    wanted = (rows * weight[:, None]).T @ rows / len(rows)
    spread = rows @ np.linalg.inv(precision)  # (p, D), M^-1 x
    own = (spread * rows).sum(1)  # x' M^-1 x
    gain = ((spread @ wanted) * spread).sum(1)  # x' M^-1 T M^-1 x

    # one by one; a chosen image changes M by a matrix of rank one
    best = np.argsort(-worth * doubt * gain / (1 + doubt * own), kind="stable")[:_CANDIDATES]
    rows, spread, own, gain = rows[best], spread[best], own[best], gain[best]
    worth, doubt, members, pool = worth[best], doubt[best], members[best], pool[best]
    chosen: list[int] = []
    for _ in range(min(count, len(rows))):
        index = int((worth * doubt * gain / (1 + doubt * own)).argmax())
        chosen.append(index)
        worth[rows @ rows[index] >= THRESHOLD] *= _COPY
        worth[index] = -1
        direction = spread[index]
        step = doubt[index] / (1 + doubt[index] * own[index])
        along = rows @ direction
        turned = wanted @ direction
        gain += step * along * (step * along * (direction @ turned) - 2 * (spread @ turned))
        own -= step * along**2
        spread -= step * np.outer(along, direction)

    classes = members[chosen].sum(0).astype(np.float64)
    return Proposal(fit, pool[chosen], float(expected_gain(fit, classes)), classes)


def pool_classes(probabilities: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Class probabilities under the class prior that a pool itself suggests, and that prior.

    The fit takes all classes for equally frequent, and so sees a rare one far too often. The prior is estimated by
    expectation maximisation (Saerens, Latinne and Decaestecker 2002), with a hundredth of it spread evenly.

    Args:
        probabilities: under an even prior (p, K).

    Returns:
        Probabilities (p, K), and prior (K,).
    """
    classes = probabilities.shape[1]
    prior = np.full(classes, 1 / classes, dtype=np.float32)
    members = probabilities
    for _ in range(_PRIOR_STEPS):
        members = probabilities * prior
        members /= members.sum(1, keepdims=True)
        prior = (1 - _EVEN) * members.mean(0) + _EVEN / classes
    return members, prior


def _variance(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Variance of the label of each row, summed over classes (n,)."""
    variance: NDArray[np.float32] = (probabilities * (1 - probabilities)).sum(1) + _LEAST_VARIANCE
    return variance


def _unit(features: NDArray[np.generic]) -> NDArray[np.float32]:
    rows = np.asarray(features, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def outcome(proposal: Proposal, fit: QuickFit, answers: Rows) -> Outcome:
    """Compare a proposal with a fit that was trained on all of its labels.

    Args:
        proposal: the proposal.
        fit: the fit after it.
        answers: class index of each proposed image, -1 for none of the classes (m,).
    """
    return Outcome(
        proposal,
        change(proposal.fit, fit),
        np.bincount(answers[answers >= 0], minlength=fit.classes),
        int((answers < 0).sum()),
        int(((fit.labels >= 0) & (proposal.fit.labels < 0)).sum()),
    )
