from __future__ import annotations

import pytest
import torch

from tests.methods.pools import D, K, clustered, plan_of, rows_of
from ulfine_fast.methods import stata


def slow_stata(trials, pool, t, alpha, weight, temperature, rounds):
    """Means, variances and assignments of one trial, class by class."""
    labeled, labels, unlabeled = rows_of(pool, t)
    texts = trials.prototypes[t].double()
    text = torch.log_softmax(8.0 * unlabeled @ texts.T, -1)
    z = text.exp()
    anchor = sum(z[i, k] * (unlabeled[i] - texts[k]).square().mean() for i in range(len(z)) for k in range(K)) / len(z)
    for _ in range(rounds):
        means, variances = torch.zeros(K, D).double(), torch.zeros(K, D).double()
        scores = text.clone()
        for k in range(K):
            members = [(z[i, k], unlabeled[i]) for i in range(len(z))]
            members += [(weight, labeled[i]) for i in range(len(labels)) if labels[i] == k]
            mass = sum(w for w, _ in members)
            share = mass / (mass + alpha)
            own_mean = sum(w * x for w, x in members) / mass
            means[k] = share * own_mean + (1 - share) * texts[k]
            own_variance = sum(w * (x - means[k]).square() for w, x in members) / mass
            variances[k] = share * own_variance + (1 - share) * (anchor + (texts[k] - means[k]).square())
            density = torch.distributions.Normal(means[k], variances[k].sqrt()).log_prob(unlabeled).sum(-1)
            scores[:, k] += density / temperature
        z = torch.softmax(scores, -1)
    return means, variances, z


@pytest.mark.parametrize(("alpha", "weight", "temperature"), [(1.0, 10.0, 10.0), (5.0, 1.0, 1.0)])
def test_gaussians_and_assignments_follow_the_objective(monkeypatch, alpha, weight, temperature):
    monkeypatch.setattr(stata, "_ROUNDS", 3)
    trials, method, state, pool = clustered(
        "stata", anchor_weight=alpha, labeled_weight=weight, likelihood_temperature=temperature
    )
    plan = plan_of(trials, method, state, pool)
    for t in range(2):
        means, variances, z = slow_stata(trials, pool, t, alpha, weight, temperature, 3)
        torch.testing.assert_close(state.memory["means"][t].double(), means, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state.memory["variance"][t].double(), variances, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(plan[t, : len(z)].double(), z, rtol=1e-3, atol=1e-4)


def test_the_update_maximises_likelihood_less_divergence_from_the_anchor():
    # the closed form of one class against gradient ascent on the objective itself
    torch.manual_seed(0)
    rows, text, anchor, alpha = torch.randn(7, 2).double(), torch.tensor([1.0, -1.0]).double(), 0.5, 3.0
    mean, log_variance = text.clone().requires_grad_(), torch.zeros(2).double().requires_grad_()
    optimiser = torch.optim.LBFGS([mean, log_variance], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def loss():
        optimiser.zero_grad()
        own = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        fixed = torch.distributions.Normal(text, torch.full_like(text, anchor**0.5))
        value = alpha * torch.distributions.kl_divergence(fixed, own).sum() - own.log_prob(rows).sum()
        value.backward()
        return value

    optimiser.step(loss)
    wanted_mean = (rows.sum(0) + alpha * text) / (len(rows) + alpha)
    spread = (rows - wanted_mean).square().sum(0) + alpha * (anchor + (text - wanted_mean).square())
    torch.testing.assert_close(mean.detach(), wanted_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_variance.detach().exp(), spread / (len(rows) + alpha), rtol=1e-5, atol=1e-6)


def test_an_infinite_anchor_is_zero_shot():
    trials, method, state, pool = clustered("stata", anchor_weight=1e9, likelihood_temperature=1.0)
    result = method.logits(trials, state.tensors, pool.unlabeled)
    cosines = pool.unlabeled @ trials.prototypes.transpose(1, 2)
    assert torch.equal(result.argsort(-1), cosines.argsort(-1))
    # and a finite one is not
    _, other, moved, _ = clustered("stata", anchor_weight=0.1, likelihood_temperature=1.0)
    assert not torch.equal(other.logits(trials, moved.tensors, pool.unlabeled).argsort(-1), cosines.argsort(-1))


def test_without_unlabelled_images_the_means_are_of_text_and_labels():
    trials, method, state, pool = clustered("stata", present=[[False] * 10] * 2, anchor_weight=2.0, labeled_weight=1.0)
    wanted = (pool.labeled[0, [0, 3]].sum(0) + 2 * trials.prototypes[0, 0]) / 4
    torch.testing.assert_close(state.memory["means"][0, 0], wanted)
    # a class without any image keeps its anchor
    torch.testing.assert_close(state.memory["means"][1, 0], trials.prototypes[1, 0])
    torch.testing.assert_close(state.memory["variance"][1, 0], torch.full((D,), 1 / D))
    assert torch.isfinite(method.logits(trials, state.tensors, pool.unlabeled)).all()
