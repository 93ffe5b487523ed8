"""Each hand-written piece against the specification under autograd, in float64."""

from __future__ import annotations

import pytest
import torch

from ulfine_fast.core.fused.adapter import FusedAdapter
from ulfine_fast.core.fused.buffers import Buffers
from ulfine_fast.core.fused.heads import FusedHeads, add_orthogonality_gradient, inverse_lengths
from ulfine_fast.core.fused.loss import cross_entropy_gradient_
from ulfine_fast.core.fused.prototypes import fit_prototypes_, move_visual_
from ulfine_fast.core.heads import apply_adapter, cosine_logits
from ulfine_fast.ops.losses import adjusted_cross_entropy
from ulfine_fast.ops.prototypes import class_means, fit_prototypes, move_visual, normalize, orthogonality

SIZES = [(1, 3, 4, 1, 1), (3, 7, 5, 10, 4), (2, 5, 9, 2, 3)]  # T, rows, D, K, rank


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def adapters(trials, dim, rank):
    return {
        "adapter.scale": 1 + 0.3 * random(trials, dim),
        "adapter.shift": 0.3 * random(trials, dim),
        "adapter.down": random(trials, dim, rank),
        "adapter.up": random(trials, rank, dim),
    }


@pytest.mark.parametrize("size", SIZES)
def test_adapter_forward_and_backward(size):
    torch.manual_seed(0)
    trials, rows, dim, _, rank = size
    tensors, features = adapters(trials, dim, rank), normalize(random(trials, rows, dim))
    features[0, 0] = 0.0  # an image without a feature must not spoil its batch
    strength = torch.rand(trials, dtype=torch.float64)
    wanted = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out, upstream = apply_adapter(wanted, features, strength), random(trials, rows, dim)
    (out * upstream).sum().backward()

    velocity = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    adapted = torch.empty_like(features)
    fused = FusedAdapter(tensors, velocity, strength, Buffers(features))
    fused.prepare()
    memory = fused.rows(features, adapted)
    fused.forward(memory)
    torch.testing.assert_close(normalize(adapted), out.detach(), rtol=1e-7, atol=1e-9)
    inverse = torch.rsqrt(adapted.square().sum(-1, keepdim=True) + 1e-12)
    unit = adapted * inverse
    fused.backward(memory, inverse * (upstream - unit * (unit * upstream).sum(-1, keepdim=True)))
    for name, tensor in wanted.items():
        # gradients are added to what the velocity held
        torch.testing.assert_close(velocity[name] - 1, tensor.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("held", [False, True])
def test_heads_forward_and_backward(size, held):
    torch.manual_seed(1)
    trials, rows, dim, classes, _ = size
    weights, adapted = random(trials, classes, dim), random(trials, rows, dim)
    scale, decay = torch.rand(trials, dtype=torch.float64) + 1, torch.rand(trials, 1, dtype=torch.float64)
    learns = (torch.rand(trials, classes) > 0.5).double() if held else None
    w, x = weights.clone().requires_grad_(), adapted.clone().requires_grad_()
    logits, upstream = cosine_logits(normalize(x), w, scale), random(trials, rows, classes)
    (logits * upstream).sum().backward()

    velocity, rows_gradient = torch.ones_like(weights), torch.empty_like(adapted)
    fused = FusedHeads(weights, velocity, scale, learns, Buffers(weights))
    fused.prepare()
    memory = fused.rows(adapted)
    fused.forward(memory)
    torch.testing.assert_close(memory.logits, logits.detach())
    fused.backward(memory, upstream.clone(), rows_gradient, 0.5, decay)
    gradient = w.grad if learns is None else w.grad * learns.unsqueeze(2)
    torch.testing.assert_close(velocity, 0.5 + gradient + decay.unsqueeze(2) * weights, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(rows_gradient, x.grad, rtol=1e-7, atol=1e-9)


def test_lengths_of_zero_rows_are_finite():
    assert torch.isfinite(inverse_lengths(torch.zeros(2, 3))).all()
    torch.testing.assert_close(inverse_lengths(torch.tensor([[3.0, 4.0]])), torch.tensor([0.2]))


@pytest.mark.parametrize("size", SIZES)
def test_orthogonality_gradient(size):
    torch.manual_seed(2)
    trials, _, dim, classes, _ = size
    vectors, weight = random(trials, classes, dim), torch.rand(trials, dtype=torch.float64)
    c = vectors.clone().requires_grad_()
    wanted = orthogonality(c)
    (weight * wanted).sum().backward()
    velocity = torch.full_like(vectors, 2.0)
    result = add_orthogonality_gradient(vectors, inverse_lengths(vectors), weight, velocity, Buffers(vectors))
    torch.testing.assert_close(result, wanted.detach())
    torch.testing.assert_close(velocity - 2.0, c.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_cross_entropy_and_its_gradient(size, heads):
    torch.manual_seed(3)
    trials, rows, _, classes, _ = size
    logits = (10 * random(trials, rows, heads, classes)).requires_grad_()
    labels, weights = torch.randint(classes, (trials, rows)), torch.rand(trials, rows, dtype=torch.float64)
    none = torch.zeros(trials, dtype=torch.float64)
    prior = torch.zeros(trials, classes, dtype=torch.float64)
    each = [adjusted_cross_entropy(logits[:, :, h], labels, prior, none) for h in range(heads)]
    (weights * sum(each)).sum().backward()
    buffer = logits.detach().clone()
    result = cross_entropy_gradient_(buffer, labels, weights)
    torch.testing.assert_close(-result, torch.stack(each, dim=2).detach())
    torch.testing.assert_close(buffer, logits.grad, rtol=1e-7, atol=1e-12)


def test_a_hopeless_row_has_a_finite_loss():
    logits = torch.tensor([[[[0.0, 500.0]]]])
    result = cross_entropy_gradient_(logits, torch.tensor([[0]]), torch.ones(1, 1))
    assert torch.isfinite(result).all()
    assert logits.flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("size", SIZES)
def test_visual_prototypes_move_in_place(size):
    torch.manual_seed(4)
    trials, rows, dim, classes, _ = size
    labels, adapted = torch.randint(classes, (trials, rows)), random(trials, rows, dim)
    seen = torch.rand(trials, classes) > 0.5
    visual = normalize(random(trials, classes, dim)) * seen.unsqueeze(2)
    momentum = torch.rand(trials, dtype=torch.float64)
    means, counts = class_means(normalize(adapted), labels, classes)
    wanted = move_visual(visual, means, counts, seen, momentum)
    moved, now = visual.clone(), seen.clone()
    move_visual_(moved, now, adapted, inverse_lengths(adapted).unsqueeze(2), labels, momentum, Buffers(visual))
    torch.testing.assert_close(moved, wanted, rtol=1e-7, atol=1e-9)
    assert torch.equal(now, seen | (counts > 0))


@pytest.mark.parametrize("size", SIZES)
def test_textual_prototypes_are_fitted_in_place(size):
    torch.manual_seed(5)
    trials, _, dim, classes, _ = size
    seen = torch.rand(trials, classes) > 0.5
    textual, visual = random(trials, classes, dim), normalize(random(trials, classes, dim))
    alpha = torch.rand(trials, classes, dtype=torch.float64)
    alpha[:, 0], seen[:, 0] = 1.0, True  # the pace of the largest class may be one
    fitted = textual.clone()
    fit_prototypes_(fitted, visual, alpha, seen)
    torch.testing.assert_close(fitted, fit_prototypes(textual, visual, alpha, seen), rtol=1e-7, atol=1e-9)
