"""Space files: what they mean, and one sentence for what they cannot mean."""

from __future__ import annotations

import math

import pytest

from ulfine_fast import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.methods import registry
from ulfine_fast.search.space import Range, Space, default_space, parse_space, read_space

LR = {"lr": {"low": 0.001, "high": 0.1, "log": True}}


def test_entries_of_every_type():
    space = parse_space(
        {
            "method": ["ulfine", "lightweight"],
            "steps": 300,
            "lr": {"low": 0.001, "high": 0.1, "log": True},
            "rank": {"low": 4, "high": 16, "step": 4},
            "dlf": [True, False],
            "tau": 1,
            "n1": {"low": 10, "high": 30},
        }
    )
    assert space.fixed == {"steps": 300, "tau": 1.0}
    assert isinstance(space.fixed["tau"], float)
    assert space.searched == {
        "method": ("ulfine", "lightweight"),
        "lr": Range(0.001, 0.1, log=True),
        "rank": Range(4, 16, step=4, whole=True),
        "dlf": (True, False),
        "n1": Range(10, 30, whole=True),
    }


def test_a_config_has_fixed_and_searched_values_and_its_seed():
    config = parse_space({"steps": 7, **LR}, {"method": "linear_probe"}).config({"lr": 0.02}, 5)
    assert config == FitConfig(method="linear_probe", steps=7, lr=0.02, seed=5)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"lrr": 0.1}, "unknown option 'lrr'; did you mean lr?"),
        ({"zzzzz": 0.1}, "unknown option 'zzzzz'; `ulfine-fast fit --method NAME --help` lists"),
        ({"lr": {"low": 0.1, "high": 0.1}}, "lr needs low below high, got low = 0.1 and high = 0.1"),
        ({"lr": {"low": 0.0, "high": 0.1, "log": True}}, "lr has log = true and needs low above 0, got 0.0"),
        ({"lr": {"low": -0.1, "high": 0.1}}, "lr must be at least 0, got -0.1"),
        ({"threshold": {"low": 0.5, "high": 1.2}}, "threshold must be at most 1, got 1.2"),
        ({"lr": {"low": 0.1}}, "lr has no high"),
        ({"lr": {"high": 0.1}}, "lr has no low"),
        ({"lr": {"low": 0.1, "high": 0.2, "base": 2}}, "lr has 'base'; a range has low, high, log, step and points"),
        ({"lr": {"low": 0.1, "high": 0.2, "log": 1}}, "lr.log must be true or false, got 1"),
        ({"lr": {"low": 0.1, "high": "x"}}, "lr.high must be a number, got 'x'"),
        ({"lr": {"low": True, "high": 2.0}}, "lr.low must be a number, got True"),
        ({"lr": {"low": 0.1, "high": 0.2, "log": True, "step": 0.1}}, "lr has both log and step"),
        ({"lr": {"low": 0.1, "high": 0.2, "step": 1.0}}, "lr needs as step a number above 0 and at most high - low"),
        ({"rank": {"low": 4, "high": 16, "step": 1.5}}, "rank needs as step a whole number"),
        ({"rank": {"low": 4.5, "high": 16}}, "rank must be a whole number, got 4.5"),
        ({"lr": {"low": 0.1, "high": 0.2, "points": 1}}, "lr needs at least 2 points"),
        ({"lr": {"low": 0.1, "high": math.inf}}, "lr must be a finite number, got inf"),
        ({"lr": "fast"}, "lr must be a finite number, got 'fast'"),
        ({"lr": []}, "lr has an empty list"),
        ({"lr": [0.1, 0.1]}, "lr has 0.1 twice"),
        ({"lr": [0.1, [0.2]]}, "lr must be a value, a list of values, or a table"),
        ({"steps": True, **LR}, "steps must be a whole number, got True"),
        ({"method": ["ulfine", "magic"]}, "method must be one of"),
        ({"method": {"low": 1, "high": 2}}, "method has no order; give a list of values"),
        ({"dlf": {"low": 0, "high": 1}}, "dlf has no order; give a list of values, such as dlf = [true, false]"),
        ({"seed": [0, 1]}, "seed cannot be in a space"),
        ({"seed": 3, **LR}, "seed cannot be in a space"),
        ({"split_seed": [0, 1]}, "split_seed can be fixed but not searched"),
        ({"lr": 0.1}, "the space has nothing to search"),
        ({}, "the space has nothing to search"),
        ({"steps": {"low": 100, "high": 3000}}, "steps is structural .* and its range has 2901 values"),
    ],
)
def test_refusals(entries, words):
    with pytest.raises(InputError, match=words.replace("[", r"\[").replace("?", r"\?")):
        parse_space(entries)


