"""Near misses of a name."""

from __future__ import annotations

import pytest

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import did_you_mean, listed, near_names, one_of

MODELS = ["ViT-B-16", "ViT-B-16-SigLIP", "ViT-B-32", "ViT-L-14", "RN50"]


@pytest.mark.parametrize(
    ("value", "known", "near"),
    [
        ("vitb16", MODELS, ["ViT-B-16"]),
        ("vit_b_32", MODELS, ["ViT-B-32"]),
        ("ViT-B-61", MODELS, ["ViT-B-16"]),
        ("probe", ["linear_probe", "knn"], ["linear_probe"]),
        ("Balanced", ["accuracy", "balanced_accuracy"], ["balanced_accuracy"]),
        ("Polar bear", ["polar_bear", "bear"], ["polar_bear"]),
        ("magic", MODELS, []),
        ("", MODELS, []),
        ("?", ["!", "a"], []),
    ],
)
def test_the_nearest_name(value, known, near):
    assert near_names(value, known) == near


def test_several_near_names():
    assert did_you_mean("vitb", MODELS, most=2) == "; did you mean ViT-B-16 or ViT-B-32?"


def test_a_refusal_lists_the_names_and_says_which_was_meant():
    error = one_of("sampler", "tpee", ["tpe", "random"])
    assert isinstance(error, InputError)
    assert str(error) == "sampler must be one of tpe, random, got 'tpee'; did you mean tpe?"
    assert str(one_of("sampler", 3, ["tpe", "random"])) == "sampler must be one of tpe, random, got 3"
    assert str(one_of("sampler", "x", ["tpe"], "leave it out")).endswith("got 'x'; leave it out")


def test_a_list_of_thousands_ends_in_a_count():
    names = [f"class {number}" for number in range(1000)]
    assert listed(names).endswith("class 49 and 950 more")
    assert str(one_of("label", "class 9999", names)).endswith("did you mean class 999?")
