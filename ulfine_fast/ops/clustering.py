"""Anchored expectation maximisation in the metric of :mod:`ulfine_fast.ops.mixture`, started from given class priors.

Rows stream through in chunks. What is kept of them are sums over rows: class sums (C, K, D), class masses (C, K), and
one length a row and candidate; never a value for each row, candidate and class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.ops.mixture import Metric, products, sums
from ulfine_fast.ops.softmax import class_scores, class_softmax

LEAST_PRIOR = 0.01
"""Smallest class prior, in units of an even one."""

# values (rows x candidates x classes) of a chunk: on a processor what its cache holds, on a GPU what keeps it busy
_CHUNK_VALUES = 1 << 20
_CHUNK_VALUES_GPU = 1 << 27
# a matrix product of fewer rows is slow
_LEAST_ROWS = 64
# passes over the anchor alone that move its probabilities onto the starting prior
ANCHOR_PASSES = 8


@dataclass(frozen=True)
class RowChunks:
    """Rows of T trials, made chunk by chunk.

    Attributes:
        present: bool (T, N), False for padding.
        rows: gives rows [first, last) of all trials (T, n, D).
    """

    present: Tensor
    rows: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, rows: Tensor, present: Tensor) -> RowChunks:
        """Rows in memory (T, N, D)."""
        return cls(present, lambda first, last: rows[:, first:last])

    def split(self, width: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Position, rows (T, n, D) and presence (T, n) of each chunk, for `width` values a row and trial."""
        trials, total = self.present.shape
        values = _CHUNK_VALUES_GPU if self.present.is_cuda else _CHUNK_VALUES
        size = max(_LEAST_ROWS, values // (trials * max(width, 1)))
        for first in range(0, total, size):
            last = min(first + size, total)
            yield slice(first, last), self.rows(first, last), self.present[:, first:last]


@dataclass(frozen=True)
class Evidence:
    """What the clusters are fitted to: T trials of J fits, each from S starting priors; C = J S candidates, fit-major.

    Attributes:
        labeled: whitened labelled rows (T, L, D).
        labels: their classes, -1 for padding (T, L).
        label_weights: weight of each labelled row in each fit (T, L, J).
        unlabeled: whitened unlabelled rows.
        heads: of linear classifiers of whitened rows, whose logits are added to the affinities (T, J, K, D).
        offsets: of the same (T, J, K).
        prior: class prior to start with (T, C, K).
    """

    labeled: Tensor
    labels: Tensor
    label_weights: Tensor
    unlabeled: RowChunks
    heads: Tensor
    offsets: Tensor
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
        """Kappa in a round, geometric between both ends (T,)."""
        progress = number / max(self.rounds - 1, 1)
        return self.sharpness_start * (self.sharpness_end / self.sharpness_start) ** progress


@dataclass(frozen=True)
class Clusters:
    """Fitted classes of each candidate.

    Attributes:
        centers: unit under the metric (T, C, K, D).
        metric: the last round's.
        prior: estimated class prior (T, C, K).
        scatter: class sums (T, C, K, D) of rows as they are, labelled ones included, for the next metric.
        mass: their weight (T, C, K).
    """

    centers: Tensor
    metric: Metric
    prior: Tensor
    scatter: Tensor
    mass: Tensor

    @cached_property
    def vectors(self) -> Tensor:
        """Centers times the metric (T, C, K, D), made once for all chunks of rows."""
        return self.metric.times(self.centers)

    def cosines(self, rows: Tensor) -> Tensor:
        """Cosines (T, n, C, K) of whitened rows (T, n, D)."""
        return products(rows, self.vectors) * self.metric.inverse_lengths(rows).unsqueeze(-1)


def cosines(rows: Tensor, centers: Tensor, metric: Metric) -> Tensor:
    """Cosines (T, n, C, K) of rows (T, n, D) and unit centers (T, C, K, D) under the metric."""
    return products(rows, metric.times(centers)) * metric.inverse_lengths(rows).unsqueeze(-1)


def fit_clusters(
    evidence: Evidence, schedule: Schedule, start: Clusters | None = None, report: Callable[[float], None] | None = None
) -> Clusters:
    """Alternate class probabilities, class prior, centers, and the metric between them.

    The first probabilities are the anchor's, moved onto the starting prior. That prior is held for the first rounds by
    transport (Sinkhorn-Knopp, arXiv 1306.0895; every pass over the rows takes one column step); later it is estimated
    anew as mixture weights.

    Args:
        evidence: what is fitted to.
        schedule: rounds and steps.
        start: clusters to go on from; its prior is no longer held.
        report: called with the fraction of the work done.
    """
    count = evidence.unlabeled.present.sum(1)  # (T,)
    known = _known_sums(evidence)
    weight = count + (evidence.labels >= 0).sum(1)  # (T,)
    total_passes = schedule.rounds * schedule.steps
    passes = 0
    unit_sums: Tensor | None

    if start is None:
        # the anchor alone, under the flat metric, moved onto the starting prior
        metric = Metric.flat(evidence.prior.shape[1], evidence.heads)
        prior, log_weights = evidence.prior, torch.log(evidence.prior)
        inverse = _inverse_lengths(evidence.unlabeled, metric)
        for _ in range(ANCHOR_PASSES - 1):
            totals = _pass(evidence, log_weights, inverse, sums_too=False, plain_too=False)
            log_weights = _transported(log_weights, prior, totals.mass, count)
        totals = _pass(evidence, log_weights, inverse)
        log_weights = _transported(log_weights, prior, totals.mass, count)
        unit_sums = totals.unit
        scatter, mass = known.sums + totals.plain, known.mass + totals.mass
        centers = evidence.heads.new_zeros(0)  # made in the first round
    else:
        prior, log_weights = start.prior, torch.log(start.prior)
        metric, centers, scatter, mass = start.metric, start.centers, start.scatter, start.mass
        unit_sums = None  # of other rows

    for number in range(schedule.rounds):
        # the metric of the clusters' own scatter; the first round stays flat
        if number > 0 or start is not None:
            metric = Metric.within(scatter, mass, weight)
            inverse = _inverse_lengths(evidence.unlabeled, metric)
        labeled_sums = _labeled_sums(evidence, metric)
        centers = metric.unit(centers if unit_sums is None else labeled_sums + unit_sums)

        # EM steps under this metric
        kappa = schedule.sharpness(number)
        held = start is None and number < schedule.held_rounds
        for step in range(schedule.steps):
            totals = _pass(
                evidence,
                log_weights,
                inverse,
                kappa.view(-1, 1, 1, 1) * metric.times(centers),
                plain_too=step == schedule.steps - 1,
            )
            if held:
                log_weights = _transported(log_weights, prior, totals.mass, count)
            else:
                prior = _estimated_prior(totals.mass, count, evidence.prior, schedule.prior_pseudo_count)
                log_weights = torch.log(prior)
            unit_sums = totals.unit
            centers = metric.unit(labeled_sums + unit_sums)
            passes += 1
            if report is not None:
                report(passes / total_passes)
        scatter, mass = known.sums + totals.plain, known.mass + totals.mass
    return Clusters(centers, metric, prior, scatter, mass)


@dataclass(frozen=True)
class _Totals:
    """Sums over rows, weighted by their class probabilities.

    Attributes:
        mass: the probabilities' own (T, C, K).
        unit: of rows at length one under the metric (T, C, K, D).
        plain: of rows as they are (T, C, K, D).
    """

    mass: Tensor
    unit: Tensor
    plain: Tensor


def _pass(
    evidence: Evidence,
    log_weights: Tensor,
    inverse: Tensor,
    vectors: Tensor | None = None,
    *,
    sums_too: bool = True,
    plain_too: bool = True,
) -> _Totals:
    """One pass over the unlabelled rows: class probabilities, and sums over rows weighted by them.

    Args:
        evidence: what is fitted to.
        log_weights: added to the scores (T, C, K).
        inverse: 1 / length of the rows (T, N, C).
        vectors: whose products with rows at length one are the affinities (T, C, K, D); None for the anchor alone.
        sums_too: whether sums of unit rows are wanted.
        plain_too: whether sums of plain rows are wanted.
    """
    trials, candidates, classes = evidence.prior.shape
    fits, dim = evidence.heads.shape[1], evidence.heads.shape[3]
    zeros = log_weights.new_zeros
    mass = zeros(trials, candidates, classes)
    unit, plain = zeros(trials, candidates * classes, dim), zeros(trials, candidates * classes, dim)
    for position, rows, present in evidence.unlabeled.split(candidates * classes):
        chunk_inverse = inverse[:, position].transpose(1, 2).unsqueeze(2).contiguous()  # (T, C, 1, n)
        anchor = class_scores(evidence.heads, rows) + evidence.offsets.unsqueeze(-1)  # (T, J, K, n)
        by_fit = (fits, -1)
        if vectors is None:
            scores = (log_weights.unsqueeze(-1).unflatten(1, by_fit) + anchor.unsqueeze(2)).flatten(1, 2)
        else:
            scores = class_scores(vectors, rows)  # (T, C, K, n)
            scores.mul_(chunk_inverse).add_(log_weights.unsqueeze(-1))
            scores.unflatten(1, by_fit).add_(anchor.unsqueeze(2))
        probabilities = class_softmax(scores).mul_(present[:, None, None].to(scores.dtype))  # (T, C, K, n)
        mass += probabilities.sum(-1)
        if plain_too:
            plain.baddbmm_(probabilities.flatten(1, 2), rows)
        if sums_too:
            unit.baddbmm_(probabilities.mul_(chunk_inverse).flatten(1, 2), rows)
    shape = (candidates, classes)
    return _Totals(mass, unit.unflatten(1, shape), plain.unflatten(1, shape))


def _inverse_lengths(rows: RowChunks, metric: Metric) -> Tensor:
    """1 / length of all rows for each candidate (T, N, C)."""
    width = metric.factors.shape[1] * max(metric.factors.shape[2], 1)
    return torch.cat([metric.inverse_lengths(part) for _, part, _ in rows.split(width)], dim=1)


def _transported(log_weights: Tensor, prior: Tensor, mass: Tensor, count: Tensor) -> Tensor:
    """The column step of Sinkhorn's iteration: log weights (T, C, K) that move the mass (T, C, K) onto the prior."""
    rows = count.view(-1, 1, 1).to(mass.dtype)
    # a class that no row chose is lifted by a finite step; without rows nothing moves
    moved = torch.log(prior * rows + 1e-12) - torch.log(mass + 1e-12)
    return torch.where(rows > 0, log_weights + moved, log_weights)


def _estimated_prior(mass: Tensor, count: Tensor, start: Tensor, pseudo_count: Tensor) -> Tensor:
    """Mixture weights (T, C, K), smoothed with the starting prior; none vanishes, as a lost class would not return."""
    smoothed = mass / count.clamp(min=1).view(-1, 1, 1) + pseudo_count.view(-1, 1, 1) * start
    smoothed = smoothed.clamp(min=LEAST_PRIOR / mass.shape[-1])
    return smoothed / smoothed.sum(-1, keepdim=True)


@dataclass(frozen=True)
class _Known:
    """Class sums (T, C, K, D) and masses (T, C, K) of labelled rows that belong to a fit, each counted once."""

    sums: Tensor
    mass: Tensor


def _known_sums(evidence: Evidence) -> _Known:
    """Sums of the labelled rows as they are."""
    kept = (evidence.label_weights > 0).to(evidence.labeled.dtype)
    known = torch.zeros_like(evidence.heads)  # (T, J, K, D)
    mass = torch.zeros_like(evidence.offsets)  # (T, J, K)
    for position, rows, _ in _labeled_chunks(evidence):
        members = _members(evidence, kept, position)  # (T, n, J, K)
        known += sums(members, rows)
        mass += members.sum(1)
    starts = evidence.prior.shape[1] // kept.shape[2]
    return _Known(known.repeat_interleave(starts, dim=1), mass.repeat_interleave(starts, dim=1))


def _labeled_sums(evidence: Evidence, metric: Metric) -> Tensor:
    """Weighted class sums (T, C, K, D) of labelled rows at length one under the metric."""
    result = torch.zeros_like(evidence.prior).unsqueeze(-1)
    for position, rows, _ in _labeled_chunks(evidence):
        members = _members(evidence, evidence.label_weights, position)  # (T, n, J, K)
        inverse = metric.inverse_lengths(rows).unflatten(2, (members.shape[2], -1))  # (T, n, J, S)
        weights = (members.unsqueeze(3) * inverse.unsqueeze(-1)).flatten(2, 3)  # (T, n, C, K)
        result = result + sums(weights, rows)
    return result


def _labeled_chunks(evidence: Evidence) -> Iterator[tuple[slice, Tensor, Tensor]]:
    chunks = RowChunks.of(evidence.labeled, evidence.labels >= 0)
    return chunks.split(evidence.prior.shape[1] * evidence.prior.shape[2])


def _members(evidence: Evidence, weights: Tensor, position: slice) -> Tensor:
    """Weights (T, L, J) of labelled rows at their classes, for some rows: (T, n, J, K)."""
    labels = evidence.labels[:, position]
    one_hot = F.one_hot(labels.clamp(min=0), evidence.prior.shape[-1]) * (labels >= 0).unsqueeze(-1)
    return weights[:, position].unsqueeze(-1) * one_hot.unsqueeze(2)
