from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, FitConfig, InputError, fit, fit_many
from ulfine_fast.config import readable
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine import fit as fitting
from ulfine_fast.engine import scheduling, trial_batch
from ulfine_fast.engine.trial_batch import TrialBatch

METHODS = ["zero_shot", "linear_probe", "lightweight", "ulfine"]


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_alone_and_among_others_gives_the_same(clusters, quick, method):
    values = [(0, 0.1, 1.0), (5, 0.01, 0.0), (9, 0.03, 2.0)]
    configs = [quick(method=method, seed=s, lr=lr, **readable(method, {"tau": tau})) for s, lr, tau in values]
    together, alone = fit_many(clusters, configs), fit(clusters, configs[1])
    assert together[1].config == configs[1]
    np.testing.assert_allclose(together[1].test_probabilities, alone.test_probabilities, atol=1e-5)
    np.testing.assert_array_equal(together[1].test_probabilities.argmax(1), alone.test_probabilities.argmax(1))
    assert together[1].metrics["balanced_accuracy"] == alone.metrics["balanced_accuracy"]
    assert together[1].split == alone.split


def test_trial_batches_of_one_trial_give_what_one_big_one_gives(clusters, quick, monkeypatch):
    configs = [quick(seed=s) for s in range(3)]
    whole = fit_many(clusters, configs)
    monkeypatch.setattr(scheduling, "budget", lambda device: 1)
    for one, other in zip(whole, fit_many(clusters, configs), strict=True):
        np.testing.assert_allclose(one.test_probabilities, other.test_probabilities, atol=1e-5)


def test_results_keep_the_order_of_mixed_structures(clusters, quick):
    configs = [
        quick(method="ulfine", rank=4),
        quick(method="zero_shot"),
        quick(method="ulfine", rank=8),
        quick(rank=4, seed=1),
    ]
    runs = fit_many(clusters, configs)
    assert [run.config for run in runs] == configs
    assert runs[0].tensors["adapter.up"].shape == (4, 16)
    assert runs[2].tensors["adapter.up"].shape == (8, 16)


def test_the_same_config_gives_the_same_bits_another_seed_does_not(clusters, quick):
    first, again, other = fit(clusters, quick()), fit(clusters, quick()), fit(clusters, quick(seed=1, split_seed=0))
    assert torch.equal(first.tensors["linear"], again.tensors["linear"])
    assert not torch.equal(first.tensors["linear"], other.tensors["linear"])
    assert first.split == other.split


def test_training_learns_what_zero_shot_does_not_know(quick):
    cache = make_clusters(classes=6, text_noise=2.0)
    zero, probe = (fit(cache, quick(method=m, lr=0.1, steps=100)) for m in ("zero_shot", "linear_probe"))
    assert probe.metrics["balanced_accuracy"] > zero.metrics["balanced_accuracy"] + 0.05
    assert probe.history[-1]["loss"] < probe.history[0]["loss"]


def test_a_learning_rate_of_zero_leaves_the_text_prototypes(clusters, quick):
    run = fit(clusters, quick(method="linear_probe", lr=0.0))
    np.testing.assert_allclose(run.tensors["linear"].numpy(), clusters.prototypes, atol=1e-5)


def test_logit_adjustment_helps_the_rarest_class():
    cache = make_clusters(classes=6, noise=1.6, train=120, test=60)
    base = {"method": "linear_probe", "n1": 100, "gamma_l": 50, "steps": 200, "lr": 0.1}
    seeds = range(3)
    plain, adjusted = (fit_many(cache, [FitConfig(**base, tau=tau, seed=s) for s in seeds]) for tau in (0.0, 1.0))
    gain = np.mean([a.metrics["few"] - p.metrics["few"] for a, p in zip(adjusted, plain, strict=True)])
    assert gain > 0.05


