"""Realigned runs: heads, metrics and files, against numpy; and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.cli.program import refused, run, usage_error
from tests.conftest import make_clusters
from ulfine_fast import FitConfig, Run, export, fit, fit_many, load
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.metrics.classification import per_class_accuracy
from ulfine_fast.related.head_realignment.gaussians import Sampling, class_gaussians
from ulfine_fast.related.head_realignment.realign import realign
from ulfine_fast.related.test_time_adaptation.adapt import Adaptation, adapt
from ulfine_fast.runs.evaluate import evaluate

QUICK = Sampling(epochs=2, per_class=64)


@pytest.fixture(scope="module")
def world():
    """Six classes, of whose largest all 60 labelled images are taken, and 2 of the smallest."""
    return make_clusters(classes=6, dim=16, train=80, noise=1.0, text_noise=2.0)


@pytest.fixture(scope="module")
def biased(world):
    options = {"method": "cross_entropy", "n1": 60, "m1": 10, "gamma_l": 30, "gamma_u": 1, "steps": 150, "scale": 10.0}
    return fit_many(world, [FitConfig(**options, seed=seed) for seed in range(3)], progress=False)


def rows_of(cache, ids):
    return [cache.ids.index(name) for name in ids]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_adjusted_logits_by_hand(world, biased):
    adjusted = realign(biased[:1], world, by="adjust", tau=0.5)[0]
    counts = np.array(biased[0].metrics["class_counts"])
    expected = biased[0].logits(world.plain) - 0.5 * np.log(counts / counts.sum())
    np.testing.assert_allclose(adjusted.logits(world.plain), expected, atol=1e-5)
    assert adjusted.metrics["realigned"] == {"by": "adjust", "tau": 0.5}


def test_lda_classifies_as_mahalanobis_distances_do(world, biased):
    lda = realign(biased[:1], world, by="lda", kappas=[0])[0]
    labeled = rows_of(world, biased[0].split["labeled"])
    features, labels = unit(world.plain.astype(np.float64)), world.labels[labeled]
    covariance = class_gaussians(torch.from_numpy(features[labeled]), torch.from_numpy(labels), 6).covariance.numpy()
    distance = []
    for k in range(6):
        offset = features - features[labeled][labels == k].mean(0)
        distance.append([row @ np.linalg.solve(covariance, row) for row in offset])
    assert np.array_equal(lda.predict(world.plain), np.argmin(distance, axis=0))
    # the two differ by a common factor, which spreads the logits as they were
    both = lda.logits(world.plain), -0.5 * np.array(distance).T
    centred = [logits - logits.mean(1, keepdims=True) for logits in both]
    factor = (centred[0] * centred[1]).sum() / (centred[1] ** 2).sum()
    np.testing.assert_allclose(centred[0], factor * centred[1], atol=1e-3)
    before, after = (each.logits(world.plain[labeled]) for each in (biased[0], lda))
    assert (before - before.mean(1, keepdims=True)).std() == pytest.approx(
        (after - after.mean(1, keepdims=True)).std(), rel=1e-4
    )


def spoiled(before):
    """The run with its rarest classes' weights negated."""
    head, order = before.tensors["linear"].clone(), np.argsort(before.metrics["class_counts"])
    head[order[:2]] *= -1
    return replace(before, tensors={"linear": head})


@pytest.mark.parametrize("by", ["gaussians", "lda"])
def test_a_spoiled_head_gets_its_rare_classes_back(world, biased, by):
    broken = [spoiled(before) for before in biased]
    after = realign(broken, world, by=by, sampling=Sampling(per_class=64, lr=0.1), progress=False)
    for bad, old, new in zip(broken, biased, after, strict=True):
        predicted = bad.predict(world.plain[rows_of(world, old.test_ids)])
        rarest = np.argsort(old.metrics["class_counts"])[:2]
        accuracy = per_class_accuracy(old.test_labels, predicted, 6)[rarest].mean()
        assert new.metrics["few"] > accuracy + 0.3
        assert new.test_ids == old.test_ids
        assert new.config == old.config
        assert new.metrics["class_counts"] == old.metrics["class_counts"]
        accuracy = (new.test_probabilities.argmax(1) == new.test_labels).mean()
        assert accuracy == pytest.approx(new.metrics["accuracy"])


def test_kappa_is_chosen_on_validation(world, biased):
    lda = realign(biased[:1], world, by="lda", kappas=[0, 1e4])[0]
    note = lda.metrics["realigned"]
    assert note["val_balanced_accuracy"][f"{note['kappa']:g}"] == max(note["val_balanced_accuracy"].values())
    alone = realign(biased[:1], world, by="lda", kappas=[note["kappa"]])[0]
    assert torch.equal(alone.tensors["realigned.weight"], lda.tensors["realigned.weight"])
    assert lda.metrics["val"]["balanced_accuracy"] == pytest.approx(max(note["val_balanced_accuracy"].values()))


