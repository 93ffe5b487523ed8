"""ulfine_plus over a cache whose classes are described: prompts weighted by their class's cluster, judged by labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ulfine_fast.cache.descriptions import Descriptions
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.types import Inputs, Pool, Trials
from ulfine_fast.engine.fit import fit, fit_many
from ulfine_fast.methods import ulfine_plus
from ulfine_fast.methods.ulfine_plus import _described
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.runs.evidence import evidence_lines

CLASSES, IMAGES, DIM = 4, 240, 128
NAMES = ["ash", "elm", "fir", "oak"]


def cache_of(sentences, *, seed=1, noise=2.5, good_prompts=False):
    """A cache of four classes, whose prompts are noise or near the centers, and sentences (S, D) in class order."""
    rng = np.random.default_rng(seed)
    labels = np.arange(IMAGES) % CLASSES
    centers = rng.standard_normal((CLASSES, DIM))
    features = (centers[labels] + noise * rng.standard_normal((IMAGES, DIM))).astype(np.float32)
    splits = np.where(np.arange(IMAGES) < 24, "train", np.where(np.arange(IMAGES) < 160, "unlabeled", "test"))
    cache = FeatureCache.from_arrays(
        features,
        np.where(splits == "unlabeled", -1, labels),
        class_names=NAMES,
        text_features=good_prompts * centers[:, None] + rng.standard_normal((CLASSES, 2, DIM)),
        splits=splits.tolist(),
    )
    rows = sentences(centers, rng)
    each = len(rows) // CLASSES
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    names = [name for name in NAMES for _ in range(each)]
    cache.descriptions = Descriptions(names, [f"{name} {n}" for n, name in enumerate(names)], unit)
    return cache


def test_sentences_that_know_the_classes_are_read_and_their_worth_is_told():
    cache = cache_of(lambda centers, rng: np.repeat(centers, 4, axis=0))
    run = fit(cache, FitConfig(), device="cpu", progress=False)
    cache.descriptions = None
    alone = fit(cache, FitConfig(), device="cpu", progress=False)
    assert "gain_descriptions" not in alone.metrics
    assert run.metrics["weight_of_descriptions"] == 1
    assert run.metrics["balanced_accuracy"] > alone.metrics["balanced_accuracy"] + 0.05
    lines = evidence_lines([run.metrics], NAMES)
    gain, low, high = (100 * value for value in run.metrics["gain_descriptions"])
    assert f"descriptions {gain:+.1f} [{low:.1f}, {high:.1f}]" in lines[0]
    assert lines[1] == "the descriptions: read by 1 of 1 fits"


def test_sentences_about_other_classes_do_no_harm(monkeypatch):
    cache = cache_of(lambda centers, rng: np.repeat(np.roll(centers, 1, axis=0), 8, axis=0), good_prompts=True)
    judged = fit(cache, FitConfig(), device="cpu", progress=False)
    monkeypatch.setattr(ulfine_plus, "_readings", lambda trials: [ulfine_plus._Reading(sharpness=0.0)])
    believed = fit(cache, FitConfig(), device="cpu", progress=False)
    monkeypatch.undo()
    cache.descriptions = None
    alone = fit(cache, FitConfig(), device="cpu", progress=False)
    assert believed.metrics["balanced_accuracy"] < alone.metrics["balanced_accuracy"] - 0.02
    assert judged.metrics["balanced_accuracy"] > alone.metrics["balanced_accuracy"] - 0.02


def test_a_trial_alone_is_the_same_as_among_others():
    cache = cache_of(lambda centers, rng: np.repeat(centers, 2, axis=0) + rng.standard_normal((8, DIM)))
    configs = [FitConfig(seed=seed) for seed in range(3)]
    together = fit_many(cache, configs, device="cpu", progress=False)
    alone = fit(cache, configs[1], device="cpu", progress=False)
    np.testing.assert_allclose(together[1].test_probabilities, alone.test_probabilities, atol=1e-4)


@pytest.fixture
def parts():
    """Arguments of `_described`: two folds, three prompts a class, the first of which is the class's center."""
    torch.manual_seed(0)
    centers = normalize(torch.randn(3, 6))
    labels = torch.arange(12) % 3
    features = normalize(centers[torch.arange(42) % 3] + 0.2 * torch.randn(42, 6))
    device = DeviceFeatures(features, features[:, None], 1, torch.arange(42))
    index = torch.arange(12, 42)[None]
    pool = Pool(device, torch.arange(12)[None], labels[None], index, torch.ones(1, 30, dtype=torch.bool))
    texts = torch.cat([centers[:, None], normalize(torch.randn(3, 2, 6))], dim=1)  # (K, P, D)
    shared = {"texts": texts.flatten(0, 1), "text_labels": torch.arange(3).repeat_interleave(3)}
    prototypes = normalize(texts.mean(1))[None]
    trials = Trials(FitConfig(), {}, torch.zeros(1), prototypes, torch.zeros(1, 3), {}, Inputs(shared=shared))
    kept = torch.ones(1, 12, 2, dtype=torch.bool)
    kept[:, 6:, 1] = False
    return trials, pool, kept, texts, index


def described(parts, sharpness, pool=None):
    trials, own, kept, _, index = parts
    mean = trials.prototypes.mean(1, keepdim=True)
    return _described(trials, pool or own, {}, kept, index, torch.ones(1, 30, dtype=torch.bool), mean, sharpness)


def test_without_sharpness_all_texts_count_alike(parts):
    wanted = normalize(parts[3].mean(1))
    for fold in described(parts, 0.0)[0]:
        torch.testing.assert_close(fold, wanted)


def test_the_text_that_agrees_with_the_cluster_counts_most(parts):
    torch.testing.assert_close(described(parts, 200.0)[0, 0], parts[3][:, 0], atol=1e-3, rtol=0)


def test_weights_know_no_label_that_their_fold_holds_out(parts):
    pool = parts[1]
    labels = pool.labels.clone()
    labels[:, 6:] = (labels[:, 6:] + 1) % 3
    changed = Pool(pool.features, pool.labeled_rows, labels, pool.unlabeled_rows, pool.present)
    before, after = described(parts, 5.0), described(parts, 5.0, changed)
    torch.testing.assert_close(before[:, 1], after[:, 1], rtol=0, atol=0)
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-4
