"""Compiled passes against the plain functions that specify them; whole steps are in tests/core/test_arithmetic.py."""

from __future__ import annotations

import shutil

import pytest
import torch

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.core.fused.heads import inverse_lengths
from ulfine_fast.ops import native
from ulfine_fast.ops.fusion import fuse
from ulfine_fast.ops.losses import adjusted_cross_entropy
from ulfine_fast.ops.losses import pseudo_labels as plain_pseudo_labels
from ulfine_fast.ops.prototypes import class_means, fit_prototypes, move_visual, normalize

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
SIZES = [(1, 1, 1, 1), (3, 5, 2, 3), (2, 3, 10, 384), (3, 2, 101, 33), (1, 4, 1000, 5)]  # T, rows, K, D


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", SIZES)
def test_gather(size):
    trials, rows, _, dim = size
    store, slots = torch.randn(11, dim), torch.randint(11, (trials, rows))
    room, twin, means = (torch.zeros(trials, rows + 2, width) for width in (dim, dim, 1))
    native.gather(store, slots, room[:, 1:-1], twin[:, 1:-1], means[:, 1:-1])
    assert torch.equal(room[:, 1:-1], store[slots])
    assert torch.equal(twin, room)
    assert not room[:, [0, -1]].any()  # what lies around is not touched
    torch.testing.assert_close(means[:, 1:-1], store[slots].mean(-1, keepdim=True))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_cross_entropy_and_gradient(size, heads):
    trials, rows, classes, _ = size
    everything = 5 * torch.randn(trials, rows + 1, heads, classes)
    logits = everything[:, 1:].clone().requires_grad_()
    labels, weights = torch.randint(classes, (trials, rows)), torch.rand(trials, rows)
    adjustment = torch.randn(trials, 1, classes)
    one = torch.ones(trials)
    each = [adjusted_cross_entropy(logits[:, :, h], labels, adjustment[:, 0], one) for h in range(heads)]
    (weights * sum(each)).sum().backward()
    gradient, result = torch.zeros(trials, rows, heads, classes), torch.zeros(trials, rows, heads)
    native.cross_entropy_gradient(everything[:, 1:], adjustment, labels, weights, gradient, result)
    torch.testing.assert_close(-result, torch.stack(each, dim=2).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-4, atol=1e-6)


def test_a_diverged_row_has_a_loss_that_is_no_number_and_a_hopeless_one_a_finite_loss():
    logits = torch.tensor([[[[0.0, 500.0]], [[float("nan"), 0.0]], [[1.0, 2.0]]]])
    gradient, result = torch.zeros_like(logits), torch.zeros(1, 3, 1)
    none, labels = torch.zeros(1, 1, 2), torch.zeros(1, 3, dtype=torch.int64)
    native.cross_entropy_gradient(logits, none, labels, torch.ones(1, 3), gradient, result)
    assert result.isnan().flatten().tolist() == [False, True, False]
    assert result[0, 0].isfinite()
    assert gradient[0, 0].flatten().tolist() == [-1.0, 1.0]
    assert gradient[0, 1].isnan().all()


@pytest.mark.parametrize("size", [*SIZES, (2, 19, 10, 1)])
def test_pseudo_labels(size):
    trials, rows, classes, _ = size
    both = 5 * torch.randn(trials, rows + 1, 2, classes)
    linear, similarity = both[:, :rows, 0], both[:, :rows, 1]
    eta, threshold, temperature = torch.rand(trials), torch.rand(trials), torch.rand(trials) + 0.5
    wanted = plain_pseudo_labels(fuse(linear, similarity, eta, "standardize"), threshold, temperature)
    labels, mask, mean = native.pseudo_labels(linear, similarity, eta, threshold, temperature)
    assert torch.equal(labels, wanted.labels)
    assert torch.equal(mask, wanted.mask)
    torch.testing.assert_close(mean, wanted.probabilities.mean(1), rtol=1e-4, atol=1e-6)
    alone = native.pseudo_labels(linear[-1:], similarity[-1:], eta[-1:], threshold[-1:], temperature[-1:])
    assert torch.equal(alone[2], mean[-1:])


def test_pseudo_labels_of_equal_classes_take_the_first_and_a_diverged_trial_has_labels_among_the_classes():
    flat, half = torch.zeros(1, 2, 5), torch.full((1,), 0.5)
    assert native.pseudo_labels(flat, flat, half, half, half)[0].tolist() == [[0, 0]]
    spoilt = torch.full((1, 2, 5), float("nan"))
    labels, mask, _ = native.pseudo_labels(spoilt, spoilt, half, half, half)
    assert labels.tolist() == [[0, 0]]
    assert mask.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("size", [*SIZES[:3], (1, 2, 17, 33), (2, 70, 4, 5)])
def test_prototypes(size):
    trials, rows, classes, dim = size
    labels, adapted = torch.randint(classes, (trials, rows)), torch.randn(trials, rows + 1, dim)[:, :rows]
    seen = torch.rand(trials, classes) > 0.5
    visual = normalize(torch.randn(trials, classes, dim)) * seen.unsqueeze(2)
    textual, alpha, momentum = torch.randn(trials, classes, dim), torch.rand(trials, classes), torch.rand(trials)
    alpha[0, 0] = 1.0
    means, counts = class_means(normalize(adapted), labels, classes)
    moved = move_visual(visual, means, counts, seen, momentum)
    now = seen | (counts > 0)
    fitted = fit_prototypes(textual, moved, alpha, now)
    before = visual.clone()
    inverse = inverse_lengths(adapted).unsqueeze(2)
    native.move_prototypes_(visual, seen, textual, adapted, inverse, labels, momentum, alpha)
    assert torch.equal(seen, now)
    assert torch.equal(visual[counts == 0], before[counts == 0])  # a class that is not in the batch keeps its vector
    torch.testing.assert_close(visual, moved, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(textual, fitted, rtol=1e-4, atol=1e-5)


def test_the_exponential_function_is_exact_to_a_few_digits_of_float32():
    # a softmax of two classes whose logits are z and 0
    z = torch.cat([torch.linspace(-86.0, 86.0, 4001), torch.tensor([0.0, -1e-6, 1e-6])])
    logits = torch.stack([z, torch.zeros_like(z)], dim=1).view(1, -1, 1, 2)
    gradient, result = torch.zeros_like(logits), torch.zeros(1, len(z), 1)
    labels = torch.ones(1, len(z), dtype=torch.int64)
    native.cross_entropy_gradient(logits, torch.zeros(1, 1, 2), labels, torch.ones_like(z)[None], gradient, result)
    torch.testing.assert_close(gradient[0, :, 0, 0], torch.sigmoid(z.double()).float(), rtol=5e-7, atol=0.0)


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    native._built.cache_clear()
    monkeypatch.setattr(native, "_functions", {})
    try:
        wanted = "engine native needs a C compiler and none was found; install one, name it in CC, or use engine fused"
        assert native.why_not() == wanted
        with pytest.raises(InputError, match="needs a C compiler"):
            native.gather(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), *[torch.zeros(1, 1, 1)] * 3)
    finally:
        monkeypatch.undo()
        native._built.cache_clear()


def test_where_the_compiler_fails_it_says_so(monkeypatch):
    monkeypatch.setenv("CC", "false")
    native._built.cache_clear()
    try:
        assert "could not compile its passes" in native.why_not()
    finally:
        monkeypatch.undo()
        native._built.cache_clear()
