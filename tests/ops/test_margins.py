from __future__ import annotations

import math

import pytest
import torch

from ulfine_fast.ops.margins import (
    balanced_margins,
    balanced_one_hot,
    class_counts,
    effective_weights,
    ldam_margins,
    smoothed_cross_entropy,
    with_margin,
)


def test_counts_leave_padding_out():
    labels = torch.tensor([[0, 2, 2, -1], [1, -1, -1, -1]])
    assert class_counts(labels, 3).tolist() == [[1, 0, 2], [0, 1, 0]]


def test_one_hot_labels_are_plain_at_tau_zero():
    labels = torch.tensor([[0, 1, -1]])
    result = balanced_one_hot(labels, torch.log(torch.tensor([[0.9, 0.1]])), torch.zeros(1))
    assert result.tolist() == [[[1, 0], [0, 1], [0, 0]]]


def test_one_hot_labels_weigh_all_classes_the_same_at_tau_one():
    labels = torch.tensor([[0, 0, 0, 1]])
    result = balanced_one_hot(labels, torch.log(torch.tensor([[0.75, 0.25]])), torch.ones(1))
    torch.testing.assert_close(result.sum(1), torch.tensor([[2.0, 2.0]]))


@pytest.mark.parametrize("tau", [0.0, 0.5, 2.0])
def test_balanced_data_have_plain_one_hot_labels(tau):
    result = balanced_one_hot(torch.tensor([[1, 0]]), torch.log(torch.tensor([[0.5, 0.5]])), torch.tensor([tau]))
    torch.testing.assert_close(result, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))


def test_a_class_without_labels_makes_no_infinity():
    prior = torch.log(torch.tensor([[1.0, 0.0]]).clamp(min=1e-8))
    assert torch.isfinite(balanced_one_hot(torch.tensor([[0]]), prior, torch.tensor([2.0]))).all()


def test_a_margin_is_taken_from_the_own_class_alone():
    logits = torch.tensor([[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]])
    margins = torch.tensor([[0.5, 0.6, 0.7], [1.5, 1.6, 1.7]])
    result = with_margin(logits, torch.tensor([[2], [0]]), margins)
    torch.testing.assert_close(result, torch.tensor([[[1.0, 2.0, 2.3]], [[-0.5, 2.0, 3.0]]]))


def test_a_margin_off_the_own_class_is_one_on_all_others():
    torch.manual_seed(0)
    logits, labels, margins = torch.randn(1, 4, 3), torch.tensor([[0, 1, 2, 1]]), torch.rand(1, 3)
    others = logits.clone()
    for row, label in enumerate(labels[0].tolist()):
        for k in range(3):
            others[0, row, k] += margins[0, label] * (k != label)
    torch.testing.assert_close(torch.softmax(with_margin(logits, labels, margins), -1), torch.softmax(others, -1))


def test_ldam_margins_fall_with_the_fourth_root_of_the_count():
    result = ldam_margins(torch.tensor([[16.0, 1.0, 81.0]]), torch.tensor([0.5]))
    torch.testing.assert_close(result, torch.tensor([[0.25, 0.5, 0.5 / 3]]))


def test_an_empty_class_does_not_shrink_ldams_margins():
    torch.testing.assert_close(
        ldam_margins(torch.tensor([[16.0, 0.0]]), torch.tensor([0.5])), torch.tensor([[0.25, 0.5]])
    )


def test_effective_numbers_by_hand():
    result = effective_weights(torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))
    # 1 / (1 + beta) for two images, against 1 for one; then a mean of one
    torch.testing.assert_close(result, torch.tensor([[1.0, 2 / 3]]) * 6 / 5)


def test_effective_numbers_between_no_weights_and_inverse_frequency():
    counts = torch.tensor([[100.0, 10.0, 1.0]] * 2)
    result = effective_weights(counts, torch.tensor([0.0, 0.9999999]))
    assert result[0].tolist() == [1, 1, 1]
    inverse = 1 / counts[1]
    torch.testing.assert_close(result[1], inverse / inverse.mean(), rtol=1e-4, atol=1e-6)


def test_balanced_margins_by_hand():
    result = balanced_margins(torch.tensor([[4.0, 2.0, 0.0]]), torch.tensor([8.0]))
    # fractions 1, 1/2, 0; gap 1
    torch.testing.assert_close(result, torch.tensor([[0.0, 8 / 3, 8.0]]))


@pytest.mark.parametrize("count", [0.0, 3.0])
def test_balanced_margins_vanish_where_all_classes_are_the_same(count):
    assert balanced_margins(torch.full((2, 3), count), torch.tensor([8.0, 1.0])).abs().max() == 0


def test_smoothing_by_hand():
    logits, labels = torch.log(torch.tensor([[[0.7, 0.2, 0.1]]])), torch.tensor([[0]])
    for s in (0.0, 0.5):
        wanted = -(1 - s) * math.log(0.7) - s / 2 * (math.log(0.2) + math.log(0.1))
        result = smoothed_cross_entropy(logits, labels, torch.tensor([s]))
        assert result.item() == pytest.approx(wanted, rel=1e-5)


def test_smoothing_of_a_single_class_is_finite():
    assert smoothed_cross_entropy(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0.5])) == 0
