"""Adaptation to a stream: its losses beside loops in numpy, the encoder's own norm, and streams that break things."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import softmax

from tests.cache.samples import write_images, write_model_with_norm
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit
from ulfine_fast.related.head_realignment.gaussians import Sampling
from ulfine_fast.related.head_realignment.realign import realign
from ulfine_fast.related.test_time_adaptation.adapt import Adaptation, ConfidentMemory, adapt, last_norm_of
from ulfine_fast.related.test_time_adaptation.losses import (
    entropy,
    exposure_loss,
    known_score,
    marginal_entropy,
    otsu,
    soft_contrast,
)
from ulfine_fast.related.test_time_adaptation.metrics import open_set_metrics, stream_labels, stream_metrics

FEW = {"n1": 20, "gamma_l": 4.0, "gamma_u": 4.0, "steps": 30, "eval_every": 30}
SHORT = {"steps": 5, "eval_every": 5}
FAST = Adaptation(lr=1e-2, steps=5, batch=16)


def entropy_of(p):
    return -sum(x * np.log(x) for x in p if x > 0)


@pytest.fixture(scope="module")
def logits():
    return torch.from_numpy(np.random.default_rng(0).normal(0, 3, (7, 4)))


def test_losses_by_hand(logits):
    rows = logits.numpy()
    predicted = [row.argmax() for row in rows]
    contrast = np.array([[row[k] for k in predicted] for row in rows])
    to_text = np.mean([entropy_of(softmax(row)) for row in contrast])
    to_image = np.mean([entropy_of(softmax(column)) for column in contrast.T])
    assert abs(to_text - to_image) > 0.05  # the two directions are not the same
    assert soft_contrast(logits).item() == pytest.approx((to_text + to_image) / 2)
    assert entropy(logits).item() == pytest.approx(np.mean([entropy_of(softmax(row)) for row in rows]))
    assert marginal_entropy(logits).item() == pytest.approx(entropy_of(np.mean([softmax(row) for row in rows], axis=0)))
    scores = [np.log(softmax(row).max()) for row in rows]
    np.testing.assert_allclose(known_score(logits), scores)


def test_exposure_by_hand():
    scores, threshold = np.array([0.1, 0.104, 0.11, 0.2]), 0.107
    inside = 1 / (1 + np.exp(-(scores - threshold) / 0.005))
    gap = np.average(scores, weights=inside) - np.average(scores, weights=1 - inside)
    loss = exposure_loss(torch.from_numpy(scores), torch.tensor(threshold))
    assert loss.item() == pytest.approx(-(gap**2))
    # far from all scores one side is empty
    assert torch.isfinite(exposure_loss(torch.from_numpy(scores), torch.tensor(50.0)))


def test_the_threshold_separates_most_variance():
    scores = np.random.default_rng(1).normal(size=30)
    scores[20:] += 3

    def between(cut):
        low, high = scores[scores < cut], scores[scores >= cut]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    ordered = np.sort(scores)
    best = max((ordered[1:] + ordered[:-1]) / 2, key=between)
    assert otsu(torch.from_numpy(scores)).item() == pytest.approx(best)
    assert otsu(torch.tensor([0.5])).item() == 0.5
    assert otsu(torch.tensor([0.5, 0.5, 0.5])).item() == 0.5


def test_the_memory_keeps_the_most_confident_of_each_class():
    random, memory, images = np.random.default_rng(2), ConfidentMemory(3, shots=2, sample=6, seed=0), []
    for batch in range(4):
        rows = random.normal(0, 2, (5, 3)).astype(np.float32)
        rows[:, 2] = -9  # no image is of the last class
        memory.add(torch.arange(5) + 5 * batch, torch.from_numpy(rows))
        images += [(softmax(row).max(), int(row.argmax()), 5 * batch + i) for i, row in enumerate(rows)]
        for k in range(3):
            expected = sorted((image for image in images if image[1] == k), reverse=True)[:2]
            kept = memory.positions[k][memory.positions[k] >= 0].tolist()
            assert kept == [position for *_, position in expected]
    assert sorted(memory.draw().tolist()) == sorted(memory.positions[:2].flatten().tolist())


def test_the_memory_draws_as_many_of_each_class():
    memory = ConfidentMemory(2, shots=4, sample=4, seed=0)
    memory.add(torch.arange(8), torch.tensor([[3.0, 0.0], [0.0, 3.0]]).repeat(4, 1))
    draws = [tuple(sorted(memory.draw().tolist())) for _ in range(20)]
    assert all(sum(position % 2 for position in drawn) == 2 and len(set(drawn)) == 4 for drawn in draws)
    assert len(set(draws)) > 1


@pytest.fixture(scope="module")
def zero_shot(clusters):
    return fit(clusters, FitConfig(method="zero_shot", **FEW), progress=False)


@pytest.fixture(scope="module")
def probe(clusters):
    return fit(clusters, FitConfig(method="linear_probe", **FEW), progress=False)


@pytest.mark.parametrize("by", ["none", "tent", "cliptta"])
def test_a_stream_by_autograd_alone(by, probe, clusters):
    """The whole loop again, plainly: affine features, one loss, torch's Adam."""
    settings = dataclasses.replace(FAST, by=by, shots=0, marginal=0.5)
    order = np.random.default_rng(0).permutation(len(clusters))[:40]
    adapted = adapt(probe, clusters, settings, rows=order, progress=False)
    features = torch.from_numpy(clusters.plain[order].astype(np.float32))
    features = features / features.norm(dim=1, keepdim=True) * 4  # the root of 16 dimensions
    heads = probe.tensors["linear"] / probe.tensors["linear"].norm(dim=1, keepdim=True)
    weight, bias = torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
    adam, expected = torch.optim.Adam([weight, bias], lr=settings.lr), []
    for batch in features.split(16):
        for step in range(6):
            moved = weight * batch + bias
            logits = 25 * (moved / moved.norm(dim=1, keepdim=True)) @ heads.T
            if by == "none" or step == 5:
                expected.append(logits.detach())
                break
            adam.zero_grad()
            loss = (soft_contrast if by == "cliptta" else entropy)(logits) - 0.5 * marginal_entropy(logits)
            loss.backward()
            adam.step()
    np.testing.assert_allclose(adapted.logits, torch.cat(expected), atol=2e-3)
    np.testing.assert_allclose(adapted.before, probe.logits(clusters.plain[order]), atol=1e-4)
    assert (np.abs(adapted.logits - adapted.before).max() > 0.5) == (by != "none")


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("open_set", [False, True])
def test_one_class_alone_gives_numbers(batch, open_set, zero_shot, clusters):
    """A memory of one class, first batches of one class, and rows of length zero."""
    settings = dataclasses.replace(FAST, batch=batch, open_set=open_set)
    rows = np.flatnonzero(clusters.labels == 0)[:20]
    assert np.isfinite(adapt(zero_shot, clusters, settings, rows=rows, progress=False).logits).all()
    features = np.array(clusters.plain[rows])
    features[::3] = 0
    empty = FeatureCache.from_arrays(features, np.zeros(len(rows), np.int64), class_names=clusters.class_names)
    adapted = adapt(zero_shot, empty, settings, progress=False)
    assert np.isfinite(adapted.logits).all()
    assert np.isfinite(adapted.weight).all()


