"""Formulas written out row by row, for comparison."""

from __future__ import annotations

import math


def logits_of(features, weights, scale=8.0):
    """Scaled cosines of rows and class vectors, both of unit length."""
    return [
        [scale * sum(a * b for a, b in zip(x, w, strict=True)) for w in weights.tolist()] for x in features.tolist()
    ]


def softmax(row):
    largest = max(row)
    total = sum(math.exp(z - largest) for z in row)
    return [math.exp(z - largest) / total for z in row]


def log_softmax(row):
    return [math.log(p) for p in softmax(row)]


def cross_entropy(row, target, shift=None):
    """Of one row of logits, to a class or to probabilities, with a shift of the logits."""
    shifted = [z + (shift[k] if shift is not None else 0.0) for k, z in enumerate(row)]
    targets = [float(k == target) for k in range(len(row))] if isinstance(target, int) else target
    return -sum(p * math.log(q) for p, q in zip(targets, softmax(shifted), strict=True))


def best(row):
    """The largest entry and where it is."""
    return max(row), row.index(max(row))


def mean(values):
    values = list(values)
    return sum(values) / len(values)
