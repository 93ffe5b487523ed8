"""Training through a tower, on a world that a convolution can learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.data import VIEWS
from benchmarks.studies.backbone import (
    WAYS,
    World,
    batches,
    cache_of,
    drawn,
    encoded,
    forget,
    loss,
    moved,
    new_model,
    norm_weights,
    recipe_of,
    train,
    views,
)
from tests.benchmarks.worlds import make_world, tower
from ulfine_fast import FitConfig, fit
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.core.batches import BatchSource, PaddedRows
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.data.splits import draw_split
from ulfine_fast.ops.philox import Purpose


@pytest.fixture(scope="module")
def world():
    return make_world()


def config(**values):
    own = {"method": "lightweight", "adapter": "none", "n1": 12, "m1": 20, "gamma_l": 4, "gamma_u": 4}
    return FitConfig(**{**own, "batch_labeled": 6, "batch_unlabeled": 4, "steps": 3, "lr": 0.02, **values})


def split_of(world, settings):
    return draw_split(world.labels, world.splits, world.class_names, settings)


def fresh(world, way, **values):
    settings = config(**values)
    split = split_of(world, settings)
    return new_model(way, world, split, settings), split, settings


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


# -- what trains


@pytest.mark.parametrize(("way", "count"), [("fft", 6), ("scratch", 6), ("lft", 2), ("lp", 0)])
def test_weights_that_train(world, way, count):
    model, *_ = fresh(world, way)
    trained = model.trained()
    assert len(trained) == count + 1
    assert trained[-1] is model.state.parameters["linear"]


@pytest.mark.parametrize("way", ["fft", "lft", "lp"])
def test_starts_at_the_tower_and_its_texts(world, way):
    model, *_ = fresh(world, way)
    assert changed(copied(world.tower), model.tower) == set()
    assert torch.equal(model.state.parameters["linear"][0].detach(), torch.from_numpy(world.prototypes))


def test_scratch_knows_neither_tower_nor_texts(world):
    # not 0, the seed that the tower of this world was made from
    model, *_ = fresh(world, "scratch", seed=1)
    assert "0.weight" in changed(copied(world.tower), model.tower)
    head = model.state.parameters["linear"][0].detach()
    assert not np.allclose(head, world.prototypes, atol=0.1)
    assert np.allclose(head.norm(dim=-1), 1, atol=1e-5)


def test_scratch_depends_on_the_seed_alone(world):
    first, again, other = (fresh(world, "scratch", seed=seed)[0].tower.state_dict() for seed in (1, 1, 2))
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_forget_resets_statistics():
    net = tower().train()
    net(torch.randn(8, 3, 12, 12) + 5)
    forget(net)
    assert torch.equal(net[1].running_mean, torch.zeros(6))
    assert torch.equal(net[1].running_var, torch.ones(6))


def test_norm_weights_are_scale_and_shift():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    assert [id(weight) for weight in norm_weights(net)] == [
        id(weight) for i in (1, 2, 4) for weight in (net[i].weight, net[i].bias)
    ]


@pytest.mark.parametrize(
    ("way", "moves"),
    [
        ("fft", {"0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias"}),
        ("lft", {"1.weight", "1.bias"}),
        ("lp", set()),
    ],
)
def test_training_moves_what_it_may(world, way, moves):
    model, split, settings = fresh(world, way)
    before, head = copied(model.tower), model.state.parameters["linear"].detach().clone()
    original = copied(world.tower)
    assert train(model, world, split, settings) > 0
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    # a bias before a batch norm that uses the batch's mean has no gradient but its own decay
    assert changed(before, model.tower) - {"0.bias"} == (moves - {"0.bias"}) | (statistics if way == "fft" else set())
    assert not torch.equal(head, model.state.parameters["linear"])
    assert changed(original, world.tower) == set()


@pytest.mark.parametrize("way", WAYS)
def test_learns_colours(world, way):
    model, split, settings = fresh(world, way, steps=60, lr=0.05)
    before = (model.logits(world, split.test).argmax(1) == world.labels[split.test]).mean()
    train(model, world, split, settings)
    after = (model.logits(world, split.test).argmax(1) == world.labels[split.test]).mean()
    # three classes; a head on six frozen random filters cannot do better than this
    assert after >= (0.6 if way == "lp" else 0.8)
    assert after > before - 0.01


def test_training_repeats(world):
    results = []
    for _ in range(2):
        model, split, settings = fresh(world, "fft")
        train(model, world, split, settings)
        results.append(model.logits(world, split.test))
    assert np.array_equal(*results)


# -- the loss


def slow_loss(model, labeled, labels, weak, strong, ramp, settings, counts):
    """Row by row, as FixMatch is written."""
    head = F.normalize(model.state.parameters["linear"][0], dim=-1)
    prior = torch.log(torch.tensor(counts / counts.sum()).float())

    def logits(pixels):
        return settings.scale * F.normalize(model.tower(pixels), dim=-1) @ head.T

    total = 0.0
    for row, label in zip(logits(labeled), labels[0], strict=True):
        total += -torch.log_softmax(row + settings.tau * prior, 0)[label] / len(labeled)
    for sure, hard in zip(logits(weak), logits(strong), strict=True):
        probability = torch.softmax(sure, 0)
        if probability.max() >= settings.threshold:
            guess = probability.argmax()
            total += ramp * settings.lambda_u * -torch.log_softmax(hard, 0)[guess] / len(weak)
    return total


@pytest.mark.parametrize(("ramp", "threshold"), [(1.0, 0.0), (0.3, 0.0), (1.0, 0.6), (0.0, 0.0)])
def test_loss_is_fixmatch(world, ramp, threshold):
    model, split, settings = fresh(world, "lft", threshold=threshold)
    batch = next(batches(world, split, settings))
    counts = np.bincount(world.labels[split.labeled], minlength=3)
    expected = slow_loss(model, *batch, ramp, settings, counts)
    assert torch.allclose(loss(model, *batch, ramp), expected, atol=1e-5)


def test_weak_views_give_no_gradient(world):
    model, split, settings = fresh(world, "fft", threshold=0.0)
    labeled, labels, weak, strong = next(batches(world, split, settings))
    weak.requires_grad_(True)
    strong.requires_grad_(True)
    loss(model, labeled, labels, weak, strong, 1.0).backward()
    assert weak.grad is None
    assert strong.grad.abs().sum() > 0


def test_a_step_on_the_head_follows_sgd(world):
    """With the tower frozen, one step is w - lr (gradient + decay w)."""
    model, split, settings = fresh(world, "lp", steps=1, weight_decay=0.01)
    head = model.state.parameters["linear"]
    loss(model, *next(batches(world, split, settings)), 1.0).backward()
    expected = head.detach() - settings.lr * (head.grad + settings.weight_decay * head.detach())
    head.grad = None
    train(model, world, split, settings)
    assert torch.allclose(head.detach(), expected, atol=1e-6)


def test_logits_are_scaled_cosines_of_plain_views(world):
    model, split, settings = fresh(world, "fft")
    rows = split.test[:5]
    features = F.normalize(world.tower(world.plain_pixels(rows)), dim=-1)
    expected = settings.scale * features @ torch.from_numpy(world.prototypes).T
    assert np.allclose(model.logits(world, rows), expected, atol=1e-4)
    assert model.tower.training


def test_logits_of_a_diverged_model_are_zero(world):
    model, split, _ = fresh(world, "fft")
    with torch.no_grad():
        model.tower[5].bias.fill_(float("nan"))
    assert (model.logits(world, split.test) == 0).all()


# -- mini-batches


def test_batches_are_those_of_the_cached_engine(world):
    settings = config(steps=4)
    split = split_of(world, settings)
    cache, inside, _ = cache_of(world, split, ViewRecipe(**VIEWS))
    model = new_model("lp", world, split, settings)
    features = DeviceFeatures.load(cache, torch.device("cpu"))
    labeled_rows, unlabeled_rows = (
        PaddedRows.pad([part], torch.device("cpu")) for part in (inside.labeled, inside.unlabeled)
    )
    source = BatchSource(
        labels=torch.from_numpy(cache.labels)[labeled_rows.index],
        labeled=labeled_rows,
        unlabeled=unlabeled_rows,
        trials=model.trials,
        features=features,
        config=settings,
        pairs=True,
    )
    number = {name: row for row, name in enumerate(world.ids)}
    world_row = np.array([number[name] for name in cache.ids])
    labeled, view = drawn(split.labeled, settings, 6, (Purpose.LABELED, Purpose.LABELED_VIEW))
    unlabeled, _ = drawn(split.unlabeled, settings, 4, (Purpose.UNLABELED, Purpose.WEAK_VIEW))
    for step, batch in source.draw(0, 4):
        assert np.array_equal(world.labels[labeled[step]], batch.labels[0])
        assert np.array_equal(world_row[inside.unlabeled][batch.positions[0]], unlabeled[step])
        same = torch.isclose(batch.labeled[0], features.rows(rows_of(labeled[step], world_row)), atol=1e-6).all(-1)
        assert same[view[step] == 0].all()


def rows_of(wanted, world_row):
    position = {int(row): i for i, row in enumerate(world_row)}
    return torch.tensor([position[int(row)] for row in wanted])


def test_batches_repeat_and_differ_by_seed(world):
    def first_two(seed):
        settings = config(seed=seed, split_seed=0)
        return list(itertools.islice(batches(world, split_of(world, settings), settings), 2))

    first, again, other = first_two(0), first_two(0), first_two(1)
    for batch, same in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    labeled, labels, weak, strong = first[0]
    assert labeled.shape == (6, 3, 12, 12)
    assert labels.shape == (1, 6)
    assert weak.shape == strong.shape == (4, 3, 12, 12)
    assert not torch.equal(weak, strong)


def test_there_are_as_many_batches_as_steps(world):
    settings = config(steps=5)
    assert len(list(batches(world, split_of(world, settings), settings))) == 5


def test_plain_views_are_where_they_were_asked_for(world):
    rows, recipe = np.array([3, 4, 5]), recipe_of(0, 0, strong=1)
    mixed = views(world, rows, torch.tensor([True, False, True]), recipe)
    fresh_ones, plain = world.views(rows, recipe), world.plain_pixels(rows)
    assert torch.equal(mixed[[0, 2], 0], plain[[0, 2]])
    assert torch.equal(mixed[1], fresh_ones[1])
    assert torch.equal(mixed[:, 1], fresh_ones[:, 1])
    assert torch.equal(views(world, rows, torch.zeros(3, dtype=torch.bool), recipe), fresh_ones)


def test_views_change_from_step_to_step(world):
    rows = np.array([3, 4])
    first, again, later = (world.views(rows, recipe_of(0, step, strong=1)) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    # asking for strong views as well leaves the weak ones as they were
    assert torch.equal(first[:, :1], world.views(rows, recipe_of(0, 0, strong=0)))
    assert recipe_of(0, 63, strong=0) != recipe_of(1, 0, strong=0)


def test_the_control_is_the_cached_head_where_views_are_equal(world, monkeypatch):
    """Frozen tower, plain views everywhere: training through the tower and on its features ends in one head."""
    monkeypatch.setattr(World, "views", lambda self, rows, recipe: plain_views(self, rows, recipe))
    settings = config(steps=30, lr=0.05, threshold=0.3)
    split = split_of(world, settings)
    model = new_model("lp", world, split, settings)
    train(model, world, split, settings)
    cache, inside, _ = cache_of(world, split, ViewRecipe(**VIEWS))
    run = fit(cache, settings, split=inside, device="cpu", progress=False)
    assert torch.allclose(model.state.parameters["linear"][0].detach(), run.tensors["linear"], atol=2e-3)


def plain_views(world, rows, recipe):
    return world.plain_pixels(rows).unsqueeze(1).repeat(1, len(recipe.kinds), 1, 1, 1)


# -- the cache


def test_encoded_puts_the_plain_view_first(world):
    rows = np.arange(70)
    features = encoded(world, rows, ViewRecipe(weak=1, strong=2))
    assert features.shape == (70, 4, 5)
    assert features.dtype == np.float16
    expected = F.normalize(world.tower(world.plain_pixels(rows)), dim=-1)
    assert np.allclose(features[:, 0], expected, atol=2e-3)
    strong = world.views(rows[-2:], ViewRecipe(weak=1, strong=2))[:, 2]
    assert np.allclose(features[-2:, 3], F.normalize(world.tower(strong), dim=-1), atol=2e-3)


def test_cache_holds_the_split(world):
    settings = config(val_fraction=0.3)
    split = split_of(world, settings)
    cache, inside, seconds = cache_of(world, split, ViewRecipe(weak=2, strong=1))
    assert seconds > 0
    for role in ("labeled", "unlabeled", "val", "test"):
        there, here = getattr(split, role), getattr(inside, role)
        assert [cache.ids[row] for row in here] == [world.ids[row] for row in there]
        assert np.array_equal(cache.labels[here], world.labels[there])
    assert set(cache.splits[inside.val]) == {"train"}
    assert len(cache) == sum(len(getattr(split, role)) for role in ("labeled", "unlabeled", "val", "test"))
    assert cache.views("weak").shape == (len(cache.view_rows), 2, 5)
    assert cache.views("strong").shape[1] == 1
    assert np.allclose(cache.prototypes, world.prototypes, atol=1e-5)
    model = new_model("lp", world, split, settings)
    cosines = cache.plain[inside.test].astype(np.float32) @ cache.prototypes.T
    assert np.allclose(model.logits(world, split.test), settings.scale * cosines, atol=0.1)


def test_moved_keeps_order(world):
    split = split_of(world, config())
    rows = np.arange(len(world.labels))[::-1]
    assert np.array_equal(rows[moved(split, rows).unlabeled], split.unlabeled)
