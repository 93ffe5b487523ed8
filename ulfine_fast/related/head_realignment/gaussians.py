"""One Gaussian for each class of features, and heads made from them: in closed form, or trained on samples.

Classifier alignment of SLCA (arXiv 2303.05118) and SLCA++ (arXiv 2408.08295) as a reconstruction: the covariance is
shared by all classes, and the means of rare classes lean on their texts, since a long tail has classes of few rows.
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
_TRUSTED_AT = 10.0


class Gaussians(NamedTuple):
    """Class statistics of features.

    `means` (K, D), zero for a class without rows; `counts` (K,); `covariance` (D, D), shared, positive definite.
    """

    means: Tensor
    counts: Tensor
    covariance: Tensor


def class_gaussians(features: Tensor, labels: Tensor, classes: int) -> Gaussians:
    """Means and the shared covariance within classes, in float64.

    Rows of a class of n are scaled by sqrt(n / (n - 1)), which makes each class's part unbiased; one row alone says
    nothing of a spread. The covariance is shrunk towards a multiple of the identity, see :func:`shrunk`.

    Args:
        features: (n, D).
        labels: int64 (n,).
        classes: K.

    Raises:
        ValueError: no class has two rows.
    """
    rows = features.double()
    counts = torch.bincount(labels, minlength=classes)
    chosen = F.one_hot(labels, classes).double()  # (n, K)
    means = chosen.T @ rows / counts.clamp(min=1).unsqueeze(1)
    several = counts[labels] > 1
    if not bool(several.any()):
        raise ValueError("no class has two rows")
    own = counts[labels[several]].double()
    spread = (rows[several] - means[labels[several]]) * (own / (own - 1)).sqrt().unsqueeze(1)
    return Gaussians(means, counts, shrunk(spread))


def shrunk(rows: Tensor) -> Tensor:
    """Covariance (D, D) of centred rows (n, D), shrunk by the rule of Ledoit and Wolf (2004).

    S + b (m I - S), where m is the mean variance and b the share of |S - m I|^2 that the sampling error of S explains.
    """
    count, dim = rows.shape
    sample = rows.T @ rows / count
    mean = sample.diagonal().mean()
    target = mean * torch.eye(dim, dtype=rows.dtype, device=rows.device)
    distance = (sample - target).square().sum()
    error = (rows.square().sum(1).square().sum() / count - sample.square().sum()) / count
    share = (error / distance.clamp(min=_EPS)).clamp(0.0, 1.0)
    # rows that are all alike have no variance at all, and a covariance must have an inverse
    return sample + share * (target - sample) + _EPS * torch.eye(dim, dtype=rows.dtype, device=rows.device)


def text_anchors(means: Tensor, counts: Tensor, text: Tensor) -> Tensor:
    """Where the texts say that the class means are: a ridge map from texts to means, fitted on all classes.

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
    weight = rows / (rows + _TRUSTED_AT)  # (K,)
    share = weight / weight.sum()
    text = text.to(means.dtype) - share @ text.to(means.dtype)
    center = share @ means
    gram = text @ text.T  # (K, K)
    ridge = (share @ gram.diagonal()).clamp(min=_EPS)
    # both sides multiplied by sqrt(w): a class without rows has weight 0, whose inverse there is none of
    root = weight.sqrt()
    inner = root.unsqueeze(1) * gram * root + ridge * torch.eye(len(root), dtype=means.dtype, device=means.device)
    solved = torch.linalg.solve(inner, root.unsqueeze(1) * (means - center))
    return center + (gram * root) @ solved


def anchored(means: Tensor, counts: Tensor, anchors: Tensor, kappa: float) -> Tensor:
    """(n_k mu_k + kappa a_k) / (n_k + kappa): kappa rows' worth of trust in the anchors (K, D)."""
    own = counts.to(means.dtype).unsqueeze(1)
    return (own * means + kappa * anchors) / (own + kappa).clamp(min=_EPS)


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
    """How a head is trained on samples; numbers of SLCA's released code but for `lr`, which its linear head has 0.01.

    Attributes:
        epochs: passes, each of `per_class` samples of every class.
        per_class: samples of a class in an epoch, and rows of a mini-batch.
        lr: peak learning rate of SGD, half a cosine to zero. momentum: of SGD.
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

    The loss is CE(z / (tau |z|), k), z the cosines (SLCA's normalised logits). The C heads of a trial are given the
    same noise, so that they differ by their means alone.

    Args:
        heads: C heads for each of T trials (T, C, K, D), of any length.
        means: (T, C, K, D).
        covariance: (T, D, D).
        seeds: (T,).
        sampling: the schedule.

    Yields:
        Steps done and the heads (T, C, K, D) as they are.
    """
    trials, candidates, classes, dim = heads.shape
    factor = torch.linalg.cholesky(covariance.double()).to(heads.dtype)
    weights = normalize(heads).flatten(0, 1).requires_grad_(True)  # (T C, K, D)
    velocity = {"heads": torch.zeros_like(weights)}
    rate, momentum, decay = (weights.new_full((len(weights),), v) for v in (sampling.lr, sampling.momentum, 0.0))
    for step in range(sampling.steps(classes)):
        labels = _labels(step, sampling.per_class, classes, heads.device)
        noise = normals(seeds, step, Purpose.SAMPLES, sampling.per_class * dim).view(trials, -1, dim)  # (T, B, D)
        rows = (noise @ factor.transpose(1, 2)).unsqueeze(1) + means[:, :, labels]  # (T, C, B, D)
        _alignment_loss(weights, rows.flatten(0, 1), labels, sampling.temperature).sum().backward()
        scheduled = rate * cosine_rate(step, sampling.steps(classes))
        sgd_step({"heads": weights}, velocity, scheduled, momentum, decay)
        yield step + 1, weights.detach().view(trials, candidates, classes, dim)


def _labels(step: int, size: int, classes: int, device: torch.device) -> Tensor:
    """Classes of a mini-batch (B,): going round, each comes as often as any other over K mini-batches."""
    return (torch.arange(size, device=device) + step * size) % classes


def _alignment_loss(weights: Tensor, rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """CE(z / (tau |z|), k) of rows (T, B, D), mean over rows (T,); their length cancels."""
    logits = rows @ normalize(weights).transpose(1, 2)  # (T, B, K)
    log_probability = torch.log_softmax(normalize(logits) / temperature, -1)
    return -log_probability.gather(2, labels.view(1, -1, 1).expand(len(weights), -1, 1)).mean((1, 2))
