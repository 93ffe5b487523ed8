"""ulfine_plus on the feature before the projection: the projected feature around its mean, and wide directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.cache.samples import write_images, write_model_with_norm
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit, fit_many
from ulfine_fast.runs.evaluate import evaluate
from ulfine_fast.runs.evidence import unread_lines
from ulfine_fast.runs.predict import predict_images
from ulfine_fast.runs.run import Run

COUNTS = {"train/cat": 14, "train/dog": 12, "unlabeled": 10, "test/cat": 3, "test/dog": 4}
WIDE = FitConfig(feature="pre-projection")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), COUNTS)


@pytest.fixture(scope="module")
def caches(images, tmp_path_factory):
    """Caches of the tokens of the last block, and of what is projected."""
    model = write_model_with_norm(tmp_path_factory.mktemp("model"))
    result = {}
    for features in ("last-block", "pre-projection"):
        folder = tmp_path_factory.mktemp(features) / "cache"
        encoder = load_encoder(model, device="cpu", features=features)
        extract(open_source(images), encoder, folder, views=ViewRecipe(weak=1, strong=1), workers=0, progress=False)
        result[features] = FeatureCache.open(folder)
    return result


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_the_probe_sees_both_features_of_a_row(caches):
    cache = caches["pre-projection"]
    run = fit(cache, WIDE, device="cpu", progress=False)
    tokens = np.asarray(cache.tokens("plain"))[:, 0].astype(np.float64)
    tensors = {name: tensor.double().numpy() for name, tensor in run.tensors.items()}
    for row in range(0, len(cache), 5):
        projected = unit(tokens[row] @ cache.head["projection"])
        wide = unit(tokens[row] @ tensors["basis"])
        both = np.concatenate([unit(projected - tensors["center"][0]), wide]) / np.sqrt(2)
        # all weight on the probe: the mixture is its softmax
        alone = Run(
            config=run.config,
            class_names=run.class_names,
            tensors={**run.tensors, "weights": torch.eye(len(run.tensors["weights"]))[0]},
            metrics={},
        )
        logits = tensors["linear"] @ both / tensors["temperature"][0]
        wanted = logits - np.log(np.exp(logits).sum())
        np.testing.assert_allclose(alone.logits(tokens[row][None, None])[0], wanted, atol=2e-3)


def test_the_center_is_the_training_images_mean(caches):
    cache = caches["pre-projection"]
    run = fit(cache, WIDE, device="cpu", progress=False)
    names = [*run.split["labeled"], *run.split["unlabeled"]]
    rows = [cache.ids.index(name) for name in names]
    projected = unit(np.asarray(cache.tokens("plain"))[rows, 0].astype(np.float64) @ cache.head["projection"])
    np.testing.assert_allclose(run.tensors["center"].numpy()[0], projected.mean(0), atol=1e-5)


def test_tokens_from_before_the_last_norm_give_the_same_run(caches):
    runs = [fit(cache, WIDE, device="cpu", progress=False) for cache in caches.values()]
    assert [run.input_shape for run in runs] == [(2, 16), (1, 16)]
    assert np.abs(runs[0].test_probabilities - runs[1].test_probabilities).max() < 0.05


@pytest.mark.parametrize("features", ["last-block", "pre-projection"])
def test_runs_are_saved_evaluated_and_predict_images(images, caches, features, tmp_path):
    run = fit(caches[features], WIDE, device="cpu", progress=False)
    again = Run.load(run.save(tmp_path / "run"))
    assert evaluate(again)["balanced_accuracy"] == pytest.approx(run.metrics["balanced_accuracy"])
    predicted = predict_images(again, images / "test", device="cpu")
    order = [run.test_ids.index(f"test/{name}") for name in predicted.ids]
    np.testing.assert_allclose(predicted.probabilities, run.test_probabilities[order], atol=0.02)


def test_a_trial_alone_is_the_same_as_among_others(caches):
    configs = [FitConfig(feature="pre-projection", seed=seed) for seed in range(3)]
    together = fit_many(caches["pre-projection"], configs, device="cpu", progress=False)
    alone = fit(caches["pre-projection"], configs[1], device="cpu", progress=False)
    np.testing.assert_allclose(together[1].test_probabilities, alone.test_probabilities, atol=1e-4)


def test_what_it_cannot_do_is_said(caches, clusters):
    with pytest.raises(InputError, match="extract again with --features pre-projection, or take feature projected"):
        fit(clusters, WIDE, device="cpu", progress=False)
    with pytest.raises(InputError, match="method ulfine_plus takes no adapter adaptformer; use one of abc, "):
        fit(caches["last-block"], FitConfig(adapter="adaptformer"), device="cpu", progress=False)


def test_a_fit_says_that_the_cache_holds_more_than_it_read(caches):
    assert "--feature pre-projection reads it" in unread_lines(caches["pre-projection"], FitConfig())[0]
    assert unread_lines(caches["pre-projection"], WIDE) == []
    # other methods have no such option, other caches no such feature
    assert unread_lines(caches["pre-projection"], FitConfig(method="linear_probe")) == []
    plain = caches["pre-projection"]
    arrays = FeatureCache.from_arrays(plain.plain, plain.labels, text_features=plain.text_features)
    assert unread_lines(arrays, FitConfig()) == []
