from __future__ import annotations

import pytest
import torch

from tests.methods.pools import K, clustered, plan_of, rows_of, slow_sinkhorn
from ulfine_fast.ops.prototypes import normalize

SCALE = 20.0
NONE = [[False] * 10] * 2


def slow_supervised(trials, pool, t, text_weight=1.0):
    labeled, labels, _ = rows_of(pool, t)
    prototypes = text_weight * trials.prototypes[t].double()
    for k in range(K):
        members = [labeled[i] for i in range(len(labels)) if labels[i] == k]
        if members:
            prototypes[k] += SCALE * len(members) / (2 * len(labels)) * sum(members)
    return prototypes


def slow_solver(trials, pool, t, weight, text_weight):
    """Prototypes and plan of one trial, entry by entry."""
    _, labels, unlabeled = rows_of(pool, t)
    counts = [labels.count(k) for k in range(K)]
    least = min(n for n in counts if n)
    prior = torch.tensor([n if n else least / 4 for n in counts]).double()
    prior = prior / prior.sum()
    supervised = slow_supervised(trials, pool, t, text_weight)
    prototypes = supervised
    for _ in range(3):
        plan = slow_sinkhorn(SCALE * unlabeled @ normalize(prototypes).T, prior, 10)
        prototypes = supervised.clone()
        for k in range(K):
            prototypes[k] += weight * SCALE / len(unlabeled) * (plan[:, k : k + 1] * unlabeled).sum(0)
    return prototypes, slow_sinkhorn(SCALE * unlabeled @ normalize(prototypes).T, prior, 10)


@pytest.mark.parametrize(("weight", "text_weight"), [(1.0, 1.0), (0.3, 2.0)])
def test_rounds_of_plan_and_prototypes_follow_the_solver(weight, text_weight):
    trials, method, state, pool = clustered(
        "ss_text_u", plan_scale=SCALE, unlabeled_weight=weight, text_weight=text_weight
    )
    plan = plan_of(trials, method, state, pool)
    for t in range(2):
        prototypes, wanted = slow_solver(trials, pool, t, weight, text_weight)
        torch.testing.assert_close(state.memory["prototypes"][t].double(), prototypes, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plan[t, : len(wanted)].double(), wanted, rtol=1e-3, atol=1e-5)


def test_without_weight_of_unlabelled_images_it_is_ss_text():
    trials, _, state, pool = clustered("ss_text_u", plan_scale=SCALE, unlabeled_weight=0.0)
    for t in range(2):
        torch.testing.assert_close(state.memory["prototypes"][t].double(), slow_supervised(trials, pool, t))


def test_with_text_alone_it_is_zero_shot():
    trials, method, state, pool = clustered("ss_text_u", present=NONE, labels=[[-1] * 4] * 2)
    result = method.logits(trials, state.tensors, pool.unlabeled)
    torch.testing.assert_close(result, 8.0 * pool.unlabeled @ trials.prototypes.transpose(1, 2))
    assert torch.isfinite(method.pseudo_logits(trials, state.tensors, pool.unlabeled)).all()


def test_the_plan_has_the_labelled_frequencies():
    trials, method, state, pool = clustered("ss_text_u", plan_scale=5.0)
    plan = plan_of(trials, method, state, pool)
    torch.testing.assert_close(plan[0].mean(0), torch.tensor([0.5, 0.25, 0.25]), rtol=0, atol=5e-3)
    # a class without labels has a quarter of the rarest other one's
    torch.testing.assert_close(plan[1, :8].mean(0), torch.tensor([1, 4, 4]) / 9, rtol=0, atol=5e-3)
