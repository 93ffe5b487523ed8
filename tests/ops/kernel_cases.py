"""Cases that tests/ops/test_kernels.py runs in a process of its own, see there."""

from __future__ import annotations

import math
import os

import pytest
import torch

from tests.conftest import make_clusters
from ulfine_fast import FitConfig, fit_many
from ulfine_fast.core.fused.buffers import Buffers
from ulfine_fast.core.fused.heads import add_orthogonality_gradient, inverse_lengths
from ulfine_fast.ops import kernels, philox
from ulfine_fast.ops.fusion import fuse
from ulfine_fast.ops.losses import adjusted_cross_entropy
from ulfine_fast.ops.losses import pseudo_labels as plain_pseudo_labels
from ulfine_fast.ops.prototypes import class_means, fit_prototypes, move_visual, normalize, orthogonality

DEVICE = os.environ["KERNEL_DEVICE"]
SIZES = [(1, 1, 1, 1), (3, 5, 2, 3), (1, 3, 10, 7), (3, 2, 101, 33), (1, 1, 1000, 5)]  # T, rows, K, D
WIDE = [(1, 3, 10, 384), (2, 2, 1, 512), (1, 3, 1000, 768), (1, 2, 1025, 1280)]
SIZES += WIDE
TILES = [(2, 19, 10, 1), (1, 9, 1500, 1)]  # more rows than a tile has


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def integers(below, *shape):
    return torch.randint(below, shape, device=DEVICE)


def test_kernels_are_in_use_here():
    assert kernels.usable(random(1))
    assert not kernels.usable(random(1).double())


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_gather(size, kind):
    trials, rows, _, dim = size
    store = random(11, dim).to(kind)
    store[0] = 0.0
    slots = integers(11, trials, rows)
    slots[0, 0] = 0
    room = random(trials, rows + 2, dim)
    before = room.clone()
    kernels.gather_rows(store, slots, room[:, 1:-1])
    torch.testing.assert_close(room[:, 1:-1], normalize(store[slots].float()), rtol=1e-5, atol=1e-6)
    assert torch.equal(room[:, [0, -1]], before[:, [0, -1]])  # what lies around is not touched


