"""One Gaussian for each class of features, and heads made from them: in closed form, or trained on samples.

Classifier alignment of SLCA (arXiv 2303.05118) and SLCA++ (arXiv 2408.08295) as a reconstruction: the covariance is
shared by all classes, and the means of rare classes are drawn towards estimates from their texts, since a long tail has
classes of few rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.ops.philox import Purpose, normals
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.sgd import cosine_rate, sgd_step

_EPS = 1e-12
_HALF_WEIGHT_ROWS = 10.0


class Gaussians(NamedTuple):
    """Class statistics of features.

    Attributes:
        means: (K, D), zero for a class without rows.
        counts: rows of each class (K,).
        covariance: of all classes together (D, D), positive definite.
    """

    means: Tensor
    counts: Tensor
    covariance: Tensor


def class_gaussians(features: Tensor, labels: Tensor, classes: int) -> Gaussians:
    """Means and the shared covariance within classes, in float64.

    Rows of a class of n are scaled by sqrt(n / (n - 1)), which makes each class's part unbiased; classes of one row
    are left out. The covariance is shrunk towards a multiple of the identity, see :func:`shrunk`.

    Args:
        features: (n, D).
        labels: int64 (n,).
        classes: K.

    Raises:
        ValueError: no class has two rows.
    """
    rows = features.double()
    counts = torch.bincount(labels, minlength=classes)
    one_hot = F.one_hot(labels, classes).double()  # (n, K)
    means = one_hot.T @ rows / counts.clamp(min=1).unsqueeze(1)
    used = counts[labels] > 1
    if not bool(used.any()):
        raise ValueError("no class has two rows")
    sizes = counts[labels[used]].double()
    centred = (rows[used] - means[labels[used]]) * (sizes / (sizes - 1)).sqrt().unsqueeze(1)
    return Gaussians(means, counts, shrunk(centred))


def shrunk(rows: Tensor) -> Tensor:
    """Covariance (D, D) of centred rows (n, D), shrunk by the rule of Ledoit and Wolf (2004).

    S + b (m I - S), where m is the mean variance and b the fraction of |S - m I|^2 that is due to the sampling error of
    S.
    """
    count, dim = rows.shape
    sample = rows.T @ rows / count
    mean = sample.diagonal().mean()
    target = mean * torch.eye(dim, dtype=rows.dtype, device=rows.device)
    distance = (sample - target).square().sum()
    error = (rows.square().sum(1).square().sum() / count - sample.square().sum()) / count
    fraction = (error / distance.clamp(min=_EPS)).clamp(0.0, 1.0)
    # equal rows have no variance, and a covariance must have an inverse
    return sample + fraction * (target - sample) + _EPS * torch.eye(dim, dtype=rows.dtype, device=rows.device)


def text_anchors(means: Tensor, counts: Tensor, text: Tensor) -> Tensor:
    """Class means estimated from the texts: a ridge map from texts to means, fitted on all classes.

    Class k weighs n_k / (n_k + 10); both sides are centred by these weights, and the ridge is the texts' weighted mean
    squared distance from their center. Solved over classes, of which there are fewer than dimensions.

    Args:
        means: (K, D).
        counts: rows of each class (K,).
        text: (K, E), of any width.

    Returns:
        Anchors (K, D).
    """
    rows = counts.to(means.dtype)
    weight = rows / (rows + _HALF_WEIGHT_ROWS)  # (K,)
    normalized = weight / weight.sum()
    text = text.to(means.dtype) - normalized @ text.to(means.dtype)
    center = normalized @ means
    gram = text @ text.T  # (K, K)
    ridge = (normalized @ gram.diagonal()).clamp(min=_EPS)
    # both sides multiplied by sqrt(w): a class without rows has weight 0, which has no inverse
    root = weight.sqrt()
    inner = root.unsqueeze(1) * gram * root + ridge * torch.eye(len(root), dtype=means.dtype, device=means.device)
    solved = torch.linalg.solve(inner, root.unsqueeze(1) * (means - center))
    return center + (gram * root) @ solved


def anchored(means: Tensor, counts: Tensor, anchors: Tensor, kappa: float) -> Tensor:
    """(n_k mu_k + kappa a_k) / (n_k + kappa): the anchors (K, D) count as kappa rows."""
    rows = counts.to(means.dtype).unsqueeze(1)
    return (rows * means + kappa * anchors) / (rows + kappa).clamp(min=_EPS)


def discriminant(means: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis with equal priors: log p(x | k) = w_k x + b_k up to what all classes share.

    Args:
        means: (K, D).
        covariance: (D, D), positive definite.

    Returns:
        W = mu Sigma^-1 (K, D) and b_k = -w_k mu_k / 2 (K,).
    """
    weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(covariance)).T
    return weights, -0.5 * (weights * means).sum(1)


