"""Clusters of images that probably show the same class, so that a page of them takes one answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ulfine_fast.data.splits import Rows
from ulfine_fast.methods.registry import method_of
from ulfine_fast.runs.run import Run

_IMAGES = 60  # of a k-means cluster, on average: two pages
_MOST = 300  # clusters of k-means
_LEAST_POINTS = 2  # images a cluster; of fewer, faiss refuses
_ROUNDS = 15
_TOGETHER = 16384  # rows assigned together


@dataclass(frozen=True)
class Clusters:
    """Clusters of the rows of a cache.

    Attributes:
        number: cluster of each row (n,).
        typical: how typical of its cluster a row is, more is more (n,).
        count: number of clusters.
        of_classes: whether cluster k is that of class k, as of a run of `ulfine_plus`; else they come from k-means.
    """

    number: Rows
    typical: NDArray[np.float32]
    count: int
    of_classes: bool


def find_clusters(run: Run, inputs: NDArray[np.generic], features: NDArray[np.generic]) -> Clusters:
    """The clusters that a run has fitted, or else those of spherical k-means.

    Args:
        run: with "centers" among its tensors where its method clusters.
        inputs: what the run's head reads, features (n, D) or tokens.
        features: (n, D).
    """
    if "centers" in run.tensors:
        return _class_clusters(run, inputs)
    return _kmeans(features, len(run.class_names))


def _class_clusters(run: Run, inputs: NDArray[np.generic]) -> Clusters:
    """Each row in the class of its pseudo-label."""
    head = run.head()
    method = method_of(run.config)
    number = np.empty(len(inputs), dtype=np.int64)
    typical = np.empty(len(inputs), dtype=np.float32)
    for first in range(0, len(inputs), _TOGETHER):
        part = slice(first, first + _TOGETHER)
        rows = head.rows(torch.from_numpy(np.asarray(inputs[part], dtype=np.float32)))
        with torch.no_grad():
            logits = method.pseudo_logits(head.trials, head.tensors, rows.unsqueeze(0))[0]
        confidence, likeliest = torch.softmax(logits, -1).max(-1)
        number[part] = likeliest.numpy()
        typical[part] = confidence.numpy()
    return Clusters(number, typical, len(run.class_names), of_classes=True)


def _kmeans(features: NDArray[np.generic], classes: int) -> Clusters:
    # loaded on use: it takes a while, and a run of ulfine_plus does without
    import faiss

    rows = np.ascontiguousarray(features, dtype=np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    count = int(np.clip(len(rows) // _IMAGES, min(classes, len(rows) // _LEAST_POINTS), _MOST))
    kmeans = faiss.Kmeans(
        rows.shape[1], max(1, count), niter=_ROUNDS, spherical=True, seed=0, min_points_per_centroid=1
    )
    kmeans.train(rows)
    cosines, number = kmeans.index.search(rows, 1)
    return Clusters(number[:, 0].astype(np.int64), cosines[:, 0], max(1, count), of_classes=False)
