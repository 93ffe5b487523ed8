from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, FitConfig, Run, fit, fit_many
from ulfine_fast.data.splits import draw_split
from ulfine_fast.methods import ulfine_plus
from ulfine_fast.ops.evidence import fold_numbers

SEEDS = range(3)


def plus(**values):
    return FitConfig(**{"method": "ulfine_plus", "n1": 20, "gamma_l": 10, "gamma_u": 10, **values})


def unit_rows(cache, rows):
    features = cache.plain[rows].astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def balanced(predicted, labels):
    return float(np.mean([(predicted[labels == k] == k).mean() for k in np.unique(labels)]))


def gains(cache, runs):
    """Balanced test accuracy of each run less that of its own probe."""
    result = []
    for run in runs:
        rows = [cache.ids.index(name) for name in run.test_ids]
        probe = (unit_rows(cache, rows) @ run.tensors["linear"].numpy().T).argmax(1)
        result.append(run.metrics["balanced_accuracy"] - balanced(probe, run.test_labels))
    return np.array(result)


def merged(cache, pairs):
    """The same images, two unlike clusters to a class."""
    return FeatureCache.from_arrays(
        cache.plain,
        np.asarray(pairs)[cache.labels],
        weak=cache.views("weak"),
        strong=cache.views("strong"),
        splits=list(cache.splits),
    )


def every_shape(cache):
    """Gains over the probe by shape and seed."""
    shapes = ("consistent", "uniform", "reversed")
    runs = fit_many(cache, [plus(shape=shape, seed=s, m1=80) for shape in shapes for s in SEEDS])
    return gains(cache, runs).reshape(3, -1)


@pytest.fixture
def brief(monkeypatch):
    """Short probes, for tests that are not about how good they are."""
    monkeypatch.setattr(ulfine_plus, "PROBE_STOPS", (4, 20))


@pytest.fixture
def watched(monkeypatch, brief):
    """Evidence and clusters of every call of the clustering: that of the folds, then that with all labels."""
    seen = []

    def watching(evidence, *args, **options):
        seen.append((evidence, fit_clusters(evidence, *args, **options)))
        return seen[-1][1]

    fit_clusters = ulfine_plus.fit_clusters
    monkeypatch.setattr(ulfine_plus, "fit_clusters", watching)
    return seen


def test_better_than_its_probe_where_unlabelled_images_cluster_by_class():
    gained = every_shape(make_clusters(noise=1.5, train=100, test=60, text=False))
    # little is left to learn where the unlabelled set is as lopsided as the labels
    assert gained[0].mean() > 0
    assert gained[1:].mean(1).min() > 0.02


def test_not_worse_than_its_probe_where_features_are_noise():
    cache = make_clusters(noise=20, train=100, test=60)
    runs = fit_many(cache, [plus(shape="uniform", seed=s, m1=80) for s in SEEDS])
    assert gains(cache, runs).mean() > -0.02
    # a probe that knows nothing is believed more than any clusters of nothing
    weights = torch.stack([run.tensors["weights"] for run in runs]).mean(0)
    assert weights.argmax() == 0


def test_not_worse_than_its_probe_where_a_class_is_two_unlike_clusters():
    cache = merged(make_clusters(classes=8, noise=1.5, train=60, test=40, text=False), [0, 1, 2, 3, 0, 1, 2, 3])
    assert every_shape(cache).mean(1).min() > -0.02


@pytest.mark.parametrize("text", [True, False])
def test_without_views(text):
    cache = make_clusters(noise=1.5, train=100, test=60, views=False, text=text)
    gained = gains(cache, fit_many(cache, [plus(shape="uniform", seed=s, m1=80) for s in SEEDS]))
    assert gained.mean() > 0.02


def test_without_unlabelled_images():
    cache = make_clusters()
    none, whole = fit(cache, plus(m1=0, shape="uniform")), fit(cache, FitConfig(method="ulfine_plus"))
    assert none.split["unlabeled"] == whole.split["unlabeled"] == []
    assert none.metrics["balanced_accuracy"] > 0.6
    assert np.isfinite(none.test_probabilities).all()
    assert gains(cache, [whole])[0] > -0.05


