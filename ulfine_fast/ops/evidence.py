"""Folds of the labelled rows, class priors to start from, and scores of candidates on held-out labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.ops.philox import Purpose, uniforms
from ulfine_fast.ops.softmax import log_softmax

_TEMPERATURES = tuple(2.0 ** (step / 2) for step in range(-2, 9))


def fold_numbers(seeds: Tensor, labels: Tensor, classes: int, folds: int) -> Tensor:
    """Split the labelled rows of every class into folds, in an order drawn from the trial's seed.

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


def starting_priors(counts: Tensor, gamma: float = 30.0) -> Tensor:
    """Five candidate class priors of the unlabelled images, exponential in the class's rank among the labelled ones.

    Falling, uniform, rising, peaked in the middle, and lowest in the middle.

    Args:
        counts: labelled rows of each class (T, K).
        gamma: largest prior over the smallest.

    Returns:
        Priors (T, 5, K), each summing to one.
    """
    last = max(counts.shape[1] - 1, 1)
    ranks = torch.argsort(torch.argsort(-counts, dim=1, stable=True), dim=1).to(counts.dtype) / last  # (T, K) in 0..1
    from_middle = (2 * ranks - 1).abs()
    slopes = torch.stack([ranks, torch.zeros_like(ranks), 1 - ranks, from_middle, 1 - from_middle], dim=1)  # (T, 5, K)
    return torch.softmax(-torch.log(torch.tensor(gamma)) * slopes, dim=-1)


def class_sums(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sums (T, K) of values (T, L) by label (T, L); those of padding, label -1, must be zero."""
    return values.new_zeros(len(labels), classes).scatter_add_(1, labels.clamp(min=0), values)


def label_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-likelihood of each row's label by each candidate, at every temperature of the grid.

    Args:
        logits: (T, n, S, K).
        labels: int64 (T, n); those of padding, -1, mean nothing.

    Returns:
        (T, n, S, G).
    """
    target = labels.clamp(min=0)[:, :, None, None].expand(-1, -1, logits.shape[2], 1)
    by_temperature = [log_softmax(logits / temperature).gather(-1, target) for temperature in _TEMPERATURES]
    return torch.cat(by_temperature, dim=-1)


def held_out_scores(likelihoods: Tensor, labels: Tensor, judged: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Class-balanced log-likelihood of held-out labels, at each candidate's best temperature.

    Args:
        likelihoods: (T, L, S, G), see :func:`label_likelihoods`.
        labels: int64 (T, L), -1 for padding.
        judged: bool (T, L), the rows that were held out.
        classes: K.

    Returns:
        Scores (T, S), at most 0, the mean over classes with held-out rows; and temperatures (T, S), one where a trial
        has no such rows.
    """
    index = labels.clamp(min=0)
    kept = judged.to(likelihoods.dtype)
    counts = class_sums(kept, labels, classes)  # (T, K)
    weight = kept / counts.gather(1, index).clamp(min=1) / (counts > 0).sum(1, keepdim=True).clamp(min=1)  # (T, L)
    best = torch.einsum("tlsg,tl->tsg", likelihoods, weight).max(-1)  # (T, S)
    # without held-out rows all temperatures score the same, and the first of the grid would sharpen for no reason
    grid = torch.tensor(_TEMPERATURES, device=labels.device)
    known = judged.any(1, keepdim=True)  # (T, 1)
    return best.values, torch.where(known, grid[best.indices], torch.ones_like(best.values))


def balanced_gain(difference: Tensor, labels: Tensor, judged: Tensor, classes: int) -> Tensor:
    """Difference in balanced accuracy of two classifiers on held-out labels, with a 95% interval.

    The interval is the normal one of a mean of class means, with one variance inside all classes, as rare classes have
    too few rows for one of their own.

    Args:
        difference: 1 where only the first is right, -1 where only the second is, else 0; (T, L).
        labels: int64 (T, L), -1 for padding.
        judged: bool (T, L), the rows that were held out.
        classes: K.

    Returns:
        Mean, lower and upper end (T, 3); NaN where there are too few rows to tell.
    """
    index = labels.clamp(min=0)
    kept = judged.to(difference.dtype)
    counts = class_sums(kept, labels, classes)  # (T, K)
    means = class_sums(kept * difference, labels, classes) / counts.clamp(min=1)
    seen = (counts > 0).sum(1)  # (T,)
    mean = means.sum(1) / seen
    spread = (kept * (difference - means.gather(1, index)).square()).sum(1) / (kept.sum(1) - seen)
    variance = spread * torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0).sum(1) / seen.square()
    half = 1.96 * variance.sqrt()
    enough = kept.sum(1) > seen
    result = torch.stack([mean, mean - half, mean + half], dim=1)
    return torch.where(enough.unsqueeze(1), result, torch.nan)
