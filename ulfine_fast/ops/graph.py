"""Graphs of nearest neighbours over a trials axis, and the linear systems that label propagation solves on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CELLS = 1 << 24  # similarities held at once: 64 MB of float32
_EPS = 1e-30


class Neighbors(NamedTuple):
    """Nearest keys of rows.

    Attributes:
        indices: their positions among the keys, int64 (T, B, k).
        weight: their cosines in [0, 1] (T, B, k); 0 marks what is no neighbour: a negative cosine, or too few keys.
    """

    indices: Tensor
    weight: Tensor


def nearest(rows: Tensor, keys: Tensor, present: Tensor, count: int, *, skip_self: bool = False) -> Neighbors:
    """The nearest keys of each row by cosine.

    Args:
        rows: unit rows (T, B, D).
        keys: unit rows (T, M, D).
        present: bool (T, M), False for keys that are padding.
        count: k, how many are wanted; all M where there are fewer.
        skip_self: rows and keys are the same images, and an image is no neighbour of itself.

    Returns:
        Neighbours (T, B, min(k, M)), nearest first.
    """
    # the whole matrix of cosines would not fit for a hundred thousand images
    block = max(1, _CELLS // max(1, len(keys) * keys.shape[1]))
    blocks = []
    for start in range(0, rows.shape[1], block):
        cosine = rows[:, start : start + block] @ keys.transpose(1, 2)  # (T, b, M)
        cosine.masked_fill_(~present.unsqueeze(1), -torch.inf)
        if skip_self:
            cosine.diagonal(offset=start, dim1=1, dim2=2).fill_(-torch.inf)
        blocks.append(cosine.topk(min(count, keys.shape[1]), dim=-1))
    weight = torch.cat([top.values for top in blocks], 1).clamp(min=0)
    return Neighbors(torch.cat([top.indices for top in blocks], 1), weight)


def symmetric(neighbors: Neighbors, nodes: int) -> Tensor:
    """W + W^T of a graph in which row i of T x B is node i of its trial.

    Args:
        neighbors: edges of the first B nodes (T, B, k), weights of padding already 0.
        nodes: how many nodes n >= B each trial has.

    Returns:
        One sparse matrix (T n, T n) with a block for each trial: trials share no edge.
    """
    trials, rows, count = neighbors.indices.shape
    # block-diagonal, because sparse matrices have no batches
    first = torch.arange(trials, device=neighbors.indices.device).view(-1, 1, 1) * nodes
    source = (first + torch.arange(rows, device=first.device).view(1, -1, 1)).expand(-1, -1, count).flatten()
    target = (first + neighbors.indices).flatten()
    weight = neighbors.weight.flatten()
    edges = torch.stack([torch.cat([source, target]), torch.cat([target, source])])  # (2, 2 T B k)
    # coalescing adds the two directions of an edge up
    return torch.sparse_coo_tensor(
        edges, torch.cat([weight, weight]), (trials * nodes,) * 2, check_invariants=False
    ).coalesce()


def normalized(graph: Tensor) -> Tensor:
    """D^-1/2 W D^-1/2 of a symmetric sparse W; its eigenvalues are in [-1, 1], a node without edges has a zero row."""
    degree = torch.sparse.sum(graph, dim=1).to_dense()
    root = torch.where(degree > 0, degree.clamp(min=_EPS).rsqrt(), torch.zeros_like(degree))
    source, target = graph.indices()
    weights = graph.values() * root[source] * root[target]
    return torch.sparse_coo_tensor(graph.indices(), weights, graph.shape, check_invariants=False).coalesce()


def spread(graph: Tensor, values: Tensor) -> Tensor:
    """W z for a graph of :func:`symmetric` and values (T, n, K): the weighted sum over each node's neighbours."""
    summed: Tensor = torch.sparse.mm(graph, values.flatten(0, 1))
    return summed.view_as(values)


def propagate(graph: Tensor, sources: Tensor, alpha: Tensor, rounds: int = 50) -> Tensor:
    """Label propagation: z of (I - alpha S) z = y, by conjugate gradients for all trials and classes together.

    Closed form of Zhou et al., "Learning with local and global consistency" (2004), up to its factor 1 - alpha; solved
    as in ZLaP (arXiv 2404.04072).

    Args:
        graph: S as :func:`normalized` gives it (T n, T n).
        sources: y (T, n, K).
        alpha: how far labels travel, in [0, 1), shape (T,).
        rounds: of conjugate gradients; 50 leave an error below float32's at alpha <= 0.9.

    Returns:
        z (T, n, K), non-negative up to rounding where the sources are.
    """
    strength = alpha.view(-1, 1, 1)
    solution = torch.zeros_like(sources)
    residual = sources.clone()
    direction = residual.clone()
    size = residual.square().sum(1, keepdim=True)  # (T, 1, K)
    for _ in range(rounds):
        product = direction - strength * spread(graph, direction)
        # both go to zero where a column is solved: the quotient must be 0, not NaN
        pace = size / ((direction * product).sum(1, keepdim=True) + _EPS)
        solution = solution + pace * direction
        residual = residual - pace * product
        new_size = residual.square().sum(1, keepdim=True)
        direction = residual + new_size / (size + _EPS) * direction
        size = new_size
    return solution