def test_gather_takes_the_smallest_and_largest_halves():
    store = torch.tensor([[6e-8, 0.0], [60000.0, -60000.0]], dtype=torch.float16, device=DEVICE)
    out = random(1, 2, 2)
    kernels.gather_rows(store, torch.tensor([[0, 1]], device=DEVICE), out)
    torch.testing.assert_close(out[0], normalize(store.float()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_cross_entropy_and_gradient(size, heads):
    trials, rows, classes, _ = size
    logits = (5 * random(trials, rows, heads, classes)).requires_grad_()
    labels, weights = integers(classes, trials, rows), torch.rand(trials, rows, device=DEVICE)
    weights[0, 0] = 0.0
    none, prior = torch.zeros(trials, device=DEVICE), torch.zeros(trials, classes, device=DEVICE)
    each = [adjusted_cross_entropy(logits[:, :, h], labels, prior, none) for h in range(heads)]
    (weights * sum(each)).sum().backward()
    buffer = logits.detach().clone()
    result = kernels.cross_entropy_gradient_(buffer, labels, weights)
    torch.testing.assert_close(-result, torch.stack(each, dim=2).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(buffer, logits.grad, rtol=1e-4, atol=1e-6)


def test_a_diverged_row_has_a_loss_that_is_no_number():
    logits = random(1, 2, 1, 5)
    logits[0, 0, 0, 2] = float("nan")
    weights = torch.ones(1, 2, device=DEVICE)
    result = kernels.cross_entropy_gradient_(logits, torch.zeros(1, 2, dtype=torch.int64, device=DEVICE), weights)
    assert result.isnan().flatten().tolist() == [True, False]
    assert logits[0, 0].isnan().all()


def test_a_hopeless_row_has_a_finite_loss():
    logits = torch.tensor([[[[0.0, 500.0]]]], device=DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    assert kernels.cross_entropy_gradient_(logits, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), one).isfinite()
    assert logits.flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("size", [*SIZES, *TILES])
def test_pseudo_labels(size):
    trials, rows, classes, _ = size
    both = 5 * random(trials, rows + 1, 2, classes)
    linear, similarity = both[:, :rows, 0], both[:, :rows, 1]
    eta, threshold = torch.rand(trials, device=DEVICE), torch.rand(trials, device=DEVICE)
    temperature = torch.rand(trials, device=DEVICE) + 0.5
    wanted = plain_pseudo_labels(fuse(linear, similarity, eta, "standardize"), threshold, temperature)
    labels, mask, mean = kernels.pseudo_labels(linear, similarity, eta, threshold, temperature)
    assert torch.equal(labels, wanted.labels)
    assert torch.equal(mask, wanted.mask)
    torch.testing.assert_close(mean, wanted.probabilities.mean(1), rtol=1e-4, atol=1e-6)


def test_the_mean_of_a_trial_does_not_depend_on_its_neighbours():
    both = 5 * random(3, 20, 2, 10)
    half = torch.full((3,), 0.5, device=DEVICE)
    mean = kernels.pseudo_labels(both[:, :, 0], both[:, :, 1], half, half, half)[2]
    alone = kernels.pseudo_labels(both[1:2, :, 0], both[1:2, :, 1], half[:1], half[:1], half[:1])[2]
    assert torch.equal(mean[1:2], alone)


def test_pseudo_labels_of_equal_classes_take_the_first():
    flat = torch.zeros(1, 2, 5, device=DEVICE)
    half = torch.full((1,), 0.5, device=DEVICE)
    labels, mask, mean = kernels.pseudo_labels(flat, flat, half, half, half)
    assert labels.tolist() == [[0, 0]]
    assert mask.tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(mean, torch.full((1, 5), 0.2, device=DEVICE))


def test_a_diverged_trial_has_labels_among_the_classes_and_no_neighbour_notices():
    both = random(2, 3, 2, 10)
    one = torch.ones(2, device=DEVICE)
    labels, _, mean = kernels.pseudo_labels(both[:, :, 0], both[:, :, 1], 0.5 * one, 0.5 * one, one)
    both[0] = float("nan")
    spoilt, mask, spoilt_mean = kernels.pseudo_labels(both[:, :, 0], both[:, :, 1], 0.5 * one, 0.5 * one, one)
    assert spoilt[0].tolist() == [0, 0, 0]
    assert mask[0].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(spoilt[1], labels[1])
    assert torch.equal(spoilt_mean[1], mean[1])


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (2, 2500)])
def test_decay(size):
    buffer, parameters = random(size[0], size[1] + 3), random(*size)
    momentum, decay = torch.rand(size[0], device=DEVICE), torch.rand(size[0], device=DEVICE)
    wanted = momentum.unsqueeze(1) * buffer[:, 3:] + decay.unsqueeze(1) * parameters
    first = buffer[:, :3].clone()
    kernels.decay_velocity_(buffer[:, 3:], parameters, momentum, decay)
    torch.testing.assert_close(buffer[:, 3:], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(buffer[:, :3], first)


@pytest.mark.parametrize("size", [*SIZES[:3], (1, 2, 17, 33), (1, 2, 3, 768), (2, 70, 4, 5)])
def test_prototypes(size):
    trials, rows, classes, dim = size
    labels, adapted = integers(classes, trials, rows), random(trials, rows + 1, dim)[:, :rows]
    seen = torch.rand(trials, classes, device=DEVICE) > 0.5
    visual = normalize(random(trials, classes, dim)) * seen.unsqueeze(2)
    textual, alpha = random(trials, classes, dim), torch.rand(trials, classes, device=DEVICE)
    alpha[0, 0] = 1.0
    momentum = torch.rand(trials, device=DEVICE)
    means, counts = class_means(normalize(adapted), labels, classes)
    moved = move_visual(visual, means, counts, seen, momentum)
    now = seen | (counts > 0)
    fitted = fit_prototypes(textual, moved, alpha, now)
    before = visual.clone()
    kernels.move_prototypes_(visual, seen, textual, adapted, inverse_lengths(adapted), labels, momentum, alpha)
    assert torch.equal(seen, now)
    assert torch.equal(visual[counts == 0], before[counts == 0])  # a class that is not in the batch keeps its vector
    torch.testing.assert_close(visual, moved, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(textual, fitted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 2, 3), (2, 10, 7), (1, 33, 5)])  # T, K, D
def test_orthogonality(size):
    trials, classes, dim = size
    vectors, weight = random(trials, classes, dim), torch.rand(trials, device=DEVICE)
    c = vectors.double().requires_grad_()
    wanted = orthogonality(c)
    (weight.double() * wanted).sum().backward()
    velocity = torch.full((trials, classes, dim), 2.0, device=DEVICE)
    # the inverse lengths may be a part of those of two heads
    both = torch.cat([random(trials, classes), inverse_lengths(vectors)], dim=1)
    result = add_orthogonality_gradient(vectors, both[:, classes:], weight, velocity, Buffers(vectors))
    torch.testing.assert_close(result, wanted.detach().float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(velocity - 2.0, c.grad.float(), rtol=1e-4, atol=1e-5)


SEEDS = [0, 1, 2**31, 2**32 + 5, -1, 2**63 - 1]


@pytest.mark.parametrize("count", [1, 3, 64, 1027])
def test_random_integers_are_those_of_the_specification(count):
    seeds, steps = torch.tensor(SEEDS, device=DEVICE), torch.tensor([0, 7, 2**31 - 1], device=DEVICE)
    below = torch.tensor([1, 2, 1000, 2**31 - 1, 45_000, 3], device=DEVICE)
    wanted = (philox.words(seeds, steps, philox.Purpose.WEAK_VIEW, count) * below.view(1, -1, 1)) >> 32
    drawn = philox.integers(seeds, steps, philox.Purpose.WEAK_VIEW, count, below)
    assert kernels.runs_on(seeds.device)
    assert torch.equal(drawn, wanted)
    assert drawn.amax((0, 2))[0] == 0


@pytest.mark.parametrize("count", [1, 5, 1500])
def test_random_normals_are_those_of_the_specification(count):
    seeds = torch.tensor(SEEDS, device=DEVICE)
    uniform = philox.uniforms(seeds, 9, philox.Purpose.STRONG_NOISE, 2 * count)
    wanted = torch.sqrt(-2.0 * torch.log(uniform[:, :count])) * torch.cos(2.0 * math.pi * uniform[:, count:])
    drawn = philox.normals(seeds, 9, philox.Purpose.STRONG_NOISE, count)
    torch.testing.assert_close(drawn, wanted.float(), rtol=1e-6, atol=1e-7)
    step = torch.tensor([9], device=DEVICE)
    assert torch.equal(philox.normals(seeds, step, philox.Purpose.STRONG_NOISE, count), drawn)


@pytest.mark.parametrize(
    "values",
    [{"method": "ulfine"}, {"method": "ulfine", "prior": "hard"}, {"method": "lightweight", "feature_noise": 0.2}],
)
def test_whole_steps_go_through_the_kernels(values):
    cache = make_clusters(classes=3, dim=6)
    common = {"n1": 12, "gamma_l": 4, "gamma_u": 4, "steps": 3, "eval_every": 3, "rank": 2, "threshold": 0.4}
    configs = [
        FitConfig(**common, **values, seed=seed, batch_labeled=5, batch_unlabeled=6, momentum=0.9 - seed / 10)
        for seed in range(2)
    ]
    fast = fit_many(cache, configs, device=DEVICE, engine="fused")
    slow = fit_many(cache, configs, device=DEVICE, engine="specification")
    for a, b in zip(fast, slow, strict=True):
        for name, tensor in b.tensors.items():
            torch.testing.assert_close(a.tensors[name], tensor, rtol=1e-3, atol=1e-4)
        assert a.history[-1]["loss"] == pytest.approx(b.history[-1]["loss"], rel=1e-4)
