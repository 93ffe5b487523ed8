from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.methods.conftest import pool_of
from tests.methods.slow import log_softmax

T, B, U, K, D = 2, 6, 8, 3, 5


def prepared(world, assigned=None, **values):
    """Two trials with heads apart from each other and some classes already assigned to the twenty unlabelled images."""
    trials, method, state, batch = world(
        **{"method": "finessl", "lambda_u": 0.7, "smoothing": 0.4, "margin": 6.0, **values}
    )
    pool = pool_of(torch.randn(30, D), [[0]] * T, [[0]] * T, [list(range(20))] * T, [[True] * 20] * T)
    method.refresh(trials, state, pool, 0)
    with torch.no_grad():
        for name in ("linear", "auxiliary"):
            state.parameters[name].add_(0.3 * torch.randn(T, K, D))
    if assigned is not None:
        state.scratch["assigned"][:, : len(assigned)] = torch.tensor(assigned)
    return trials, method, state, batch


def cosines(features, weights, scale):
    return [[scale * torch.nn.functional.cosine_similarity(x, w, dim=0).item() for w in weights] for x in features]


def slow_margins(assigned, strength):
    counts = [assigned.count(k) for k in range(K)]
    beta = [count / max(counts) for count in counts]
    return [strength * (max(beta) - min(beta)) * (1 - b) / (1 + b) for b in beta]


def slow_loss(row, label, margin, shift=(0.0,) * K):
    """Margins stand on all classes but the label's, as published."""
    moved = [z + shift[k] + (margin if k != label else 0.0) for k, z in enumerate(row)]
    return -log_softmax(moved)[label]


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_losses_are_the_papers_row_by_row(world, tau):
    assigned = [0, 0, 0, 0, 1, 1]
    trials, method, state, batch = prepared(world, assigned, tau=tau, threshold=0.6)
    losses = method.losses(trials, state, batch)
    margins = slow_margins(assigned, 6.0)
    for t in range(T):
        heads = [state.parameters[name][t] for name in ("linear", "auxiliary")]
        main, auxiliary = (cosines(batch.labeled[t], head, 8.0) for head in heads)
        shift, labels = [tau * p for p in trials.log_prior[t].tolist()], batch.labels[t].tolist()
        labeled = sum(slow_loss(row, y, margins[y], shift) for row, y in zip(main, labels, strict=True))
        labeled += sum(slow_loss(row, y, 0.0, shift) for row, y in zip(auxiliary, labels, strict=True))
        assert losses.labeled[t].item() == pytest.approx(labeled / B, rel=1e-4)
        total, smoothed = 0.0, []
        weak, strong = ([cosines(x[t], head, 8.0) for head in heads] for x in (batch.weak, batch.strong))
        for i in range(U):
            chances = [math.exp(z) for z in log_softmax(weak[0][i])]
            label = chances.index(max(chances))
            confidence = math.exp(max(log_softmax(weak[1][i])))
            total += confidence * slow_loss(strong[0][i], label, margins[label]) / U
            if max(chances) >= 0.6:
                logs = log_softmax(strong[1][i])
                smoothed.append(-0.6 * logs[label] - 0.2 * (sum(logs) - logs[label]))
        wanted = 0.7 * total + sum(smoothed) / max(1, len(smoothed))
        assert losses.unlabeled[t].item() == pytest.approx(wanted, rel=1e-4)


def test_the_auxiliary_head_teaches_the_adapter_nothing(world):
    trials, method, state, batch = prepared(world, adapter="residual", lambda_u=0.0, threshold=0.0)
    for tensor in state.parameters.values():
        tensor.requires_grad_(True)
    method.losses(trials, state, batch).unlabeled.sum().backward()
    assert state.parameters["auxiliary"].grad.abs().max() > 0
    assert state.parameters["adapter.up"].grad.abs().max() == 0


def test_the_main_heads_scale_is_learned_and_predicts(world):
    trials, method, state, batch = prepared(world)
    state.parameters["linear.scale"].requires_grad_(True)
    method.losses(trials, state, batch).labeled.sum().backward()
    assert (state.parameters["linear.scale"].grad != 0).all()
    before = method.logits(trials, state.tensors, batch.weak)
    with torch.no_grad():
        state.parameters["linear.scale"].mul_(2)
    torch.testing.assert_close(method.logits(trials, state.tensors, batch.weak), 2 * before)


def test_it_remembers_the_last_sure_class_of_each_image(world):
    trials, method, state, batch = prepared(world, assigned=[2, 2, 2], threshold=0.5)
    batch = replace(batch, positions=torch.arange(U).repeat(T, 1))
    losses = method.losses(trials, state, batch)
    method.after_step(trials, state, batch, losses)
    for t in range(T):
        for i in range(U):
            earlier = 2 if i < 3 else -1
            sure = bool(losses.pseudo.mask[t, i])
            wanted = int(losses.pseudo.labels[t, i]) if sure else earlier
            assert int(state.scratch["assigned"][t, i]) == wanted
    assert (state.scratch["assigned"][:, U:] == -1).all()


def test_a_image_drawn_twice_keeps_one_of_its_classes(world):
    trials, method, state, batch = prepared(world, threshold=0.0)
    batch = replace(batch, positions=torch.zeros_like(batch.positions))
    losses = method.losses(trials, state, batch)
    method.after_step(trials, state, batch, losses)
    assert torch.equal(state.scratch["assigned"][:, 0], losses.pseudo.labels.amax(-1))


def test_no_margin_while_no_image_has_a_class(world):
    trials, method, state, _ = prepared(world)
    assert method.margins(trials, state).abs().max() == 0


def test_no_unlabelled_images_no_unlabelled_loss(world):
    trials, method, state, batch = prepared(world)
    batch = replace(batch, weak=None, strong=None, positions=None)
    losses = method.losses(trials, state, batch)
    method.after_step(trials, state, batch, losses)
    assert losses.unlabeled.tolist() == [0, 0]
    assert losses.pseudo is None


def test_margins_off_the_label_keep_rare_classes_alive(world):
    # with the same logits, a class that few were assigned loses more until it wins by its margin
    trials, method, state, batch = prepared(world, assigned=[0] * 9 + [1])
    assert method.margins(trials, state)[0].tolist() == pytest.approx([0.0, 6 * (8 / 9) / (10 / 9), 6.0], rel=1e-5)
    assert torch.isfinite(method.losses(trials, state, batch).labeled).all()
