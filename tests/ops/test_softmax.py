"""Softmax by columns is PyTorch's own, values and gradients, at any number of classes."""

import pytest
import torch

from ulfine_fast.ops.softmax import class_scores, class_softmax, log_softmax, softmax


@pytest.mark.parametrize("shape", [(5,), (0, 3), (7, 1), (2, 3, 2), (2, 3, 5, 15), (4, 16), (3, 100)])
@pytest.mark.parametrize(("ours", "reference"), [(softmax, torch.softmax), (log_softmax, torch.log_softmax)])
def test_values_and_gradients_are_those_of_torch(shape, ours, reference):
    torch.manual_seed(0)
    logits = 10 * torch.randn(shape, dtype=torch.float64)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weight = torch.randn(shape, dtype=torch.float64)
    result, wanted = ours(mine), reference(theirs, -1)
    assert result.is_contiguous()
    torch.testing.assert_close(result, wanted)
    (result * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_rows_that_do_not_lie_side_by_side():
    logits = torch.randn(4, 6, 3).transpose(0, 1)
    torch.testing.assert_close(softmax(logits), torch.softmax(logits, -1))


def test_infinite_logits_give_zero():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    torch.testing.assert_close(softmax(logits), torch.tensor([[0.5, 0.0, 0.5]]))


@pytest.mark.parametrize("classes", [1, 3, 15, 16, 40])
def test_scores_and_probabilities_of_classes(classes):
    torch.manual_seed(0)
    vectors, rows = torch.randn(2, 3, classes, 6), torch.randn(2, 5, 6)
    scores = class_scores(vectors, rows)
    torch.testing.assert_close(scores, torch.einsum("tckd,tnd->tckn", vectors, rows))
    probabilities = class_softmax(scores.mul_(2.0))
    torch.testing.assert_close(probabilities, torch.softmax(scores, 2))
    # what is made of them is one matrix product, without a copy
    assert probabilities.flatten(1, 2).data_ptr() == probabilities.data_ptr()
