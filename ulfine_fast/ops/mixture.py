"""Classes as clusters of all images, in a metric that forgets what views change.

Rows are compared by their cosine after whitening with the scatter inside classes, as in linear discriminant analysis,
to which the scatter between views of one image is added: directions in which augmentation moves an image say
nothing of its class. The within-class scatter is the whole one minus K class means' worth, so its inverse is the
identity plus a product of at most K vectors (Woodbury's identity). The metric is applied to the classes, never to the
rows: a row costs D K for its length and D K for its cosines, and no D D. C candidates share the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.ops.philox import Purpose, normals

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

    def linear(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Linear functions of plain rows as functions of whitened ones: weights (T, J, K, D) give weights and offsets.

        Returns:
            Weights (T, J, K, D), and offsets (T, J, K) to add to their products.
        """
        solved = torch.linalg.solve_triangular(self.map.unsqueeze(1), weights.transpose(-1, -2), upper=True)
        return solved.transpose(-1, -2), (weights @ self.mean.transpose(1, 2).unsqueeze(1)).squeeze(-1)


@dataclass(frozen=True)
class Metric:
    """I + F^T F, the inverse of a whitened within-class scatter.

    Attributes:
        factors: F (T, C, R, D), R at most D and at most K.
    """

    factors: Tensor

    @classmethod
    def flat(cls, candidates: int, like: Tensor) -> Metric:
        """The identity, for tensors (T, ..., D)."""
        return cls(like.new_zeros(like.shape[0], candidates, 0, like.shape[-1]))

    @classmethod
    def within(cls, sums: Tensor, mass: Tensor, total: Tensor) -> Metric:
        """From class sums (T, C, K, D) of whitened rows, their weights (T, C, K) and all rows' weight (T,).

        The scatter inside classes is I - A^T A with the scaled class means A, and its inverse
        I + A^T (I - A A^T)^-1 A.
        """
        means = sums * torch.rsqrt(mass * total.view(-1, 1, 1) + _EPS).unsqueeze(-1)
        if means.shape[2] > means.shape[3]:
            # more classes than dimensions: a square matrix has the same scatter
            means = torch.linalg.qr(means, mode="r").R
        gram = means @ means.transpose(-1, -2)  # (T, C, R, R)
        identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        # the scatter between classes is at most the whole one; rounding must not make it more
        return cls(inverse_root(identity - 0.999 * gram) @ means)

    def times(self, vectors: Tensor) -> Tensor:
        """Vectors (T, C, K, D) times the matrix: their inner products with plain rows are those of the metric."""
        return vectors + (vectors @ self.factors.transpose(-1, -2)) @ self.factors

    def unit(self, vectors: Tensor) -> Tensor:
        """Vectors (T, C, K, D) at length one; a zero vector stays zero."""
        squared = vectors.square().sum(-1) + (vectors @ self.factors.transpose(-1, -2)).square().sum(-1)
        return vectors * torch.rsqrt(squared.clamp(min=_EPS)).unsqueeze(-1)

    def inverse_lengths(self, rows: Tensor) -> Tensor:
        """1 / length of rows (T, n, D) for each candidate (T, n, C)."""
        # norms read the rows once, and what is left has no dimension of theirs
        own, more = (torch.linalg.vector_norm(x, dim=-1).square() for x in (rows, products(rows, self.factors)))
        return torch.rsqrt((own.unsqueeze(-1) + more).clamp(min=_EPS))


def products(rows: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of rows (T, n, D) with vectors (T, C, K, D), as one matrix product: (T, n, C, K)."""
    flat = rows @ vectors.flatten(1, 2).transpose(1, 2)
    return flat.unflatten(-1, vectors.shape[1:3])


def sums(weights: Tensor, rows: Tensor) -> Tensor:
    """Weighted class sums: weights (T, n, C, K) and rows (T, n, D) give (T, C, K, D)."""
    flat = weights.flatten(2).transpose(1, 2) @ rows
    return flat.unflatten(1, weights.shape[2:])


@dataclass(frozen=True)
class Scatter:
    """Mean and scatter of rows that come part by part.

    Attributes:
        count: rows (T,).
        mean: theirs (T, 1, D).
        covariance: around the mean (T, D, D).
    """

    count: Tensor
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, parts: Iterable[tuple[Tensor, Tensor]]) -> Scatter:
        """From parts, at least one, each of rows (T, n, D) and which of them are present (T, n)."""
        shift: Tensor | None = None
        count = total = outer = torch.zeros(())
        for rows, present in parts:
            part_count = present.sum(1).to(rows.dtype)
            kept = present.unsqueeze(-1)
            if shift is None:
                # a point near the mean: far from the origin, float32 loses the scatter in the rows' length
                shift = (rows * kept).sum(1, keepdim=True) / part_count.clamp(min=1).view(-1, 1, 1)
            moved = (rows - shift) * kept
            count = count + part_count
            total = total + moved.sum(1, keepdim=True)
            outer = outer + moved.transpose(1, 2) @ moved
        assert shift is not None, "at least one part"
        divisor = count.clamp(min=1).view(-1, 1, 1)
        offset = total / divisor
        return cls(count, shift + offset, outer / divisor - offset.transpose(1, 2) @ offset)


def view_scatter(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Scatter (T, D, D) of views around their image's mean; parts are views (T, n, V, D) and presence (T, n)."""
    spread = (
        ((views - views.mean(2, keepdim=True)).flatten(1, 2), present.repeat_interleave(views.shape[2], dim=1))
        for views, present in parts
    )
    return Scatter.of(spread).covariance


def whitening(scatter: Scatter, nuisance: Tensor | None, shrinkage: Tensor, weight: Tensor) -> Whitening:
    """Whiten by the rows' scatter, `shrinkage` of it spread evenly over all directions, and `weight` of the nuisance.

    Args:
        scatter: of the rows.
        nuisance: scatter between views (T, D, D), scaled here to the rows' trace; None without views.
        shrinkage: in units of the mean eigenvalue, at least 0, shape (T,).
        weight: of the nuisance, at least 0, shape (T,).
    """
    covariance = scatter.covariance
    trace = _trace(covariance)
    dim = covariance.shape[-1]
    identity = torch.eye(dim, device=covariance.device, dtype=covariance.dtype)
    # a floor under the shrinkage: fewer rows than dimensions leave directions without any scatter
    covariance = covariance + (shrinkage.view(-1, 1, 1).clamp(min=1e-4) * trace / dim + _EPS) * identity
    if nuisance is not None:
        covariance = covariance + weight.view(-1, 1, 1) * trace * nuisance / (_trace(nuisance) + _EPS)
    return Whitening(scatter.mean, inverse_root(covariance).transpose(1, 2))


def leading_directions(covariance: Tensor, count: int, rounds: int = 6) -> Tensor:
    """Orthonormal directions of the largest scatter, by subspace iteration from fixed random directions.

    Args:
        covariance: (T, D, D).
        count: R, at most D.
        rounds: products with the covariance; the span is close to the leading eigenvectors', not exact.

    Returns:
        Columns (T, D, R).
    """
    trials, dim = covariance.shape[:2]
    start = normals(torch.zeros(1, dtype=torch.int64, device=covariance.device), 0, Purpose.WEIGHTS, dim * count)
    directions = start.to(covariance.dtype).view(1, dim, count).expand(trials, -1, -1)
    for _ in range(rounds):
        directions = torch.linalg.qr(covariance @ directions).Q
    return directions


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
