from __future__ import annotations

import pytest
import torch

from tests.methods.conftest import pool_of, trials_of
from ulfine_fast.config import FitConfig
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.prototypes import normalize

K, D = 3, 6


def small(count=2, **values):
    """Two count over fourteen random images; the second one has padding in both roles."""
    torch.manual_seed(1)
    config = FitConfig(**{"method": "label_propagation", "neighbors": 2, "tau": 0.0, **values})
    features = normalize(torch.randn(14, D))
    prior = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 1e-8]]))[:count]
    trials = trials_of(config, normalize(torch.randn(K, D)).repeat(count, 1, 1), prior)
    pool = pool_of(
        features,
        [[0, 1, 2, 3], [4, 5, 0, 0]][:count],
        [[0, 1, 2, 0], [1, 0, -1, -1]][:count],
        [[6, 7, 8, 9, 10], [11, 12, 13, 0, 0]][:count],
        [[True] * 5, [True] * 3 + [False] * 2][:count],
    )
    method = method_of(config)
    state = method.start(trials)
    method.refresh(trials, state, pool, 0)
    return trials, method, state, pool


def slow_scores(trials, pool, t, alpha, gamma, tau, count):
    """Scores of one trial's own images and texts by a dense graph and a dense solver, and a rule for new rows."""
    labels = [y for y in pool.labels[t].tolist() if y >= 0]
    hidden = pool.unlabeled[t][pool.present[t]]
    rows = torch.cat([pool.labeled[t][: len(labels)], hidden])
    texts = trials.prototypes[t]

    def links(row, skip=None):
        result = {}
        cosines = rows @ row
        if skip is not None:
            cosines[skip] = -2
        for j in cosines.topk(count).indices.tolist():
            result[j] = max(0.0, float(cosines[j]))
        words = texts @ row
        for k in words.topk(count).indices.tolist():
            result[len(rows) + k] = max(0.0, float(words[k])) ** gamma
        return result

    nodes = len(rows) + K
    weights = torch.zeros(nodes, nodes)
    for i, row in enumerate(rows):
        for j, weight in links(row, i).items():
            weights[i, j] += weight
            weights[j, i] += weight
    root = weights.sum(1)
    root = torch.where(root > 0, root.rsqrt(), torch.zeros_like(root))
    sources = torch.zeros(nodes, K)
    for i, label in enumerate(labels):
        sources[i, label] = (len(labels) / (K * labels.count(label))) ** tau
    sources[len(rows) :] = torch.eye(K)
    system = torch.eye(nodes) - alpha * root.view(-1, 1) * weights * root
    scores = torch.linalg.solve(system, sources)
    return scores, len(labels), lambda row: sum(w * scores[j] for j, w in links(row).items())


@pytest.mark.parametrize(("alpha", "gamma", "tau"), [(0.3, 5.0, 0.0), (0.9, 1.0, 1.0)])
def test_scores_are_those_of_a_dense_graph(alpha, gamma, tau):
    trials, method, state, pool = small(propagation=alpha, text_power=gamma, tau=tau)
    torch.manual_seed(5)
    fresh = normalize(torch.randn(2, 4, D))
    logits = method.logits(trials, state.tensors, fresh)
    for t in range(2):
        scores, labeled, rule = slow_scores(trials, pool, t, alpha, gamma, tau, 2)
        hidden = int(pool.present[t].sum())
        unlabeled = scores[labeled : labeled + hidden]
        torch.testing.assert_close(
            method.pool_probabilities(trials, state)[t, :hidden],
            unlabeled / unlabeled.sum(-1, keepdim=True),
            rtol=1e-3,
            atol=1e-5,
        )
        for row, result in zip(fresh[t], logits[t], strict=True):
            wanted = rule(row)
            torch.testing.assert_close(torch.softmax(result, -1), wanted / wanted.sum(), rtol=1e-3, atol=1e-5)


def test_a_trial_does_not_see_its_neighbour():
    trials, method, state, _ = small()
    alone_trials, alone_method, alone, _ = small(count=1)
    torch.testing.assert_close(
        method.pool_probabilities(trials, state)[:1], alone_method.pool_probabilities(alone_trials, alone)
    )
    torch.testing.assert_close(state.memory["scores"][:1], alone.memory["scores"])


def test_labels_travel_along_a_string_of_images():
    # two arcs of images, each nearest to the one before it, labelled at their outer ends alone
    angles = torch.tensor([0.0, 3.1, 0.1, 0.22, 0.36, 0.52, 3.0, 2.88, 2.74, 2.58])
    features = torch.stack([angles.cos(), angles.sin()], -1)
    config = FitConfig(method="label_propagation", neighbors=1, propagation=0.9, tau=0.0, text_power=0.0)
    texts = torch.tensor([[0.0, -1.0], [0.0, -1.0]])  # below: no image has a positive cosine with them
    trials = trials_of(config, texts.unsqueeze(0), torch.log(torch.tensor([[0.5, 0.5]])))
    method = method_of(config)
    state = method.start(trials)
    method.refresh(trials, state, pool_of(features, [[0, 1]], [[0, 1]], [list(range(2, 10))], [[True] * 8]), 0)
    assert method.pool_probabilities(trials, state)[0].argmax(-1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_without_propagation_nothing_reaches_an_unlabelled_image():
    trials, method, state, _ = small(propagation=0.0, neighbors=3)
    probabilities = method.pool_probabilities(trials, state)
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 1 / K))


def test_it_is_a_closed_form_that_keeps_images_as_stored():
    _, method, state, pool = small()
    assert not method.trains
    assert state.parameters == {}
    assert state.memory["pictures"].dtype == pool.features.plain.dtype