def test_tent_collapses_where_the_contrast_does_not():
    """All images are moved the same way, so that most look like a few of the classes."""
    world = make_clusters(classes=10, dim=32, noise=1.5, train=100)
    run = fit(world, FitConfig(method="zero_shot", **FEW), progress=False)
    shift = np.random.default_rng(5).normal(size=32)
    moved = world.plain + 2 * shift / np.linalg.norm(shift)
    stream, order = FeatureCache.from_arrays(moved, world.labels), np.random.default_rng(0).permutation(len(world))
    results = {}
    for by in ("tent", "cliptta"):
        settings = Adaptation(by=by, lr=1e-2, scale=100.0)
        results[by] = stream_metrics(adapt(run, stream, settings, rows=order, progress=False), world.labels[order])
    tent, cliptta = results["tent"], results["cliptta"]
    assert tent["effective_classes"] < tent["effective_classes_before"] < 5 < 8 < cliptta["effective_classes"]
    assert tent["accuracy"] < tent["accuracy_before"] < 0.5 < cliptta["accuracy"]
    assert tent["accuracy_by_quarter"][-1] < tent["accuracy_by_quarter"][0]
    assert cliptta["accuracy_by_quarter"][-1] > cliptta["accuracy_by_quarter"][0]


def test_what_came_before_does_not_change_with_what_comes_after(probe, clusters):
    short, long = (adapt(probe, clusters, FAST, rows=np.arange(n), progress=False) for n in (48, 96))
    assert np.array_equal(short.logits, long.logits[:48])
    again = adapt(probe, clusters, FAST, rows=np.arange(96), progress=False)
    assert np.array_equal(again.logits, long.logits)


def without_the_last_class(clusters):
    """A run that does not know the last class."""
    known = clusters.labels < 3
    part = FeatureCache.from_arrays(
        clusters.plain[known],
        clusters.labels[known],
        class_names=clusters.class_names[:3],
        text_features=clusters.text_features[:3],
        splits=clusters.splits[known].tolist(),
    )
    return fit(part, FitConfig(method="zero_shot", **FEW), progress=False)


