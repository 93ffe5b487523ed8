"""Two trials over clustered images, the second with padding in both roles, for methods that read the pool."""

from __future__ import annotations

import torch

from tests.methods.conftest import pool_of, trials_of
from ulfine_fast.config import FitConfig
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.margins import class_counts
from ulfine_fast.ops.prototypes import normalize

K, D = 3, 6
LABELED = [[0, 1, 2, 3], [4, 5, 0, 0]]
LABELS = [[0, 1, 2, 0], [1, 2, -1, -1]]
UNLABELED = [list(range(6, 16)), [*range(16, 24), 0, 0]]
PRESENT = [[True] * 10, [True] * 8 + [False] * 2]


def clustered(method, count=2, noise=0.3, present=None, labels=None, **values):
    """Trials, method, its first state and the pool.

    The second trial has no label of class 0. `present` and `labels` replace those of both trials.
    """
    torch.manual_seed(3)
    config = FitConfig(**{"method": method, "scale": 8.0, **values})
    centers = normalize(torch.randn(K, D))
    features = normalize(centers[torch.arange(30) % K] + noise * torch.randn(30, D))
    labels = LABELS if labels is None else labels
    pool = pool_of(
        features, LABELED[:count], labels[:count], UNLABELED[:count], (PRESENT if present is None else present)[:count]
    )
    counts = class_counts(pool.labels, K)
    log_prior = torch.log((counts / counts.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-8))
    trials = trials_of(config, normalize(centers + 0.8 * torch.randn(K, D)).repeat(count, 1, 1), log_prior)
    chosen = method_of(config)
    state = chosen.start(trials)
    chosen.refresh(trials, state, pool, 0)
    return trials, chosen, state, pool


def rows_of(pool, t):
    """Labelled rows, their classes, and unlabelled rows of one trial, in double."""
    known = pool.labels[t] >= 0
    return pool.labeled[t][known].double(), pool.labels[t][known].tolist(), pool.unlabeled[t][pool.present[t]].double()


def slow_sinkhorn(scores, prior, rounds):
    """The plan (n, K) of entropic transport by scaling columns and rows one after the other, rows of sum one."""
    plan = torch.exp(scores - scores.amax(1, keepdim=True))
    plan = plan / plan.sum(1, keepdim=True)
    for _ in range(rounds):
        plan = plan * (len(plan) * prior / plan.sum(0))
        plan = plan / plan.sum(1, keepdim=True)
    return plan


def plan_of(trials, method, state, pool):
    """Probabilities (T, N, K) that the method gives the pool's unlabelled images."""
    return torch.softmax(method.pseudo_logits(trials, state.tensors, pool.unlabeled), -1)
