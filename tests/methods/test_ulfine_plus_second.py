"""ulfine_plus over two encoders: one assignment, the second encoder's weight by held-out labels."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.cache.samples import write_images, write_model_with_norm
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cache.two_encoders import beside
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.checkpoint import cache_fingerprint
from ulfine_fast.engine.fit import fit, fit_many
from ulfine_fast.exports.write import export
from ulfine_fast.methods import ulfine_plus
from ulfine_fast.methods.ulfine_plus import _join, _of_variant
from ulfine_fast.runs.evaluate import evaluate
from ulfine_fast.runs.evidence import evidence_lines
from ulfine_fast.runs.predict import predict_images
from ulfine_fast.runs.run import Run

COUNTS = {"train/cat": 14, "train/dog": 12, "unlabeled": 10, "test/cat": 3, "test/dog": 4}
CLASSES, IMAGES = 3, 180


def arrays(noise, dim, *, seed, texts=False):
    """A cache in memory of three classes, 36 labelled images of 120, each a class center and noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(IMAGES) % CLASSES
    centers = rng.standard_normal((CLASSES, dim))
    features = centers[labels][:, None] + noise * rng.standard_normal((IMAGES, 2, dim))
    known = np.where(np.arange(IMAGES) < 36, labels, -1)
    splits = np.where(np.arange(IMAGES) < 120, np.where(known >= 0, "train", "unlabeled"), "test")
    return FeatureCache.from_arrays(
        features[:, 0].astype(np.float32),
        np.where(splits == "test", labels, known),
        class_names=["ash", "elm", "fir"],
        text_features=centers + rng.standard_normal((CLASSES, dim)) if texts else None,
        weak=features[:120, 1:].astype(np.float32),
        splits=splits.tolist(),
    )


def test_an_encoder_that_knows_the_classes_is_chosen_and_its_worth_is_told():
    weak, good = arrays(6.0, 12, seed=0, texts=True), arrays(0.7, 20, seed=1)
    alone = fit(weak, FitConfig(), device="cpu", progress=False)
    both = fit(beside(weak, good), FitConfig(), device="cpu", progress=False)
    assert both.metrics["balanced_accuracy"] > alone.metrics["balanced_accuracy"] + 0.2
    assert both.metrics["weight_of_second"] > 0
    gain, low, high = both.metrics["gain_second"]
    assert gain > 0.2
    assert low < gain < high
    lines = evidence_lines([both.metrics], both.class_names)
    assert f"second encoder {100 * gain:+.1f} [{100 * low:.1f}, {100 * high:.1f}]" in lines[0]
    assert lines[1].startswith("the second encoder: read by 1 of 1 fits as 0.")


def test_without_the_second_encoder_the_fit_is_that_of_the_first(monkeypatch):
    good, noise = arrays(3.0, 12, seed=1, texts=True), arrays(100.0, 20, seed=7)
    alone = fit(good, FitConfig(), device="cpu", progress=False)
    # any other reading is far less likely than this one
    monkeypatch.setattr(ulfine_plus, "_exceeds_error", lambda gain: torch.ones(len(gain), dtype=torch.bool))
    monkeypatch.setattr(ulfine_plus, "_best_gain", lambda gains, among: (torch.zeros(1, dtype=torch.int64), gains[0]))
    both = fit(beside(good, noise), FitConfig(), device="cpu", progress=False)
    assert both.metrics["weight_of_second"] == 0
    np.testing.assert_allclose(both.test_probabilities, alone.test_probabilities, atol=1e-4)
    assert evidence_lines([both.metrics], both.class_names)[1] == "the second encoder: read by 0 of 1 fits"


def test_a_reading_is_changed_for_a_gain_above_its_error():
    nan = float("nan")
    gains = torch.tensor(
        [
            [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [nan, nan, nan]],
            [[0.1, -0.2, 0.4], [0.1, 0.0, 0.2], [nan, nan, nan]],
            [[0.2, -0.3, 0.7], [-0.1, -0.2, 0.0], [nan, nan, nan]],
        ]
    )
    best, gain = ulfine_plus._best_gain(gains, [1, 2])
    assert best.tolist() == [2, 1, 1]
    # 0.2 is less than its error of 0.5 / 1.96, 0.1 more than that of 0.1 / 1.96
    assert ulfine_plus._exceeds_error(gain).tolist() == [False, True, False]


def test_trials_choose_for_themselves():
    caches = arrays(5.0, 12, seed=0), arrays(1.6, 20, seed=1)
    cache = beside(*caches)
    configs = [FitConfig(seed=seed) for seed in range(5)]
    together = fit_many(cache, configs, device="cpu", progress=False)
    assert len({run.metrics["weight_of_second"] for run in together}) > 1
    for run, config in zip(together, configs, strict=True):
        alone = fit(cache, config, device="cpu", progress=False)
        np.testing.assert_allclose(run.test_probabilities, alone.test_probabilities, atol=1e-3)