def test_open_set(clusters):
    run, order = without_the_last_class(clusters), np.random.default_rng(0).permutation(len(clusters))
    labels = stream_labels(run, clusters)[order]
    assert np.array_equal(labels, clusters.labels[order])  # the fourth is unknown
    results = {}
    for exposure in (0.0, 30.0):
        settings = Adaptation(open_set=True, exposure=exposure, lr=1e-3)
        adapted = adapt(run, clusters, settings, rows=order, progress=False)
        results[exposure] = stream_metrics(adapted, labels, open_set=True)
    assert results[30.0]["auroc"] != results[0.0]["auroc"]
    assert results[0.0]["auroc_before"] == results[30.0]["auroc_before"] > 0.5
    assert "auroc" not in stream_metrics(adapt(run, clusters, FAST, rows=order, progress=False), labels)


def test_open_set_metrics_by_hand():
    known, unknown = np.array([3.0, 2.0, 2.0, 1.0]), np.array([2.0, 0.0])
    pairs = [(a > b) + 0.5 * (a == b) for a in known for b in unknown]
    assert open_set_metrics(known, unknown) == {"auroc": np.mean(pairs), "fpr95": 0.5}
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    known, unknown = random.normal(1, 1, 200), random.normal(0, 1, 100)
    metrics = open_set_metrics(known, unknown)
    labels = np.repeat([1, 0], [200, 100])
    assert metrics["auroc"] == pytest.approx(roc_auc_score(labels, np.concatenate([known, unknown])))
    threshold = max(score for score in known if (known >= score).mean() >= 0.95)
    assert metrics["fpr95"] == (unknown >= threshold).mean()


def test_labels_by_name(zero_shot, clusters):
    other = FeatureCache.from_arrays(clusters.plain[:4], [0, 1, 2, -1], class_names=["class 3", "moose", "class 0"])
    assert stream_labels(zero_shot, other).tolist() == [3, 4, 0, -1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model_with_norm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    counts = {"train/cat": 10, "train/dog": 8, "test/cat": 3, "test/dog": 4}
    return write_images(tmp_path_factory.mktemp("images"), counts)


@pytest.fixture(scope="module")
def caches(images, model, tmp_path_factory):
    by_features = {}
    for features in ("projected", "last-block", "pre-projection"):
        folder = tmp_path_factory.mktemp(features) / "cache"
        encoder = load_encoder(model, device="cpu", features=features)
        views = ViewRecipe(weak=1, strong=1)
        extract(open_source(images), encoder, folder, views=views, dtype="float32", workers=0, progress=False)
        by_features[features] = FeatureCache.open(folder)
    return by_features


RUNS = {
    "zero_shot": {},
    "lightweight": {"adapter": "adaptformer", "batch_labeled": 4},
    "lift_head": {"feature": "pre-projection", "batch_labeled": 4},
}


@pytest.mark.parametrize("features", ["last-block", "pre-projection"])
@pytest.mark.parametrize("method", ["zero_shot", "lift_head"])
def test_the_encoders_own_norm_is_adapted(features, method, caches, images, model):
    """The adapted weight and bias, put into the encoder itself, give the same predictions there."""
    config = FitConfig(method=method, **RUNS[method], **SHORT)
    cache = caches[features]
    run = fit(cache, config, device="cpu", progress=False)
    adapted = adapt(run, cache, Adaptation(lr=0.05, steps=5, batch=32), progress=False)
    assert adapted.exact
    assert np.abs(adapted.logits - adapted.before).max() > 0.5
    encoder, source = load_encoder(model, device="cpu"), open_source(images)
    norm = encoder.model.visual.ln_post
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(adapted.weight))
        norm.bias.copy_(torch.from_numpy(adapted.bias))
        if method == "lift_head":
            encoder.model.visual.proj = None
        rows = encoder.model.visual(torch.stack([encoder.transform(source.read(row)) for row in source.rows]))
        heads = run.tensors["linear" if method == "lift_head" else "prototypes"]
        expected = 25 * torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(heads).T
    assert [row.id for row in source.rows] == cache.ids
    np.testing.assert_allclose(adapted.logits, expected, atol=2e-3)


@pytest.mark.parametrize("features", ["projected", "last-block", "pre-projection"])
@pytest.mark.parametrize("by", ["gaussians", "lda", "adjust"])
def test_a_realigned_run_adapts_with_its_own_head(features, by, caches):
    cache = caches[features]
    run = fit(cache, FitConfig(method="cross_entropy", batch_labeled=4, **SHORT), device="cpu", progress=False)
    realigned = realign([run], cache, by=by, sampling=Sampling(per_class=16), progress=False)[0]
    adapted = adapt(realigned, cache, Adaptation(by="none"), progress=False)
    np.testing.assert_allclose(adapted.logits, realigned.logits(cache.plain), atol=2e-3)
    assert np.abs(adapted.logits - run.logits(cache.plain)).max() > 0.1