def test_runs_together_are_runs_alone(world, biased):
    together = realign(biased, world, kappas=[0, 20], sampling=QUICK, progress=False)
    alone = realign(biased[1:2], world, kappas=[0, 20], sampling=QUICK, progress=False)[0]
    assert torch.equal(together[1].tensors["linear"], alone.tensors["linear"])
    assert together[1].metrics == alone.metrics


def test_without_texts_means_are_drawn_towards_their_mean(biased):
    bare = make_clusters(classes=6, dim=16, train=80, noise=2.0, text=False)
    before = fit(bare, biased[0].config, progress=False)
    lda = realign([before], bare, by="lda", kappas=[50])[0]
    labeled = rows_of(bare, before.split["labeled"])
    features, labels = torch.from_numpy(unit(bare.plain.astype(np.float64))), torch.from_numpy(bare.labels[labeled])
    gaussians = class_gaussians(features[labeled], labels, 6)
    counts = gaussians.counts.unsqueeze(1)
    means = (counts * gaussians.means + 50 * gaussians.means.mean(0)) / (counts + 50)
    offset = features.unsqueeze(1) - means  # (n, K, D)
    distance = (offset @ torch.linalg.inv(gaussians.covariance) * offset).sum(-1)
    assert np.array_equal(lda.predict(bare.plain), distance.argmin(1).numpy())


def test_the_head_is_realigned_behind_its_adapter(world):
    config = FitConfig(method="lightweight", n1=60, m1=20, gamma_l=30, gamma_u=1, steps=100, lr=0.1)
    before = fit(world, config, progress=False)
    after = realign([before], world, sampling=QUICK, progress=False)[0]
    assert torch.equal(after.tensors["adapter.up"], before.tensors["adapter.up"])
    assert after.tensors["adapter.up"].abs().max() > 0
    assert not torch.equal(after.tensors["linear"], before.tensors["linear"])
    lda = realign([before], world, by="lda", kappas=[0])[0]
    plain = {name: tensor for name, tensor in lda.tensors.items() if not name.startswith("adapter")}
    assert np.abs(replace(lda, tensors=plain).logits(world.plain) - lda.logits(world.plain)).max() > 1e-3


def test_two_heads_can_only_be_adjusted(world):
    before = fit(world, FitConfig(method="ulfine", n1=60, m1=20, gamma_l=30, gamma_u=1, steps=20), progress=False)
    with pytest.raises(InputError, match="method ulfine predicts from something else"):
        realign([before], world)
    shift = realign([before], world, by="adjust")[0].logits(world.plain) - before.logits(world.plain)
    assert np.ptp(shift, axis=0).max() < 1e-4
    assert np.ptp(shift, axis=1).min() > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": "magic"}, "by must be one of gaussians, lda, adjust, got 'magic'"),
        ({"kappas": [-1.0]}, "kappa must be numbers of at least 0, got -1.0"),
        ({"kappas": []}, "got none"),
        ({"by": "adjust", "tau": float("nan")}, "tau must be"),
    ],
)
def test_wrong_values_are_refused(world, biased, options, words):
    with pytest.raises(InputError, match=words):
        realign(biased[:1], world, **options)


def test_other_images_or_labels_are_refused(world, biased):
    with pytest.raises(InputError, match="use the cache it was fitted on"):
        realign(biased[:1], make_clusters(classes=6, train=5, test=1))
    with pytest.raises(InputError, match="--labels"):
        realign(biased[:1], world.with_labels(world.labels.copy()))


@pytest.mark.parametrize("first", ["lda", "adjust"])
@pytest.mark.parametrize("second", ["gaussians", "lda", "adjust"])
def test_a_replaced_head_is_not_realigned_again(world, biased, first, second):
    once = realign(biased[:1], world, by=first, kappas=[0])
    with pytest.raises(InputError, match="realigned already; name the run that it was made from"):
        realign(once, world, by=second)


@pytest.mark.parametrize("second", ["lda", "adjust"])
def test_a_trained_head_is_a_cosine_head_like_any_other(world, biased, second):
    once = realign(biased[:1], world, kappas=[5], sampling=QUICK, progress=False)
    twice = realign(once, world, by=second, kappas=[5])[0]
    counts = np.array(once[0].metrics["class_counts"])
    if second == "adjust":
        expected = once[0].logits(world.plain) - np.log(counts / counts.sum())
        np.testing.assert_allclose(twice.logits(world.plain), expected, atol=1e-5)
    else:
        # its features are those of the first run, and so is its discriminant
        lda = realign(biased[:1], world, by="lda", kappas=[5])[0]
        assert np.array_equal(twice.predict(world.plain), lda.predict(world.plain))


