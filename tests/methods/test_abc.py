from __future__ import annotations

import pytest
import torch

from tests.methods.slow import best, cross_entropy, logits_of, mean, softmax
from ulfine_fast.ops.prototypes import normalize


@pytest.mark.parametrize("done", [0.0, 0.6])
def test_the_auxiliary_head_is_balanced(world, done):
    trials, method, state, batch = world(method="abc", threshold=0.7, lambda_u=0.5)
    state.parameters["auxiliary"] = normalize(trials.prototypes + 0.4 * torch.randn(2, 3, 5))
    state.scratch["done"].fill_(done)
    plain, other, start, _ = world(method="fixmatch", threshold=0.7, lambda_u=0.5)
    losses, main, kinds = method.losses(trials, state, batch), other.losses(plain, start, batch), set()
    for t in range(2):
        head, prior = state.parameters["auxiliary"][t], trials.log_prior[t].exp().tolist()
        ratio = [min(prior) / p for p in prior]
        rows, labels = logits_of(batch.labeled[t], head), batch.labels[t].tolist()
        own = mean(ratio[y] * cross_entropy(row, y) for row, y in zip(rows, labels, strict=True))
        assert losses.labeled[t].item() == pytest.approx(main.labeled[t].item() + own, rel=1e-4)
        total = 0.0
        for easy, hard in zip(logits_of(batch.weak[t], head), logits_of(batch.strong[t], head), strict=True):
            probabilities = softmax(easy)
            sure, k = best(probabilities)
            kinds.add(sure >= 0.7)
            total += (1 - done * (1 - ratio[k])) * cross_entropy(hard, probabilities) if sure >= 0.7 else 0.0
        wanted = main.unlabeled[t].item() + 0.5 * total / 8
        assert losses.unlabeled[t].item() == pytest.approx(wanted, rel=1e-4)
    assert kinds == {True, False}


def test_the_step_is_counted_and_no_gradient_comes_from_the_pseudo_labels(world):
    trials, method, state, batch = world(method="abc", steps=4, threshold=0.0)
    batch.weak.requires_grad_(True)
    for tensor in state.parameters.values():
        tensor.requires_grad_(True)
    losses = method.losses(trials, state, batch)
    losses.unlabeled.sum().backward()
    assert batch.weak.grad is None
    for _ in range(3):
        method.after_step(trials, state, batch, losses)
    assert state.scratch["done"].tolist() == [0.75, 0.75]


def test_it_predicts_from_the_auxiliary_head_and_pseudo_labels_from_the_first(world):
    trials, method, state, batch = world(method="abc")
    state.parameters["auxiliary"] = normalize(torch.randn(2, 3, 5))
    wanted = 8.0 * batch.weak @ state.parameters["auxiliary"].transpose(1, 2)
    torch.testing.assert_close(method.logits(trials, state.tensors, batch.weak), wanted)
    first = 8.0 * batch.weak @ trials.prototypes.transpose(1, 2)
    torch.testing.assert_close(method.pseudo_logits(trials, state.tensors, batch.weak), first)
