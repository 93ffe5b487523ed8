from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.methods.slow import log_softmax


@pytest.mark.parametrize(("threshold", "wanted"), [(0.0, {True}), (0.8, {True, False}), (1.0, {False})])
def test_sure_images_train_hard_and_the_others_softly(world, threshold, wanted):
    trials, method, state, batch = world(method="loft", threshold=threshold, lambda_u=3.0)
    losses = method.losses(trials, state, batch)
    kinds = set()
    for t in range(2):
        head, total = trials.prototypes[t], 0.0
        for easy, hard in zip(batch.weak[t], batch.strong[t], strict=True):
            chances = [math.exp(z) for z in log_softmax((8.0 * head @ easy).tolist())]
            logs = log_softmax((8.0 * head @ hard).tolist())
            sure = max(chances) >= threshold
            kinds.add(sure)
            targets = [float(c == max(chances)) for c in chances] if sure else chances
            total -= sum(p * z for p, z in zip(targets, logs, strict=True))
        assert losses.unlabeled[t].item() == pytest.approx(3.0 * total / 8, rel=1e-4)
    assert kinds == wanted


def test_the_labelled_loss_is_lightweights(world):
    trials, method, state, batch = world(method="loft", adapter="residual")
    _, plain, _, _ = world(method="lightweight", adapter="residual")
    torch.testing.assert_close(method.losses(trials, state, batch).labeled, plain.losses(trials, state, batch).labeled)


def test_no_gradient_flows_through_the_soft_labels(world):
    trials, method, state, batch = world(method="loft", threshold=1.0)
    linear = state.parameters["linear"].requires_grad_(True)
    method.losses(trials, state, batch).unlabeled.sum().backward()
    once = linear.grad.clone()
    linear.grad = None
    # where strong and weak agree, a soft label is a fixed point: its gradient must vanish
    method.losses(trials, state, replace(batch, strong=batch.weak)).unlabeled.sum().backward()
    assert linear.grad.abs().max() < 1e-5 < once.abs().max()


def test_no_unlabelled_images_no_unlabelled_loss(world):
    trials, method, state, batch = world(method="loft")
    losses = method.losses(trials, state, replace(batch, weak=None, strong=None))
    assert losses.unlabeled.tolist() == [0, 0]
    assert losses.pseudo is None
