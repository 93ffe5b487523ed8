import pytest

from benchmarks.comparison.contenders import names
from benchmarks.options import parse_methods, parse_seeds, parse_settings
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
    assert parse_methods("all") == names()


@pytest.mark.parametrize("text", ["", "nope", "ulfine,all"])
def test_other_methods_are_refused(text):
    with pytest.raises(InputError, match="method"):
        parse_methods(text)


def test_settings_have_the_type_of_their_value():
    given = ["steps=300", "lr=0.1", "dlf=false", "adapter=none"]
    assert parse_settings(given) == {"steps": 300, "lr": 0.1, "dlf": False, "adapter": "none"}


@pytest.mark.parametrize(("pair", "words"), [("lr", "NAME=VALUE"), ("seed=3", "decided"), ("n1=3", "decided")])
def test_other_settings_are_refused(pair, words):
    with pytest.raises(InputError, match=words):
        parse_settings([pair])
