from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ulfine_fast.related.multilabel.comic import modified_focus
from ulfine_fast.related.multilabel.losses import Focus, binary_cross_entropy, focal, make_targets, rarity

LABELS = torch.tensor([[[1, 0, -1], [-1, 1, 0]], [[1, 0, -1], [-1, 1, 0]]], dtype=torch.int8)  # (2, 2, 3)
LOGITS = torch.tensor([[[0.3, -2.0, 1.5], [4.0, -0.5, 0.1]], [[0.0, 1.0, -1.0], [2.0, -3.0, 0.5]]])


def slow(p, positive, negative, clip, weight, label, ignored):
    """One label's focal cost by its formula."""
    if label == 1:
        return -weight * (1 - p) ** positive * math.log(p)
    if label == -1 and ignored:
        return 0.0
    clipped = max(p - clip, 0.0)
    return -weight * clipped**negative * math.log(1 - clipped)


def test_against_a_slow_sum():
    positive, negative, weight = [0.0, 1.0, 2.0], [3.0, 4.0, 2.5], [1.0, 1.4, 2.0]
    shape = torch.ones(2, 1, 1)
    focus = Focus(
        *(torch.tensor(powers) * shape for powers in (positive, negative)), 0.05 * shape, torch.tensor(weight) * shape
    )
    targets = make_targets(LABELS, torch.tensor([False, True]))
    loss = focal(torch.nn.functional.logsigmoid(LOGITS), targets, focus)
    expected = [0.0, 0.0]
    for t, b, k in np.ndindex(2, 2, 3):
        p, label = float(LOGITS[t, b, k].sigmoid()), int(LABELS[t, b, k])
        expected[t] += slow(p, positive[k], negative[k], 0.05, weight[k], label, t == 1) / 2
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-5)


def test_without_focus_it_is_cross_entropy():
    values = {name: torch.zeros(2) for name in ("gamma_positive", "gamma_negative", "clip", "rarity_power")}
    values |= {name: torch.zeros(2) for name in ("tail_positive", "tail_negative")}
    targets = make_targets(LABELS, torch.tensor([False, False]))
    focus = modified_focus(values, torch.tensor([[100.0, 10.0, 1.0]]).expand(2, -1))
    logits = LOGITS.clone().requires_grad_()
    focal(torch.nn.functional.logsigmoid(logits), targets, focus).sum().backward()
    other = LOGITS.clone().requires_grad_()
    plain = binary_cross_entropy(other, targets)
    plain.sum().backward()
    torch.testing.assert_close(logits.grad, other.grad)
    known = torch.nn.functional.binary_cross_entropy_with_logits(LOGITS, (LABELS > 0).float(), reduction="none")
    torch.testing.assert_close(plain, known.sum(-1).mean(-1))


def test_focusing_factors_carry_no_gradient():
    logits = torch.tensor([[[0.7]]], requires_grad=True)
    shape = torch.ones(1, 1, 1)
    focus = Focus(2 * shape, 2 * shape, 0 * shape, shape)
    targets = make_targets(torch.ones(1, 1, 1, dtype=torch.int8), torch.tensor([False]))
    focal(torch.nn.functional.logsigmoid(logits), targets, focus).sum().backward()
    p = 1 / (1 + math.exp(-0.7))
    assert float(logits.grad) == pytest.approx(-((1 - p) ** 3), rel=1e-5)


def test_rarity_grows_towards_the_tail():
    rare = rarity(torch.tensor([[100.0, 10.0, 0.0]]), torch.tensor([1 / 3]))[0]
    expected = [1.0, (1 + math.log(10)) ** (1 / 3), (1 + math.log(100)) ** (1 / 3)]
    np.testing.assert_allclose(rare, expected, rtol=1e-6)
    assert rarity(torch.tensor([[100.0, 10.0]]), torch.tensor([0.0])).tolist() == [[1.0, 1.0]]