def test_the_joined_row():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    tensors = {
        "center": torch.randn(2, 1, 4),
        "second_center": torch.randn(2, 1, 6),
        "second_basis": torch.randn(2, 6, 3),
        "second_weight": torch.tensor([0.0, 0.6]),
    }
    joined = _join(tensors, torch.cat([first, second], dim=-1)).double().numpy()
    for t, row in np.ndindex(2, 5):
        one, two = (values[t, row].double().numpy() for values in (first, second))
        one, two = one / np.linalg.norm(one), two / np.linalg.norm(two)
        own = one - tensors["center"][t, 0].double().numpy()
        other = (two - tensors["second_center"][t, 0].double().numpy()) @ tensors["second_basis"][t].double().numpy()
        weight = float(tensors["second_weight"][t])
        wanted = [np.sqrt(1 - weight**2) * own / np.linalg.norm(own), weight * other / np.linalg.norm(other)]
        np.testing.assert_allclose(joined[t, row], np.concatenate(wanted), atol=1e-5)


def test_variants_of_other_sizes_are_padded():
    small = {"linear": torch.ones(2, 1, 2), "shares": torch.full((2, 1), 0.5)}
    large = {"linear": 3 * torch.ones(2, 2, 3), "shares": torch.full((2, 2), 0.25), "basis": torch.ones(2, 1)}
    chosen = _of_variant([small, large], torch.tensor([0, 1]))
    assert chosen["linear"].tolist() == [[[1, 1, 0], [0, 0, 0]], [[3, 3, 3], [3, 3, 3]]]
    assert chosen["shares"].tolist() == [[0.5, 1.0], [0.25, 0.25]]
    assert chosen["basis"].tolist() == [[0.0], [1.0]]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), COUNTS)


@pytest.fixture(scope="module")
def folders(images, tmp_path_factory):
    """Caches by an image-text model, with its tokens, and by a timm model."""
    root = tmp_path_factory.mktemp("caches")
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), root / "weights.safetensors")
    models = {
        "first": load_encoder(write_model_with_norm(root / "model"), device="cpu", features="last-block"),
        "second": load_encoder("timm:test_efficientnet@32", str(root / "weights.safetensors"), device="cpu"),
    }
    for name, encoder in models.items():
        extract(open_source(images), encoder, root / name, workers=0, progress=False)
    return root


@pytest.mark.parametrize("feature", ["projected", "pre-projection"])
def test_runs_are_saved_evaluated_and_predict_images(images, folders, feature, tmp_path):
    cache = beside(FeatureCache.open(folders / "first"), FeatureCache.open(folders / "second"))
    run = fit(cache, FitConfig(feature=feature), device="cpu", progress=False)
    again = Run.load(run.save(tmp_path / "run"))
    assert again.input_shape == ((1, 32 + 256) if feature == "pre-projection" else (8 + 256,))
    assert again.second is not None
    assert again.second.encoder["name"] == "timm:test_efficientnet@32"
    assert again.second.cache_path == folders / "second"
    assert evaluate(again)["balanced_accuracy"] == pytest.approx(run.metrics["balanced_accuracy"])
    wanted = evaluate(again, folders / "first", folders / "second")
    assert wanted["balanced_accuracy"] == pytest.approx(run.metrics["balanced_accuracy"])
    predicted = predict_images(again, images / "test", device="cpu")
    order = [run.test_ids.index(f"test/{name}") for name in predicted.ids]
    np.testing.assert_allclose(predicted.probabilities, run.test_probabilities[order], atol=0.02)


def test_what_a_run_of_two_encoders_cannot_do_is_said(folders, tmp_path):
    first, second = (FeatureCache.open(folders / name) for name in ("first", "second"))
    run = fit(beside(first, second), FitConfig(), device="cpu", progress=False)
    with pytest.raises(InputError, match=r"must have shape \(n, 264\), those of both encoders side by side, got"):
        run.predict(first.plain)
    with pytest.raises(InputError, match="this run has two encoders; name a cache of each with --cache and --with"):
        evaluate(run, folders / "first")
    with pytest.raises(InputError, match="a run of two encoders is not exported"):
        export(run, tmp_path / "export")
    alone = fit(first, FitConfig(), device="cpu", progress=False)
    with pytest.raises(InputError, match="this run has one encoder; leave out the second cache"):
        evaluate(alone, folders / "first", folders / "second")
    with pytest.raises(InputError, match=r"method linear_probe reads the features of one encoder; .* use ulfine_plus"):
        fit(beside(first, second), FitConfig(method="linear_probe"), device="cpu", progress=False)


def test_a_checkpoint_is_of_both_caches(folders):
    first, second = (FeatureCache.open(folders / name) for name in ("first", "second"))
    assert cache_fingerprint(beside(first, second)) != cache_fingerprint(first)


def test_methods_work_without_texts(folders):
    cache = FeatureCache.open(folders / "second")
    for method in ("ulfine_plus", "linear_probe"):
        run = fit(cache, FitConfig(method=method), device="cpu", progress=False)
        assert run.metrics["test_rows"] == 7
        assert "gain_text" not in run.metrics