@pytest.mark.usefixtures("brief")
def test_a_trial_without_unlabelled_images_beside_others(clusters):
    lonely = plus(m1=0, n1=30, shape="uniform")
    together = fit_many(clusters, [plus(n1=30, m1=20), lonely])[1]
    np.testing.assert_allclose(together.test_probabilities, fit(clusters, lonely).test_probabilities, atol=1e-5)


@pytest.mark.parametrize(
    ("world", "values"),
    [
        ({"classes": 2, "train": 80}, {}),
        ({"train": 80}, {"n1": 1, "gamma_l": 1, "m1": 40, "val_fraction": 0.0}),
        ({"train": 80}, {"n1": 2, "gamma_l": 1, "m1": 40, "val_fraction": 0.0}),
        ({"dim": 96, "train": 40}, {"n1": 8, "gamma_l": 4, "m1": 12}),
        ({"classes": 2, "dim": 64, "train": 20}, {"n1": 1, "gamma_l": 1, "m1": 0, "val_fraction": 0.0}),
    ],
    ids=["two classes", "one label a class", "two labels a class", "fewer rows than dimensions", "two images"],
)
def test_small_worlds(world, values):
    cache = make_clusters(noise=0.6, **world)
    run = fit(cache, plus(**values))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.tensors.values())
    assert np.isfinite(run.test_probabilities).all()
    assert run.metrics["balanced_accuracy"] > 0.75
    assert gains(cache, [run])[0] > -0.1


@pytest.mark.usefixtures("brief")
def test_a_saved_run_gives_the_same_logits(clusters, tmp_path):
    run = fit(clusters, plus())
    again = Run.load(run.save(tmp_path / "run"))
    np.testing.assert_array_equal(again.logits(clusters.plain), run.logits(clusters.plain))
    rows = [clusters.ids.index(name) for name in run.test_ids]
    np.testing.assert_allclose(run.predict_proba(clusters.plain[rows]), run.test_probabilities, atol=1e-4)


@pytest.mark.usefixtures("brief")
def test_a_trial_alone_is_the_same_as_among_others(clusters):
    configs = [
        plus(seed=3),
        plus(
            seed=5,
            n1=9,
            m1=30,
            shape="reversed",
            probe_weight=0.5,
            sharpness_end=20.0,
            evidence_temperature=5.0,
            shrinkage=0.2,
        ),
        plus(seed=7, n1=30, m1=20, label_weight=2.0, prior_pseudo_count=1.0, view_weight=0.0),
    ]
    for run in fit_many(clusters, configs)[:2]:
        alone = fit(clusters, run.config)
        np.testing.assert_allclose(run.test_probabilities, alone.test_probabilities, atol=1e-3)
        assert run.metrics.get("pseudo_label_precision") == alone.metrics.get("pseudo_label_precision")


@pytest.mark.usefixtures("brief")
def test_hidden_labels_change_nothing(clusters):
    split = draw_split(clusters.labels, clusters.splits, clusters.class_names, plus())
    labels = clusters.labels.copy()
    labels[split.unlabeled] = (labels[split.unlabeled] + 1) % 4
    blind = FeatureCache.from_arrays(
        clusters.plain,
        labels,
        class_names=clusters.class_names,
        text_features=clusters.text_features,
        weak=clusters.views("weak"),
        strong=clusters.views("strong"),
        splits=list(clusters.splits),
        ids=clusters.ids,
    )
    one, other = fit(clusters, plus(), split=split), fit(blind, plus(), split=split)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    assert one.metrics["pseudo_label_precision"] > other.metrics["pseudo_label_precision"]


