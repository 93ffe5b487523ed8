from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.methods.slow import best, cross_entropy, logits_of, mean, softmax


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.8, 1.0])
def test_both_losses_are_the_published_ones(world, threshold):
    trials, method, state, batch = world(method="fixmatch", threshold=threshold, lambda_u=0.7)
    losses = method.losses(trials, state, batch)
    for t in range(2):
        head = trials.prototypes[t]
        rows = logits_of(batch.labeled[t], head)
        wanted = mean(cross_entropy(row, y) for row, y in zip(rows, batch.labels[t].tolist(), strict=True))
        assert losses.labeled[t].item() == pytest.approx(wanted, rel=1e-4)
        total = 0.0
        for easy, hard in zip(logits_of(batch.weak[t], head), logits_of(batch.strong[t], head), strict=True):
            sure, k = best(softmax(easy))
            total += cross_entropy(hard, k) if sure >= threshold else 0.0
        assert losses.unlabeled[t].item() == pytest.approx(0.7 * total / 8, rel=1e-4, abs=1e-6)
        assert losses.regularizer[t].item() == 0


def test_it_is_lightweight_fine_tuning_without_the_adjustment(world):
    trials, method, state, batch = world(method="fixmatch", adapter="residual")
    plain, other, start, _ = world(method="lightweight", adapter="residual", tau=0.0)
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    torch.testing.assert_close(result.labeled, wanted.labeled)
    torch.testing.assert_close(result.unlabeled, wanted.unlabeled)
    assert set(state.tensors) == set(start.tensors)


def test_no_gradient_flows_through_the_pseudo_labels(world):
    trials, method, state, batch = world(method="fixmatch", threshold=0.0)
    for tensor in state.parameters.values():
        tensor.requires_grad_(True)
    losses = method.losses(trials, state, batch)
    assert not losses.pseudo.probabilities.requires_grad
    losses.unlabeled.sum().backward()
    assert state.parameters["linear"].grad.abs().max() > 0


@pytest.mark.parametrize("name", ["fixmatch", "freematch", "acr", "simpro", "daso"])
def test_no_unlabelled_images_no_unlabelled_loss(world, name):
    trials, method, state, batch = world(method=name)
    losses = method.losses(trials, state, replace(batch, weak=None, strong=None, positions=None))
    before = {key: tensor.clone() for key, tensor in state.memory.items()}
    assert losses.unlabeled.tolist() == [0, 0]
    assert losses.regularizer.tolist() == [0, 0]
    assert losses.pseudo is None
    method.after_step(trials, state, batch, losses)
    # what is estimated from unlabelled images rests
    for key in set(before) - {"visual", "seen"}:
        torch.testing.assert_close(state.memory[key], before[key])


def test_published_settings_leave_the_labelled_loss_unadjusted(world):
    names = ("freematch", "daso")
    for name in names:
        trials, method, state, batch = world(method=name, tau=0.0)
        plain, other, start, _ = world(method="fixmatch")
        torch.testing.assert_close(
            method.losses(trials, state, batch).labeled, other.losses(plain, start, batch).labeled
        )