@pytest.mark.parametrize("by", ["gaussians", "lda", "adjust"])
def test_a_realigned_run_with_an_adapter_in_the_last_block_adapts_with_its_own_head(by, caches):
    cache, config = caches["last-block"], FitConfig(method="lightweight", **RUNS["lightweight"], **SHORT)
    run = fit(cache, config, device="cpu", progress=False)
    realigned = realign([run], cache, by=by, sampling=Sampling(per_class=16), progress=False)[0]
    adapted = adapt(realigned, cache, Adaptation(by="none"), progress=False)
    np.testing.assert_allclose(adapted.logits, realigned.logits(cache.tokens("plain")), atol=1e-4)
    assert np.abs(adapted.logits - run.logits(cache.tokens("plain"))).max() > 0.1


@pytest.mark.parametrize("features", ["last-block", "pre-projection"])
def test_a_head_before_the_projection_can_only_be_adjusted(features, caches):
    cache = caches[features]
    run = fit(cache, FitConfig(method="lift_head", **RUNS["lift_head"], **SHORT), device="cpu", progress=False)
    for by in ("gaussians", "lda"):
        with pytest.raises(InputError, match="method lift_head predicts from something else"):
            realign([run], cache, by=by)
    adjusted = realign([run], cache, by="adjust")[0]
    adapted = adapt(adjusted, cache, Adaptation(by="none"), progress=False)
    np.testing.assert_allclose(adapted.logits, adjusted.logits(cache.tokens("plain")), atol=1e-4)


def test_an_adapter_in_the_last_block_stays_in_front_of_the_norm(caches):
    config = FitConfig(method="lightweight", **RUNS["lightweight"], **SHORT)
    run = fit(caches["last-block"], config, device="cpu", progress=False)
    adapted = adapt(run, caches["last-block"], Adaptation(lr=0.05), progress=False)
    np.testing.assert_allclose(adapted.before, run.logits(caches["last-block"].tokens("plain")), atol=1e-4)
    assert np.abs(adapted.logits - adapted.before).max() > 0.5
    # the final weight and bias, in the run itself, give that run
    for name, vector in (("scale", adapted.weight), ("shift", adapted.bias)):
        run.tensors[f"backbone.{name}"] = torch.from_numpy(vector)
    np.testing.assert_allclose(adapted.logits, run.logits(caches["last-block"].tokens("plain")), atol=1e-4)
    with pytest.raises(InputError, match="extract the stream with --features last-block"):
        adapt(run, caches["pre-projection"], FAST, progress=False)


def test_both_kinds_of_token_are_the_same_stream(caches):
    run = fit(caches["projected"], FitConfig(method="zero_shot"), device="cpu", progress=False)
    streams = {name: adapt(run, cache, FAST, progress=False) for name, cache in caches.items()}
    assert [stream.exact for stream in streams.values()] == [False, True, True]
    np.testing.assert_allclose(streams["last-block"].logits, streams["pre-projection"].logits, atol=2e-3)
    np.testing.assert_allclose(streams["last-block"].before, streams["projected"].before, atol=1e-3)


def test_a_channel_of_weight_zero(caches):
    cache = caches["pre-projection"]
    weight = cache.head["ln_post_weight"].copy()
    weight[3] = 0
    cache = FeatureCache(
        class_names=cache.class_names,
        dim=cache.dim,
        text_features=cache.text_features,
        prototypes=cache.prototypes,
        logit_scale=cache.logit_scale,
        path=cache.path,
        manifest=cache.manifest,
        records=cache.records,
        head={**cache.head, "ln_post_weight": weight},
    )
    rows, *_ = last_norm_of(cache)
    assert torch.isfinite(rows).all()
    assert not rows[:, 3].any()


def test_bad_input_is_one_sentence(zero_shot, clusters, caches):
    for wrong in ({"by": "eata"}, {"lr": 0.0}, {"steps": 0}, {"marginal": -1.0}, {"shots": -1}, {"scale": -2.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Adaptation(**wrong)
    with pytest.raises(InputError, match="no images"):
        adapt(zero_shot, clusters, rows=np.zeros(0, np.int64))
    with pytest.raises(InputError, match="not finite; lower"):
        adapt(zero_shot, clusters, dataclasses.replace(FAST, marginal=1e38), progress=False)
    run = fit(caches["projected"], FitConfig(method="zero_shot"), device="cpu", progress=False)
    with pytest.raises(CacheMismatch):
        adapt(run, clusters, FAST, progress=False)
