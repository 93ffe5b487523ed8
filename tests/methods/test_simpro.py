from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.methods.slow import cross_entropy, logits_of, mean, softmax


def with_counts(world, **values):
    """SimPro's world with both distributions on the way."""
    trials, method, state, batch = world(method="simpro", **values)
    state.memory["hidden"] = torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 2.0]])
    state.memory["all"] = torch.tensor([[6.0, 3.0, 1.0], [2.0, 1.0, 1.0]])
    return trials, method, state, batch


def log_prior_of(counts, tau):
    return [tau * math.log(c / sum(counts)) for c in counts]


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_losses_add_the_prior_of_all_and_pseudo_labels_that_of_the_unlabelled(world, tau):
    trials, method, state, batch = with_counts(world, tau=tau, threshold=0.7, lambda_u=0.6)
    losses, kinds = method.losses(trials, state, batch), set()
    for t in range(2):
        head, shift = trials.prototypes[t], log_prior_of(state.memory["all"][t].tolist(), tau)
        own = log_prior_of(state.memory["hidden"][t].tolist(), tau)
        rows, labels = logits_of(batch.labeled[t], head), batch.labels[t].tolist()
        labeled = mean(cross_entropy(row, y, shift) for row, y in zip(rows, labels, strict=True))
        assert losses.labeled[t].item() == pytest.approx(labeled, rel=1e-4)
        total = 0.0
        for easy, hard in zip(logits_of(batch.weak[t], head), logits_of(batch.strong[t], head), strict=True):
            probabilities = softmax([z + s for z, s in zip(easy, own, strict=True)])
            kinds.add(max(probabilities) >= 0.7)
            total += cross_entropy(hard, probabilities, shift) if max(probabilities) >= 0.7 else 0.0
        assert losses.unlabeled[t].item() == pytest.approx(0.6 * total / 8, rel=1e-4)
    assert kinds == {True, False}


def test_distributions_move_by_confident_pseudo_labels_and_by_labels(world):
    trials, method, state, batch = with_counts(world, rho=0.75, threshold=0.7)
    before = {name: value.clone() for name, value in state.memory.items()}
    losses = method.losses(trials, state, batch)
    method.after_step(trials, state, batch, losses)
    for t in range(2):
        own = log_prior_of(before["hidden"][t].tolist(), 1.0)
        rows = logits_of(batch.weak[t], trials.prototypes[t])
        probabilities = [softmax([z + s for z, s in zip(row, own, strict=True)]) for row in rows]
        for k in range(3):
            hidden = sum(p[k] for p in probabilities if max(p) >= 0.7)
            labeled = batch.labels[t].tolist().count(k)
            wanted = 0.75 * before["hidden"][t, k].item() + 0.25 * hidden
            assert state.memory["hidden"][t, k].item() == pytest.approx(wanted, rel=1e-4)
            wanted = 0.75 * before["all"][t, k].item() + 0.25 * (hidden + labeled)
            assert state.memory["all"][t, k].item() == pytest.approx(wanted, rel=1e-4)


def test_it_starts_with_a_uniform_and_with_the_labelled_distribution(world):
    trials, _, state, _ = world(method="simpro", batch_labeled=6, batch_unlabeled=9)
    torch.testing.assert_close(state.memory["hidden"], torch.full((2, 3), 3.0))
    torch.testing.assert_close(state.memory["all"], 6 * trials.log_prior.exp())


def test_at_the_start_confident_pseudo_labels_are_fixmatchs_and_labels_are_adjusted(world):
    trials, method, state, batch = world(method="simpro", threshold=0.6, tau=1.0)
    plain, other, start, _ = world(method="lightweight", threshold=0.6, tau=1.0)
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    torch.testing.assert_close(result.labeled, wanted.labeled)
    assert torch.equal(result.pseudo.labels, wanted.pseudo.labels)
    assert torch.equal(result.pseudo.mask, wanted.pseudo.mask)


def test_confident_pseudo_labels_at_tau_0_are_fixmatchs_loss(world):
    # at a high threshold soft probabilities are all but hard
    trials, method, state, batch = with_counts(world, threshold=0.999, tau=0.0, scale=60.0)
    plain, other, start, _ = world(method="fixmatch", threshold=0.999, scale=60.0)
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    assert wanted.pseudo.mask.sum() > 0
    torch.testing.assert_close(result.unlabeled, wanted.unlabeled, rtol=1e-2, atol=5e-3)


def test_a_batch_without_confident_pseudo_labels_leaves_the_unlabelled_prior(world):
    trials, method, state, batch = with_counts(world, threshold=1.0, rho=0.5)
    before = state.memory["hidden"].clone()
    method.after_step(trials, state, batch, method.losses(trials, state, batch))
    torch.testing.assert_close(state.memory["hidden"], 0.5 * before)
    state.memory["hidden"].zero_()
    even = method.pseudo_logits(trials, state.tensors, batch.weak)
    own = method.logits(trials, state.tensors, batch.weak)
    torch.testing.assert_close(torch.softmax(even, -1), torch.softmax(own, -1))


def test_it_finds_the_unlabelled_distribution_of_clear_images(world):
    trials, method, state, batch = world(method="simpro", scale=60.0, rho=0.5, unlabeled=10)
    truth = torch.tensor([[0] * 7 + [1] * 2 + [2], [0] + [1] * 2 + [2] * 7])
    clear = trials.prototypes.gather(1, truth.unsqueeze(-1).expand(-1, -1, 5))
    batch = replace(batch, weak=clear, strong=clear)
    for _ in range(20):
        method.after_step(trials, state, batch, method.losses(trials, state, batch))
    prior = state.memory["hidden"] / state.memory["hidden"].sum(-1, keepdim=True)
    torch.testing.assert_close(prior, torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]), atol=0.01, rtol=0)
