"""What held-out labels say about candidates: folds, class shares to start from, scores, and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.ops.philox import Purpose, uniforms


def fold_numbers(seeds: Tensor, labels: Tensor, classes: int, folds: int) -> Tensor:
    """Deal the labelled rows of every class into folds, in an order drawn from the trial's seed.

    Args:
        seeds: (T,).
        labels: int64 (T, L), -1 for padding.
        classes: K.
        folds: J.

    Returns:
        Fold of each row in 1..J, 0 for padding and for the only row of a class, which is never held out (T, L).
    """
    drawn = uniforms(seeds, 0, Purpose.FOLDS, labels.shape[1])  # (T, L)
    group = torch.where(labels < 0, classes, labels)
    order = torch.argsort(group.double() + drawn.double(), dim=1)
    counts = torch.nn.functional.one_hot(group, classes + 1).sum(1)  # (T, K + 1)
    first = counts.cumsum(1) - counts
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(labels.shape[1], device=labels.device).expand_as(order)
    )
    number = 1 + (ranks - first.gather(1, group)) % folds
    alone = (labels < 0) | (counts.gather(1, group) < 2)
    return torch.where(alone, torch.zeros_like(number), number)


def starting_shares(counts: Tensor, gamma: float = 30.0) -> Tensor:
    """Five guesses at the unlabelled classes' shares, exponential in the class's rank among the labelled ones.

    Falling, even, rising, peaked in the middle, and hollow there.

    Args:
        counts: labelled rows of each class (T, K).
        gamma: largest share over the smallest.

    Returns:
        Shares (T, 5, K), each summing to one.
    """
    last = max(counts.shape[1] - 1, 1)
    ranks = torch.argsort(torch.argsort(-counts, dim=1, stable=True), dim=1).to(counts.dtype) / last  # (T, K) in 0..1
    hollow = (2 * ranks - 1).abs()
    slopes = torch.stack([ranks, torch.zeros_like(ranks), 1 - ranks, hollow, 1 - hollow], dim=1)  # (T, 5, K)
    return torch.softmax(-torch.log(torch.tensor(gamma)) * slopes, dim=-1)


def held_out_scores(logits: Tensor, labels: Tensor, judged: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Class-balanced log-likelihood of held-out labels, at each candidate's best temperature.

    Args:
        logits: (T, L, S, K).
        labels: int64 (T, L), -1 for padding.
        judged: bool (T, L), the rows that were held out.
        classes: K.

    Returns:
        Scores (T, S), at most 0, the mean over classes with held-out rows; and temperatures (T, S), one where a trial
        has no such rows.
    """
    target = labels.clamp(min=0)[:, :, None, None].expand(-1, -1, logits.shape[2], 1)
    member = torch.nn.functional.one_hot(labels.clamp(min=0), classes) * judged.unsqueeze(-1)  # (T, L, K)
    counts = member.sum(1)  # (T, K)
    weight = (member / counts.clamp(min=1).unsqueeze(1)).sum(-1) / (counts > 0).sum(-1).clamp(min=1).view(-1, 1)
    grid = 2.0 ** torch.arange(-1.0, 4.5, 0.5, device=logits.device)
    found = []
    for temperature in grid:
        likelihood = torch.log_softmax(logits / temperature, -1).gather(-1, target).squeeze(-1)  # (T, L, S)
        found.append((likelihood * weight.unsqueeze(-1)).sum(1))
    best = torch.stack(found).max(0)  # (T, S)
    # with nothing held out every temperature is as good, and the first of the grid would only make guesses sure
    known = judged.any(1, keepdim=True)  # (T, 1)
    return best.values, torch.where(known, grid[best.indices], torch.ones_like(best.values))
