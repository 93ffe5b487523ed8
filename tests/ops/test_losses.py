from __future__ import annotations

import math

import pytest
import torch

from ulfine_fast.ops.losses import adjusted_cross_entropy, masked_mean, pseudo_labels


def slow_adjusted(logits, labels, log_prior, tau):
    """One row at a time, in Python floats."""
    losses = torch.zeros(labels.shape, dtype=logits.dtype)
    for t in range(logits.shape[0]):
        for b in range(logits.shape[1]):
            row = [float(z) + float(tau[t]) * float(p) for z, p in zip(logits[t, b], log_prior[t], strict=True)]
            losses[t, b] = math.log(sum(math.exp(z) for z in row)) - row[int(labels[t, b])]
    return losses


@pytest.mark.parametrize(("trials", "rows", "classes"), [(1, 1, 1), (2, 5, 3), (3, 4, 10)])
def test_adjusted_cross_entropy_equals_the_slow_one(trials, rows, classes):
    torch.manual_seed(0)
    logits = torch.randn(trials, rows, classes, dtype=torch.float64)
    labels = torch.randint(classes, (trials, rows))
    log_prior = torch.log_softmax(torch.randn(trials, classes, dtype=torch.float64), -1)
    tau = torch.linspace(0, 2, trials, dtype=torch.float64)
    result = adjusted_cross_entropy(logits, labels, log_prior, tau)
    torch.testing.assert_close(result, slow_adjusted(logits, labels, log_prior, tau))


def test_adjusted_cross_entropy_gradcheck():
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    labels, log_prior = torch.randint(4, (2, 3)), torch.randn(2, 4, dtype=torch.float64)
    tau = torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: adjusted_cross_entropy(z, labels, log_prior, tau), (logits,))


def test_a_rare_class_costs_more_at_equal_logits():
    log_prior = torch.log(torch.tensor([[0.9, 0.1]]))
    losses = adjusted_cross_entropy(torch.zeros(1, 2, 2), torch.tensor([[0, 1]]), log_prior, torch.ones(1))
    torch.testing.assert_close(losses, -log_prior.log_softmax(-1))


def test_pseudo_labels_at_the_very_threshold_are_kept():
    # two equal logits: probability exactly one half
    logits = torch.tensor([[[0.0, 0.0]]])
    assert pseudo_labels(logits, torch.tensor([0.5]), torch.ones(1)).mask.item() == 1
    assert pseudo_labels(logits, torch.tensor([0.5000001]), torch.ones(1)).mask.item() == 0


def test_pseudo_labels_use_each_trials_threshold_and_temperature():
    logits = torch.tensor([[[2.0, 0.0]]]).repeat(3, 1, 1)
    result = pseudo_labels(logits, torch.tensor([0.8, 0.9, 0.8]), torch.tensor([1.0, 1.0, 4.0]))
    assert result.mask.flatten().tolist() == [1, 0, 0]
    assert result.labels.flatten().tolist() == [0, 0, 0]
    torch.testing.assert_close(result.probabilities[2, 0, 0], torch.sigmoid(torch.tensor(0.5)))


def test_pseudo_labels_carry_no_gradient():
    logits = torch.randn(1, 2, 3, requires_grad=True)
    assert not pseudo_labels(logits, torch.zeros(1), torch.ones(1)).probabilities.requires_grad


def test_masked_mean_divides_by_the_whole_batch():
    values, mask = torch.tensor([[2.0, 4.0, 6.0, 8.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert masked_mean(values, mask).tolist() == [2.0]
    assert masked_mean(values, torch.zeros_like(mask)).tolist() == [0.0]
