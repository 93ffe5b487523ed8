"""Gradients of the specification by finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from ulfine_fast.core.heads import apply_adapter, cosine_logits, new_adapter
from ulfine_fast.ops.fusion import fuse
from ulfine_fast.ops.losses import masked_mean
from ulfine_fast.ops.margins import smoothed_cross_entropy, with_margin
from ulfine_fast.ops.prototypes import class_means, fit_prototypes, normalize

T, B, K, D, R = 2, 3, 4, 5, 2


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_adapter():
    start = new_adapter(torch.tensor([0, 1]), D, torch.full((T,), R))
    names = sorted(start)
    # moved away from the start, where W_up is zero and most gradients with it
    tensors = [(start[name].double() + draw(*start[name].shape, seed=3)).detach().requires_grad_() for name in names]
    features, strength = normalize(draw(T, B, D)).detach(), torch.tensor([0.5, 1.0], dtype=torch.float64)

    def run(*values):
        return apply_adapter(dict(zip(names, values, strict=True)), features, strength)

    assert gradcheck(run, tensors)


def test_padded_ranks_have_no_gradient_beyond_their_own():
    start = new_adapter(torch.tensor([0, 1]), D, torch.tensor([1, R]))
    tensors = {name: value.double().requires_grad_() for name, value in start.items()}
    apply_adapter(
        tensors, normalize(draw(T, B, D)).detach(), torch.ones(T, dtype=torch.float64)
    ).square().sum().backward()
    assert tensors["adapter.up"].grad[0, 1:].abs().sum() == 0
    assert tensors["adapter.down"].grad[0, :, 1:].abs().sum() == 0


def test_cosine_logits():
    scale = torch.tensor([25.0, 3.0], dtype=torch.float64)
    assert gradcheck(lambda x, w: cosine_logits(x, w, scale), (draw(T, B, D), draw(T, K, D, seed=1)))


@pytest.mark.parametrize("rule", ["standardize", "max-ratio", "none"])
def test_fused_logits(rule):
    eta = torch.tensor([0.3, 0.8], dtype=torch.float64)
    assert gradcheck(lambda f, s: fuse(f, s, eta, rule), (draw(T, B, K), draw(T, B, K, seed=1)))


def test_fitted_prototypes():
    alpha = torch.rand(T, K, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    seen = torch.tensor([[True, False, True, True], [False, False, True, True]])
    assert gradcheck(lambda c, v: fit_prototypes(c, v, alpha, seen), (draw(T, K, D), draw(T, K, D, seed=1)))


def test_class_means():
    labels = torch.tensor([[0, 0, 3], [1, 2, 2]])
    assert gradcheck(lambda x: class_means(x, labels, K)[0], (draw(T, B, D),))


def test_losses_with_margins_and_smoothing():
    labels = torch.tensor([[0, 1, 3], [2, 2, 0]])
    margins, smoothing = torch.full((T, K), 0.2, dtype=torch.float64), torch.full((T,), 0.1, dtype=torch.float64)
    assert gradcheck(lambda z: with_margin(z, labels, margins), (draw(T, B, K),))
    assert gradcheck(lambda z: smoothed_cross_entropy(z, labels, smoothing), (draw(T, B, K),))


def test_masked_mean():
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert gradcheck(lambda values: masked_mean(values, mask), (draw(T, B),))