def test_a_structural_field_and_a_per_trial_field_given_twice():
    for name, value in {"method": "ulfine", "lr": 0.1}.items():
        entries = {"method": ["ulfine", "lightweight"], **LR}
        with pytest.raises(InputError, match=f"{name} is in the space and given as {value!r} beside it; keep one"):
            parse_space(entries, {name: value})
    with pytest.raises(InputError, match="lr is in the space and given as"):
        parse_space({"method": "ulfine", "lr": 0.2, "tau": [0.5, 1.0]}, {"lr": 0.1})
    with pytest.raises(InputError, match="lr must be at least 0, got -1"):
        parse_space({"method": "ulfine", "tau": [0.5, 1.0]}, {"lr": -1.0})


def test_an_entry_that_no_method_of_the_space_reads_is_refused():
    with pytest.raises(InputError, match="method lightweight does not read mu, which channel_ulfine and ulfine read"):
        parse_space({"method": "lightweight", "mu": {"low": 0.1, "high": 0.2}})
    with pytest.raises(InputError, match="method lightweight does not read mu"):
        parse_space({"lr": [0.1, 0.2]}, {"method": "lightweight", "mu": 0.1})


def test_without_a_method_the_refusal_says_which_to_name():
    sentence = "method ulfine_plus does not read mu, .*; name a method that reads it, such as --method ulfine$"
    with pytest.raises(InputError, match=sentence):
        parse_space({"mu": {"low": 0.1, "high": 0.2}})


def test_an_entry_reaches_the_methods_that_read_it():
    space = parse_space({"method": ["lightweight", "ulfine"], "mu": [0.1, 0.2]})
    assert space.config({"method": "ulfine", "mu": 0.2}, 3) == FitConfig(method="ulfine", mu=0.2, seed=3)
    assert space.config({"method": "lightweight", "mu": 0.2}, 3) == FitConfig(method="lightweight", seed=3)


def test_old_names_are_accepted_with_a_warning():
    space = parse_space({"method": "ulfine_plus", "lean": [0.5, 1.0]}, {"trust": 10.0})
    assert space.searched == {"probe_weight": (0.5, 1.0)}
    assert space.fixed == {"method": "ulfine_plus", "evidence_temperature": 10.0}
    assert [sentence.partition(";")[0] for sentence in sorted(space.warnings)] == [
        "the option lean is now called probe_weight",
        "the option trust is now called evidence_temperature",
    ]


def test_a_file_and_its_faults(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text('method = "linear_probe"\n[lr]\nlow = 0.001\nhigh = 0.1\nlog = true\n')
    assert read_space(path) == parse_space({"method": "linear_probe", **LR})
    path.write_text("lr = {")
    with pytest.raises(InputError, match=r"space.toml is not TOML"):
        read_space(path)
    path.write_text("lrr = 1")
    with pytest.raises(InputError, match=r"space.toml: unknown option 'lrr'"):
        read_space(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"space.toml is not TOML"):
        read_space(path)
    with pytest.raises(InputError, match=r"none.toml: No such file"):
        read_space(tmp_path / "none.toml")


def test_grids():
    assert Range(0.0, 1.0).grid() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Range(0.01, 100.0, log=True, points=3).grid() == pytest.approx([0.01, 1.0, 100.0])
    assert Range(0.0, 0.3, step=0.1).grid() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert Range(1, 3, whole=True, points=9).grid() == [1, 2, 3]
    assert Range(4, 17, step=4, whole=True).count == 4
    assert Range(0.0, 1.0).count == math.inf


@pytest.mark.parametrize("method", [name for name in registry.names() if name not in ("zero_shot", "proportions")])
def test_every_method_has_a_space_of_its_own_or_of_its_kind(method):
    space = default_space(method)
    assert space.fixed == {"method": method}
    assert len(space.searched) >= 3
    assert space.warnings == []


def test_shared_options_are_searched_where_they_matter():
    assert "adapter_scale" in default_space("lightweight").searched
    assert "adapter_scale" not in default_space("ulfine").searched
    assert "warmup" not in default_space("linear_probe").searched


def test_a_setting_given_takes_the_place_of_a_shipped_entry():
    space = default_space("ulfine", {"lr": 0.1, "n1": 30})
    assert space.fixed == {"method": "ulfine", "lr": 0.1, "n1": 30}
    assert "mu" in space.searched
    with pytest.raises(InputError, match="zero_shot has no option to search"):
        default_space("zero_shot")
    with pytest.raises(InputError, match="method must be one of"):
        default_space("magic")


def test_equal_spaces_say_the_same():
    assert parse_space(LR).to_dict() == {
        "lr": {"low": 0.001, "high": 0.1, "log": True, "step": None, "points": 5, "whole": False}
    }
    assert Space({"tau": 1.0}, {"dlf": (True, False)}).to_dict() == {"tau": 1.0, "dlf": [True, False]}
