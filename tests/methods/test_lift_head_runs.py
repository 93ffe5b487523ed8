"""LIFT's head over a cache equals LIFT's head over a frozen encoder that sees the same crops of the same images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from tests.cache.samples import write_images, write_model_with_norm
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.views import ViewRecipe, draw
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine.fit import fit, fit_many
from ulfine_fast.engine.inputs import trial_inputs
from ulfine_fast.ops.sgd import cosine_rate
from ulfine_fast.runs.evaluate import evaluate
from ulfine_fast.runs.predict import predict_images
from ulfine_fast.runs.run import Run

COUNTS = {"train/cat": 10, "train/dog": 8, "test/cat": 3, "test/dog": 4}
CROPS = ViewRecipe(weak=3, strong=1, weak_scale=(0.08, 1.0))
LIFT = FitConfig(
    method="lift_head", feature="pre-projection", steps=12, eval_every=6, batch_labeled=4, lr=0.2, crop_epochs=4
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), COUNTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model_with_norm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def caches(images, model, tmp_path_factory):
    """Float16 caches with the tokens of the last block, and with what is projected."""
    result = {}
    for features in ("last-block", "pre-projection"):
        folder = tmp_path_factory.mktemp(features) / "cache"
        encoder = load_encoder(model, device="cpu", features=features)
        extract(open_source(images), encoder, folder, views=CROPS, workers=0, progress=False)
        result[features] = FeatureCache.open(folder)
    return result


@pytest.fixture(scope="module")
def tower(model):
    """The encoder, and its image tower without the projection."""
    encoder = load_encoder(model, device="cpu")
    encoder.model.visual.proj = None
    return encoder


def seen(tower, image, name, view):
    """What a frozen tower gives its classifier of one view, 0 for the evaluation view, at length 1 (W,)."""
    if view == 0:
        pixels = tower.transform(image)
    else:
        drawn = draw(image, name, CROPS, image_size=tower.spec.image_size)
        pixels = tower.normalise(torch.from_numpy(drawn.pixels[view - 1][None]))[0]
    with torch.no_grad():
        return normalize(tower.model.visual(pixels[None])[0], dim=-1)


def draws_of(cache, config):
    """Row, view and label of every labelled image of every step, and the log prior, as the engine draws them."""
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    features = DeviceFeatures.load(cache, torch.device("cpu"), tokens=True)
    inputs = trial_inputs(cache, features, [config], [split])
    for _, draws in inputs.batches(pairs=False).draws(0, config.steps):
        where, view = draws.labeled[0] // features.views.shape[1], draws.labeled[0] % features.views.shape[1]
        yield cache.view_rows[where], view.tolist(), draws.labels[0], inputs.trials.log_prior[0]


def trained_end_to_end(tower, source, cache, config):
    """LIFT's head trained on images: each crop goes through the tower in the step that asks for it."""
    texts, projection = torch.from_numpy(cache.prototypes), torch.from_numpy(cache.head["projection"])
    weights = normalize(normalize(texts, dim=-1) @ projection.T, dim=-1).requires_grad_(True)
    sgd = torch.optim.SGD([weights], lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay)
    rows_of = {row.id: row for row in source.rows}
    for step, (rows, views, labels, log_prior) in enumerate(draws_of(cache, config)):
        names = [cache.ids[row] for row in rows]
        features = [seen(tower, source.read(rows_of[n]), n, v) for n, v in zip(names, views, strict=True)]
        logits = 25 * torch.stack(features) @ normalize(weights, dim=-1).T + log_prior
        sgd.param_groups[0]["lr"] = config.lr * cosine_rate(step, config.steps)
        sgd.zero_grad()
        cross_entropy(logits, labels).backward()
        sgd.step()
    return weights.detach()


@pytest.mark.parametrize("features", ["last-block", "pre-projection"])
def test_the_same_crops_through_the_frozen_encoder_give_the_same_logits(images, tower, caches, features):
    cache, source = caches[features], open_source(images)
    run = fit(cache, LIFT, device="cpu", progress=False)
    weights = trained_end_to_end(tower, source, cache, LIFT)
    tests = [row for row in source.rows if row.split == "test"]
    theirs = (
        25 * torch.stack([seen(tower, source.read(row), row.id, 0) for row in tests]) @ normalize(weights, dim=-1).T
    )
    ours = run.logits(cache.tokens("plain")[np.flatnonzero(cache.splits == "test")])
    assert run.test_ids == [row.id for row in tests]
    assert np.abs(ours - theirs.numpy()).max() < 0.05
    # it went somewhere: the start's logits are far away
    start = fit(cache, dataclasses.replace(LIFT, lr=0.0), device="cpu", progress=False)
    assert np.abs(ours - start.logits(cache.tokens("plain")[cache.splits == "test"])).max() > 0.5


def test_both_caches_train_the_same_head(caches):
    runs = [fit(cache, LIFT, device="cpu", progress=False) for cache in caches.values()]
    torch.testing.assert_close(runs[0].tensors["linear"], runs[1].tensors["linear"], atol=0.01, rtol=0)
    assert [run.input_shape for run in runs] == [(2, 16), (1, 16)]


