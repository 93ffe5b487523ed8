"""Anchored expectation maximisation over :mod:`ulfine_fast.ops.mixture`, started from given class priors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.ops.mixture import Metric, Rows, cosines, sums, unit
from ulfine_fast.ops.transport import transport

_LEAST_PRIOR = 1e-3


@dataclass(frozen=True)
class Evidence:
    """What the clusters are fitted to, for T trials of S candidates.

    Attributes:
        labeled: whitened labelled rows (T, L, D).
        label_weights: weight of each labelled row as a member of each class (T, L, S, K).
        unlabeled: whitened unlabelled rows (T, N, D).
        present: bool (T, N), False for padding.
        anchor: logits that are added to the unlabelled rows' affinities (T, N, S, K).
        prior: class prior to start with (T, S, K).
    """

    labeled: Tensor
    label_weights: Tensor
    unlabeled: Tensor
    present: Tensor
    anchor: Tensor
    prior: Tensor


@dataclass(frozen=True)
class Schedule:
    """How the rounds run.

    Attributes:
        rounds: how often the metric is fitted.
        steps: EM steps under each metric.
        held_rounds: first rounds, in which the starting prior is kept by transport.
        sharpness_start: sharpness kappa of the first round (T,).
        sharpness_end: sharpness kappa of the last round (T,).
        prior_pseudo_count: weight of the starting prior in the estimated one, as a multiple of the rows (T,).
    """

    rounds: int
    steps: int
    held_rounds: int
    sharpness_start: Tensor
    sharpness_end: Tensor
    prior_pseudo_count: Tensor

    def sharpness(self, number: int) -> Tensor:
        """Kappa in a round, geometric between both ends (T, 1, 1, 1)."""
        progress = number / max(self.rounds - 1, 1)
        kappa = self.sharpness_start * (self.sharpness_end / self.sharpness_start) ** progress
        return kappa.view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Clusters:
    """Fitted classes.

    Attributes:
        centers: unit under the metric (T, S, K, D).
        metric: the last round's.
        prior: estimated class prior (T, S, K).
        probabilities: of the unlabelled rows' classes (T, N, S, K), zero for padding.
    """

    centers: Tensor
    metric: Metric
    prior: Tensor
    probabilities: Tensor

    def cosines(self, rows: Tensor) -> Tensor:
        """Cosines (T, n, S, K) of whitened rows (T, n, D)."""
        return cosines(Rows.under(rows, self.metric), self.centers, self.metric)


def fit_clusters(evidence: Evidence, schedule: Schedule) -> Clusters:
    """Alternate class probabilities, class prior, centers, and the metric between them.

    The first probabilities are the anchor's, moved onto the starting prior. That prior is held for the first rounds by
    transport of all rows together; later it is re-estimated as mixture weights.
    """
    candidates, classes = evidence.prior.shape[1:]
    present = evidence.present[:, :, None, None]
    known = (evidence.label_weights > 0).to(evidence.anchor.dtype)  # (T, L, S, K)
    count = evidence.present.sum(1) + (evidence.label_weights.sum((2, 3)) > 0).sum(1)  # (T,)

    # the anchor alone, under the flat metric
    prior = evidence.prior
    probabilities = transport(evidence.anchor, torch.log(prior), evidence.present) * present  # (T, N, S, K)
    metric = Metric.flat(candidates, evidence.unlabeled, classes)
    centers = evidence.unlabeled.new_zeros(0)

    for number in range(schedule.rounds):
        # the metric of the clusters' own scatter; the first round stays flat
        if number > 0:
            scatter = sums(known, evidence.labeled) + sums(probabilities, evidence.unlabeled)  # (T, S, K, D)
            metric = Metric.within(scatter, known.sum(1) + probabilities.sum(1), count)
        labeled = Rows.under(evidence.labeled, metric)
        unlabeled = Rows.under(evidence.unlabeled, metric)
        labeled_sums = _unit_sums(labeled, evidence.label_weights)
        centers = unit(labeled_sums + _unit_sums(unlabeled, probabilities), metric)

        # EM steps under this metric
        for _ in range(schedule.steps):
            affinity = cosines(unlabeled, centers, metric)
            scores = schedule.sharpness(number) * affinity + evidence.anchor
            log_prior = torch.log(prior)
            if number < schedule.held_rounds:
                probabilities = transport(scores, log_prior, evidence.present) * present
            else:
                probabilities = torch.softmax(scores + log_prior.unsqueeze(1), dim=-1) * present
                prior = _estimated_prior(probabilities, evidence, schedule.prior_pseudo_count)
            centers = unit(labeled_sums + _unit_sums(unlabeled, probabilities), metric)
    return Clusters(centers, metric, prior, probabilities)


def _estimated_prior(probabilities: Tensor, evidence: Evidence, pseudo_count: Tensor) -> Tensor:
    """Mixture weights (T, S, K), smoothed with the starting prior; none vanishes, as a lost class would not return."""
    count = evidence.present.sum(1).clamp(min=1).view(-1, 1, 1)
    smoothed = probabilities.sum(1) / count + pseudo_count.view(-1, 1, 1) * evidence.prior
    smoothed = smoothed.clamp(min=_LEAST_PRIOR)
    return smoothed / smoothed.sum(-1, keepdim=True)


def _unit_sums(rows: Rows, weights: Tensor) -> Tensor:
    """Class sums (T, S, K, D) of rows at length one, by weights (T, n, S, K)."""
    return sums(weights * rows.inverse.unsqueeze(-1), rows.values)
