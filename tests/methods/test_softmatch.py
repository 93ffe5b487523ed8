from __future__ import annotations

import math
import statistics

import pytest
import torch

from tests.methods.slow import best, cross_entropy, logits_of, softmax


def slow_weights(chances, memory, t, rho):
    """Weights of one trial's guesses, and its running means after the batch."""
    running = [rho * memory["shares"][t, k].item() + (1 - rho) * sum(p[k] for p in chances) / 8 for k in range(3)]
    moved = [[q / s for q, s in zip(p, running, strict=True)] for p in chances]
    sure = [max(p) / sum(p) for p in moved]
    mean = rho * memory["mean"][t].item() + (1 - rho) * statistics.mean(sure)
    variance = rho * memory["variance"][t].item() + (1 - rho) * statistics.variance(sure)
    return [math.exp(-(min(c - mean, 0.0) ** 2) / (2 * variance / 4)) for c in sure], mean, variance, running


def with_means(world, **values):
    trials, method, state, batch = world(method="softmatch", **values)
    state.memory["mean"] = torch.tensor([0.9, 0.6])
    state.memory["variance"] = torch.tensor([0.02, 0.1])
    state.memory["shares"] = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    return trials, method, state, batch


def test_every_pseudo_label_trains_by_its_weight(world):
    trials, method, state, batch = with_means(world, rho=0.7, tau=0.0, lambda_u=1.0)
    losses, result = method.losses(trials, state, batch), []
    for t in range(2):
        head = trials.prototypes[t]
        chances = [softmax(row) for row in logits_of(batch.weak[t], head)]
        weights, _, _, _ = slow_weights(chances, state.memory, t, 0.7)
        strong = logits_of(batch.strong[t], head)
        # the class is that of the probabilities before alignment
        total = sum(w * cross_entropy(z, best(p)[1]) for w, z, p in zip(weights, strong, chances, strict=True))
        assert losses.unlabeled[t].item() == pytest.approx(total / 8, rel=1e-4)
        result += weights
    assert min(result) < 0.5
    assert max(result) == 1.0


def test_running_means_are_those_that_the_loss_used(world):
    trials, method, state, batch = with_means(world, rho=0.7)
    before = {name: value.clone() for name, value in state.memory.items()}
    method.after_step(trials, state, batch, method.losses(trials, state, batch))
    for t in range(2):
        chances = [softmax(row) for row in logits_of(batch.weak[t], trials.prototypes[t])]
        _, mean, variance, running = slow_weights(chances, before, t, 0.7)
        assert state.memory["mean"][t].item() == pytest.approx(mean, rel=1e-4)
        assert state.memory["variance"][t].item() == pytest.approx(variance, rel=1e-4)
        assert state.memory["shares"][t].tolist() == pytest.approx(running, rel=1e-4)


def test_with_a_mean_under_all_it_is_fixmatch_without_a_threshold(world):
    trials, method, state, batch = with_means(world, rho=0.9999, tau=0.0)
    state.memory["mean"] = torch.zeros(2)
    plain, other, start, _ = world(method="fixmatch", threshold=0.0)
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    torch.testing.assert_close(result.unlabeled, wanted.unlabeled)
    torch.testing.assert_close(result.labeled, wanted.labeled)


def test_a_batch_of_one_image_moves_the_variance_towards_none(world):
    trials, method, state, batch = world(method="softmatch", unlabeled=1, rho=0.5)
    method.after_step(trials, state, batch, method.losses(trials, state, batch))
    assert state.memory["variance"].tolist() == [0.5, 0.5]