@pytest.mark.parametrize("features", ["last-block", "pre-projection"])
def test_runs_are_saved_evaluated_and_predict_images(images, caches, features, tmp_path):
    run = fit(caches[features], LIFT, device="cpu", progress=False)
    again = Run.load(run.save(tmp_path / "run"))
    assert evaluate(again)["balanced_accuracy"] == pytest.approx(run.metrics["balanced_accuracy"])
    predicted = predict_images(again, images / "test", device="cpu")
    order = [run.test_ids.index(f"test/{name}") for name in predicted.ids]
    np.testing.assert_allclose(predicted.probabilities, run.test_probabilities[order], atol=0.02)


def test_five_crops_average_the_logits_of_corners_and_middle(images, tower, caches):
    run = fit(caches["pre-projection"], LIFT, device="cpu", progress=False)
    result = predict_images(run, images / "test", device="cpu", five_crops=True)
    source = open_source(images)
    (row,) = [row for row in source.rows if row.id == f"test/{result.ids[0]}"]
    image, heads = source.read(row), run.tensors["linear"]
    side = round(20 * 224 / 248)  # of 24 x 20 pixels
    corners = [(left, top) for top in (0, 20 - side) for left in (0, 24 - side)]
    crops = [image.crop((x, y, x + side, y + side)) for x, y in [*corners, ((24 - side) // 2, (20 - side) // 2)]]
    pixels = torch.stack([tower.transform(crop) for crop in crops])
    with torch.no_grad():
        logits = 25 * normalize(tower.model.visual(pixels), dim=-1) @ normalize(heads, dim=-1).T  # (5, K)
    wanted = torch.softmax(logits.mean(0) / run.metrics["temperature"], 0)
    np.testing.assert_allclose(result.probabilities[0], wanted, atol=1e-3)
    assert np.abs(predict_images(run, images / "test", device="cpu").probabilities - result.probabilities).max() > 0


def test_the_schedule_takes_crops_that_are_large_enough(caches):
    cache = caches["last-block"]
    areas = np.concatenate([np.ones((18, 1), np.float32), cache.view_areas("weak")], axis=1)
    assert 0.08 <= areas.min() < 0.5
    config = dataclasses.replace(LIFT, batch_labeled=64)
    smallest = [1 - 0.92 * np.sqrt(1 - (step * 4 // 12 / 3) ** 2) for step in range(12)]
    counts = np.zeros(4)
    for least, (rows, views, *_) in zip(smallest, draws_of(cache, config), strict=True):
        assert (areas[rows, views] >= least).all()
        counts += np.bincount(views, minlength=4)
    assert counts.min() > 0
    # without it small crops are drawn to the end
    late = list(draws_of(cache, dataclasses.replace(config, crop_epochs=0)))[-1]
    assert areas[late[0], late[1]].min() < 0.5


def test_trials_do_not_depend_on_their_neighbours(caches):
    cache = caches["last-block"]
    configs = [LIFT, dataclasses.replace(LIFT, seed=1, crop_epochs=0), dataclasses.replace(LIFT, seed=2, lr=0.01)]
    configs.append(dataclasses.replace(LIFT, adapter="adaptformer", adapter_scale=1.0))
    for config, run in zip(configs, fit_many(cache, configs, device="cpu", progress=False), strict=True):
        alone = fit(cache, config, device="cpu", progress=False)
        assert run.tensors.keys() == alone.tensors.keys()
        for name, tensor in run.tensors.items():
            torch.testing.assert_close(tensor, alone.tensors[name], atol=1e-5, rtol=1e-4)


def test_both_engines_train_the_same_head_on_projected_features(caches):
    config = dataclasses.replace(LIFT, feature="projected")
    by_hand, slow = (
        fit(caches["last-block"], config, device="cpu", progress=False, engine=engine)
        for engine in ("fused", "specification")
    )
    torch.testing.assert_close(by_hand.tensors["linear"], slow.tensors["linear"], atol=1e-5, rtol=1e-4)


def test_what_it_cannot_do_is_said(caches, clusters):
    projected = dataclasses.replace(LIFT, feature="projected")
    for config, message in (
        (LIFT, "hold; extract again with --features last-block or pre-projection, or take feature projected"),
        (
            projected,
            "crop_epochs is 4 and this cache does not say how much .* again with --weak 4 --smallest-crop 0.08",
        ),
    ):
        with pytest.raises(InputError, match=message):
            fit(clusters, config, device="cpu", progress=False)
    with pytest.raises(InputError, match="method ulfine does not read feature, which lift_head"):
        dataclasses.replace(projected, method="ulfine", feature="pre-projection")
    bare = FeatureCache.from_arrays(clusters.plain, clusters.labels, text_features=clusters.text_features)
    with pytest.raises(InputError, match="this cache holds no weak views; extract the images again with --weak 4"):
        fit(bare, projected, device="cpu", progress=False)
    with pytest.raises(InputError, match="adapter adaptformer trains on the tokens of the encoder's last block"):
        fit(caches["pre-projection"], dataclasses.replace(LIFT, adapter="adaptformer"), device="cpu", progress=False)
    with pytest.raises(InputError, match=r"lift_head with feature pre-projection .* has no fused step"):
        fit(caches["last-block"], LIFT, device="cpu", progress=False, engine="fused")
    with pytest.raises(InputError, match="feature pre-projection trains on tokens"):
        fit(caches["last-block"], dataclasses.replace(LIFT, feature_noise=0.1), device="cpu", progress=False)
