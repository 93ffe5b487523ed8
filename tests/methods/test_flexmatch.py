from __future__ import annotations

import pytest
import torch

from tests.methods.slow import best, cross_entropy, logits_of, softmax


def with_pool(world, **values):
    """FlexMatch's world with classes noted for a pool of 20 images, four of them padding in the first trial."""
    trials, method, state, batch = world(method="flexmatch", **values)
    assigned = torch.full((2, 20), -1)
    assigned[0, :9] = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1])
    assigned[1, :15] = torch.tensor([2] * 12 + [1] * 3)
    present = torch.ones(2, 20, dtype=torch.bool)
    present[0, 16:] = False
    state.scratch = {"assigned": assigned, "present": present}
    return trials, method, state, batch


def test_thresholds_follow_the_learning_effect(world):
    trials, method, state, _ = with_pool(world, threshold=0.9)
    # 7 of class 0, 2 of class 1, 7 of none; then 3 of class 1, 12 of class 2, 5 of none
    effects = [[1.0, 2 / 7, 0.0], [0.0, 0.25, 1.0]]
    wanted = torch.tensor([[0.9 * b / (2 - b) for b in row] for row in effects])
    torch.testing.assert_close(method.class_thresholds(trials, state), wanted)


def test_pseudo_labels_train_over_their_classs_threshold(world):
    trials, method, state, batch = with_pool(world, threshold=0.9, tau=0.0, lambda_u=0.5)
    losses, thresholds, kinds = method.losses(trials, state, batch), method.class_thresholds(trials, state), set()
    for t in range(2):
        head, total = trials.prototypes[t], 0.0
        for easy, hard in zip(logits_of(batch.weak[t], head), logits_of(batch.strong[t], head), strict=True):
            sure, k = best(softmax(easy))
            kinds.add((sure >= thresholds[t, k].item(), sure >= 0.9))
            total += cross_entropy(hard, k) if sure >= thresholds[t, k].item() else 0.0
        assert losses.unlabeled[t].item() == pytest.approx(0.5 * total / 8, rel=1e-4)
    # some train that the fixed threshold would have left out, and some do not
    assert {(True, False), (False, False), (True, True)} <= kinds


def test_only_images_over_the_fixed_threshold_are_noted(world):
    trials, method, state, batch = with_pool(world, threshold=0.9)
    before = state.scratch["assigned"].clone()
    losses = method.losses(trials, state, batch)
    method.after_step(trials, state, batch, losses)
    for t in range(2):
        wanted = before[t].tolist()
        noted = {}
        rows = logits_of(batch.weak[t], trials.prototypes[t])
        for position, row in zip(batch.positions[t].tolist(), rows, strict=True):
            sure, k = best(softmax(row))
            if sure >= 0.9:
                noted[position] = max(k, noted.get(position, -1))
        assert noted
        for position, k in noted.items():
            wanted[position] = k
        assert state.scratch["assigned"][t].tolist() == wanted


def test_where_all_classes_are_learned_alike_it_is_fixmatch(world):
    trials, method, state, batch = with_pool(world, tau=0.0, threshold=0.8)
    state.scratch["assigned"] = (torch.arange(18) % 3).repeat(2, 1)
    state.scratch["present"] = torch.ones(2, 18, dtype=torch.bool)
    plain, other, start, _ = world(method="fixmatch", threshold=0.8)
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    assert 0 < wanted.pseudo.mask.mean() < 1
    torch.testing.assert_close(result.unlabeled, wanted.unlabeled)
    torch.testing.assert_close(result.labeled, wanted.labeled)