@dataclass(frozen=True)
class Sampling:
    """How a head is trained on samples; the values of SLCA's released code but for `lr`, 0.01 for its linear head.

    Attributes:
        epochs: each has `per_class` samples of every class.
        per_class: samples of a class in an epoch, and rows of a mini-batch.
        lr: peak learning rate of SGD, half a cosine to zero.
        momentum: of SGD.
        temperature: tau, divides the normalised logits.
    """

    epochs: int = 5
    per_class: int = 256
    lr: float = 0.03
    momentum: float = 0.9
    temperature: float = 0.1

    def steps(self, classes: int) -> int:
        """Mini-batches in all."""
        return self.epochs * classes


def align(
    heads: Tensor, means: Tensor, covariance: Tensor, seeds: Tensor, sampling: Sampling
) -> Iterator[tuple[int, Tensor]]:
    """Train cosine heads on samples of their classes' Gaussians, each class the same number of times.

    The loss is CE(z / (tau |z|), k), z the cosines (SLCA's normalised logits). The C heads of a trial see the same
    noise, so that they differ by their means alone.

    Args:
        heads: C heads for each of T trials (T, C, K, D), of any length.
        means: (T, C, K, D).
        covariance: (T, D, D).
        seeds: (T,).
        sampling: the schedule.

    Yields:
        Steps done and the heads (T, C, K, D) after them.
    """
    trials, candidates, classes, dim = heads.shape
    factor = torch.linalg.cholesky(covariance.double()).to(heads.dtype)
    weights = normalize(heads).flatten(0, 1).requires_grad_(True)  # (T C, K, D)
    velocity = {"heads": torch.zeros_like(weights)}
    rate, momentum, decay = (weights.new_full((len(weights),), v) for v in (sampling.lr, sampling.momentum, 0.0))
    for step in range(sampling.steps(classes)):
        labels = _balanced_labels(step, sampling.per_class, classes, heads.device)
        noise = normals(seeds, step, Purpose.SAMPLES, sampling.per_class * dim).view(trials, -1, dim)  # (T, B, D)
        rows = (noise @ factor.transpose(1, 2)).unsqueeze(1) + means[:, :, labels]  # (T, C, B, D)
        _alignment_loss(weights, rows.flatten(0, 1), labels, sampling.temperature).sum().backward()
        scheduled = rate * cosine_rate(step, sampling.steps(classes))
        sgd_step({"heads": weights}, velocity, scheduled, momentum, decay)
        yield step + 1, weights.detach().view(trials, candidates, classes, dim)


def _balanced_labels(step: int, size: int, classes: int, device: torch.device) -> Tensor:
    """Classes of a mini-batch (B,) in round-robin order: over K mini-batches each is as frequent as any other."""
    return (torch.arange(size, device=device) + step * size) % classes


def _alignment_loss(weights: Tensor, rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """CE(z / (tau |z|), k) of rows (T, B, D), mean over rows (T,); their length cancels."""
    logits = rows @ normalize(weights).transpose(1, 2)  # (T, B, K)
    log_probability = torch.log_softmax(normalize(logits) / temperature, -1)
    return -log_probability.gather(2, labels.view(1, -1, 1).expand(len(weights), -1, 1)).mean((1, 2))
