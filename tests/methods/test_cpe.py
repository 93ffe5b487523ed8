from __future__ import annotations

import pytest
import torch

from tests.methods.slow import best, cross_entropy, logits_of, mean, softmax
from ulfine_fast.ops.prototypes import normalize

EXPERTS = ("linear", "balanced", "inverse")


def test_each_expert_is_fixmatch_with_its_own_adjustment(world):
    trials, method, state, batch = world(method="cpe", tau=1.5, threshold=0.8, lambda_u=0.6)
    for name in EXPERTS:
        state.parameters[name] = normalize(trials.prototypes + 0.4 * torch.randn(2, 3, 5))
    losses, kinds = method.losses(trials, state, batch), set()
    for t in range(2):
        prior, labels = trials.log_prior[t].tolist(), batch.labels[t].tolist()
        # of three classes each is a third; the rarest one's pseudo-labels train three times
        times = [1 + sorted(prior, reverse=True).index(p) for p in prior]
        labeled = unlabeled = 0.0
        for strength, name in enumerate(EXPERTS):
            head, shift = state.parameters[name][t], [1.5 * strength * p for p in prior]
            rows = logits_of(batch.labeled[t], head)
            labeled += mean(cross_entropy(row, y, shift) for row, y in zip(rows, labels, strict=True))
            total = weights = 0.0
            for easy, hard in zip(logits_of(batch.weak[t], head), logits_of(batch.strong[t], head), strict=True):
                sure, k = best(softmax(easy))
                kinds.add(sure >= 0.8)
                if sure >= 0.8:
                    total, weights = total + times[k] * cross_entropy(hard, k), weights + times[k]
            unlabeled += 0.6 * total / max(weights, 1)
        assert losses.labeled[t].item() == pytest.approx(labeled, rel=1e-4)
        assert losses.unlabeled[t].item() == pytest.approx(unlabeled, rel=1e-4)
    assert kinds == {True, False}


def test_where_nothing_is_sure_nothing_unlabelled_trains(world):
    trials, method, state, batch = world(method="cpe", threshold=1.0)
    assert method.losses(trials, state, batch).unlabeled.tolist() == [0, 0]


def test_without_adjustment_all_experts_stay_one(world):
    trials, method, state, batch = world(method="cpe", tau=0.0)
    plain, other, start, _ = world(method="fixmatch")
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    torch.testing.assert_close(result.labeled, 3 * wanted.labeled)
    for tensor in state.parameters.values():
        tensor.requires_grad_(True)
    losses = method.losses(trials, state, batch)
    (losses.labeled + losses.unlabeled).sum().backward()
    for name in EXPERTS[1:]:
        torch.testing.assert_close(state.parameters[name].grad, state.parameters["linear"].grad)


def test_the_second_expert_predicts(world):
    trials, method, state, batch = world(method="cpe")
    state.parameters["balanced"] = normalize(torch.randn(2, 3, 5))
    wanted = 8.0 * batch.weak @ state.parameters["balanced"].transpose(1, 2)
    torch.testing.assert_close(method.logits(trials, state.tensors, batch.weak), wanted)
