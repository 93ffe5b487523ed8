from __future__ import annotations

import math

import pytest
import torch

from ulfine_fast.ops import probe
from ulfine_fast.ops.probe import class_starts, fit_probe
from ulfine_fast.ops.prototypes import normalize

T, N, V, J, K, D = 2, 9, 3, 2, 4, 6
SCALE = torch.tensor([8.0, 20.0])


def problem(seed=0, count=N):
    """Rows in several views, their labels, rows left out of each classifier, and weights to begin with."""
    torch.manual_seed(seed)
    views = normalize(torch.randn(T, count, V, D))
    labels = (torch.arange(count) % K).repeat(T, 1)
    kept = torch.ones(T, count, J, dtype=torch.bool)
    kept[:, 3, 0] = False
    kept[:, 5:7, 1] = False
    labels[1, 7:] = -1
    return views, labels, kept, normalize(torch.randn(T, K, D))


def fitted(views, labels, kept, start, scale, rate, steps, decay=5e-4):
    """Read once, after the last step."""
    result = fit_probe(views, labels, kept, start, scale, rate, (steps,), decay)
    return result.squeeze(1)


def slow_probe(rows_of, start, scale, rate, steps, decay, read=None):
    """One classifier by autograd on the adjusted cross-entropy; `rows_of` gives rows and labels of a step.

    It is read after the last of the steps, or earlier.
    """
    every = rows_of(None)[1]
    prior = torch.bincount(every, minlength=K) / len(every)
    weights, velocity = start.clone(), torch.zeros_like(start)
    for step in range(read or steps):
        weights.requires_grad_(True)
        rows, labels = rows_of(step)
        logits = scale * rows @ torch.nn.functional.normalize(weights, dim=-1).T + prior.clamp(min=1e-8).log()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, weights)
        weights = weights.detach()
        velocity = 0.9 * velocity + gradient + decay * weights
        weights = weights - rate * 0.5 * (1 + math.cos(math.pi * step / steps)) * velocity
    return torch.nn.functional.normalize(weights, dim=-1)


@pytest.mark.parametrize(("steps", "decay"), [(1, 0.0), (25, 5e-4), (25, 0.1)])
def test_the_steps_are_those_of_autograd(steps, decay):
    views, labels, kept, start = problem()
    result = fitted(views, labels, kept, start, SCALE, 0.1, steps, decay)
    assert result.shape == (T, J, K, D)
    for t in range(T):
        for j in range(J):
            chosen = kept[t, :, j] & (labels[t] >= 0)

            def rows_of(step, t=t, chosen=chosen):
                return views[t, chosen, (step or 0) % V], labels[t, chosen]

            wanted = slow_probe(rows_of, start[t], float(SCALE[t]), 0.1, steps, decay)
            torch.testing.assert_close(result[t, j], wanted, rtol=1e-3, atol=1e-4)


