import numpy as np
import pytest

from benchmarks.comparison.cells import parse_cell
from benchmarks.comparison.contenders import (
    ORACLE,
    check_contenders,
    contender_names,
    fit_cell,
    read_options,
    splits_of,
    with_true_labels,
    without_test,
)
from ulfine_fast import FitConfig, fit
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.data.splits import draw_split
from ulfine_fast.methods import registry

CELL = parse_cell("folder=/made:20:reversed", 5)
QUICK = {"steps": 30, "eval_every": 30}


@pytest.fixture(scope="module")
def splits(clusters):
    return splits_of(CELL, clusters, [0, 1])


def test_all_methods_are_known_and_no_others():
    check_contenders([*registry.names(), ORACLE, "sklearn_self_training"])
    assert set(contender_names()) > set(registry.names())
    with pytest.raises(InputError, match="unknown method 'nope'"):
        check_contenders(["linear_probe", "nope"])


def test_a_contender_reads_its_own_options_by_old_names_too():
    options = {"lr": 0.1, "mu": 0.2, "lean": 0.5, "tau": 1.5}
    assert read_options("ulfine", options) == {"lr": 0.1, "mu": 0.2, "tau": 1.5}
    assert read_options("ulfine_plus", options).keys() >= {"lr", "lean"}
    assert read_options(ORACLE, options) == read_options("linear_probe", options) == {"lr": 0.1, "tau": 1.5}


def test_splits_are_those_the_engine_draws_itself(clusters, splits):
    drawn = draw_split(clusters.labels, clusters.splits, clusters.class_names, CELL.config(seed=1))
    for role in ("labeled", "unlabeled", "val", "test", "class_order"):
        assert np.array_equal(getattr(splits[1], role), getattr(drawn, role))


def test_the_oracle_knows_the_labels_of_the_unlabelled_images(clusters, splits):
    split = with_true_labels(splits[0], clusters)
    assert set(split.labeled) == set(splits[0].labeled) | set(splits[0].unlabeled)
    assert len(split.unlabeled) == 0
    assert np.array_equal(split.val, splits[0].val)
    assert np.array_equal(split.test, splits[0].test)


def test_a_search_has_no_test_image(splits):
    blind = without_test(splits[0])
    assert len(blind.test) == 0
    assert np.array_equal(blind.labeled, splits[0].labeled)


def test_metrics_are_the_engines_for_each_setting_and_seed(clusters, splits):
    settings = [{**QUICK, "lr": 0.01}, {**QUICK, "lr": 0.1}]
    metrics = fit_cell("linear_probe", CELL, clusters, [0, 1], splits, settings, "cpu")
    assert [len(of_setting) for of_setting in metrics] == [2, 2]
    for of_setting, options in zip(metrics, settings, strict=True):
        for seed in (0, 1):
            alone = fit(clusters, CELL.config(method="linear_probe", seed=seed, **options), device="cpu")
            assert of_setting[seed]["balanced_accuracy"] == alone.metrics["balanced_accuracy"]
            assert of_setting[seed]["tail_accuracy"] == pytest.approx(alone.metrics["few"])


def test_the_oracle_is_the_probe_on_its_own_split(clusters, splits):
    [[metrics, _]] = fit_cell(ORACLE, CELL, clusters, [0, 1], splits, [QUICK], "cpu")
    config = CELL.config(method="linear_probe", seed=0, **QUICK)
    alone = fit(clusters, config, split=with_true_labels(splits[0], clusters), device="cpu")
    assert metrics["balanced_accuracy"] == alone.metrics["balanced_accuracy"]
    # nothing is left to guess
    assert metrics.get("pseudo_label_precision") is None


def test_the_oracles_tail_is_that_of_all_contenders(clusters, splits):
    [[metrics, _]] = fit_cell(ORACLE, CELL, clusters, [0, 1], splits, [QUICK], "cpu")
    # with four classes the rare third is the last one of the labelled order
    rarest = splits[0].class_order[-1]
    assert metrics["tail_accuracy"] == metrics["per_class_accuracy"][rarest]


def test_scikit_learn_gives_the_same_metrics(clusters, splits):
    [[engine, _]] = fit_cell("linear_probe", CELL, clusters, [0, 1], splits, [QUICK], "cpu")
    [[sklearn, _]] = fit_cell("sklearn_label_spreading", CELL, clusters, [0, 1], splits, [{}], "cpu")
    names = {"balanced_accuracy", "tail_accuracy", "ece_temperature_scaled", "seconds", "val"}
    assert names <= set(engine) & set(sklearn)


def test_a_blind_split_has_no_test_metrics(clusters, splits):
    for method in ("linear_probe", "sklearn_label_spreading"):
        settings = [QUICK] if method == "linear_probe" else [{}]
        [[metrics]] = fit_cell(method, CELL, clusters, [0], [without_test(splits[0])], settings, "cpu")
        assert "balanced_accuracy" not in metrics
        assert metrics["tail_accuracy"] is None
        assert metrics["val"]["balanced_accuracy"] > 0


def test_cells_make_configs_the_engine_knows():
    assert isinstance(CELL.config(), FitConfig)
