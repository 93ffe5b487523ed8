"""Entropic transport of images onto classes with a given class prior."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Parts = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Makes scores (T, n, K) and presence (T, n) of all rows, part by part; called once for each pass over them."""

# scores of rows and classes that are held from one pass to the next: 64 MB of float32
HELD_VALUES = 1 << 24
# the logarithm of no mass; a finite value, since infinities cancel to NaN
_NONE = -1e30
# the least proportion of a class in logarithms: exp of minus infinity minus itself would be no number
_LEAST = 1e-8


def transport(scores: Tensor, log_prior: Tensor, present: Tensor, rounds: int = 10) -> Tensor:
    """Class probabilities whose mean over rows is the given prior (Sinkhorn-Knopp; Cuturi, arXiv 1306.0895).

    Ends on a row step: rows sum to one exactly, columns to the prior up to what `rounds` leave.

    Args:
        scores: log affinities of rows and classes (T, N, S, K), for S candidates of each trial.
        log_prior: log class prior (T, S, K).
        present: bool (T, N); other rows have no weight.
        rounds: alternations of column and row scaling.

    Returns:
        Probabilities (T, N, S, K).
    """
    rows = torch.log(present.sum(1).clamp(min=1).to(scores.dtype)).view(-1, 1, 1)
    absent = ~present[:, :, None, None]
    potential = torch.zeros_like(log_prior)  # (T, S, K)
    for _ in range(rounds):
        log_plan = torch.log_softmax(scores + potential.unsqueeze(1), dim=-1) - potential.unsqueeze(1)
        # an absent row must not fill a column; a finite value, since a trial may have no rows at all
        column = torch.logsumexp(log_plan.masked_fill(absent, -1e30), dim=1)  # (T, S, K)
        potential = log_prior + rows - column
    return torch.softmax(scores + potential.unsqueeze(1), dim=-1)


def class_potentials(parts: Parts, log_prior: Tensor, rounds: int = 10, start: Tensor | None = None) -> Tensor:
    """What :func:`transport` adds to the scores of each class, for rows that come part by part.

    The plan is softmax(scores + potential), for these rows and for new ones; only the potentials are kept of it.

    Args:
        parts: log affinities of the rows, in parts.
        log_prior: log class prior (T, K).
        rounds: alternations of column and row scaling.
        start: potentials to begin with (T, K), zero by default.

    Returns:
        Potentials (T, K); those of a trial without rows stay what they were.
    """
    potential = torch.zeros_like(log_prior) if start is None else start
    for _ in range(rounds):
        column = torch.full_like(log_prior, _NONE)
        count = log_prior.new_zeros(len(log_prior), 1)
        for scores, present in parts():
            log_plan = torch.log_softmax(scores + potential.unsqueeze(1), dim=-1) - potential.unsqueeze(1)
            part = torch.logsumexp(log_plan.masked_fill(~present.unsqueeze(-1), _NONE), dim=1)  # (T, K)
            column = torch.logaddexp(column, part)
            count = count + present.sum(1, keepdim=True)
        potential = torch.where(count > 0, log_prior + torch.log(count.clamp(min=1)) - column, potential)
    return potential


def held(parts: Parts) -> Parts:
    """The same parts, made once for all passes where all of them are small enough to be held."""
    kept, size = [], 0
    for scores, present in parts():
        size += scores.numel()
        if size > HELD_VALUES:
            return parts
        kept.append((scores, present))
    return lambda: kept


def sinkhorn(logits: Tensor, proportions: Tensor, present: Tensor, rounds: int = 100) -> Tensor:
    """Class probabilities of a bag's images with its class proportions as mean, nearest to softmax of the logits.

    The plan of entropic transport at epsilon = 1, for which the model's own probabilities are the kernel: columns and
    rows scaled one after the other (:func:`transport`), ending on rows.

    Args:
        logits: (T, G, m, K).
        proportions: of the classes, sum to 1, zeros allowed (T, G, K).
        present: bool (T, G, m).
        rounds: alternations; the means reach the proportions up to the remaining error.

    Returns:
        Probabilities (T, G, m, K); those of absent images mean nothing.
    """
    log_proportions = torch.log(proportions.clamp(min=_LEAST)).flatten(0, 1).unsqueeze(1)  # (T G, 1, K)
    plan = transport(logits.flatten(0, 1).unsqueeze(2), log_proportions, present.flatten(0, 1), rounds)
    return plan.squeeze(2).view_as(logits)
