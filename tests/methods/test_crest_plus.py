from __future__ import annotations

import pytest
import torch

from tests.methods.slow import best, cross_entropy, logits_of, softmax


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
def test_pseudo_labels_are_aligned_and_weighted_by_rate(world, done):
    trials, method, state, batch = world(method="crest_plus", threshold=0.8, lambda_u=0.6, align_power=0.5)
    state.memory["shares"] = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    state.memory["done"].fill_(done)
    losses, kinds = method.losses(trials, state, batch), set()
    for t in range(2):
        head, prior = trials.prototypes[t], trials.log_prior[t].exp().tolist()
        ranked = sorted(prior, reverse=True)
        # rank l of L takes the relative count of rank L + 1 - l
        rates = [(ranked[2 - ranked.index(p)] / ranked[0]) ** (1 / 3) for p in prior]
        power, total = 1 - 0.5 * done, 0.0
        for easy, hard in zip(logits_of(batch.weak[t], head), logits_of(batch.strong[t], head), strict=True):
            running = state.memory["shares"][t].tolist()
            moved = [q * p**power / s for q, p, s in zip(softmax(easy), prior, running, strict=True)]
            sure, k = best([m / sum(moved) for m in moved])
            kinds.add(sure >= 0.8)
            total += (1 - done * (1 - rates[k])) * cross_entropy(hard, k) if sure >= 0.8 else 0.0
        assert losses.unlabeled[t].item() == pytest.approx(0.6 * total / 8, rel=1e-4)
    assert kinds == {True, False}


def test_rates_of_a_long_tail_by_hand(world):
    trials, method, _, _ = world(method="crest_plus", sampling_power=0.5)
    trials.log_prior.copy_(torch.tensor([[0.16, 0.8, 0.04], [1 / 3, 1 / 3, 1 / 3]]).log())
    result = method.rates(trials, torch.ones(2))
    torch.testing.assert_close(result[0], torch.tensor([0.2**0.5, 0.05**0.5, 1.0]))
    torch.testing.assert_close(result[1], torch.ones(3))


def test_the_mean_pseudo_label_is_that_before_alignment(world):
    trials, method, state, batch = world(method="crest_plus", rho=0.6, steps=10)
    method.after_step(trials, state, batch, method.losses(trials, state, batch))
    for t in range(2):
        chances = [softmax(row) for row in logits_of(batch.weak[t], trials.prototypes[t])]
        wanted = [0.6 / 3 + 0.4 * sum(p[k] for p in chances) / 8 for k in range(3)]
        assert state.memory["shares"][t].tolist() == pytest.approx(wanted, rel=1e-4)
    assert state.memory["done"].tolist() == pytest.approx([0.1, 0.1])


def test_with_balanced_labels_and_even_pseudo_labels_it_is_fixmatch(world):
    trials, method, state, batch = world(method="crest_plus", adapter="residual", threshold=0.8)
    trials.log_prior.fill_(torch.tensor(1 / 3).log().item())
    state.memory["done"].fill_(0.7)
    plain, other, start, _ = world(method="fixmatch", adapter="residual", threshold=0.8)
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    torch.testing.assert_close(result.labeled, wanted.labeled)
    torch.testing.assert_close(result.unlabeled, wanted.unlabeled)
