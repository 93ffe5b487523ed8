from __future__ import annotations

import math

import pytest
import torch

from tests.methods.slow import best, cross_entropy, logits_of, mean, softmax
from ulfine_fast.ops.prototypes import normalize


def two_heads(world, **values):
    """CCL's world with heads apart and both distributions on the way; batches of 6 + 8."""
    trials, method, state, batch = world(method="ccl", batch_labeled=6, batch_unlabeled=8, **values)
    for name in ("linear", "balanced"):
        state.parameters[name] = normalize(trials.prototypes + 0.4 * torch.randn(2, 3, 5))
    state.memory["hidden"] = torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 2.0]])
    state.memory["all"] = torch.tensor([[6.0, 3.0, 1.0], [2.0, 1.0, 1.0]])
    return trials, method, state, batch


def slow_probabilities(trials, state, batch, t, tau):
    """Probabilities of the averaged heads for each unlabelled image of a trial."""
    hidden, counted = (state.memory[name][t].tolist() for name in ("hidden", "all"))
    prior = trials.log_prior[t].exp().tolist()
    learned = [6 / 14 * p + 8 / 14 * a / sum(counted) for p, a in zip(prior, counted, strict=True)]
    shift = [(1 + tau / 2) * math.log(h / sum(hidden)) - math.log(q) for h, q in zip(hidden, learned, strict=True)]
    plain, balanced = (logits_of(batch.weak[t], state.parameters[name][t]) for name in ("linear", "balanced"))
    return [
        softmax([(a + s) / 2 + b / 2 for a, b, s in zip(one, other, shift, strict=True)])
        for one, other in zip(plain, balanced, strict=True)
    ]


def test_both_heads_are_taught_by_their_adjusted_mean(world):
    trials, method, state, batch = two_heads(world, tau=1.2, threshold=0.8, lambda_u=0.6)
    losses, kinds = method.losses(trials, state, batch), set()
    for t in range(2):
        heads, labels = [state.parameters[name][t] for name in ("linear", "balanced")], batch.labels[t].tolist()
        labeled_logits = [logits_of(batch.labeled[t], head) for head in heads]
        shift = [1.2 * p for p in trials.log_prior[t].tolist()]
        labeled = mean(cross_entropy(row, y) for row, y in zip(labeled_logits[0], labels, strict=True))
        labeled += mean(cross_entropy(row, y, shift) for row, y in zip(labeled_logits[1], labels, strict=True))
        assert losses.labeled[t].item() == pytest.approx(labeled, rel=1e-4)
        counted = state.memory["all"][t].tolist()
        shift, total = [1.2 * math.log(a / sum(counted)) for a in counted], 0.0
        strong = [logits_of(batch.strong[t], head) for head in heads]
        for i, row in enumerate(slow_probabilities(trials, state, batch, t, 1.2)):
            sure, k = best(row)
            kinds.add(sure >= 0.8)
            if sure >= 0.8:
                total += cross_entropy(strong[0][i], k) + cross_entropy(strong[1][i], k, shift)
        assert losses.unlabeled[t].item() == pytest.approx(0.6 * total / 8, rel=1e-4)
    assert kinds == {True, False}


def test_both_distributions_move_by_confident_pseudo_labels(world):
    trials, method, state, batch = two_heads(world, tau=1.0, threshold=0.8, rho=0.75)
    before = {name: value.clone() for name, value in state.memory.items()}
    rows = [slow_probabilities(trials, state, batch, t, 1.0) for t in range(2)]
    method.after_step(trials, state, batch, method.losses(trials, state, batch))
    for t in range(2):
        for k in range(3):
            counts = sum(p[k] for p in rows[t] if max(p) >= 0.8)
            for name, old in before.items():
                wanted = 0.75 * old[t, k].item() + 0.25 * counts
                assert state.memory[name][t, k].item() == pytest.approx(wanted, rel=1e-4)


def test_with_balanced_labels_it_starts_as_two_fixmatches(world):
    trials, method, _, batch = world(method="ccl")
    trials.log_prior.fill_(torch.tensor(1 / 3).log().item())
    state = method.start(trials)
    plain, other, start, _ = world(method="fixmatch")
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    torch.testing.assert_close(result.labeled, 2 * wanted.labeled)
    torch.testing.assert_close(result.unlabeled, 2 * wanted.unlabeled)


def test_the_balanced_head_predicts(world):
    trials, method, state, batch = two_heads(world)
    wanted = 8.0 * batch.weak @ state.parameters["balanced"].transpose(1, 2)
    torch.testing.assert_close(method.logits(trials, state.tensors, batch.weak), wanted)
