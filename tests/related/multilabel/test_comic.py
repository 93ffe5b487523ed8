from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ulfine_fast.related.multilabel.comic import (
    Memory,
    balance_loss,
    correction_loss,
    head_tail_logits,
    modified_focus,
    plain_focus,
    restorable,
)
from ulfine_fast.related.multilabel.heads import head_logits, normalised
from ulfine_fast.related.multilabel.losses import make_targets

LABELS = torch.tensor([[[1, -1, -1], [-1, 0, 1]]], dtype=torch.int8)
LOGITS = torch.tensor([[[0.5, 2.0, -1.0], [3.0, 2.5, 0.2]]])


def values_of(**changed):
    values = {"gamma_positive": 0, "gamma_negative": 3, "clip": 0.05, "tail_positive": 0, "tail_negative": 1}
    values |= {"rarity_power": 1 / 3, "threshold": 0.7, "mean_momentum": 0.9, "margin": 1, "scale": 16, "shift": 1}
    values |= {"balance_weight": 1, "balance_power": 2}
    return {name: torch.tensor([float(value)]) for name, value in (values | changed).items()}


def cost(p, present, power, weight):
    spared = max(p - 0.05, 0.0)
    return -weight * math.log(p) if present else -weight * spared**power * math.log(1 - spared)


def test_only_unknown_labels_above_both_thresholds_are_restored():
    mean = torch.tensor([[0.1, 0.9, 0.1]])
    restored = restorable(LOGITS.sigmoid(), LABELS, mean, torch.tensor([0.7]))
    # 0.88 is above the threshold, but not above its class's mean; 0.92 is of a label that is known to be absent
    assert restored.tolist() == [[[False, False, False], [True, False, False]]]


def test_correction_against_a_slow_sum():
    counts, memory = torch.tensor([[20.0, 5.0, 10.0]]), Memory.empty(1, 3, 4, torch.device("cpu"))
    targets = make_targets(LABELS, torch.tensor([False]))
    values = values_of()
    loss = correction_loss(LOGITS, LABELS, targets, memory, counts, torch.tensor([40]), values)
    restored = np.array([0.1 * 0.5, 0.1 * 0.5, 0.0])  # one of two images each, and the running mean keeps 0.9
    np.testing.assert_allclose(memory.restored[0], restored, rtol=1e-5)
    np.testing.assert_allclose(memory.probability[0], 0.1 * LOGITS.sigmoid().mean(1)[0], rtol=1e-5)
    now = counts[0].numpy() + 40 * restored
    weight = (1 - np.log(now / now.max())) ** (1 / 6)
    total, present = 0.0, [[1, 1, 0], [1, 0, 1]]
    for b, k in np.ndindex(2, 3):
        logit = float(LOGITS[0, b, k]) - (1.0 if LABELS[0, b, k] == 1 else 0.0)
        total += cost(1 / (1 + math.exp(-logit)), present[b][k], 3 + weight[k], weight[k])
    assert float(loss) == pytest.approx(total / 4, rel=1e-5)  # four present labels


def test_modification_makes_rare_classes_count_more():
    focus = modified_focus(values_of(tail_positive=0.5), torch.tensor([[100.0, 10.0, 1.0]]))
    weight = focus.weight[0, 0]
    assert weight[0] == 1
    assert (weight.diff() > 0).all()
    torch.testing.assert_close(focus.negative[0, 0], 3 + weight)
    torch.testing.assert_close(focus.positive[0, 0], 0.5 * weight)
    plain = plain_focus(values_of(), 3)
    assert plain.negative[0, 0].tolist() == [3, 3, 3]
    assert plain.weight[0, 0].tolist() == [1, 1, 1]


def test_head_loses_the_mean_features_part_and_tail_gains_it():
    torch.manual_seed(0)
    weights = torch.randn(1, 3, 2, 4)
    features = torch.nn.functional.normalize(torch.randn(1, 5, 4), dim=-1)
    mean = torch.randn(1, 4)
    logits = head_logits({"weights": weights, "bias": torch.zeros(1, 3, 2)}, features, torch.tensor([16.0]))
    shifted = head_tail_logits(logits, normalised(weights), features, mean, values_of())
    unit = (mean[0] / mean[0].norm()).numpy()
    for head, sign in ((1, -1), (2, 1)):
        for b, k in np.ndindex(5, 2):
            w = weights[0, head, k].numpy()
            scaled = 16 * w / (np.linalg.norm(w) + 1 / 32)
            f = features[0, b].numpy()
            expected = scaled @ f + sign * (f @ unit) * (scaled @ unit)
            assert float(shifted[0, head - 1, b, k]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_balance_learns_from_the_worse_of_both():
    targets = make_targets(LABELS, torch.tensor([False]))
    values, counts = values_of(), torch.tensor([[20.0, 5.0, 10.0]])
    focus = modified_focus(values, counts)
    balanced = torch.zeros(1, 2, 3, requires_grad=True)
    others = torch.stack([LOGITS, -LOGITS], 1).requires_grad_()
    loss = balance_loss(balanced, others, targets, focus, values)
    weight = (1 - np.log(counts[0].numpy() / 20)) ** (1 / 3)
    alone, joint = [0.0, 0.0], [0.0, 0.0]
    for i, b, k in np.ndindex(2, 2, 3):
        p, here = float(others[0, i, b, k].detach().sigmoid()), bool(LABELS[0, b, k] == 1)
        alone[i] += cost(p, here, 3 + weight[k], weight[k]) / 2
        joint[i] += cost(p / 2, here, 3 + weight[k], weight[k]) / 2
    kappa = np.square(alone) / np.square(alone).sum()
    assert float(loss.detach()) == pytest.approx(sum(alone) + kappa @ joint, rel=1e-4)
    # what the balanced classifier learns from gets no gradient through it
    (lone,) = torch.autograd.grad(loss.sum(), others, retain_graph=True)
    silent = balance_loss(balanced, others, targets, focus, values_of(balance_weight=0))
    torch.testing.assert_close(lone, torch.autograd.grad(silent.sum(), others)[0])