def test_pseudo_labels_help_where_classes_are_clusters():
    cache = make_clusters(classes=4, noise=1.2, train=150, test=60)
    base = {"n1": 20, "gamma_l": 10, "m1": 100, "shape": "uniform", "steps": 200}
    probe = fit_many(cache, [FitConfig(method="linear_probe", seed=s, **base) for s in range(3)])
    ulfine = fit_many(cache, [FitConfig(method="ulfine", seed=s, threshold=0.8, **base) for s in range(3)])
    gain = np.mean(
        [u.metrics["balanced_accuracy"] - p.metrics["balanced_accuracy"] for u, p in zip(ulfine, probe, strict=True)]
    )
    assert gain > 0


def test_history_has_a_row_for_each_validation(clusters, quick):
    run = fit(clusters, quick(steps=50, eval_every=20))
    assert [row["step"] for row in run.history] == [20, 40, 50]
    last = run.history[-1]
    assert last["loss"] == pytest.approx(last["loss_labeled"] + last["loss_unlabeled"], abs=0.5)
    assert 0 <= last["pseudo_label_rate"] <= 1
    assert len(last["per_class_pseudo_label_recall"]) == 4


def test_the_pseudo_label_rate_follows_the_threshold(clusters, quick):
    none, some, every = (fit(clusters, quick(threshold=t, scale=5.0)) for t in (1.0, 0.6, 0.0))
    assert none.metrics["pseudo_label_rate"] == 0
    assert none.metrics["pseudo_label_precision"] is None
    assert 0 < some.metrics["pseudo_label_rate"] < 1
    assert every.metrics["pseudo_label_rate"] == 1
    assert none.history[-1]["loss_unlabeled"] == 0


def test_the_best_heads_are_those_of_the_best_validation(clusters, quick):
    wild = {"lr": 3.0, "steps": 60, "eval_every": 10, "val_fraction": 0.3}
    run = fit(clusters, quick(method="lightweight", select="best", **wild))
    best = max(row["val_balanced_accuracy"] for row in run.history)
    assert run.metrics["val"]["balanced_accuracy"] == pytest.approx(best)


def test_without_validation_images_the_last_heads_are_kept(clusters, quick):
    last, best = fit_many(clusters, [quick(val_fraction=0.0, select=select) for select in ("last", "best")])
    assert best.split["val"] == []
    torch.testing.assert_close(best.tensors["linear"], last.tensors["linear"])


def test_one_trial_selects_and_its_neighbour_does_not(clusters, quick):
    wild = {"method": "lightweight", "lr": 3.0, "steps": 60, "eval_every": 10, "val_fraction": 0.3}
    configs = [quick(select=select, **wild) for select in ("best", "last")]
    for together, config in zip(fit_many(clusters, configs), configs, strict=True):
        torch.testing.assert_close(together.tensors["linear"], fit(clusters, config).tensors["linear"])


def test_warm_up_weakens_early_pseudo_labels(clusters, quick):
    cold, warm = (fit(clusters, quick(method="lightweight", threshold=0.0, warmup=w, steps=20)) for w in (0.0, 1.0))
    assert not torch.equal(cold.tensors["linear"], warm.tensors["linear"])


def test_without_text_the_class_means_are_the_prototypes(quick):
    cache = make_clusters(text=False)
    run = fit(cache, quick(method="zero_shot", val_fraction=0.0))
    split = draw_split(cache.labels, cache.splits, cache.class_names, run.config)
    rows = split.labeled[cache.labels[split.labeled] == 0]
    mean = cache.plain[rows].astype(np.float32).mean(0)
    np.testing.assert_allclose(run.tensors["prototypes"][0], mean / np.linalg.norm(mean), atol=1e-3)
    assert run.metrics["balanced_accuracy"] > 0.5


def test_strong_views_are_needed_or_noise_instead(quick):
    cache = make_clusters(views=False)
    with pytest.raises(InputError, match=r"views\.strong = 0; extract again with --strong 1"):
        fit(cache, quick(method="lightweight"))
    run = fit(cache, quick(method="lightweight", feature_noise=0.3))
    assert run.metrics["balanced_accuracy"] > 0.5


