"""Entropic transport of images onto classes: all rows at once, with the class shares given."""

from __future__ import annotations

import torch
from torch import Tensor


def transport(scores: Tensor, log_prior: Tensor, present: Tensor, rounds: int = 10) -> Tensor:
    """Class probabilities whose mean over rows is the given prior (Sinkhorn-Knopp; Cuturi, arXiv 1306.0895).

    Ends on a row step: rows sum to one exactly, columns to the prior up to what `rounds` leave.

    Args:
        scores: log affinities of rows and classes (T, N, S, K), for S candidates of each trial.
        log_prior: log class shares (T, S, K).
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
