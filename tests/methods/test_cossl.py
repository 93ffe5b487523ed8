from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.methods.slow import best, cross_entropy, logits_of, mean, softmax
from ulfine_fast.methods.cossl import balanced_weights, blend_chances
from ulfine_fast.ops.philox import Purpose, words
from ulfine_fast.ops.prototypes import normalize


def apart(world, **values):
    """A world whose newest and averaged balanced heads differ from the first head and from each other."""
    trials, method, state, batch = world(method="cossl", **values)
    state.parameters["balanced"] = normalize(trials.prototypes + 0.4 * torch.randn(2, 3, 5))
    state.memory["averaged.balanced"] = normalize(trials.prototypes + 0.4 * torch.randn(2, 3, 5))
    return trials, method, state, batch


def slow_enhanced(trials, batch, t, step, least):
    """Rows of trial t blended one by one, and how many were."""
    drawn = (words(trials.seeds, torch.tensor([step]), Purpose.BLEND, 12)[0, t] / 2**32).tolist()
    prior, rows, blended = trials.log_prior[t].exp().tolist(), [], 0
    for i, (x, y) in enumerate(zip(batch.labeled[t], batch.labels[t].tolist(), strict=True)):
        if drawn[i] < (max(prior) - prior[y]) / max(prior):
            kept = 1 - (1 - least) * drawn[6 + i]
            x = kept * x + (1 - kept) * batch.strong[t, i]
            blended += 1
        rows.append(x / x.norm())
    return torch.stack(rows), blended


def test_losses_are_fixmatchs_and_those_of_balanced_enhanced_rows(world):
    trials, method, state, batch = apart(world, threshold=0.6, lambda_u=0.5, least_labeled=0.3)
    state.scratch["step"].fill_(7)
    losses, blended, kinds = method.losses(trials, state, batch), 0, set()
    for t in range(2):
        rows, count = slow_enhanced(trials, batch, t, 7, 0.3)
        blended, labels, prior = blended + count, batch.labels[t].tolist(), trials.log_prior[t].exp().tolist()
        first, head = trials.prototypes[t], state.parameters["balanced"][t]
        main = mean(cross_entropy(row, y) for row, y in zip(logits_of(batch.labeled[t], first), labels, strict=True))
        own = mean(cross_entropy(row, y) / (3 * prior[y]) for row, y in zip(logits_of(rows, head), labels, strict=True))
        assert losses.labeled[t].item() == pytest.approx(main + own, rel=1e-4)
        total = 0.0
        for easy, hard in zip(logits_of(batch.weak[t], head), logits_of(batch.strong[t], first), strict=True):
            sure, k = best(softmax(easy))
            kinds.add(sure >= 0.6)
            total += cross_entropy(hard, k) if sure >= 0.6 else 0.0
        assert losses.unlabeled[t].item() == pytest.approx(0.5 * total / 8, rel=1e-4)
    assert 0 < blended < 12
    assert kinds == {True, False}


def test_rarer_classes_are_blended_more_often_and_classes_count_the_same():
    log_prior = torch.tensor([[0.8, 0.16, 0.04, 1e-8]]).log()
    torch.testing.assert_close(blend_chances(log_prior), torch.tensor([[0.0, 0.8, 0.95, 1.0]]))
    weights = balanced_weights(log_prior)
    torch.testing.assert_close(weights * log_prior.exp(), torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]))


def test_a_fraction_of_one_or_no_unlabelled_images_blends_nothing(world):
    trials, method, state, batch = apart(world, least_labeled=1.0)
    torch.testing.assert_close(method.enhanced(trials, state, batch), batch.labeled)
    torch.testing.assert_close(method.enhanced(trials, state, replace(batch, strong=None)), batch.labeled)


def test_more_labelled_than_unlabelled_rows_share_their_partners(world):
    trials, method, state, batch = apart(world, least_labeled=0.0)
    few = replace(batch, strong=batch.strong[:, :1])
    same = replace(batch, strong=batch.strong[:, :1].expand(-1, 6, -1))
    torch.testing.assert_close(method.enhanced(trials, state, few), method.enhanced(trials, state, same))


def test_the_balanced_loss_moves_its_head_alone(world):
    trials, method, state, batch = world(method="cossl", adapter="residual", threshold=1.0)
    for tensor in state.parameters.values():
        tensor.requires_grad_(True)
    plain, other, start, _ = world(method="fixmatch", adapter="residual", threshold=1.0)
    for tensor in start.parameters.values():
        tensor.requires_grad_(True)
    method.losses(trials, state, batch).labeled.sum().backward()
    other.losses(plain, start, batch).labeled.sum().backward()
    torch.testing.assert_close(state.parameters["adapter.up"].grad, start.parameters["adapter.up"].grad)
    assert state.parameters["balanced"].grad.abs().max() > 0


def test_averages_follow_the_weights_and_predict(world):
    trials, method, state, batch = world(method="cossl", adapter="residual", weight_average=0.75)
    before = {name: tensor.clone() for name, tensor in state.memory.items()}
    for name in ("balanced", "adapter.up"):
        state.parameters[name] = torch.randn_like(state.parameters[name])
    method.after_step(trials, state, batch, method.losses(trials, state, batch))
    assert state.scratch["step"].tolist() == [1, 1]
    for name, tensor in state.memory.items():
        newest = state.parameters[name.removeprefix("averaged.")]
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * newest)
    state.memory["averaged.adapter.up"].zero_()
    wanted = 8.0 * batch.weak @ normalize(state.memory["averaged.balanced"]).transpose(1, 2)
    torch.testing.assert_close(method.logits(trials, state.tensors, batch.weak), wanted)
    wanted = 8.0 * batch.weak @ normalize(state.parameters["balanced"]).transpose(1, 2)
    torch.testing.assert_close(method.pseudo_logits(trials, state.tensors, batch.weak), wanted)
