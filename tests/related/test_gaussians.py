"""Class Gaussians, their anchors and their heads against numpy, scikit-learn and cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from ulfine_fast.ops.philox import Purpose, normals
from ulfine_fast.related.head_realignment.gaussians import (
    Sampling,
    align,
    anchored,
    class_gaussians,
    discriminant,
    shrunk,
    text_anchors,
)

K, D = 4, 6
COUNTS = np.array([40, 12, 3, 1])


@pytest.fixture
def world():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(K), COUNTS)
    means = 2 * random.normal(size=(K, D))
    rows = means[labels] + random.normal(size=(len(labels), D)) * np.linspace(0.3, 1.5, D)
    return torch.from_numpy(rows), torch.from_numpy(labels), means


def test_shrinkage_is_ledoit_and_wolfs(world):
    rows = world[0] - world[0].mean(0)
    expected, fraction = ledoit_wolf(rows.numpy(), assume_centered=True)
    assert 0.01 < fraction < 0.99
    np.testing.assert_allclose(shrunk(rows), expected, atol=1e-10)


def test_statistics_row_by_row(world):
    rows, labels, _ = world
    gaussians = class_gaussians(rows, labels, K)
    centred = []
    for k in range(K):
        of_class = rows[labels == k].numpy()
        mean, n = of_class.mean(0), len(of_class)
        np.testing.assert_allclose(gaussians.means[k], mean, atol=1e-12)
        # a class of one row has no spread
        centred += [] if n < 2 else [(x - mean) * np.sqrt(n / (n - 1)) for x in of_class]
    assert gaussians.counts.tolist() == COUNTS.tolist()
    expected = ledoit_wolf(np.array(centred), assume_centered=True)[0]
    np.testing.assert_allclose(gaussians.covariance, expected, atol=1e-10)


def test_fewer_rows_than_dimensions_still_have_an_inverse():
    random = torch.Generator().manual_seed(0)
    covariance = class_gaussians(torch.randn(4, 50, generator=random), torch.tensor([0, 0, 1, 1]), 2).covariance
    assert torch.linalg.eigvalsh(covariance)[0] > 1e-3
    alike = class_gaussians(torch.ones(4, 5), torch.tensor([0, 0, 1, 1]), 2).covariance
    assert torch.isfinite(torch.linalg.cholesky(alike)).all()
    with pytest.raises(ValueError, match="two rows"):
        class_gaussians(torch.ones(2, 5), torch.tensor([0, 1]), 2)


def test_anchors_are_the_weighted_ridge_map(world):
    """Against the normal equations over dimensions, where the function solves over classes."""
    _, _, means = world
    text = np.random.default_rng(1).normal(size=(K, 3))
    w = COUNTS / (COUNTS + 10)
    normalized = w / w.sum()
    x, center = text - normalized @ text, normalized @ means
    ridge = sum(s * (row @ row) for s, row in zip(normalized, x, strict=True))
    left, right = ridge * np.eye(3), np.zeros((3, D))
    for k in range(K):
        left, right = left + w[k] * np.outer(x[k], x[k]), right + w[k] * np.outer(x[k], means[k] - center)
    anchors = text_anchors(torch.from_numpy(means), torch.from_numpy(COUNTS), torch.from_numpy(text))
    np.testing.assert_allclose(anchors, center + x @ np.linalg.solve(left, right), atol=1e-10)


def test_the_mean_of_a_class_without_rows_comes_from_its_text_alone(world):
    _, _, means = world
    text = torch.randn(K, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.tensor([40, 12, 3, 0])
    wild = torch.from_numpy(means).clone()
    wild[3] = 1e6
    anchors, others = (text_anchors(each, counts, text) for each in (torch.from_numpy(means), wild))
    assert torch.allclose(anchors, others)
    assert torch.allclose(anchored(wild, counts, anchors, 5.0)[3], anchors[3], rtol=1e-12)


def test_anchored_means_by_hand():
    means, anchors = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [3.0]])
    moved = anchored(means, torch.tensor([20, 5]), anchors, 5.0)
    assert moved.squeeze(1).tolist() == pytest.approx([(20 + 15) / 25, 2.0])
    assert torch.equal(anchored(means, torch.tensor([20, 5]), anchors, 0.0), means)


def test_the_discriminant_is_scikit_learns(world):
    used = world[1] < 3  # scikit-learn warns of a class of one row
    rows, labels = world[0][used], world[1][used]
    means = class_gaussians(rows, labels, 3).means
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(3, 1 / 3))
    reference.fit(rows.numpy(), labels.numpy())
    weights, bias = discriminant(means, torch.from_numpy(np.asarray(reference.covariance_)))
    expected = reference.decision_function(rows.numpy())
    scores = (rows @ weights.T + bias).numpy()
    scores, expected = (each - each.mean(1, keepdims=True) for each in (scores, expected))
    np.testing.assert_allclose(scores, expected, atol=1e-8)


def trained(heads, means, covariance, seeds, sampling):
    return list(align(heads, means, covariance, seeds, sampling))[-1][1]


def test_one_step_against_numpy():
    random = torch.Generator().manual_seed(0)
    heads, means = (torch.randn(1, 1, K, D, generator=random) for _ in range(2))
    root = torch.randn(1, D, D, generator=random)
    covariance = root @ root.transpose(1, 2) + torch.eye(D)
    sampling = Sampling(epochs=1, per_class=5, lr=0.5, temperature=0.2)
    trained_heads = next(align(heads, means, covariance, torch.tensor([7]), sampling))[1]
    noise = normals(torch.tensor([7]), 0, Purpose.SAMPLES, 5 * D).view(5, D).double().numpy()
    labels = np.arange(5) % K
    rows = noise @ np.linalg.cholesky(covariance[0].double().numpy()).T + means[0, 0].double().numpy()[labels]
    start = heads[0, 0].double().numpy()
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    gradient = np.zeros_like(start)
    for k, d in np.ndindex(K, D):
        moved = [
            slow_loss(start + step * np.eye(K * D)[k * D + d].reshape(K, D), rows, labels) for step in (1e-5, -1e-5)
        ]
        gradient[k, d] = (moved[0] - moved[1]) / 2e-5
    np.testing.assert_allclose(trained_heads[0, 0], start - 0.5 * gradient, atol=1e-4)


def slow_loss(weights, rows, labels, temperature=0.2):
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        z = np.array([w @ row / np.linalg.norm(w) for w in weights])
        z = z / (temperature * np.linalg.norm(z))
        total += np.log(np.exp(z).sum()) - z[label]
    return total / len(rows)


def test_a_head_that_ignores_a_class_learns_it_back():
    """Separated Gaussians, and a head with two equal rows."""
    means = torch.eye(D)[:K].expand(1, 1, K, D)
    heads = torch.eye(D)[[0, 1, 2, 2]].expand(1, 1, K, D).clone()
    heads[..., 3, 0] = 0.5
    covariance = 0.02 * torch.eye(D).unsqueeze(0)
    assert (means[0, 0] @ heads[0, 0].T).argmax(1).tolist() != [0, 1, 2, 3]
    aligned = trained(heads, means, covariance, torch.tensor([0]), Sampling(per_class=32, lr=0.1))
    assert (means[0, 0] @ aligned[0, 0].T).argmax(1).tolist() == [0, 1, 2, 3]


def test_trials_do_not_see_their_neighbours():
    random = torch.Generator().manual_seed(0)
    heads, means = (torch.randn(3, 2, K, D, generator=random) for _ in range(2))
    covariance = torch.eye(D).expand(3, D, D) * torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    seeds, sampling = torch.tensor([3, 1, 2]), Sampling(epochs=2, per_class=8)
    together = trained(heads, means, covariance, seeds, sampling)
    alone = trained(heads[1:2], means[1:2], covariance[1:2], seeds[1:2], sampling)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[1, 0], together[1, 1])


def test_every_class_is_sampled_as_often():
    from ulfine_fast.related.head_realignment.gaussians import _balanced_labels

    labels = torch.cat([_balanced_labels(step, 5, K, torch.device("cpu")) for step in range(K)])
    assert torch.bincount(labels).tolist() == [5] * K
