from __future__ import annotations

import math

import pytest
import torch

from ulfine_fast.ops.thresholds import (
    adaptive_thresholds,
    fairness_loss,
    histogram,
    learning_effect,
    running,
    truncated_weights,
    updated_classes,
)


def test_a_histogram_sums_the_weights_of_each_class():
    labels = torch.tensor([[0, 2, 2, 1], [1, 1, 1, 1]])
    weights = torch.tensor([[1.0, 0.5, 0.25, 0.0], [1.0, 1.0, 0.0, 2.0]])
    assert histogram(labels, weights, 4).tolist() == [[1.0, 0.0, 0.75, 0.0], [0.0, 4.0, 0.0, 0.0]]


def test_a_running_mean_has_a_momentum_for_each_trial():
    old, new = torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    moved = running(old, new, torch.tensor([0.5, 0.75]))
    assert moved.tolist() == [[2.0, 2.0], [1.5, 2.5]]
    assert running(old[:, 0], new[:, 0], torch.tensor([0.0, 1.0])).tolist() == [3.0, 1.0]


def test_the_class_that_gets_most_has_the_overall_threshold():
    result = adaptive_thresholds(torch.tensor([0.8, 0.5]), torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    torch.testing.assert_close(result, torch.tensor([[0.8, 0.4, 0.4], [0.0625, 0.0625, 0.5]]))


def slow_fairness(rows, mask, running, counts):
    kept = [row for row, m in zip(rows, mask, strict=True) if m]
    if not kept:
        return 0.0
    classes = range(len(running))
    chances = []
    for row in kept:
        total = sum(math.exp(z) for z in row)
        chances.append([math.exp(z) / total for z in row])
    predicted = [row.index(max(row)) for row in chances]
    level = []
    for k in classes:
        fraction = predicted.count(k) / len(kept)
        level.append(sum(row[k] for row in chances) / len(kept) / fraction if fraction else 0.0)
    level = [x / sum(level) for x in level]
    target = [running[k] / counts[k] for k in classes]
    target = [x / sum(target) for x in target]
    return sum(q * math.log(r + 1e-12) for q, r in zip(target, level, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_fairness_loss_is_the_published_sum(seed):
    torch.manual_seed(seed)
    logits, mask = torch.randn(3, 12, 4), (torch.rand(3, 12) > 0.4).float()
    mask[2] = 0  # a trial that trains none
    running, counts = torch.softmax(torch.randn(3, 4), -1), torch.softmax(torch.randn(3, 4), -1)
    result = fairness_loss(logits, mask, running, counts)
    for t in range(3):
        wanted = slow_fairness(logits[t].tolist(), mask[t].tolist(), running[t].tolist(), counts[t].tolist())
        assert result[t].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert result[2] == 0


def test_the_fairness_loss_has_the_published_sign():
    # each of four rows is of another class, so that a uniform mean is equal confidence in all of them
    even = torch.full((1, 4), 0.25)
    fair = fairness_loss(5 * torch.eye(4)[None], torch.ones(1, 4), even, even)
    other = fairness_loss(torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0]))[None], torch.ones(1, 4), even, even)
    assert fair.item() == pytest.approx(-math.log(4), rel=1e-4)
    assert other < fair


def test_rows_that_do_not_train_have_no_gradient():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 3, requires_grad=True)
    mask = torch.tensor([[1.0, 1, 0, 1, 0, 1], [0.0] * 6])
    running = torch.full((2, 3), 1 / 3)
    fairness_loss(logits, mask, running, running).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[mask == 0].abs().max() == 0
    assert logits.grad[0].abs().max() > 0


def test_classes_are_updated_at_their_positions():
    assigned = torch.tensor([[-1, 2, 0, -1], [1, 1, 1, 1]])
    result = updated_classes(assigned, torch.tensor([[0, 1, 0], [3, 2, 2]]), torch.tensor([[1, -1, 2], [0, -1, -1]]))
    assert result.tolist() == [[2, 2, 0, -1], [1, 1, 1, 0]]
    assert assigned.tolist() == [[-1, 2, 0, -1], [1, 1, 1, 1]]


def test_learning_effect_is_over_the_images_of_no_class_while_they_are_many():
    assigned = torch.tensor([[0, 0, 1, -1, -1, -1, -1, -1], [0, 0, 0, 0, 1, 1, -1, -1]])
    present = torch.tensor([[True] * 7 + [False], [True] * 7 + [False]])
    # 4 images without a class in the first trial; in the second the most frequent class is larger
    assert learning_effect(assigned, present, 3).tolist() == [[0.5, 0.25, 0.0], [1.0, 0.5, 0.0]]
    assert learning_effect(torch.full((1, 4), -1), torch.ones(1, 4, dtype=torch.bool), 2).tolist() == [[0.0, 0.0]]


def test_truncated_weights_by_hand():
    result = truncated_weights(torch.tensor([[0.9, 0.7, 0.5]]), torch.tensor([0.7]), torch.tensor([0.04]))
    # one standard deviation under the mean, halved by the width, is two
    torch.testing.assert_close(result, torch.tensor([[1.0, 1.0, math.exp(-2.0)]]))