@pytest.mark.parametrize("by", ["gaussians", "lda", "adjust"])
@pytest.mark.parametrize("method", ["cross_entropy", "lightweight"])
def test_a_realigned_run_has_one_head(world, tmp_path, method, by):
    """Prediction, evaluation, adaptation that learns nothing, export and the saved run agree."""
    config = FitConfig(method=method, n1=60, m1=20, gamma_l=30, gamma_u=1, steps=60, lr=0.1)
    before = fit(world, config, progress=False)
    after = realign([before], world, by=by, sampling=QUICK, progress=False)[0]
    logits = after.logits(world.plain)
    assert np.abs(logits - before.logits(world.plain)).max() > 0.1

    stream = adapt(after, world, Adaptation(by="none"), progress=False)
    np.testing.assert_allclose(stream.logits, logits, atol=2e-4)
    np.testing.assert_allclose(stream.before, logits, atol=2e-4)
    loaded = Run.load(after.save(tmp_path / "run"))
    np.testing.assert_array_equal(loaded.logits(world.plain), logits)
    probabilities = after.predict_proba(world.plain)
    for to in ("safetensors", "onnx"):
        exported = load(export(after, tmp_path / to, to=to))
        np.testing.assert_allclose(exported.predict_proba(world.plain), probabilities, atol=1e-4)
    test = rows_of(world, after.test_ids)
    assert (logits[test].argmax(1) == after.test_labels).mean() == pytest.approx(after.metrics["accuracy"])


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A small cache of images and two biased runs of it."""
    from tests.cache.samples import write_images, write_tiny_model

    folder = tmp_path_factory.mktemp("realign")
    images = write_images(folder / "images", {"train/cat": 20, "train/dog": 6, "test/cat": 4, "test/dog": 4})
    assert run("extract", images, "-o", folder / "cache", "--model", write_tiny_model(folder)).exit_code == 0
    fitted = run(
        "fit", folder / "cache", "-o", folder / "run", "--method", "cross_entropy", "--seeds", 2, "--steps", 20
    )
    assert fitted.exit_code == 0, fitted.output
    return folder


@pytest.mark.parametrize("by", ["gaussians", "lda", "adjust"])
def test_the_command_writes_runs_that_others_read(on_disk, tmp_path, by):
    out = tmp_path / "aligned"
    done = run("realign", on_disk / "run", "--out", out, "--by", by, "--json")
    assert done.exit_code == 0, done.output
    means = json.loads(done.stdout)
    assert means[by]["accuracy"]["n"] == means["before"]["accuracy"]["n"] == 2
    fitted = Run.load(out / "seed-1")
    assert fitted.metrics["realigned"]["by"] == by
    assert evaluate(fitted)["accuracy"] == pytest.approx(fitted.metrics["accuracy"])
    predicted = run("predict", out / "seed-1", on_disk / "images" / "test", "--out", tmp_path / "predictions.csv")
    assert predicted.exit_code == 0, predicted.output
    exported = run("export", out / "seed-0", tmp_path / "graph", "--to", "torchscript")
    assert exported.exit_code == 0, exported.output
    probabilities = torch.jit.load(str(tmp_path / "graph" / "model.ts"))(torch.eye(8))
    np.testing.assert_allclose(probabilities, Run.load(out / "seed-0").predict_proba(np.eye(8)), atol=1e-6)


def test_a_report_tells_the_runs_apart(on_disk, tmp_path):
    assert run("realign", on_disk / "run" / "seed-0", "-o", tmp_path / "lda", "--by", "lda").exit_code == 0
    done = run("report", on_disk / "run", tmp_path / "lda", "--out", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    assert "realigned=lda" in (tmp_path / "report.html").read_text()


def test_bad_input_at_the_command(on_disk, tmp_path):
    arguments = (on_disk / "run" / "seed-0", "--out", tmp_path / "x")
    assert "kappa is numbers separated by commas" in refused("realign", *arguments, "--kappa", "five")
    assert "'magic' is not one of 'gaussians', 'lda', 'adjust'" in usage_error("realign", *arguments, "--by", "magic")
    assert "is gone or no cache" in refused("realign", *arguments, "--cache", tmp_path / "none")
    assert "is no run" in refused("realign", tmp_path / "none", "--out", tmp_path / "x")
    assert "exists and is no run" in refused("realign", on_disk / "run" / "seed-0", "--out", on_disk / "images")
    assert not (tmp_path / "x").exists()
