from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.methods.conftest import pool_of
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import readable

T, K = 2, 3
COUNTS = [[4, 2, 1], [1, 0, 3]]


def counted(world, method, **values):
    """Two trials whose labelled images have the counts above, the head moved away from the text."""
    trials, chosen, state, batch = world(method=method, **values)
    labels = [[k for k, n in enumerate(counts) for _ in range(n)] for counts in COUNTS]
    labels = [[*row, *[-1] * (7 - len(row))] for row in labels]
    pool = pool_of(torch.randn(8, 5), [list(range(7))] * T, labels, [[0]] * T, [[False]] * T)
    if chosen.uses_pool:
        chosen.refresh(trials, state, pool, 0)
    state.parameters["linear"].add_(0.3 * torch.randn(T, K, 5))
    return trials, chosen, state, batch


def slow_loss(trials, state, batch, t, shift, margins, weights):
    """Weighted mean over rows of -log softmax, with shifts on all logits and a margin on the label's."""
    total = norm = 0.0
    for row, label in zip(batch.labeled[t], batch.labels[t].tolist(), strict=True):
        logits = []
        for k in range(K):
            cosine = torch.nn.functional.cosine_similarity(row, state.parameters["linear"][t, k], dim=0).item()
            logits.append(8.0 * (cosine - (margins[k] if k == label else 0.0)) + shift[k])
        total += weights[label] * (math.log(sum(math.exp(z) for z in logits)) - logits[label])
        norm += weights[label]
    return total / norm


def effective(counts, beta):
    return [(1 - beta) / (1 - beta ** max(1, n)) for n in counts]


@pytest.mark.parametrize("method", ["cross_entropy", "balanced_softmax", "class_balanced", "ldam"])
@pytest.mark.parametrize("late", [False, True])
def test_losses_row_by_row(world, method, late):
    values = {"effective_beta": 0.9, "largest_margin": 0.4, "reweight_after": 0.5, "steps": 10}
    trials, chosen, state, batch = counted(world, method, **readable(method, values))
    with pytest.raises(InputError, match=f"method {method} does not read tau"):
        dataclasses.replace(trials.config, tau=7.0)
    if method == "ldam":
        state.scratch["steps"].fill_(5.0 if late else 4.0)
    losses = chosen.losses(trials, state, batch)
    for t, counts in enumerate(COUNTS):
        shift = trials.log_prior[t].tolist() if method == "balanced_softmax" else [0.0] * K
        margins = [0.4 * max(1, n) ** -0.25 for n in counts] if method == "ldam" else [0.0] * K
        weighted = method == "class_balanced" or (method == "ldam" and late)
        weights = effective(counts, 0.9) if weighted else [1.0] * K
        wanted = slow_loss(trials, state, batch, t, shift, margins, weights)
        assert losses.labeled[t].item() == pytest.approx(wanted, rel=1e-4)
        assert losses.unlabeled[t] == losses.regularizer[t] == 0


def test_balanced_softmax_is_the_linear_probe_at_tau_one(world):
    trials, chosen, state, batch = counted(world, "balanced_softmax")
    own, probe, _, _ = world(method="linear_probe", tau=1.0)
    torch.testing.assert_close(chosen.losses(trials, state, batch).labeled, probe.losses(own, state, batch).labeled)


def test_ldam_counts_steps(world):
    trials, chosen, state, batch = counted(world, "ldam", reweight_after=0.5, steps=4)
    plain = chosen.weights(trials, state)
    for _ in range(2):
        assert torch.equal(chosen.weights(trials, state), plain)
        chosen.after_step(trials, state, batch, chosen.losses(trials, state, batch))
    assert not torch.equal(chosen.weights(trials, state), plain)


@pytest.mark.parametrize("method", ["cross_entropy", "balanced_softmax", "class_balanced", "ldam"])
def test_it_starts_as_the_text_and_takes_no_unlabelled_images(world, method):
    trials, chosen, state, _ = world(method=method, adapter="residual")
    assert set(state.parameters) == {"linear"}
    assert torch.equal(state.parameters["linear"], trials.prototypes)
    assert not chosen.uses_unlabeled
