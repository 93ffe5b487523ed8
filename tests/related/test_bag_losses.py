"""Losses of bags and the transport of a bag's images, against numbers worked out bag by bag."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax

from ulfine_fast.ops.losses import adjusted_cross_entropy
from ulfine_fast.ops.transport import sinkhorn
from ulfine_fast.related.label_proportions.losses import beta_draws, proportion_loss, symmetric_cross_entropy

T, G, M, K = 2, 3, 6, 4


def problem(seed=0, scale=3.0):
    """Logits, proportions of which some are zero, and bags of which two are short."""
    torch.manual_seed(seed)
    logits = scale * torch.randn(T, G, M, K, dtype=torch.double)
    present = torch.ones(T, G, M, dtype=torch.bool)
    present[0, 1, 4:] = present[1, 2, 3:] = False
    proportions = torch.softmax(torch.randn(T, G, K, dtype=torch.double), -1)
    proportions[0, 0] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    return logits, proportions, present


def bags_of(logits, proportions, present):
    for t in range(T):
        for g in range(G):
            there = present[t, g].numpy()
            yield t, g, there, logits[t, g].numpy()[there], proportions[t, g].numpy()


def slow_sinkhorn(logits, proportions, rounds):
    """Scaling of a bag's own matrix of probabilities, columns and rows alternately."""
    plan = softmax(logits, axis=-1)
    for _ in range(rounds):
        plan = plan * (len(plan) * proportions / np.maximum(plan.sum(0), 1e-300))
        plan = plan / plan.sum(1, keepdims=True)
    return plan


def test_the_loss_of_a_bag_is_that_of_its_mean_prediction():
    logits, proportions, present = problem()
    result = proportion_loss(logits, proportions, present)
    for t, g, _, own, target in bags_of(logits, proportions, present):
        wanted = -(target * np.log(softmax(own, axis=-1).mean(0))).sum()
        assert result[t, g].item() == pytest.approx(wanted, rel=1e-9)


def test_a_bag_of_one_image_is_a_labelled_image():
    logits, labels = problem()[0].flatten(1, 2), torch.arange(T * G * M).view(T, -1) % K
    proportions = torch.nn.functional.one_hot(labels, K).double()
    result = proportion_loss(logits.unsqueeze(2), proportions, torch.ones(T, G * M, 1, dtype=torch.bool))
    zeros = torch.zeros(T, K, dtype=torch.double)
    torch.testing.assert_close(result, adjusted_cross_entropy(logits, labels, zeros, zeros[:, 0]))


def test_a_class_that_no_image_reaches_has_a_finite_gradient():
    logits = torch.tensor([[[[90.0, 0.0], [90.0, 0.0]]]], requires_grad=True)
    there = torch.tensor([[[True, False]]])
    loss = proportion_loss(logits, torch.tensor([[[0.0, 1.0]]]), there)
    loss.sum().backward()
    assert loss.item() == pytest.approx(90)
    # the absent image has none
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("rounds", [1, 10, 100])
def test_the_plan_is_that_of_alternate_scaling(rounds):
    logits, proportions, present = problem()
    plan = sinkhorn(logits, proportions, present, rounds)
    for t, g, there, own, target in bags_of(logits, proportions, present):
        np.testing.assert_allclose(plan[t, g].numpy()[there], slow_sinkhorn(own, target, rounds), atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_each_bags_mean_reaches_its_proportions(scale):
    logits, proportions, present = problem(scale=scale)
    plan = sinkhorn(logits.float(), proportions.float(), present)
    for t, g, there, _, target in bags_of(logits, proportions, present):
        own = plan[t, g].numpy()[there]
        np.testing.assert_allclose(own.sum(1), 1, atol=1e-5)
        assert np.abs(own.mean(0) - target).max() < 1e-4


def test_what_the_proportions_leave_open_the_logits_decide():
    # three images look like class 0, and one of them must be of class 1: the one that looks most like it
    logits = torch.tensor([[[[4.0, 0.0], [4.0, 3.0], [4.0, 1.0]]]])
    plan = sinkhorn(logits, torch.tensor([[[2 / 3, 1 / 3]]]), torch.ones(1, 1, 3, dtype=torch.bool))
    assert plan.argmax(-1).tolist() == [[[0, 1, 0]]]


def test_sharp_logits_stay_finite_and_bags_apart():
    logits, proportions, present = problem(scale=300.0)
    logits, proportions = logits.float(), proportions.float()
    plan = sinkhorn(logits, proportions, present)
    assert torch.isfinite(plan).all()
    loud = logits.clone()
    loud[0, 0] = 0
    loud[~present] = 1e4
    same = sinkhorn(loud, proportions, present)
    assert torch.equal(plan[1][present[1]], same[1][present[1]])
    assert torch.equal(plan[0, 1:][present[0, 1:]], same[0, 1:][present[0, 1:]])


def test_symmetric_cross_entropy_has_both_directions():
    logits = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    targets = torch.tensor([[[1.0, 0.0]], [[0.75, 0.25]]])
    p, q = math.e / (1 + math.e), 1 / (1 + math.e)
    result = symmetric_cross_entropy(logits, targets, torch.tensor([0.5, 2.0])).flatten().tolist()
    assert result[0] == pytest.approx(-math.log(p) - 0.5 * q * math.log(1e-4))
    forward, backward = -0.75 * math.log(p) - 0.25 * math.log(q), -p * math.log(0.75) - q * math.log(0.25)
    assert result[1] == pytest.approx(forward + 2 * backward)


@pytest.mark.parametrize("a", [1, 2, 8])
def test_the_middle_of_uniform_numbers_is_a_beta_draw(a):
    torch.manual_seed(0)
    drawn = beta_draws(torch.rand(20_000, 2 * a - 1, dtype=torch.double))
    # mean and variance of Beta(a, a), to five standard errors
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.05)
