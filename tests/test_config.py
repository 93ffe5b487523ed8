from __future__ import annotations

import dataclasses

import pytest

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig, per_trial_fields, split_key, structural_key


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"threshold": 1.5}, "threshold must be at most 1, got 1.5"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": "fast"}, "lr must be a finite number, got 'fast'"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"paf": 1}, "paf must be true or false, got 1"),
        ({"seed": None}, "seed must be given, got None"),
        ({"n1": 0}, "n1 must be at least 1, got 0"),
        ({"gamma_l": 0.5}, "gamma_l must be at least 1, got 0.5"),
        ({"method": "magic"}, "method must be one of zero_shot, linear_probe, lightweight, ulfine, "),
        ({"shape": ["consistent"]}, "shape must be one of"),
    ],
)
def test_bad_values_are_named_with_the_range(values, sentence):
    with pytest.raises(InputError) as error:
        FitConfig(**values)
    assert str(error.value).startswith(sentence)


def test_the_edges_of_ranges_are_legal():
    FitConfig(threshold=0.0, eta=1.0, steps=1, n1=1, m1=0, gamma_l=1.0, val_fraction=0.0)


def test_every_field_says_what_it_is():
    for spec in dataclasses.fields(FitConfig):
        assert spec.metadata["help"], spec.name


def test_a_round_trip_through_json_values():
    config = FitConfig(method="lightweight", seed=3, n1=150, lr=0.01, paf=False)
    assert FitConfig.from_dict(config.to_dict()) == config


def test_an_unknown_setting_is_named():
    with pytest.raises(InputError, match="unknown setting 'learning_rate'"):
        FitConfig.from_dict({"learning_rate": 0.1})


def test_structure_is_shared_by_trials_that_differ_in_numbers_only():
    assert structural_key(FitConfig(lr=0.1, seed=3, mu=0.5)) == structural_key(FitConfig())
    assert structural_key(FitConfig(rank=8)) == structural_key(FitConfig())
    assert structural_key(FitConfig(batch_labeled=8)) != structural_key(FitConfig())
    assert "lr" in per_trial_fields()
    assert "rank" in per_trial_fields()
    assert "batch_labeled" not in per_trial_fields()


def test_the_data_seed_is_the_seed_unless_given():
    assert FitConfig(seed=4).data_seed == 4
    assert FitConfig(seed=4, split_seed=9).data_seed == 9


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 1},
        {"split_seed": 1},
        {"n1": 5},
        {"m1": 5},
        {"gamma_l": 5.0},
        {"gamma_u": 5.0},
        {"shape": "shuffled"},
        {"labeled_in_unlabeled": True},
        {"permute_classes": False},
        {"labeled_fraction": 0.5},
        {"val_fraction": 0.2},
        {"test_fraction": 0.3},
    ],
)
def test_what_decides_the_split_is_in_its_key(values):
    assert split_key(FitConfig(**values)) != split_key(FitConfig())


def test_what_does_not_decide_the_split_is_not_in_its_key():
    other = FitConfig(method="gmm", lr=0.5, steps=7, seed=3, split_seed=0, trust=1.0)
    assert split_key(other) == split_key(FitConfig())
    hash(split_key(other))
