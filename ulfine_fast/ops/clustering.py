"""The loop over :mod:`ulfine_fast.ops.mixture`: anchored expectation maximisation from given class shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.ops.mixture import Metric, Rows, cosines, sums, unit
from ulfine_fast.ops.transport import transport

_LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Evidence:
    """What the clusters are made from, for T trials of S candidates.

    Attributes:
        labeled: whitened labelled rows (T, L, D). given: weight of each as a member of a class (T, L, S, K).
        hidden: whitened unlabelled rows (T, N, D). present: bool (T, N).
        anchor: logits that are added to the hidden rows' affinities (T, N, S, K).
        start: class shares to begin with (T, S, K).
    """

    labeled: Tensor
    given: Tensor
    hidden: Tensor
    present: Tensor
    anchor: Tensor
    start: Tensor


@dataclass(frozen=True)
class Schedule:
    """How the rounds run.

    Attributes:
        rounds: metrics fitted in turn. inner: EM steps in each.
        held: rounds in which the start's class shares are kept, by transport.
        blunt, sharp: sharpness kappa of the first and the last round, T values each.
        pull: pseudo-count of the start's shares in the estimated ones, as a multiple of the rows (T,).
    """

    rounds: int
    inner: int
    held: int
    blunt: Tensor
    sharp: Tensor
    pull: Tensor

    def sharpness(self, number: int) -> Tensor:
        """Kappa in a round, geometric between both ends (T, 1, 1, 1)."""
        share = number / max(self.rounds - 1, 1)
        return (self.blunt * (self.sharp / self.blunt) ** share).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Clusters:
    """Fitted classes.

    Attributes:
        centers: unit under the metric (T, S, K, D). metric: the last round's. shares: (T, S, K).
        plan: class probabilities of the hidden rows (T, N, S, K). hidden: those rows as the metric sees them.
    """

    centers: Tensor
    metric: Metric
    shares: Tensor
    plan: Tensor
    hidden: Rows

    def cosines(self, rows: Tensor) -> Tensor:
        """Cosines (T, n, S, K) of whitened rows (T, n, D)."""
        return cosines(Rows.under(rows, self.metric), self.centers, self.metric)


def fit_clusters(evidence: Evidence, schedule: Schedule) -> Clusters:
    """Alternate probabilities, class shares, centers and the metric between them.

    The first probabilities are the anchor's, moved onto the starting shares; those shares are held for the first
    rounds by transport of all rows at once, later they are re-estimated as mixture weights.
    """
    clusters = _first(evidence)
    for number in range(schedule.rounds):
        clusters = _measured(evidence, clusters, number)
        for _ in range(schedule.inner):
            clusters = _step(evidence, schedule, clusters, number)
    return clusters


def _first(evidence: Evidence) -> Clusters:
    """The anchor's own view of the hidden rows, under the flat metric."""
    plan = transport(evidence.anchor, torch.log(evidence.start), evidence.present)
    plan = plan * evidence.present[:, :, None, None]
    candidates, classes = evidence.start.shape[1:]
    metric = Metric.flat(candidates, evidence.hidden, classes)
    return Clusters(evidence.hidden.new_zeros(0), metric, evidence.start, plan, Rows.under(evidence.hidden, metric))


def _measured(evidence: Evidence, clusters: Clusters, number: int) -> Clusters:
    """The clusters under the metric of their own scatter; the first round stays flat."""
    metric, hidden = clusters.metric, clusters.hidden
    if number > 0:
        known = (evidence.given > 0).to(clusters.plan.dtype)
        mass = known.sum(1) + clusters.plan.sum(1)  # (T, S, K)
        total = evidence.present.sum(1) + (evidence.given.sum((2, 3)) > 0).sum(1)
        metric = Metric.within(sums(known, evidence.labeled) + sums(clusters.plan, evidence.hidden), mass, total)
        hidden = Rows.under(evidence.hidden, metric)
    centers = _centers(evidence, metric, hidden, clusters.plan)
    return Clusters(centers, metric, clusters.shares, clusters.plan, hidden)


def _step(evidence: Evidence, schedule: Schedule, clusters: Clusters, number: int) -> Clusters:
    """One EM step under a fixed metric."""
    affinity = cosines(clusters.hidden, clusters.centers, clusters.metric)
    scores = schedule.sharpness(number) * affinity + evidence.anchor
    log_shares = torch.log(clusters.shares)
    present = evidence.present[:, :, None, None]
    if number < schedule.held:
        plan, shares = transport(scores, log_shares, evidence.present) * present, clusters.shares
    else:
        plan = torch.softmax(scores + log_shares.unsqueeze(1), dim=-1) * present
        shares = _shares(plan, evidence, schedule.pull)
    centers = _centers(evidence, clusters.metric, clusters.hidden, plan)
    return Clusters(centers, clusters.metric, shares, plan, clusters.hidden)


def _shares(plan: Tensor, evidence: Evidence, pull: Tensor) -> Tensor:
    """Mixture weights (T, S, K), pulled towards the start; none vanishes, since a lost class never comes back."""
    count = evidence.present.sum(1).clamp(min=1).view(-1, 1, 1)
    shares = (plan.sum(1) / count + pull.view(-1, 1, 1) * evidence.start).clamp(min=_LEAST_SHARE)
    return shares / shares.sum(-1, keepdim=True)


def _centers(evidence: Evidence, metric: Metric, hidden: Rows, plan: Tensor) -> Tensor:
    """Class means of unit rows, labelled ones by their weight, at length one (T, S, K, D)."""
    labeled = Rows.under(evidence.labeled, metric)
    return unit(_mass(labeled, evidence.given) + _mass(hidden, plan), metric)


def _mass(rows: Rows, weights: Tensor) -> Tensor:
    return sums(weights * rows.inverse.unsqueeze(-1), rows.values)
