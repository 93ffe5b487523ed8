"""Realigned runs: heads, figures and files, against numpy; and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.cli.test_bad_input import refused, run
from tests.conftest import make_clusters
from ulfine_fast import FitConfig, Run, fit, fit_many, metrics
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.related.head_realignment.gaussians import Sampling, class_gaussians
from ulfine_fast.related.head_realignment.realign import realign
from ulfine_fast.runs.evaluate import evaluate

QUICK = Sampling(epochs=2, per_class=64)


@pytest.fixture(scope="module")
def world():
    """Six classes, of whose largest all 60 labelled images are taken, and 2 of the smallest."""
    return make_clusters(classes=6, dim=16, train=80, noise=1.0, text_noise=2.0)


@pytest.fixture(scope="module")
def biased(world):
    told = {"method": "cross_entropy", "n1": 60, "m1": 10, "gamma_l": 30, "gamma_u": 1, "steps": 150, "scale": 10.0}
    return fit_many(world, [FitConfig(**told, seed=seed) for seed in range(3)], progress=False)


def rows_of(cache, ids):
    return [cache.ids.index(name) for name in ids]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_adjusted_logits_by_hand(world, biased):
    found = realign(biased[:1], world, by="adjust", tau=0.5)[0]
    counts = np.array(biased[0].metrics["class_counts"])
    wanted = biased[0].logits(world.plain) - 0.5 * np.log(counts / counts.sum())
    np.testing.assert_allclose(found.logits(world.plain), wanted, atol=1e-5)
    assert found.metrics["realigned"] == {"by": "adjust", "tau": 0.5}


def test_lda_classifies_as_mahalanobis_distances_do(world, biased):
    found = realign(biased[:1], world, by="lda", kappas=[0])[0]
    labeled = rows_of(world, biased[0].split["labeled"])
    features, labels = unit(world.plain.astype(np.float64)), world.labels[labeled]
    covariance = class_gaussians(torch.from_numpy(features[labeled]), torch.from_numpy(labels), 6).covariance.numpy()
    distance = []
    for k in range(6):
        away = features - features[labeled][labels == k].mean(0)
        distance.append([row @ np.linalg.solve(covariance, row) for row in away])
    assert np.array_equal(found.predict(world.plain), np.argmin(distance, axis=0))
    # a common factor stands between the two, and spreads the logits as they were
    centred = [one - one.mean(1, keepdims=True) for one in (found.logits(world.plain), -0.5 * np.array(distance).T)]
    factor = (centred[0] * centred[1]).sum() / (centred[1] ** 2).sum()
    np.testing.assert_allclose(centred[0], factor * centred[1], atol=1e-3)
    before, after = (one.logits(world.plain[labeled]) for one in (biased[0], found))
    assert (before - before.mean(1, keepdims=True)).std() == pytest.approx(
        (after - after.mean(1, keepdims=True)).std(), rel=1e-4
    )


def spoiled(before):
    """The run with its rarest classes' rows turned round."""
    head, order = before.tensors["linear"].clone(), np.argsort(before.metrics["class_counts"])
    head[order[:2]] *= -1
    return replace(before, tensors={"linear": head})


@pytest.mark.parametrize("by", ["gaussians", "lda"])
def test_a_spoiled_head_gets_its_rare_classes_back(world, biased, by):
    broken = [spoiled(one) for one in biased]
    found = realign(broken, world, by=by, sampling=Sampling(per_class=64, lr=0.1), progress=False)
    for bad, old, new in zip(broken, biased, found, strict=True):
        predicted = bad.predict(world.plain[rows_of(world, old.test_ids)])
        rarest = np.argsort(old.metrics["class_counts"])[:2]
        right = metrics.per_class_accuracy(old.test_labels, predicted, 6)[rarest].mean()
        assert new.metrics["few"] > right + 0.3
        assert new.test_ids == old.test_ids
        assert new.config == old.config
        assert new.metrics["class_counts"] == old.metrics["class_counts"]
        right = (new.test_probabilities.argmax(1) == new.test_labels).mean()
        assert right == pytest.approx(new.metrics["accuracy"])


def test_kappa_is_chosen_on_validation(world, biased):
    found = realign(biased[:1], world, by="lda", kappas=[0, 1e4])[0]
    note = found.metrics["realigned"]
    assert note["val_balanced_accuracy"][f"{note['kappa']:g}"] == max(note["val_balanced_accuracy"].values())
    alone = realign(biased[:1], world, by="lda", kappas=[note["kappa"]])[0]
    assert torch.equal(alone.tensors["realigned.weight"], found.tensors["realigned.weight"])
    assert found.metrics["val"]["balanced_accuracy"] == pytest.approx(max(note["val_balanced_accuracy"].values()))


