from __future__ import annotations

import math

import pytest
import torch

from tests.methods.conftest import pool_of, trials_of
from ulfine_fast.config import FitConfig
from ulfine_fast.methods import gmm
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.prototypes import normalize

K, D = 3, 6


def small(count=2, noise=0.3, **values):
    """Two count over thirty clustered images; the second one has padding in both roles."""
    torch.manual_seed(3)
    config = FitConfig(**{"method": "gmm", "neighbors": 2, "scale": 8.0, **values})
    centres = normalize(torch.randn(K, D))
    truth = torch.arange(30) % K
    features = normalize(centres[truth] + noise * torch.randn(30, D))
    trials = trials_of(config, normalize(centres + 0.8 * torch.randn(K, D)).repeat(count, 1, 1), torch.zeros(count, K))
    pool = pool_of(
        features,
        [[0, 1, 2, 3], [4, 5, 0, 0]][:count],
        [[0, 1, 2, 0], [1, 2, -1, -1]][:count],
        [list(range(6, 16)), [*range(16, 24), 0, 0]][:count],
        [[True] * 10, [True] * 8 + [False] * 2][:count],
    )
    method = method_of(config)
    return trials, method, method.start(trials), pool, truth


def slow_mixture(trials, pool, t, anchor, gamma, rounds, inner, count):
    """One trial by loops over images, classes and dimensions."""
    labels = [y for y in pool.labels[t].tolist() if y >= 0]
    rows = torch.cat([pool.labeled[t][: len(labels)], pool.unlabeled[t][pool.present[t]]]).double()
    text = torch.log_softmax(8.0 * rows @ trials.prototypes[t].double().T, -1)
    total, known = len(rows), len(labels)
    weights = torch.zeros(total, total, dtype=torch.double)
    for i in range(total):
        cosines = rows @ rows[i]
        cosines[i] = -2
        for j in cosines.topk(count).indices.tolist():
            weights[i, j] += max(0.0, float(cosines[j]))
    weights = weights + weights.T
    mass = torch.tensor([gamma / known] * known + [1 / (total - known)] * (total - known)).double()
    z = text.exp()
    z[:known] = torch.eye(K, dtype=torch.double)[labels]
    means = trials.prototypes[t].double().clone()
    for k in set(labels):
        means[k] = normalize(sum(rows[i] for i in range(known) if labels[i] == k))
    variance = torch.full((D,), 1.0 / D, dtype=torch.double)

    def assign(z):
        for _ in range(inner):
            new = z.clone()
            for i in range(known, total):
                likelihood = -0.5 * ((rows[i] - means).square() / variance).sum(-1) / 50
                around = sum(weights[i, j] * z[j] for j in range(total)) / (2 * count)
                new[i] = torch.softmax(anchor * text[i] + likelihood + around, -1)
            z = new
        return z

    for _ in range(rounds):
        z = assign(z)
        for k in range(K):
            members = mass * z[:, k]
            means[k] = normalize((members.unsqueeze(-1) * rows).sum(0) / members.sum())
        spread = sum(mass[i] * z[i, k] * (rows[i] - means[k]).square() for i in range(total) for k in range(K))
        variance = spread / (mass.unsqueeze(-1) * z).sum()
    return assign(z)[known:], means, variance


@pytest.mark.parametrize(("anchor", "gamma"), [(0.5, 1.0), (0.05, 10.0), (0.5, 0.0)])
def test_every_block_follows_the_objective(monkeypatch, anchor, gamma):
    monkeypatch.setattr(gmm, "_ROUNDS", 3)
    trials, method, state, pool, _ = small(anchor=anchor, labeled_weight=gamma)
    method.refresh(trials, state, pool, 0)
    for t in range(2):
        z, means, variance = slow_mixture(trials, pool, t, anchor, gamma, 3, 5, 2)
        torch.testing.assert_close(
            method.pool_probabilities(trials, state)[t, : len(z)].double(), z, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(state.memory["means"][t].double(), means, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state.memory["variance"][t].double(), variance, rtol=1e-3, atol=1e-5)


def test_logits_are_text_and_gaussian_up_to_a_constant():
    trials, method, state, pool, _ = small(anchor=0.3)
    method.refresh(trials, state, pool, 0)
    row = normalize(torch.randn(2, 1, D))
    result = torch.softmax(method.logits(trials, state.tensors, row), -1)
    for t in range(2):
        text = torch.softmax(8.0 * trials.prototypes[t] @ row[t, 0], -1)
        wanted = []
        for k in range(K):
            distance = ((row[t, 0] - state.memory["means"][t, k]) ** 2 / state.memory["variance"][t]).sum().item()
            wanted.append(text[k].item() ** 0.3 * math.exp(-distance / 100))
        assert result[t, 0].tolist() == pytest.approx([w / sum(wanted) for w in wanted], rel=1e-3)


def test_clusters_are_found_where_the_text_is_poor():
    trials, method, state, pool, truth = small(noise=0.15, anchor=0.01, labeled_weight=10.0)
    method.refresh(trials, state, pool, 0)
    assert torch.equal(method.pool_probabilities(trials, state)[0].argmax(-1), truth[pool.unlabeled_rows[0]])


def test_a_trial_does_not_see_its_neighbour_nor_its_padding():
    trials, method, state, pool, _ = small()
    method.refresh(trials, state, pool, 0)
    drawn = method.pool_probabilities(trials, state)
    assert (drawn[1, 8:] == 0).all()
    alone_trials, alone_method, alone, alone_pool, _ = small(count=1)
    alone_method.refresh(alone_trials, alone, alone_pool, 0)
    torch.testing.assert_close(drawn[:1], alone_method.pool_probabilities(alone_trials, alone))
    torch.testing.assert_close(state.memory["variance"][:1], alone.memory["variance"])


def test_a_class_without_any_weight_keeps_its_mean():
    before = torch.randn(1, K, D)
    weights = torch.zeros(1, 4, K)
    weights[..., 0] = 1.0
    result = gmm._means(weights, normalize(torch.randn(1, 4, D)), before)
    assert torch.equal(result[:, 1:], before[:, 1:])
    assert not torch.equal(result[:, 0], before[:, 0])


def test_without_unlabelled_images_the_means_are_the_labelled_ones():
    trials, method, state, pool, _ = small(count=1)
    empty = pool_of(pool.features.plain, pool.labeled_rows.tolist(), pool.labels.tolist(), [[0]], [[False]])
    method.refresh(trials, state, empty, 0)
    wanted = normalize(pool.labeled[0, [0, 3]].sum(0))
    torch.testing.assert_close(state.memory["means"][0, 0], wanted)
    assert torch.isfinite(method.logits(trials, state.tensors, pool.unlabeled)).all()
