import math

import numpy as np
import pytest

import benchmarks.comparison.search
from benchmarks.comparison.cells import parse_cell
from benchmarks.comparison.contenders import contender_names, fit_cell, splits_of, without_test
from benchmarks.comparison.scikit_learn import SCIKIT_LEARN, ScikitLearnClassifier
from benchmarks.comparison.search import draw, draw_value, search, space_of
from ulfine_fast.config import own_options
from ulfine_fast.search.space import Range

CELL = parse_cell("folder=/made:20:reversed", 5)
QUICK = {"steps": 20, "eval_every": 20}


@pytest.fixture(scope="module")
def splits(clusters):
    return splits_of(CELL, clusters, [0, 1])


@pytest.mark.parametrize("method", contender_names())
def test_every_draw_of_every_method_is_legal(method):
    for i in range(30):
        if method in SCIKIT_LEARN:
            ScikitLearnClassifier(method, **draw(method, i)).build()
        else:
            CELL.config(method="linear_probe" if method == "oracle" else method, **draw(method, i))


def test_the_first_draw_is_the_defaults_and_the_others_differ():
    assert draw("ulfine", 0) == {}
    assert len({tuple(draw("ulfine", i).values()) for i in range(10)}) == 10


def test_methods_that_share_an_option_share_its_draws():
    assert draw("linear_probe", 3).items() <= draw("ulfine", 3).items()
    assert draw("oracle", 3) == draw("linear_probe", 3)


def test_a_space_is_made_of_the_methods_options():
    assert set(draw("lightweight", 1)) > {"lr", "threshold", "lambda_u", "warmup", "feature_noise"}
    searched = {name for name, spec in own_options("ulfine_plus").items() if spec.metadata["search"] is not None}
    # a closed form has no use for options of the optimiser
    assert set(space_of("ulfine_plus")) == searched
    assert space_of("zero_shot") == {}
    assert "warmup" not in space_of("linear_probe")


def test_draws_are_in_their_range():
    values = [draw_value("lr", Range(0.01, 1.0, log=True), i) for i in range(300)]
    assert min(values) >= 0.01
    assert max(values) <= 1
    assert math.exp(np.log(values).mean()) == pytest.approx(0.1, rel=0.3)
    assert {draw_value("kind", ("a", "b"), i) for i in range(20)} == {"a", "b"}
    assert np.mean([draw_value("x", Range(2, 4), i) for i in range(300)]) == pytest.approx(3, abs=0.2)
    assert {draw_value("n", Range(2, 4, whole=True), i) for i in range(40)} == {2, 3, 4}
    assert {draw_value("n", Range(0.0, 1.0, step=0.5), i) for i in range(40)} == {0.0, 0.5, 1.0}


def test_the_best_on_validation_is_chosen(clusters, splits):
    chosen = search("linear_probe", CELL, clusters, [0, 1], splits, QUICK, 4, "cpu")
    drawn = [{**draw("linear_probe", i), **QUICK} for i in range(4)]
    blind = [without_test(split) for split in splits]
    scores = []
    for options in drawn:
        [metrics] = fit_cell("linear_probe", CELL, clusters, [0, 1], blind, [options], "cpu")
        scores.append(np.mean([one["val"]["balanced_accuracy"] for one in metrics]))
    assert chosen == drawn[int(np.argmax(scores))]


def test_every_method_has_as_many_draws_and_none_sees_a_test_image(clusters, splits, monkeypatch):
    asked = []

    def spy(method, cell, cache, seeds, splits, settings, device):
        asked.append((method, len(settings), sum(len(split.test) for split in splits)))
        return [[{"val": {"balanced_accuracy": 0.5}} for _ in seeds] for _ in settings]

    monkeypatch.setattr(benchmarks.comparison.search, "fit_cell", spy)
    for method in contender_names():
        assert search(method, CELL, clusters, [0, 1], splits, {}, 5, "cpu") == {}
    assert asked == [(method, 5, 0) for method in contender_names()]


def test_a_given_setting_holds_in_every_draw(clusters, splits, monkeypatch):
    def spy(method, cell, cache, seeds, splits, settings, device):
        assert all(one["lr"] == 0.5 for one in settings)
        return [[{"val": {"balanced_accuracy": float(i == 2)}}] for i in range(len(settings))]

    monkeypatch.setattr(benchmarks.comparison.search, "fit_cell", spy)
    chosen = search("linear_probe", CELL, clusters, [0, 1], splits, {"lr": 0.5}, 4, "cpu")
    assert chosen == {**draw("linear_probe", 2), "lr": 0.5}


def test_without_validation_images_the_defaults_stay(clusters, splits, monkeypatch):
    monkeypatch.setattr(
        benchmarks.comparison.search, "fit_cell", lambda *arguments: [[{"val": {}}] for _ in arguments[5]]
    )
    assert search("ulfine", CELL, clusters, [0, 1], splits, {}, 3, "cpu") == {}
