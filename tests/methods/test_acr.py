from __future__ import annotations

import pytest
import torch

from tests.methods.slow import best, cross_entropy, logits_of, mean, softmax
from ulfine_fast.ops.distributions import distance_from_labeled
from ulfine_fast.ops.prototypes import normalize


def two_branches(world, **values):
    """ACR's world with heads apart from each other and an estimate that is not uniform."""
    trials, method, state, batch = world(method="acr", **values)
    for name in ("linear", "balanced"):
        state.parameters[name] = normalize(state.parameters[name] + 0.4 * torch.randn(2, 3, 5))
    state.memory["estimated"] = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])
    return trials, method, state, batch


def slow_target(plain, branch, shift, threshold):
    """The class a branch is taught and whether it is."""
    fairer, k = best(softmax([z - s for z, s in zip(plain, shift, strict=True)]))
    return k, fairer >= threshold or max(softmax(branch)) >= threshold


def test_both_branches_are_taught_by_the_fairer_logits(world):
    trials, method, state, batch = two_branches(world, tau=1.5, tau_u=2.0, threshold=0.8, lambda_u=0.7)
    losses, kinds = method.losses(trials, state, batch), set()
    distance = distance_from_labeled(state.memory["estimated"], trials.log_prior.exp())
    for t in range(2):
        heads = [state.parameters[name][t] for name in ("linear", "balanced")]
        log_prior = trials.log_prior[t].tolist()
        shifts = [[2.0 * distance[t].item() * p for p in log_prior], [2.0 * p for p in log_prior]]
        labeled_logits = [logits_of(batch.labeled[t], head) for head in heads]
        labels = batch.labels[t].tolist()
        labeled = mean(cross_entropy(row, y) for row, y in zip(labeled_logits[0], labels, strict=True))
        adjust = [1.5 * p for p in log_prior]
        labeled += mean(cross_entropy(row, y, adjust) for row, y in zip(labeled_logits[1], labels, strict=True))
        assert losses.labeled[t].item() == pytest.approx(labeled, rel=1e-4)
        weak = [logits_of(batch.weak[t], head) for head in heads]
        strong = [logits_of(batch.strong[t], head) for head in heads]
        total = 0.0
        for i in range(8):
            for b in (0, 1):
                k, kept = slow_target(weak[0][i], weak[b][i], shifts[b], 0.8)
                total += cross_entropy(strong[b][i], k) if kept else 0.0
                kinds.add((b, kept))
        assert losses.unlabeled[t].item() == pytest.approx(0.7 * total / 8, rel=1e-4)
    assert len(kinds) == 4


def test_the_estimate_moves_by_the_balanced_branchs_confident_pseudo_labels(world):
    trials, method, state, batch = two_branches(world, rho=0.8, threshold=0.95)
    before = state.memory["estimated"].clone()
    losses = method.losses(trials, state, batch)
    method.after_step(trials, state, batch, losses)
    for t in range(2):
        chances = [softmax(row) for row in logits_of(batch.weak[t], state.parameters["balanced"][t])]
        sure = [best(p)[1] for p in chances if max(p) >= 0.95]
        assert 0 < len(sure) < 8
        for k in range(3):
            wanted = 0.8 * before[t, k].item() + 0.2 * sure.count(k) / len(sure)
            assert state.memory["estimated"][t, k].item() == pytest.approx(wanted, rel=1e-4)


def test_the_estimate_rests_where_nothing_is_sure(world):
    trials, method, state, batch = two_branches(world, threshold=1.0)
    before = state.memory["estimated"].clone()
    method.after_step(trials, state, batch, method.losses(trials, state, batch))
    assert torch.equal(state.memory["estimated"], before)


def test_the_plain_branch_is_adjusted_less_where_distributions_agree(world):
    trials, method, state, _ = two_branches(world)
    state.memory["estimated"] = trials.log_prior.exp()
    near = method.strength(trials, state)
    state.memory["estimated"] = torch.full((2, 3), 1 / 3)
    assert (near < method.strength(trials, state)).all()
    assert (near < 2 / 3).all()


def test_with_balanced_labels_both_branches_are_fixmatch(world):
    trials, method, state, batch = world(method="acr", adapter="residual")
    trials.log_prior.fill_(-torch.log(torch.tensor(3.0)).item())
    plain, other, start, _ = world(method="fixmatch", adapter="residual")
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    torch.testing.assert_close(result.labeled, 2 * wanted.labeled)
    torch.testing.assert_close(result.unlabeled, 2 * wanted.unlabeled)


def test_it_predicts_from_the_balanced_branch_and_pseudo_labels_from_the_plain_one(world):
    trials, method, state, batch = two_branches(world, tau_u=2.0)
    balanced = 8.0 * batch.weak @ state.parameters["balanced"].transpose(1, 2)
    torch.testing.assert_close(method.logits(trials, state.tensors, batch.weak), balanced)
    plain = 8.0 * batch.weak @ state.parameters["linear"].transpose(1, 2) - 2.0 * trials.log_prior.unsqueeze(1)
    torch.testing.assert_close(method.pseudo_logits(trials, state.tensors, batch.weak), plain)