def test_of_many_rows_a_step_reads_a_part(monkeypatch):
    monkeypatch.setattr(probe, "MOST_ROWS", 4)
    views, labels, kept, start = problem(count=11)
    labels[1, 3:] = -1
    result = fitted(views, labels, kept, start, SCALE, 0.1, 25, 0.0)
    for t, parts in enumerate((3, 1)):  # eleven rows, three rows
        for j in range(J):
            chosen = kept[t, :, j] & (labels[t] >= 0)

            def rows_of(step, t=t, chosen=chosen, parts=parts):
                if step is None:
                    return None, labels[t, chosen]
                part = torch.zeros_like(chosen)
                part[step // V % parts :: parts] = True
                return views[t, chosen & part, step % V], labels[t, chosen & part]

            wanted = slow_probe(rows_of, start[t], float(SCALE[t]), 0.1, 25, 0.0)
            torch.testing.assert_close(result[t, j], wanted, rtol=1e-3, atol=1e-4)


def test_rows_without_weight_do_nothing():
    views, labels, kept, start = problem()
    result = fitted(views, labels, kept, start, SCALE, 0.1, 20)
    other = views.clone()
    other[:, 3] = normalize(torch.randn(T, V, D))
    changed = fitted(other, labels, kept, start, SCALE, 0.1, 20)
    # row 3 belongs to the second classifier only
    torch.testing.assert_close(changed[:, 0], result[:, 0], rtol=0, atol=1e-6)
    assert not torch.allclose(changed[:, 1], result[:, 1], atol=1e-3)
    short = fitted(views[1:, :7], labels[1:, :7], kept[1:, :7], start[1:], SCALE[1:], 0.1, 20)
    torch.testing.assert_close(short, result[1:], rtol=0, atol=1e-5)


def test_a_classifier_does_not_notice_its_neighbours():
    views, labels, kept, start = problem()
    result = fitted(views, labels, kept, start, SCALE, 0.1, 20)
    alone = fitted(views[:1], labels[:1], kept[:1, :, 1:], start[:1], SCALE[:1], 0.1, 20)
    torch.testing.assert_close(alone[:, 0], result[:1, 1], rtol=0, atol=1e-5)


def test_all_views_are_read_in_turn():
    views, labels, kept, start = problem()
    first = fitted(views, labels, kept, start, SCALE, 0.1, 1)
    torch.testing.assert_close(first, fitted(views[:, :, :1], labels, kept, start, SCALE, 0.1, 1))
    later = fitted(views, labels, kept, start, SCALE, 0.1, 2)
    assert not torch.allclose(later, fitted(views[:, :, :1], labels, kept, start, SCALE, 0.1, 2), atol=1e-4)


def test_a_rate_of_zero_keeps_the_start():
    views, labels, kept, start = problem()
    result = fitted(views, labels, kept, start, SCALE, 0.0, 10)
    torch.testing.assert_close(result, start.unsqueeze(1).expand_as(result))


def test_it_learns_classes_that_can_be_separated():
    torch.manual_seed(1)
    centers = normalize(torch.eye(K, D))
    labels = torch.tensor([0] * 20 + [1] * 8 + [2] * 3 + [3])
    views = normalize(centers[labels] + 0.05 * torch.randn(1, 2, 32, D)).transpose(1, 2)
    kept = torch.ones(1, 32, 1, dtype=torch.bool)
    start = normalize(torch.randn(1, K, D))
    result = fitted(views, labels.unsqueeze(0), kept, start, torch.tensor([10.0]), 0.1, 200)
    assert torch.equal((centers @ result[0, 0].T).argmax(-1), torch.arange(K))


def test_no_rows_at_all_leave_the_start():
    views, labels, kept, start = problem()
    result = fitted(views, labels, torch.zeros_like(kept), start, SCALE, 0.1, 10)
    torch.testing.assert_close(result, start.unsqueeze(1).expand_as(result))


def test_stops_are_read_from_one_path():
    views, labels, kept, start = problem()
    result = fit_probe(views, labels, kept, start, SCALE, 0.1, (3, 7, 25))
    assert result.shape == (T, 3, J, K, D)
    torch.testing.assert_close(result[:, 2], fitted(views, labels, kept, start, SCALE, 0.1, 25))
    # classifiers leave their start step by step
    near = (result * start[:, None, None]).sum(-1).mean((0, 2, 3))  # (3,)
    assert near[0] > near[1] > near[2]
    # the third step has the rate of the third of 25
    for t in range(T):
        chosen = kept[t, :, 0] & (labels[t] >= 0)

        def rows_of(step, t=t, chosen=chosen):
            return views[t, chosen, (step or 0) % V], labels[t, chosen]

        wanted = slow_probe(rows_of, start[t], float(SCALE[t]), 0.1, 25, 5e-4, read=3)
        torch.testing.assert_close(result[t, 0, 0], wanted, rtol=1e-3, atol=1e-4)


def test_a_scale_for_each_classifier():
    views, labels, kept, start = problem()
    scales = torch.stack([SCALE, 2 * SCALE], dim=1)  # (T, J)
    result = fit_probe(views, labels, kept, start, scales, 0.1, (20,))
    for j in range(J):
        alone = fit_probe(views, labels, kept[:, :, j : j + 1], start, scales[:, j], 0.1, (20,))
        torch.testing.assert_close(result[:, :, j : j + 1], alone, rtol=0, atol=1e-5)


def test_class_starts_are_means_of_the_rows_kept():
    views, labels, kept, _ = problem()
    rows = views[:, :, 0]
    starts = class_starts(rows, labels, kept, K)
    assert starts.shape == (T, J, K, D)
    for t in range(T):
        for j in range(J):
            chosen = kept[t, :, j] & (labels[t] >= 0)
            for k in range(K):
                own = rows[t, chosen & (labels[t] == k)]
                wanted = (own if len(own) else rows[t, chosen]).mean(0)
                torch.testing.assert_close(starts[t, j, k], normalize(wanted))


def test_a_class_without_rows_starts_at_the_mean_of_all():
    rows = normalize(torch.randn(1, 4, D))
    labels, kept = torch.tensor([[0, 0, 2, -1]]), torch.tensor([True, True, True, True]).view(1, 4, 1)
    starts = class_starts(rows, labels, kept, 3)
    torch.testing.assert_close(starts[0, 0, 1], normalize(rows[0, :3].mean(0)))
