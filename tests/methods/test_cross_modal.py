from __future__ import annotations

from dataclasses import replace

import torch

from ulfine_fast.ops.losses import adjusted_cross_entropy


def test_texts_are_examples_of_their_classes(world):
    trials, method, state, batch = world(method="cross_modal")
    state.parameters["linear"] = torch.randn(2, 3, 5)
    result = method.losses(trials, state, batch)
    images = adjusted_cross_entropy(
        method.logits(trials, state.tensors, batch.labeled), batch.labels, trials.log_prior, torch.ones(2)
    )
    for t in range(2):
        unit = torch.nn.functional.normalize(state.parameters["linear"][t], dim=-1)
        texts = torch.nn.functional.cross_entropy(8.0 * trials.prototypes[t] @ unit.T, torch.arange(3))
        torch.testing.assert_close(result.labeled[t], (images[t].mean() + texts) / 2)
    assert result.unlabeled.tolist() == [0, 0]


def test_a_class_without_images_is_held_by_its_text(world):
    trials, method, state, batch = world(method="cross_modal")
    batch = replace(batch, labels=torch.zeros_like(batch.labels))
    linear = state.parameters["linear"].requires_grad_(True)
    for _ in range(50):
        method.losses(trials, state, batch).labeled.sum().backward()
        with torch.no_grad():
            linear.sub_(0.05 * linear.grad)
            linear.grad = None
    logits = method.logits(trials, state.tensors, trials.prototypes)
    assert logits.argmax(-1).tolist() == [[0, 1, 2]] * 2