@pytest.mark.parametrize("text", [True, False])
def test_candidates_never_see_the_labels_of_their_fold(watched, monkeypatch, text):
    clusters = make_clusters(text=text)
    split = draw_split(clusters.labels, clusters.splits, clusters.class_names, plus())
    truth = torch.from_numpy(clusters.labels[split.labeled])
    folds = fold_numbers(torch.tensor([0]), truth.unsqueeze(0), 4, 4)
    monkeypatch.setattr(ulfine_plus, "fold_numbers", lambda *_: folds)
    # the weights of probes read all held-out labels, so there is one probe here
    monkeypatch.setattr(ulfine_plus, "PROBE_SCALES", (10.0,))
    monkeypatch.setattr(ulfine_plus, "PROBE_STOPS", (20,))
    held = torch.nonzero(folds[0] == 2).flatten()
    first, second = next((a, b) for a in held for b in held if truth[a] != truth[b])
    labels = clusters.labels.copy()
    rows = split.labeled[[int(first), int(second)]]
    labels[rows] = labels[rows[::-1]]
    lying = FeatureCache.from_arrays(
        clusters.plain,
        labels,
        class_names=clusters.class_names,
        text_features=clusters.text_features,
        weak=clusters.views("weak"),
        strong=clusters.views("strong"),
        splits=list(clusters.splits),
        ids=clusters.ids,
    )
    fit(clusters, plus(), split=split)
    fit(lying, plus(), split=split)
    # of each fit, the folds' four in one call: five starting priors
    (evidence, fitted), (other, refitted) = watched[0], watched[2]
    assert evidence.label_weights.shape[2] == 4
    assert evidence.prior.shape[1] == 20
    changed = []
    for j in range(4):
        starts = slice(5 * j, 5 * j + 5)
        same = torch.equal(evidence.heads[:, j], other.heads[:, j])
        assert same == torch.allclose(fitted.centers[:, starts], refitted.centers[:, starts], rtol=0, atol=1e-5)
        changed.append(not same)
    # the labels of the second fold were swapped
    assert changed == [True, False, True, True]


def test_every_fold_leaves_its_own_rows_out(clusters, watched):
    fit(clusters, plus(folds=3, label_weight=7.0))
    (folds, _), (whole, _) = watched
    assert (whole.label_weights == 7).all()
    left_out = folds.label_weights[0] == 0  # (L, folds)
    assert left_out.sum(1).max() == 1
    assert (left_out.sum(0) > 0).all()


def test_the_scatter_between_views_is_summed_over_parts_of_the_pool(clusters, monkeypatch):
    whole = fit(clusters, plus())
    monkeypatch.setattr(ulfine_plus, "TOGETHER", 50)
    torch.testing.assert_close(fit(clusters, plus()).tensors["map"], whole.tensors["map"], rtol=1e-3, atol=1e-3)


def test_many_images_are_clustered_from_a_sample_of_them(watched, monkeypatch):
    cache = make_clusters(noise=1.5, train=100, test=60, text=False)
    monkeypatch.setattr(ulfine_plus, "SAMPLE", 100)
    runs = fit_many(cache, [plus(shape="uniform", seed=s, m1=60) for s in SEEDS])
    sizes = [evidence.unlabeled.present.shape[1] for evidence, _ in watched]
    # folds and all labels on the sample, then all images
    assert sizes == [100, 100, 240]
    assert gains(cache, runs).mean() > 0.02
    alone = fit(cache, runs[1].config)
    np.testing.assert_allclose(runs[1].test_probabilities, alone.test_probabilities, atol=1e-3)


def test_candidates_that_the_labels_reject_are_left_out(watched):
    cache = make_clusters(noise=1.5, train=100, test=60)
    run = fit(cache, plus(shape="reversed", m1=80, evidence_temperature=1e5, prior_pseudo_count=5.0))
    assert watched[1][0].prior.shape[1] == run.tensors["shares"].shape[0] == len(run.tensors["weights"]) - 1 < 5
    kept = run.tensors["weights"][run.tensors["weights"] > 0]
    assert kept.min() >= 0.01
    assert float(kept.sum()) == pytest.approx(1.0)