def test_runs_together_are_runs_alone(world, biased):
    together = realign(biased, world, kappas=[0, 20], sampling=QUICK, progress=False)
    alone = realign(biased[1:2], world, kappas=[0, 20], sampling=QUICK, progress=False)[0]
    assert torch.equal(together[1].tensors["linear"], alone.tensors["linear"])
    assert together[1].metrics == alone.metrics


def test_without_texts_means_lean_on_each_other(biased):
    bare = make_clusters(classes=6, dim=16, train=80, noise=2.0, text=False)
    before = fit(bare, biased[0].config, progress=False)
    found = realign([before], bare, by="lda", kappas=[50])[0]
    labeled = rows_of(bare, before.split["labeled"])
    features, labels = torch.from_numpy(unit(bare.plain.astype(np.float64))), torch.from_numpy(bare.labels[labeled])
    own = class_gaussians(features[labeled], labels, 6)
    counts = own.counts.unsqueeze(1)
    means = (counts * own.means + 50 * own.means.mean(0)) / (counts + 50)
    away = features.unsqueeze(1) - means  # (n, K, D)
    distance = (away @ torch.linalg.inv(own.covariance) * away).sum(-1)
    assert np.array_equal(found.predict(bare.plain), distance.argmin(1).numpy())


def test_an_adapter_stays_and_is_looked_through(world):
    config = FitConfig(method="lightweight", n1=60, m1=20, gamma_l=30, gamma_u=1, steps=100, lr=0.1)
    before = fit(world, config, progress=False)
    found = realign([before], world, sampling=QUICK, progress=False)[0]
    assert torch.equal(found.tensors["adapter.up"], before.tensors["adapter.up"])
    assert found.tensors["adapter.up"].abs().max() > 0
    assert not torch.equal(found.tensors["linear"], before.tensors["linear"])
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
    once = realign(biased[:1], world, by="lda", kappas=[0])
    with pytest.raises(InputError, match="realigned already"):
        realign(once, world, by="gaussians")
    with pytest.raises(InputError, match="use the cache it was fitted on"):
        realign(biased[:1], make_clusters(classes=6, train=5, test=1))
    with pytest.raises(InputError, match="--labels"):
        realign(biased[:1], world.with_labels(world.labels.copy()))


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
    told = json.loads(done.stdout)
    assert told[by]["accuracy"]["n"] == told["before"]["accuracy"]["n"] == 2
    fitted = Run.load(out / "seed-1")
    assert fitted.metrics["realigned"]["by"] == by
    figures = evaluate(fitted)
    assert figures["accuracy"] == pytest.approx(fitted.metrics["accuracy"])
    predicted = run("predict", out / "seed-1", on_disk / "images" / "test", "--out", tmp_path / "found.csv")
    assert predicted.exit_code == 0, predicted.output
    exported = run("export", out / "seed-0", tmp_path / "graph", "--to", "torchscript")
    assert exported.exit_code == 0, exported.output
    scored = torch.jit.load(str(tmp_path / "graph" / "model.ts"))(torch.eye(8))
    np.testing.assert_allclose(scored, Run.load(out / "seed-0").predict_proba(np.eye(8)), atol=1e-6)


def test_a_report_tells_the_runs_apart(on_disk, tmp_path):
    assert run("realign", on_disk / "run" / "seed-0", "-o", tmp_path / "lda", "--by", "lda").exit_code == 0
    done = run("report", on_disk / "run", tmp_path / "lda", "--out", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    assert "realigned=lda" in (tmp_path / "report.html").read_text()


def test_bad_input_at_the_command(on_disk, tmp_path):
    whole = (on_disk / "run" / "seed-0", "--out", tmp_path / "x")
    assert "kappa is numbers separated by commas" in refused("realign", *whole, "--kappa", "five")
    assert "by must be one of" in refused("realign", *whole, "--by", "magic")
    assert "is gone or no cache" in refused("realign", *whole, "--cache", tmp_path / "none")
    assert "is no run" in refused("realign", tmp_path / "none", "--out", tmp_path / "x")
    assert "exists and is no run" in refused("realign", on_disk / "run" / "seed-0", "--out", on_disk / "images")
    assert not (tmp_path / "x").exists()
