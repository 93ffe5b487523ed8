from __future__ import annotations

import pytest
import torch

from tests.methods.pools import K, clustered, plan_of, rows_of, slow_sinkhorn
from ulfine_fast.methods import otfusion


def slow_fusion(trials, pool, t, prior, weight, rounds):
    """The plan and the sources' weights of one trial, step by step."""
    labeled, labels, unlabeled = rows_of(pool, t)
    texts = trials.prototypes[t].double()
    rows = torch.cat([labeled, unlabeled])
    known = torch.eye(K).double()[labels]
    text = torch.softmax(8.0 * rows @ texts.T, -1)

    def fitted(z, before):
        means = before.clone()
        for k in range(K):
            if z[:, k].sum() > 0:
                means[k] = (z[:, k : k + 1] * rows).sum(0) / z[:, k].sum()
        spread = sum(z[i, k] * (rows[i] - means[k]).square() for i in range(len(rows)) for k in range(K))
        return means, spread / z.sum()

    def posterior(means, variance):
        distance = ((rows.unsqueeze(1) - means).square() / variance).sum(-1)
        return torch.softmax(-0.5 * distance / 10, -1)

    # labelled images, and zero-shot assignments for classes without any
    start = torch.cat([known, text[len(labels) :] * (known.sum(0) == 0)])
    means, variance = fitted(start, texts)
    a = torch.ones(2).double()

    def transported():
        scores = (a[0] * text + a[1] * posterior(means, variance))[len(labels) :] / 0.1
        return slow_sinkhorn(scores, prior, 10)

    for _ in range(rounds):
        plan = transported()
        classes = torch.cat([torch.tensor(labels), plan.argmax(-1)])
        sources = (text, posterior(means, variance))
        hits = torch.stack([(source.argmax(-1) == classes).double().sum() for source in sources])
        a = hits / hits.mean()
        means, variance = fitted(torch.cat([weight * known, plan]), means)
    return transported(), a


@pytest.mark.parametrize(("plan_prior", "weight"), [("uniform", 10.0), ("labeled", 1.0)])
def test_plan_mixture_and_weights_follow_one_another(monkeypatch, plan_prior, weight):
    monkeypatch.setattr(otfusion, "_ROUNDS", 3)
    trials, method, state, pool = clustered("otfusion", plan_prior=plan_prior, labeled_weight=weight)
    plan = plan_of(trials, method, state, pool)
    for t in range(2):
        prior = torch.full((K,), 1 / K).double()
        if plan_prior == "labeled":
            prior = torch.tensor([[0.5, 0.25, 0.25], [1 / 9, 4 / 9, 4 / 9]][t]).double()
        wanted, weights = slow_fusion(trials, pool, t, prior, weight, 3)
        torch.testing.assert_close(state.memory["sources"][t].double(), weights)
        torch.testing.assert_close(plan[t, : len(wanted)].double(), wanted, rtol=1e-3, atol=1e-4)


def test_without_the_mixture_it_is_the_plan_of_the_text():
    trials, method, state, pool = clustered("otfusion", mixture_weight=0.0)
    plan = plan_of(trials, method, state, pool)
    for t in range(2):
        _, _, unlabeled = rows_of(pool, t)
        text = torch.softmax(8.0 * unlabeled @ trials.prototypes[t].double().T, -1)
        scores = float(state.memory["sources"][t, 0]) * text / 0.1
        wanted = slow_sinkhorn(scores, torch.full((K,), 1 / K).double(), 10)
        torch.testing.assert_close(plan[t, : len(wanted)].double(), wanted, rtol=1e-3, atol=1e-5)


def test_a_text_that_is_wrong_loses_its_weight():
    trials, method, _, pool = clustered("otfusion", noise=0.1)
    # each text is that of the next class
    trials.prototypes[:] = trials.prototypes[:, [1, 2, 0]]
    state = method.start(trials)
    method.refresh(trials, state, pool, 0)
    assert (state.memory["sources"][0, 0] < state.memory["sources"][0, 1]).item()


def test_new_images_are_judged_without_the_plans_prior():
    trials, method, state, pool = clustered("otfusion", plan_prior="labeled")
    difference = method.pseudo_logits(trials, state.tensors, pool.unlabeled) - method.logits(
        trials, state.tensors, pool.unlabeled
    )
    torch.testing.assert_close(torch.softmax(difference[0, 0], -1), torch.tensor([0.5, 0.25, 0.25]))


def test_a_second_refresh_starts_anew():
    trials, method, state, pool = clustered("otfusion")
    first = plan_of(trials, method, state, pool)
    method.refresh(trials, state, pool, 0)
    torch.testing.assert_close(plan_of(trials, method, state, pool), first)
