"""A cosine probe fitted to all its rows together, on labelled images alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ulfine_fast.ops.prototypes import class_means, normalize
from ulfine_fast.ops.softmax import class_scores, class_softmax

# rows that a step reads; full-batch steps over more rows cost more than they bring
MOST_ROWS = 512


def class_starts(rows: Tensor, labels: Tensor, kept: Tensor, classes: int) -> Tensor:
    """What J classifiers start from where there are no texts: class means of the rows that each is fitted to.

    Means of all rows would tell a classifier of those that it is judged by.

    Args:
        rows: unit rows (T, n, D).
        labels: their classes, -1 for padding (T, n).
        kept: whether a row trains a classifier (T, n, J).
        classes: K.

    Returns:
        Unit vectors (T, J, K, D); that of a class without rows is the mean of all rows kept.
    """
    starts = []
    for fold in kept.unbind(2):
        # what is not kept is a class of its own, which is dropped
        own = torch.where(fold & (labels >= 0), labels, classes)
        means, counts = class_means(rows, own, classes + 1)
        means, counts = means[:, :classes], counts[:, :classes].unsqueeze(-1)
        starts.append(normalize(torch.where(counts > 0, means, (means * counts).sum(1, keepdim=True))))
    return torch.stack(starts, dim=1)


def fit_probe(
    views: Tensor,
    labels: Tensor,
    kept: Tensor,
    start: Tensor,
    scale: Tensor,
    rate: float,
    stops: Sequence[int],
    decay: float = 5e-4,
    report: Callable[[float], None] | None = None,
) -> Tensor:
    """Logit-adjusted cosine classifiers (arXiv 2007.07314, equation 10) by gradient descent with momentum 0.9.

    The steps cycle through the rows' views, so that all views count the same. A step reads every row once; of more than
    512 rows every second, or third, ..., which are others in the next cycle.

    Args:
        views: unit rows (T, n, V, D).
        labels: their classes, -1 for padding (T, n).
        kept: whether a row trains a classifier, for J classifiers of each trial (T, n, J).
        start: weights to begin with (T, K, D), or others for each classifier (T, J, K, D).
        scale: cosine scale sigma of each trial (T,), or of each classifier (T, J).
        rate: peak learning rate, cosine schedule to zero at the last stop.
        stops: after how many gradient steps the classifiers are read, rising; the fewer, the nearer to the start.
        decay: weight decay.
        report: called with the fraction of the steps done.

    Returns:
        Unit class vectors at each stop (T, S, J, K, D).
    """
    classes, count = start.shape[-2], kept.shape[2]
    known = labels >= 0
    index = labels.clamp(min=0)  # (T, n)
    member = (kept & known.unsqueeze(-1)).to(views.dtype)  # (T, n, J)
    frequency = member.new_zeros(len(labels), count, classes).scatter_add_(
        2, index.unsqueeze(1).expand(-1, count, -1), member.transpose(1, 2)
    )  # (T, J, K)
    total = frequency.sum(-1, keepdim=True).clamp(min=1e-9)
    log_prior = torch.log((frequency / total).clamp(min=1e-8)).unsqueeze(-1)  # (T, J, K, 1)
    parts = _parts(known)
    weights = start.clone() if start.dim() == 4 else start.unsqueeze(1).repeat(1, count, 1, 1)  # (T, J, K, D)
    velocity = torch.zeros_like(weights)
    sigma = (scale if scale.dim() == 2 else scale.unsqueeze(1)).view(len(scale), -1, 1, 1)  # (T, J, 1, 1)
    steps = max(stops)
    read = []
    for step in range(steps):
        # the rows of this step
        rows, targets, trained = views[:, :, step % views.shape[2]], index, member
        if parts is not None:
            position, present = parts(step // views.shape[2])  # (T, m)
            rows = _rows(views, position, step % views.shape[2])
            targets = index.gather(1, position)
            trained = member.gather(1, position.unsqueeze(-1).expand(-1, -1, count)) * present.unsqueeze(-1)
        row_weight = trained / trained.sum(1, keepdim=True).clamp(min=1e-9)  # (T, m, J)
        row_weight = row_weight.transpose(1, 2).unsqueeze(2) * sigma  # (T, J, 1, m)

        # the gradient of the adjusted cross-entropy, in the memory of the logits
        inverse = torch.linalg.vector_norm(weights, dim=-1, keepdim=True).clamp(min=1e-6).reciprocal()  # (T, J, K, 1)
        unit = weights * inverse
        logits = class_scores(unit, rows)  # (T, J, K, m)
        error = class_softmax(logits.mul_(sigma).add_(log_prior)).mul_(row_weight)
        error.scatter_add_(2, targets[:, None, None].expand_as(row_weight), -row_weight)
        gradient = (error.flatten(1, 2) @ rows).unflatten(1, (count, classes))
        # the cosine does not see a vector's length, so neither does its gradient
        along = (gradient * unit).sum(-1, keepdim=True)
        gradient.addcmul_(unit, along, value=-1).mul_(inverse)
        velocity.mul_(0.9).add_(gradient).add_(weights, alpha=decay)
        weights.sub_(velocity, alpha=0.5 * rate * (1 + math.cos(math.pi * step / steps)))
        if step + 1 in stops:
            read.append(normalize(weights))
        if report is not None:
            report((step + 1) / steps)
    return torch.stack(read, dim=1)


def _rows(views: Tensor, position: Tensor, view: int) -> Tensor:
    """One of the views (T, n, V, D) of rows (T, m): (T, m, D). Whole rows are copied, which a gather does not do."""
    trials, count, drawn, dim = views.shape
    first = torch.arange(trials, device=views.device).unsqueeze(1) * count
    index = (first + position) * drawn + view
    return views.reshape(-1, dim).index_select(0, index.flatten()).view(trials, -1, dim)


def _parts(known: Tensor) -> Callable[[int], tuple[Tensor, Tensor]] | None:
    """Positions (T, m) of the rows of a step, and which are rows at all; None where all rows fit into one step.

    A trial's rows are split by their own number, so that trials with fewer rows do not notice those with more.
    """
    rows = known.sum(1, keepdim=True)  # (T, 1)
    count = int(rows.max()) if known.numel() else 0
    if count <= MOST_ROWS:
        return None
    parts = (rows + MOST_ROWS - 1) // MOST_ROWS  # (T, 1)
    width = torch.arange(min(count, MOST_ROWS), device=known.device)

    def part(number: int) -> tuple[Tensor, Tensor]:
        position = width * parts + number % parts
        return position.clamp(max=known.shape[1] - 1), position < rows

    return part