def test_noise_in_one_trial_does_not_touch_its_neighbour(clusters, quick):
    noisy, still = fit_many(clusters, [quick(feature_noise=0.5), quick()])
    alone = fit(clusters, quick())
    np.testing.assert_allclose(still.test_probabilities, alone.test_probabilities, atol=1e-5)
    assert not np.allclose(noisy.test_probabilities, still.test_probabilities, atol=1e-3)


def test_no_unlabelled_images_is_supervised_training(clusters):
    run = fit(clusters, FitConfig(method="ulfine", steps=30))
    assert run.split["unlabeled"] == []
    assert run.metrics.get("pseudo_label_rate") is None
    assert run.history[-1]["loss_unlabeled"] == 0


def test_mixed_precision_stays_close(clusters, quick):
    full, mixed = fit(clusters, quick()), fit(clusters, quick(precision="amp"))
    assert abs(full.metrics["balanced_accuracy"] - mixed.metrics["balanced_accuracy"]) < 0.1
    assert mixed.tensors["linear"].dtype == torch.float32


def test_a_given_split_is_used(clusters, quick):
    split = draw_split(clusters.labels, clusters.splits, clusters.class_names, quick(seed=7))
    runs = fit_many(clusters, [quick(seed=1), quick(seed=2)], split=split)
    assert runs[0].split == runs[1].split == split.to_dict(clusters.ids)


