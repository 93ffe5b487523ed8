import pytest

from benchmarks.comparison.contenders import contender_names
from benchmarks.options import parse_methods, parse_names, parse_numbers, parse_seeds, split_options, trial_configs
from ulfine_fast.cache.io.errors import InputError


@pytest.mark.parametrize(("text", "seeds"), [("0-4", (0, 1, 2, 3, 4)), ("3", (3,)), ("0,2,5-7", (0, 2, 5, 6, 7))])
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "4-", "-1", "3-1", "1,1", "0-2,2"])
def test_other_seeds_are_refused(text):
    with pytest.raises(InputError, match="seed"):
        parse_seeds(text)


def test_methods_are_separated_by_commas_and_each_counts_once():
    assert parse_methods("ulfine, oracle,ulfine") == ("ulfine", "oracle")
    assert parse_methods("all") == contender_names()


@pytest.mark.parametrize("text", ["", "nope", "ulfine,all"])
def test_other_methods_are_refused(text):
    with pytest.raises(InputError, match="method"):
        parse_methods(text)


def test_numbers_are_separated_by_commas_and_each_counts_once():
    assert parse_numbers("0.01, 3e-3,0.01", "rates", 0) == [0.01, 0.003]
    assert parse_numbers("1, 16,64,1", "counts", 1, kind=int) == [1, 16, 64]


@pytest.mark.parametrize("text", ["", ",", "x", "1.5", "0", "10"])
def test_other_numbers_are_refused(text):
    with pytest.raises(InputError, match=f"ranks are whole numbers from 1 to 9, separated by commas, got '{text}'"):
        parse_numbers(text, "ranks", 1, 9, kind=int)


def test_names_are_known_ones():
    assert parse_names("b, a,b", ("a", "b", "c"), "letters") == ["b", "a"]
    for text in ("", "a,d"):
        with pytest.raises(InputError, match=r"letters are a, b, c, got '(d|)'"):
            parse_names(text, ("a", "b", "c"), "letters")


def test_trials_differ_in_method_and_seed():
    configs = trial_configs(["linear_probe", "ulfine"], [3, 1], split_options(20, None, 5.0))
    assert [(config.method, config.seed) for config in configs] == [
        ("linear_probe", 3),
        ("linear_probe", 1),
        ("ulfine", 3),
        ("ulfine", 1),
    ]
    assert {(config.n1, config.m1, config.gamma_l, config.gamma_u) for config in configs} == {(20, None, 5.0, 5.0)}