def explicit_logits(run, features):
    """The mixture written out with dense matrices, one candidate at a time."""
    t = {name: tensor.double().numpy() for name, tensor in run.tensors.items()}
    linear = features @ t["linear"].T
    x = (features - t["mean"]) @ t["map"]
    candidates = [linear]
    for centers, factors in zip(t["centers"], t["factors"], strict=True):
        metric = np.eye(x.shape[1]) + factors.T @ factors
        length = np.sqrt(((x @ metric) * x).sum(1, keepdims=True))
        cosines = x @ metric @ centers.T / length
        candidates.append(run.config.sharpness_end * cosines + run.config.probe_weight * linear)
    total = 0.0
    for z, weight, temperature in zip(candidates, t["weights"], t["temperature"], strict=True):
        p = np.exp((z - z.max(1, keepdims=True)) / temperature)
        total = total + weight * p / p.sum(1, keepdims=True)
    return np.log(total)


@pytest.mark.usefixtures("brief")
def test_the_prediction_is_the_weighted_mean_of_the_candidates(clusters):
    run = fit(clusters, plus(probe_weight=0.7, sharpness_end=15.0))
    features = unit_rows(clusters, np.arange(0, len(clusters), 7))
    np.testing.assert_allclose(run.logits(features), explicit_logits(run, features), rtol=1e-2, atol=2e-3)
    np.testing.assert_allclose(np.exp(run.logits(features)).sum(1), 1, atol=1e-4)


@pytest.mark.usefixtures("brief")
def test_the_evidence_temperature_decides_how_far_the_weights_part():
    hard = make_clusters(noise=1.8)
    even, sure = fit_many(hard, [plus(evidence_temperature=0.0), plus(evidence_temperature=1e6)])
    torch.testing.assert_close(even.tensors["weights"], torch.full((6,), 1 / 6))
    assert sure.tensors["weights"].max() == pytest.approx(1.0)


def test_without_probe_weight_clusters_forget_the_probe(clusters, watched):
    fit(clusters, plus(probe_weight=0.0))
    assert watched[0][0].heads.abs().max() == watched[0][0].offsets.abs().max() == 0


def test_pseudo_labels_are_probabilities_and_mostly_right():
    cache = make_clusters(noise=1.2, train=100)
    run = fit(cache, plus(shape="uniform"))
    assert run.metrics["pseudo_label_rate"] == 1
    assert run.metrics["pseudo_label_precision"] > 0.9
    assert run.history == []
    prior = run.tensors["shares"]
    torch.testing.assert_close(prior.sum(-1), torch.ones(5))
    # a uniform unlabelled set is seen as one, whatever a candidate began with
    assert (prior - 0.25).abs().max() < 0.12


def test_before_any_image_is_seen_the_text_predicts(world):
    trials, method, state, batch = world(method="ulfine_plus")
    assert method.pool_probabilities(trials, state) is None
    wanted = batch.weak @ trials.prototypes.transpose(1, 2)
    torch.testing.assert_close(method.logits(trials, state.tensors, batch.weak), wanted)


@pytest.mark.usefixtures("brief")
def test_the_probe_is_the_mean_of_candidates_weighted_by_held_out_labels(clusters, monkeypatch):
    wanted = fit(clusters, plus()).tensors["linear"]
    count = len(ulfine_plus.PROBE_SCALES)
    scores, heads = [], []

    def watching(*arguments):
        scores.append(held_out_scores(*arguments)[0])
        return held_out_scores(*arguments)

    def watching_probe(*arguments, **options):
        heads.append(fit_probe(*arguments, **options) * options["scale"][:, None, :, None, None])
        return fit_probe(*arguments, **options)

    held_out_scores, fit_probe = ulfine_plus.held_out_scores, ulfine_plus.fit_probe
    monkeypatch.setattr(ulfine_plus, "held_out_scores", watching)
    monkeypatch.setattr(ulfine_plus, "fit_probe", watching_probe)
    fit(clusters, plus())
    weights = torch.softmax(20.0 * torch.cat(scores[: count * len(ulfine_plus.PROBE_STOPS)], dim=1)[0], 0)
    # of every stop the heads that are fitted with all labels, which are the first of each scale
    of_all = heads[0][0, :, :: heads[0].shape[2] // count]  # (stops, scales, K, D)
    torch.testing.assert_close((weights.view(-1, 1, 1) * of_all.flatten(0, 1)).sum(0), wanted, rtol=1e-4, atol=1e-5)
