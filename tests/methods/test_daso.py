from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.methods.conftest import pool_of
from tests.methods.slow import best, cross_entropy, logits_of, mean, softmax
from ulfine_fast.methods.daso import blend_weights
from ulfine_fast.ops.prototypes import normalize


def with_means(world, **values):
    """DASO's world with class means of its own and a distribution of pseudo-labels."""
    trials, method, state, batch = world(method="daso", **values)
    state.memory["visual"] = normalize(torch.randn(2, 3, 5))
    state.memory["seen"] = torch.ones(2, 3, dtype=torch.bool)
    state.memory["guessed"] = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    return trials, method, state, batch


def slow_blend(linear, semantic, guessed, temperature):
    powers = [g ** (1 / temperature) for g in guessed]
    m = powers[best(linear)[1]] / max(powers)
    return [(1 - m) * p + m * q for p, q in zip(linear, semantic, strict=True)]


@pytest.mark.parametrize("temperature", [0.3, 1.5])
def test_pseudo_labels_blend_both_classifiers(world, temperature):
    trials, method, state, batch = with_means(world, blend_temperature=temperature, threshold=0.95, lambda_u=0.8)
    losses, kinds = method.losses(trials, state, batch), set()
    for t in range(2):
        head, means = trials.prototypes[t], state.memory["visual"][t]
        linear = [softmax(row) for row in logits_of(batch.weak[t], head)]
        semantic = [softmax(row) for row in logits_of(batch.weak[t], means, 1 / 0.05)]
        total = 0.0
        for p, q, hard in zip(linear, semantic, logits_of(batch.strong[t], head), strict=True):
            sure, k = best(slow_blend(p, q, state.memory["guessed"][t].tolist(), temperature))
            kinds.add(sure >= 0.95)
            total += cross_entropy(hard, k) if sure >= 0.95 else 0.0
        assert losses.unlabeled[t].item() == pytest.approx(0.8 * total / 8, rel=1e-4)
    assert kinds == {True, False}


def test_semantic_alignment_pulls_the_strong_view_to_the_weak_ones_class_means(world):
    trials, method, state, batch = with_means(world, semantic_weight=0.5, semantic_temperature=0.1)
    losses = method.losses(trials, state, batch)
    for t in range(2):
        means = state.memory["visual"][t]
        wanted = [softmax(row) for row in logits_of(batch.weak[t], means, 10.0)]
        strong = logits_of(batch.strong[t], means, 10.0)
        total = mean(cross_entropy(row, p) for row, p in zip(strong, wanted, strict=True))
        assert losses.regularizer[t].item() == pytest.approx(0.5 * total, rel=1e-4)


def test_blend_weights_by_hand():
    guessed = torch.tensor([[0.8, 0.2, 0.05], [0.25, 0.25, 0.5]])
    result = blend_weights(guessed, torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(result, torch.tensor([[1.0, 0.5, 0.25], [0.5, 0.5, 1.0]]))


def test_class_means_start_from_all_labelled_images_and_never_from_padding(world):
    trials, method, state, _ = world(method="daso")
    rows = normalize(torch.randn(6, 5))
    labels = [[0, 0, 2, -1], [1, 1, 1, 2]]
    pool = pool_of(rows, [[0, 1, 2, 5], [1, 3, 4, 5]], labels, [[0], [0]], [[True], [True]])
    method.refresh(trials, state, pool, 0)
    visual, seen = state.memory["visual"], state.memory["seen"]
    assert seen.tolist() == [[True, False, True], [False, True, True]]
    torch.testing.assert_close(visual[0, 0], normalize(rows[:2].mean(0)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(visual[0, 2], rows[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(visual[1, 1], normalize(rows[[1, 3, 4]].mean(0)), rtol=1e-4, atol=1e-5)
    assert visual[0, 1].abs().max() == 0
    method.refresh(trials, state, pool_of(-rows, [[0]] * 2, [[0]] * 2, [[0]] * 2, [[True]] * 2), 50)
    torch.testing.assert_close(visual[0, 2], rows[2], rtol=1e-4, atol=1e-5)


def test_a_class_without_labels_is_not_predicted_by_its_mean(world):
    trials, method, state, batch = with_means(world, semantic_weight=1.0)
    state.memory["seen"][:, 1] = False
    chances = torch.softmax(method.semantic(trials, state.tensors, batch.weak), -1)
    assert chances[..., 1].max() == 0
    assert torch.isfinite(method.losses(trials, state, batch).regularizer).all()


def test_memories_move_by_labels_and_pseudo_labels(world):
    trials, method, state, batch = with_means(world, visual_momentum=0.8, rho=0.6)
    visual, guessed = state.memory["visual"].clone(), state.memory["guessed"].clone()
    losses = method.losses(trials, state, batch)
    method.after_step(trials, state, batch, losses)
    for t in range(2):
        for k in range(3):
            fraction = (losses.pseudo.labels[t] == k).float().mean()
            torch.testing.assert_close(state.memory["guessed"][t, k], 0.6 * guessed[t, k] + 0.4 * fraction)
            members = batch.labeled[t][batch.labels[t] == k]
            wanted = visual[t, k]
            if len(members):
                wanted = torch.nn.functional.normalize(0.8 * visual[t, k] + 0.2 * members.mean(0), dim=0)
            torch.testing.assert_close(state.memory["visual"][t, k], wanted, rtol=1e-4, atol=1e-5)


def test_where_only_unpredicted_classes_would_blend_it_is_fixmatch(world):
    trials, method, state, batch = with_means(world, blend_temperature=0.01, tau=0.0, semantic_weight=0.0)
    state.memory["guessed"] = torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5]])
    # no image is predicted as the one class that is blended
    far = normalize(trials.prototypes[:, 0] - trials.prototypes[:, 1]).unsqueeze(1)
    batch = replace(batch, weak=far.expand(-1, 8, -1))
    plain, other, start, _ = world(method="fixmatch")
    result, wanted = method.losses(trials, state, batch), other.losses(plain, start, batch)
    torch.testing.assert_close(result.pseudo.probabilities, wanted.pseudo.probabilities)
    torch.testing.assert_close(result.unlabeled, wanted.unlabeled)
    torch.testing.assert_close(result.labeled, wanted.labeled)


@pytest.mark.parametrize("sharpen", [0.5, 2.0])
def test_pseudo_logits_give_the_blend_at_any_temperature(world, sharpen):
    trials, method, state, batch = with_means(world, sharpen=sharpen)
    logits = method.pseudo_logits(trials, state.tensors, batch.weak)
    pseudo = method.pseudo_labels(trials, state, batch)
    torch.testing.assert_close(torch.softmax(logits / sharpen, -1), pseudo.probabilities)
    linear = torch.softmax(method.logits(trials, state.tensors, batch.weak) / sharpen, -1)
    semantic = torch.softmax(method.semantic(trials, state.tensors, batch.weak), -1)
    m = blend_weights(state.memory["guessed"], trials.values["blend_temperature"]).gather(1, linear.argmax(-1))
    torch.testing.assert_close(pseudo.probabilities, torch.lerp(linear, semantic, m.unsqueeze(-1)))