def test_one_labelled_image_a_class_and_two_classes():
    cache = make_clusters(classes=2)
    run = fit(cache, FitConfig(method="ulfine", n1=1, gamma_l=1, m1=20, steps=10, val_fraction=0))
    assert run.metrics["class_counts"] == [1, 1]
    assert run.metrics["val"] == {}
    assert run.metrics["temperature"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_cpu_and_gpu_draw_the_same_and_agree(clusters, quick):
    here, there = (fit(clusters, quick(), device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(here.test_probabilities, there.test_probabilities, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_trains_as_the_first(clusters, quick):
    first, second = (fit(clusters, quick(), device=device) for device in ("cuda:0", "cuda:1"))
    np.testing.assert_allclose(first.test_probabilities, second.test_probabilities, atol=1e-5)


def test_all_work_is_done_with_the_device_as_the_current_one(clusters, quick, monkeypatch):
    # Triton and CUDA graphs run on the current device, whatever the tensors' device is
    inside = []

    @contextmanager
    def entered(device):
        inside.append(device)
        yield
        inside.append(None)

    def seen(function):
        def call(*args, **kwargs):
            assert inside == [torch.device("cpu")]
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(fitting, "current_device", entered)
    for name in ("train", "finish"):
        monkeypatch.setattr(TrialBatch, name, seen(getattr(TrialBatch, name)))
    monkeypatch.setattr(DeviceFeatures, "load", seen(DeviceFeatures.load))
    fit(clusters, quick(), device="cpu")
    assert inside == [torch.device("cpu"), None]


def test_unlabelled_rows_with_unknown_labels_train_and_are_not_judged():
    whole = make_clusters()
    hidden = whole.splits == "train"
    hidden[::3] = False
    labels = np.where(hidden, -1, whole.labels)
    splits = np.where(hidden, "unlabeled", whole.splits)
    cache = FeatureCache.from_arrays(
        whole.plain,
        labels,
        class_names=whole.class_names,
        text_features=whole.text_features,
        splits=list(splits),
        weak=whole.views("weak"),
        strong=whole.views("strong"),
    )
    run = fit(cache, FitConfig(method="ulfine", steps=30, threshold=0.5))
    assert run.metrics["pseudo_label_rate"] > 0
    assert run.metrics["pseudo_label_precision"] is None


@pytest.mark.parametrize("select", ["best", "last"])
def test_pseudo_label_metrics_read_a_sample_while_training_and_all_images_in_the_end(
    clusters, quick, monkeypatch, select
):
    configs = [quick(threshold=0.5, select=select, seed=seed, n1=20 + 10 * seed) for seed in range(2)]
    whole = fit_many(clusters, configs)
    monkeypatch.setattr(trial_batch, "_HEALTH_ROWS", 20)
    sampled = fit_many(clusters, configs)
    for one, other in zip(whole, sampled, strict=True):
        assert one.metrics == {**other.metrics, "seconds": one.metrics["seconds"]}
        rates = [[row["per_class_pseudo_label_rate"] for row in run.history] for run in (one, other)]
        assert rates[0] != rates[1]
        np.testing.assert_allclose(*rates, atol=0.2)


def test_a_trial_without_unlabelled_images_learns_nothing_from_its_neighbours(clusters, quick):
    lonely = quick(m1=0, shape="uniform", threshold=0.0)
    together = fit_many(clusters, [quick(threshold=0.0), lonely])
    alone = fit(clusters, lonely)
    assert together[1].split["unlabeled"] == []
    assert together[1].history[-1]["loss_unlabeled"] == 0
    np.testing.assert_allclose(together[1].test_probabilities, alone.test_probabilities, atol=1e-6)


def test_a_split_that_trains_on_held_out_images_is_refused(clusters, quick):
    split = draw_split(clusters.labels, clusters.splits, clusters.class_names, quick())
    with pytest.raises(InputError, match="a test image of this cache"):
        fit(clusters, quick(), split=replace(split, unlabeled=split.test))


def test_a_split_whose_labels_the_cache_does_not_know_is_refused(clusters, quick):
    split = draw_split(clusters.labels, clusters.splits, clusters.class_names, quick())
    hidden = clusters.labels.copy()
    hidden[split.labeled[0]] = -1
    cache = FeatureCache.from_arrays(
        clusters.plain, hidden, class_names=clusters.class_names, splits=list(clusters.splits), ids=clusters.ids
    )
    with pytest.raises(InputError, match="knows no label for it"):
        fit(cache, quick(), split=split)


def test_each_trial_may_have_a_split_of_its_own(clusters, quick):
    configs = [quick(seed=s, method="linear_probe") for s in (1, 2, 3)]
    splits = [draw_split(clusters.labels, clusters.splits, clusters.class_names, quick(seed=s)) for s in (7, 8, 7)]
    runs = fit_many(clusters, configs, split=splits)
    assert [run.split for run in runs] == [split.to_dict(clusters.ids) for split in splits]
    alone = fit(clusters, configs[1], split=splits[1])
    np.testing.assert_allclose(runs[1].test_probabilities, alone.test_probabilities, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_splits_must_be_as_many_as_the_configs(clusters, quick, count):
    split = draw_split(clusters.labels, clusters.splits, clusters.class_names, quick())
    with pytest.raises(InputError, match=f"2 configs need as many splits, got {count}"):
        fit_many(clusters, [quick(), quick(seed=1)], split=[split] * count)


def test_any_split_of_several_that_trains_on_held_out_images_is_refused(clusters, quick):
    split = draw_split(clusters.labels, clusters.splits, clusters.class_names, quick())
    bad = replace(split, labeled=split.test)
    with pytest.raises(InputError, match="a test image of this cache"):
        fit_many(clusters, [quick(), quick(seed=1)], split=[split, bad])


def test_unlabelled_rows_that_joined_the_labelled_ones_are_an_oracle(quick):
    cache = make_clusters(noise=1.5, train=120, test=60, text=False)
    config = quick(method="linear_probe", n1=10, m1=60, shape="uniform", steps=100, lr=0.1)
    drawn = draw_split(cache.labels, cache.splits, cache.class_names, config)
    both = np.concatenate([drawn.labeled, drawn.unlabeled])
    oracle = replace(drawn, labeled=both, unlabeled=drawn.unlabeled[:0])
    probe, informed = fit_many(cache, [config, config], split=[drawn, oracle])
    assert informed.metrics["balanced_accuracy"] > probe.metrics["balanced_accuracy"]


def test_a_split_is_drawn_once_for_all_configs_that_draw_the_same(clusters, quick, monkeypatch):
    drawn = []

    def counting(*args, **options):
        drawn.append(args[-1])
        return draw_split(*args, **options)

    monkeypatch.setattr(fitting, "draw_split", counting)
    configs = [quick(method="zero_shot", seed=s, lr=lr) for s in (0, 1) for lr in (0.1, 0.2)]
    runs = fit_many(clusters, configs)
    assert len(drawn) == 2
    assert runs[0].split == runs[1].split != runs[2].split == runs[3].split


@pytest.mark.parametrize("method", ["lightweight", "ulfine", "finessl", "clip_adapter"])
def test_adapters_of_different_rank_share_a_trial_batch(clusters, quick, method):
    """Padding beyond a trial's rank stays zero to the bit, and its run is as wide as its own rank."""
    configs = [quick(method=method, rank=rank, seed=rank, lr=0.2) for rank in (4, 16, 7)]
    features = DeviceFeatures.load(clusters, torch.device("cpu"))
    splits = fitting.draw_splits(clusters, configs)
    together = TrialBatch(clusters, features, configs, splits)
    for _ in together.train():
        pass
    name = "down" if method == "clip_adapter" else "adapter.down"
    assert [run.tensors[name].shape[1] for run in together.finish()] == [4, 16, 7]
    for t, run in enumerate(together.finish()):
        assert not together.finished[t][name][:, configs[t].rank :].any()
        assert not together.finished[t][name.replace("down", "up")][configs[t].rank :].any()
        alone = fit(clusters, configs[t])
        np.testing.assert_allclose(run.test_probabilities, alone.test_probabilities, atol=1e-5)
        np.testing.assert_array_equal(run.test_probabilities.argmax(1), alone.test_probabilities.argmax(1))


def test_a_trial_among_63_others_of_every_kind_is_as_it_is_alone(clusters, quick):
    """Everything that is not structural differs from trial to trial, the size of the splits included."""
    random = np.random.default_rng(0)

    def one(seed):
        values = {"lr": 10 ** random.uniform(-3, -1), "momentum": random.uniform(0, 0.95), "tau": random.uniform(0, 2)}
        values |= {
            "n1": int(random.integers(5, 40)),
            "gamma_l": random.uniform(1, 20),
            "m1": int(random.integers(1, 20)),
        }
        values |= {
            "gamma_u": random.uniform(1, 20),
            "rank": int(random.integers(1, 20)),
            "warmup": random.uniform(0, 1),
        }
        values |= {"select": ["last", "best"][seed % 2], "mu": random.uniform(0, 0.1), "val_fraction": 0.1 * (seed % 4)}
        return quick(seed=seed, split_seed=seed % 5, steps=20, eval_every=10, **values)

    configs = [one(seed) for seed in range(64)]
    together = fit_many(clusters, configs)
    for i in (0, 17, 63):
        alone = fit(clusters, configs[i])
        assert together[i].split == alone.split
        np.testing.assert_allclose(together[i].test_probabilities, alone.test_probabilities, atol=2e-5)
        assert together[i].metrics["per_class_accuracy"] == alone.metrics["per_class_accuracy"]
        assert together[i].history[-1]["loss"] == pytest.approx(alone.history[-1]["loss"], abs=1e-4)


def test_a_diverged_trial_fails_and_its_neighbours_do_not_notice(clusters, quick):
    configs = [quick(seed=0), quick(seed=1), quick(seed=2)]
    healthy = fit_many(clusters, configs)
    # cosine heads survive any finite rate, but not weights that overflow
    diverged = fit_many(clusters, [configs[0], replace(configs[1], lr=1e38, weight_decay=1e3), configs[2]])
    assert [run.status for run in diverged] == ["done", "failed", "done"]
    assert diverged[1].metrics == {"method": "ulfine", "seed": 1, "status": "failed", "failed_at": 20}
    assert diverged[1].tensors == {}
    assert diverged[1].history == []
    for i in (0, 2):
        assert torch.equal(diverged[i].tensors["linear"], healthy[i].tensors["linear"])
        np.testing.assert_array_equal(diverged[i].test_probabilities, healthy[i].test_probabilities)
        assert diverged[i].history == healthy[i].history


def test_a_failed_run_says_where_and_what_to_do(clusters, quick, tmp_path):
    run = fit(clusters, quick(lr=1e38, weight_decay=1e3, seed=7))
    sentence = r"seed 7 of ulfine diverged: its loss or weights were not finite at step 20; lower lr \(now 1e\+38\)"
    for use in (lambda: run.predict(clusters.plain), lambda: run.save(tmp_path / "run")):
        with pytest.raises(InputError, match=sentence):
            use()
    assert not (tmp_path / "run").exists()


def test_dropped_trials_leave_and_the_rest_is_as_without_them(clusters, quick):
    """What watch sees is the history's last row, by its position among all configs, whatever its trial batch."""
    configs = [quick(seed=0), quick(method="lightweight"), quick(seed=2), quick(seed=3)]
    whole, seen = fit_many(clusters, configs), []

    def watch(step, rows):
        seen.append((step, sorted(rows), rows))
        return {2, 99} if step == 20 else ()

    runs = fit_many(clusters, configs, watch=watch)
    assert [entry[:2] for entry in seen] == [(20, [0, 2, 3]), (40, [0, 3]), (20, [1]), (40, [1])]
    assert [run.status for run in runs] == ["done", "done", "pruned", "done"]
    assert seen[1][2][3] == runs[3].history[-1]
    assert runs[2].history == whole[2].history[:1]
    assert runs[2].metrics["pruned_at"] == runs[2].metrics["steps"] == 20
    assert "balanced_accuracy" not in runs[2].metrics
    for i in (0, 1, 3):
        np.testing.assert_allclose(runs[i].test_probabilities, whole[i].test_probabilities, atol=1e-6)


def test_patience_stops_a_trial_and_its_best_heads_are_kept(clusters, quick):
    wild = {"method": "lightweight", "lr": 3.0, "steps": 200, "eval_every": 10, "val_fraction": 0.3}
    configs = [quick(select="best", patience=3, **wild), quick(**wild), quick(patience=3, val_fraction=0.0, steps=200)]
    stopped, long, unjudged = fit_many(clusters, configs)
    scores = [row["val_balanced_accuracy"] for row in long.history]
    best, last = 0, 0
    while last + 1 < len(scores) and last - best < 3:
        last += 1
        best = last if scores[last] > scores[best] else best
    assert stopped.status == "stopped"
    assert stopped.metrics["stopped_at"] == 10 * (last + 1) < 200
    assert stopped.metrics["val"]["balanced_accuracy"] == pytest.approx(scores[best])
    assert (long.status, unjudged.status) == ("done", "done")
    again = fit(clusters, replace(configs[0], steps=200))
    np.testing.assert_allclose(stopped.test_probabilities, again.test_probabilities, atol=1e-5)


def test_the_test_split_is_not_read_unless_asked_for(clusters, quick):
    run = fit_many(clusters, [quick()], read_test=False)[0]
    asked = fit(clusters, quick())
    assert run.metrics["val"] == asked.metrics["val"]
    assert run.metrics["pseudo_label_rate"] == asked.metrics["pseudo_label_rate"]
    assert not {"accuracy", "balanced_accuracy", "few", "test_rows"} & set(run.metrics)
    assert len(run.test_probabilities) == len(run.test_ids) == 0


def test_the_metrics_kept_are_those_of_the_kept_heads(clusters, quick):
    """Pseudo-label health is not computed again at the end: it is that of the validation that was kept."""
    wild = {"method": "lightweight", "lr": 3.0, "steps": 60, "eval_every": 10, "val_fraction": 0.3}
    for run in fit_many(clusters, [quick(select="best", **wild), quick(**wild)]):
        scores = [row["val_balanced_accuracy"] for row in run.history]
        kept = run.history[int(np.argmax(scores)) if run.config.select == "best" else -1]
        for name in ("pseudo_label_rate", "confidence_on_false", "per_class_pseudo_label_recall"):
            assert run.metrics[name] == kept[name]


def test_an_unknown_engine_is_refused(clusters, quick):
    with pytest.raises(InputError, match="engine must be one of auto, fused, native, specification, got 'warp'"):
        fit(clusters, quick(), engine="warp")
