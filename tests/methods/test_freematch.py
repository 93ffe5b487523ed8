from __future__ import annotations

import pytest
import torch

from tests.methods.slow import best, cross_entropy, logits_of, softmax
from ulfine_fast.ops.thresholds import fairness_loss


def test_thresholds_move_before_they_are_used(world):
    trials, method, state, batch = world(method="freematch", rho=0.6, tau=0.0, fairness=0.0, lambda_u=1.0)
    state.memory["confidence"] = torch.tensor([0.9, 0.5])
    state.memory["shares"] = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    before = {name: value.clone() for name, value in state.memory.items()}
    losses = method.losses(trials, state, batch)
    kept = []
    for t in range(2):
        head = trials.prototypes[t]
        chances = [softmax(row) for row in logits_of(batch.weak[t], head)]
        overall = 0.6 * before["confidence"][t].item() + 0.4 * sum(max(p) for p in chances) / 8
        running = [0.6 * before["shares"][t, k].item() + 0.4 * sum(p[k] for p in chances) / 8 for k in range(3)]
        total = 0.0
        for p, hard in zip(chances, logits_of(batch.strong[t], head), strict=True):
            sure, k = best(p)
            kept.append(sure >= overall * running[k] / max(running))
            total += cross_entropy(hard, k) * kept[-1]
        assert losses.unlabeled[t].item() == pytest.approx(total / 8, rel=1e-4)
    # the case must tell images over their threshold from those under it
    assert set(kept) == {True, False}


def test_running_means_are_those_that_the_loss_used(world):
    trials, method, state, batch = world(method="freematch", rho=0.9)
    before = {name: value.clone() for name, value in state.memory.items()}
    losses = method.losses(trials, state, batch)
    for name, value in before.items():
        assert torch.equal(state.memory[name], value), "losses must leave the memory alone"
    method.after_step(trials, state, batch, losses)
    for t in range(2):
        chances = [softmax(row) for row in logits_of(batch.weak[t], trials.prototypes[t])]
        confidence = 0.9 / 3 + 0.1 * sum(max(p) for p in chances) / 8
        assert state.memory["confidence"][t].item() == pytest.approx(confidence, rel=1e-4)
        for k in range(3):
            wanted = 0.9 / 3 + 0.1 * sum(p[k] for p in chances) / 8
            count = 0.9 / 3 + 0.1 * sum(best(p)[1] == k for p in chances) / 8
            assert state.memory["shares"][t, k].item() == pytest.approx(wanted, rel=1e-4)
            assert state.memory["histogram"][t, k].item() == pytest.approx(count, rel=1e-4)


def test_the_first_thresholds_are_lenient_as_published(world):
    trials, method, state, batch = world(method="freematch", rho=0.999)
    # at 1 / K no largest probability is under its threshold, or hardly
    assert method.losses(trials, state, batch).pseudo.mask.min() == 1


def test_with_one_fixed_threshold_it_is_fixmatch(world):
    trials, method, state, batch = world(method="freematch", rho=0.9999, tau=0.0, fairness=0.0)
    state.memory["confidence"].fill_(0.7)
    plain, other, start, _ = world(method="fixmatch", threshold=0.7)
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    assert torch.equal(result.pseudo.mask, wanted.pseudo.mask)
    assert 0 < wanted.pseudo.mask.mean() < 1
    torch.testing.assert_close(result.unlabeled, wanted.unlabeled)


def test_fairness_is_weighted_and_its_gradient_comes_from_the_strong_view_alone(world):
    trials, method, state, batch = world(method="freematch", fairness=0.5)
    twice, _, _, _ = world(method="freematch", fairness=1.0)
    state.parameters["linear"].requires_grad_(True)
    once = method.losses(trials, state, batch).regularizer
    torch.testing.assert_close(2 * once, method.losses(twice, state, batch).regularizer)
    batch.weak.requires_grad_(True)
    batch.strong.requires_grad_(True)
    method.losses(trials, state, batch).regularizer.sum().backward()
    assert batch.weak.grad is None
    assert batch.strong.grad.abs().max() > 0


def test_fairness_enters_with_its_sign_and_the_moved_means(world):
    trials, method, state, batch = world(method="freematch", fairness=0.5, rho=0.5)
    losses = method.losses(trials, state, batch)
    strong = method.linear_logits(trials, state, batch.strong)
    method.after_step(trials, state, batch, losses)
    memory = state.memory
    wanted = 0.5 * fairness_loss(strong, losses.pseudo.mask, memory["shares"], memory["histogram"])
    torch.testing.assert_close(losses.regularizer, wanted)
    assert (losses.regularizer < 0).all()
