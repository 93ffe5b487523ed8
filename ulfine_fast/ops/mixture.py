"""Classes as clusters of all images: expectation maximisation in a metric that forgets what views change.

Rows are compared by their cosine after whitening with the scatter inside classes, as in linear discriminant analysis,
to which the scatter between views of one image is added: directions in which augmentation moves an image say
nothing of its class. The within-class scatter is the whole one minus K class means' worth, so every round costs N D K
and no N D D (Woodbury's identity). S candidates, which differ in labels, anchor or prior, share the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = 1e-9


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) map: unit scatter over all images and views.

    Attributes:
        mean: (T, 1, D).
        map: (T, D, D).
    """

    mean: Tensor
    map: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (T, n, D) in the whitened space (T, n, D)."""
        return (rows - self.mean) @ self.map


@dataclass(frozen=True)
class Metric:
    """The inverse I + F G F^T of the whitened within-class scatter I - F F^T.

    Attributes:
        factors: F, scaled class means (T, S, K, D).
        core: G (T, S, K, K).
    """

    factors: Tensor
    core: Tensor

    @classmethod
    def flat(cls, candidates: int, like: Tensor, classes: int) -> Metric:
        """The identity metric for rows (T, n, D)."""
        trials, _, dim = like.shape
        core = torch.eye(classes, device=like.device, dtype=like.dtype).expand(trials, candidates, classes, classes)
        return cls(like.new_zeros(trials, candidates, classes, dim), core)

    @classmethod
    def within(cls, sums: Tensor, mass: Tensor, total: Tensor) -> Metric:
        """From class sums (T, S, K, D) of whitened rows, their weights (T, S, K) and all rows' weight (T,)."""
        factors = sums * torch.rsqrt(mass * total.view(-1, 1, 1) + _EPS).unsqueeze(-1)
        gram = factors @ factors.transpose(-1, -2)  # (T, S, K, K)
        identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        # the scatter between classes is at most the whole one; rounding must not make it more
        root = inverse_root(identity - 0.999 * gram)
        return cls(factors, root.transpose(-1, -2) @ root)


@dataclass(frozen=True)
class Rows:
    """Whitened rows as one metric sees them.

    Attributes:
        values: (T, n, D).
        shadow: their products with the metric's factors (T, n, S, K).
        inverse: 1 / length (T, n, S).
    """

    values: Tensor
    shadow: Tensor
    inverse: Tensor

    @classmethod
    def under(cls, values: Tensor, metric: Metric) -> Rows:
        """Measure rows (T, n, D)."""
        shadow = products(values, metric.factors)
        bent = bend(shadow, metric.core)
        squared = values.square().sum(-1).unsqueeze(-1) + (shadow * bent).sum(-1)
        return cls(values, shadow, torch.rsqrt(squared.clamp(min=_EPS)))


def bend(shadow: Tensor, core: Tensor) -> Tensor:
    """Each candidate's rows (T, n, S, K) times its matrix (T, S, K, K), shape (T, n, S, K)."""
    return (shadow.transpose(1, 2) @ core).transpose(1, 2)


def products(rows: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of rows (T, n, D) with vectors (T, S, K, D), as one matrix product: (T, n, S, K)."""
    flat = rows @ vectors.flatten(1, 2).transpose(1, 2)
    return flat.unflatten(-1, vectors.shape[1:3])


def sums(weights: Tensor, rows: Tensor) -> Tensor:
    """Weighted class sums: weights (T, n, S, K) and rows (T, n, D) give (T, S, K, D)."""
    flat = weights.flatten(2).transpose(1, 2) @ rows
    return flat.unflatten(1, weights.shape[2:])


def unit(vectors: Tensor, metric: Metric) -> Tensor:
    """Vectors (T, S, K, D) at length one under their candidate's metric; a zero vector stays zero."""
    shadow = vectors @ metric.factors.transpose(-1, -2)  # (T, S, K, K)
    squared = vectors.square().sum(-1) + ((shadow @ metric.core) * shadow).sum(-1)
    return vectors * torch.rsqrt(squared.clamp(min=_EPS)).unsqueeze(-1)


def cosines(rows: Rows, centers: Tensor, metric: Metric) -> Tensor:
    """Cosines (T, n, S, K) of rows and unit centers (T, S, K, D) under the metric."""
    shadow = centers @ metric.factors.transpose(-1, -2)  # (T, S, K, K)
    bent = bend(rows.shadow, metric.core @ shadow.transpose(-1, -2))
    return (products(rows.values, centers) + bent) * rows.inverse.unsqueeze(-1)


def view_scatter(views: Tensor, present: Tensor) -> Tensor:
    """Scatter (T, D, D) of views (T, N, V, D) around their image's mean, over the rows present (T, N)."""
    spread = (views - views.mean(2, keepdim=True)) * present[:, :, None, None]
    flat = spread.flatten(1, 2)  # (T, N V, D)
    return flat.transpose(1, 2) @ flat / (present.sum(1).clamp(min=1) * views.shape[2]).view(-1, 1, 1)


def whitening(rows: Tensor, present: Tensor, nuisance: Tensor | None, shrinkage: Tensor, weight: Tensor) -> Whitening:
    """Whiten by the rows' scatter, `shrinkage` of it spread evenly over all directions, and `weight` of the nuisance.

    Args:
        rows: (T, n, D).
        present: bool (T, n).
        nuisance: scatter between views (T, D, D), scaled here to the rows' trace; None without views.
        shrinkage: in units of the mean eigenvalue, at least 0, shape (T,).
        weight: of the nuisance, at least 0, shape (T,).
    """
    count = present.sum(1).clamp(min=1).view(-1, 1, 1).to(rows.dtype)
    mean = (rows * present.unsqueeze(-1)).sum(1, keepdim=True) / count
    centred = (rows - mean) * present.unsqueeze(-1)
    scatter = centred.transpose(1, 2) @ centred / count  # (T, D, D)
    trace = _trace(scatter)
    identity = torch.eye(rows.shape[-1], device=rows.device, dtype=rows.dtype)
    # a floor under the shrinkage: fewer rows than dimensions leave directions without any scatter
    scatter = scatter + (shrinkage.view(-1, 1, 1).clamp(min=1e-4) * trace / rows.shape[-1] + _EPS) * identity
    if nuisance is not None:
        scatter = scatter + weight.view(-1, 1, 1) * trace * nuisance / (_trace(nuisance) + _EPS)
    return Whitening(mean, inverse_root(scatter).transpose(1, 2))


def inverse_root(matrices: Tensor) -> Tensor:
    """L^-1 of positive definite matrices L L^T (..., D, D): a lower triangle R with R^T R their inverse.

    Not by `torch.linalg.inv`: once the number of threads has been set, its batched factorisation fails on processors
    with MKL. A trial whose matrix is not finite gets values that are not finite, and no error ends the others.
    """
    lower = torch.linalg.cholesky_ex(matrices).L
    identity = torch.eye(matrices.shape[-1], device=matrices.device, dtype=matrices.dtype)
    return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(-1).view(-1, 1, 1)
