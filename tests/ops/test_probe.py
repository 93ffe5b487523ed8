from __future__ import annotations

import math

import pytest
import torch

from ulfine_fast.ops.probe import fit_probe
from ulfine_fast.ops.prototypes import normalize

T, N, V, S, K, D = 2, 9, 3, 2, 4, 6
SCALE = torch.tensor([8.0, 20.0])


def problem(seed=0):
    """Rows in several views, soft and hard memberships with rows left out, and weights to begin with."""
    torch.manual_seed(seed)
    views = normalize(torch.randn(T, N, V, D))
    targets = torch.nn.functional.one_hot(torch.arange(N) % K, K).float().repeat(T, 1, 1).unsqueeze(2)
    soft = torch.softmax(torch.randn(T, N, 1, K), -1) * torch.rand(T, N, 1, 1)
    targets = torch.cat([targets, soft], dim=2)
    targets[:, 3, 0] = 0
    targets[1, 7:] = 0
    return views, targets, normalize(torch.randn(T, K, D))


def slow_probe(views, targets, start, scale, rate, steps, decay):
    """One classifier by autograd on the adjusted cross-entropy."""
    prior = targets.sum(0) / targets.sum()
    weights, velocity = start.clone(), torch.zeros_like(start)
    for step in range(steps):
        weights.requires_grad_(True)
        rows = views[:, step % views.shape[1]]
        logits = scale * rows @ torch.nn.functional.normalize(weights, dim=-1).T + prior.clamp(min=1e-8).log()
        loss = -(targets * torch.log_softmax(logits, -1)).sum() / targets.sum()
        (gradient,) = torch.autograd.grad(loss, weights)
        weights = weights.detach()
        velocity = 0.9 * velocity + gradient + decay * weights
        weights = weights - rate * 0.5 * (1 + math.cos(math.pi * step / steps)) * velocity
    return torch.nn.functional.normalize(weights, dim=-1)


@pytest.mark.parametrize(("steps", "decay"), [(1, 0.0), (25, 5e-4), (25, 0.1)])
def test_the_steps_are_those_of_autograd(steps, decay):
    views, targets, start = problem()
    result = fit_probe(views, targets, start, SCALE, 0.1, steps, decay)
    assert result.shape == (T, S, K, D)
    for t in range(T):
        for s in range(S):
            wanted = slow_probe(views[t], targets[t, :, s], start[t], float(SCALE[t]), 0.1, steps, decay)
            torch.testing.assert_close(result[t, s], wanted, rtol=1e-3, atol=1e-4)


def test_rows_without_weight_do_nothing():
    views, targets, start = problem()
    result = fit_probe(views, targets, start, SCALE, 0.1, 20)
    other = views.clone()
    other[:, 3] = normalize(torch.randn(T, V, D))
    changed = fit_probe(other, targets, start, SCALE, 0.1, 20)
    # row 3 belongs to the second classifier only
    torch.testing.assert_close(changed[:, 0], result[:, 0], rtol=0, atol=1e-6)
    assert not torch.allclose(changed[:, 1], result[:, 1], atol=1e-3)
    cut = fit_probe(views[1:, :7], targets[1:, :7], start[1:], SCALE[1:], 0.1, 20)
    torch.testing.assert_close(cut, result[1:], rtol=0, atol=1e-5)


def test_a_classifier_does_not_notice_its_neighbours():
    views, targets, start = problem()
    result = fit_probe(views, targets, start, SCALE, 0.1, 20)
    alone = fit_probe(views[:1], targets[:1, :, 1:], start[:1], SCALE[:1], 0.1, 20)
    torch.testing.assert_close(alone[:, 0], result[:1, 1], rtol=0, atol=1e-5)


def test_all_views_are_read_in_turn():
    views, targets, start = problem()
    first = fit_probe(views, targets, start, SCALE, 0.1, 1)
    torch.testing.assert_close(first, fit_probe(views[:, :, :1], targets, start, SCALE, 0.1, 1))
    later = fit_probe(views, targets, start, SCALE, 0.1, 2)
    assert not torch.allclose(later, fit_probe(views[:, :, :1], targets, start, SCALE, 0.1, 2), atol=1e-4)


def test_a_rate_of_zero_keeps_the_start():
    views, targets, start = problem()
    result = fit_probe(views, targets, start, SCALE, 0.0, 10)
    torch.testing.assert_close(result, start.unsqueeze(1).expand_as(result))


def test_it_learns_classes_that_can_be_separated():
    torch.manual_seed(1)
    centers = normalize(torch.eye(K, D))
    labels = torch.tensor([0] * 20 + [1] * 8 + [2] * 3 + [3])
    views = normalize(centers[labels] + 0.05 * torch.randn(1, 2, 32, D)).transpose(1, 2)
    targets = torch.nn.functional.one_hot(labels, K).float().view(1, 32, 1, K)
    result = fit_probe(views, targets, normalize(torch.randn(1, K, D)), torch.tensor([10.0]), 0.1, 200)
    assert torch.equal((centers @ result[0, 0].T).argmax(-1), torch.arange(K))


def test_no_rows_at_all_leave_the_start():
    views, targets, start = problem()
    result = fit_probe(views, torch.zeros_like(targets), start, SCALE, 0.1, 10)
    torch.testing.assert_close(result, start.unsqueeze(1).expand_as(result))
