import numpy as np
import pytest

from benchmarks.comparison.cells import parse_cell
from benchmarks.comparison.contenders import (
    ORACLE,
    check_names,
    fit_cell,
    names,
    splits_of,
    with_true_labels,
    without_test,
)
from ulfine_fast import FitConfig, fit
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import METHODS
from ulfine_fast.data.splits import draw_split

CELL = parse_cell("folder=/made:20:reversed", 5)
QUICK = {"steps": 30, "eval_every": 30}


@pytest.fixture(scope="module")
def splits(clusters):
    return splits_of(CELL, clusters, [0, 1])


def test_everyone_is_known_and_nobody_else():
    check_names([*METHODS, ORACLE, "sklearn_self_training"])
    assert set(names()) > set(METHODS)
    with pytest.raises(InputError, match="unknown method 'nope'"):
        check_names(["linear_probe", "nope"])


def test_splits_are_those_the_engine_draws_itself(clusters, splits):
    drawn = draw_split(clusters.labels, clusters.splits, clusters.class_names, CELL.config(seed=1))
    for role in ("labeled", "unlabeled", "val", "test", "class_order"):
        assert np.array_equal(getattr(splits[1], role), getattr(drawn, role))


def test_the_oracle_knows_the_labels_of_the_unlabelled_images(clusters, splits):
    found = with_true_labels(splits[0], clusters)
    assert set(found.labeled) == set(splits[0].labeled) | set(splits[0].unlabeled)
    assert len(found.unlabeled) == 0
    assert np.array_equal(found.val, splits[0].val)
    assert np.array_equal(found.test, splits[0].test)


def test_a_search_is_given_no_test_image(splits):
    blind = without_test(splits[0])
    assert len(blind.test) == 0
    assert np.array_equal(blind.labeled, splits[0].labeled)


def test_figures_are_the_engines_for_each_setting_and_seed(clusters, splits):
    settings = [{**QUICK, "lr": 0.01}, {**QUICK, "lr": 0.1}]
    found = fit_cell("linear_probe", CELL, clusters, [0, 1], splits, settings, "cpu")
    assert [len(one) for one in found] == [2, 2]
    for figures, own in zip(found, settings, strict=True):
        for seed in (0, 1):
            alone = fit(clusters, CELL.config(method="linear_probe", seed=seed, **own), device="cpu")
            assert figures[seed]["balanced_accuracy"] == alone.metrics["balanced_accuracy"]
            assert figures[seed]["tail_accuracy"] == pytest.approx(alone.metrics["few"])


def test_the_oracle_is_the_probe_on_its_own_split(clusters, splits):
    [[found, _]] = fit_cell(ORACLE, CELL, clusters, [0, 1], splits, [QUICK], "cpu")
    config = CELL.config(method="linear_probe", seed=0, **QUICK)
    alone = fit(clusters, config, split=with_true_labels(splits[0], clusters), device="cpu")
    assert found["balanced_accuracy"] == alone.metrics["balanced_accuracy"]
    # nothing is left to guess
    assert found.get("pseudo_label_precision") is None


def test_the_oracles_tail_is_everyones_tail(clusters, splits):
    [[found, _]] = fit_cell(ORACLE, CELL, clusters, [0, 1], splits, [QUICK], "cpu")
    # with four classes the rare third is the last one of the labelled order
    rarest = splits[0].class_order[-1]
    assert found["tail_accuracy"] == found["per_class_accuracy"][rarest]


def test_outside_parts_give_the_same_figures(clusters, splits):
    [[ours, _]] = fit_cell("linear_probe", CELL, clusters, [0, 1], splits, [QUICK], "cpu")
    [[theirs, _]] = fit_cell("sklearn_label_spreading", CELL, clusters, [0, 1], splits, [{}], "cpu")
    assert {"balanced_accuracy", "tail_accuracy", "ece_temperature_scaled", "seconds", "val"} <= set(ours) & set(theirs)


def test_a_blind_split_has_no_test_figures(clusters, splits):
    for method in ("linear_probe", "sklearn_label_spreading"):
        settings = [QUICK] if method == "linear_probe" else [{}]
        [[found]] = fit_cell(method, CELL, clusters, [0], [without_test(splits[0])], settings, "cpu")
        assert "balanced_accuracy" not in found
        assert found["tail_accuracy"] is None
        assert found["val"]["balanced_accuracy"] > 0


def test_cells_make_configs_the_engine_knows():
    assert isinstance(CELL.config(), FitConfig)
