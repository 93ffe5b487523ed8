from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path

import pytest

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import (
    FitConfig,
    all_options,
    config_class,
    options_of,
    own_options,
    per_trial_options,
    read_options,
    readable,
    shared_options,
    split_key,
    structural_key,
)
from ulfine_fast.methods import registry

# a run of each method that version 0.1 wrote, with the options of all methods
VERSION_0_1 = sorted(Path(__file__).parent.glob("fixtures/v0_1/runs/*/config.json"))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"method": "ulfine", "threshold": 1.5}, "threshold must be at most 1, got 1.5"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": "fast"}, "lr must be a finite number, got 'fast'"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"method": "ulfine", "paf": 1}, "paf must be true or false, got 1"),
        ({"seed": None}, "seed must be given, got None"),
        ({"n1": 0}, "n1 must be at least 1, got 0"),
        ({"gamma_l": 0.5}, "gamma_l must be at least 1, got 0.5"),
        ({"method": "magic"}, "method must be one of abc, acr, balanced_softmax, "),
        ({"shape": ["consistent"]}, "shape must be one of"),
    ],
)
def test_bad_values_are_named_with_the_range(values, sentence):
    with pytest.raises(InputError) as error:
        FitConfig(**values)
    assert str(error.value).startswith(sentence)


def test_the_edges_of_ranges_are_legal():
    FitConfig(method="ulfine", threshold=0.0, eta=1.0, steps=1, n1=1, m1=0, gamma_l=1.0, val_fraction=0.0)


def test_every_option_says_what_it_is():
    for name, spec in all_options().items():
        assert spec.metadata["help"], name
    assert {"seed", "lr", "mu", "probe_weight", "bag_size"} <= set(all_options())


def test_an_unknown_option_is_named_with_the_closest():
    with pytest.raises(InputError, match="unknown option 'learning_rate'"):
        FitConfig.from_dict({"learning_rate": 0.1})
    with pytest.raises(InputError, match=r"unknown option 'threshhold'; did you mean threshold\?"):
        FitConfig(method="ulfine", threshhold=0.1)


def test_structure_is_shared_by_trials_that_differ_in_numbers_only():
    config = FitConfig(method="ulfine")
    assert structural_key(dataclasses.replace(config, lr=0.1, seed=3, mu=0.5)) == structural_key(config)
    assert structural_key(dataclasses.replace(config, rank=8)) == structural_key(config)
    assert structural_key(dataclasses.replace(config, batch_labeled=8)) != structural_key(config)
    assert structural_key(dataclasses.replace(config, align="none")) != structural_key(config)
    names = per_trial_options(config)
    assert {"lr", "rank", "mu", "paf"} <= set(names)
    assert not {"batch_labeled", "align", "method", "shape"} & set(names)


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
    other = FitConfig(method="gmm", lr=0.5, steps=7, seed=3, split_seed=0, anchor=1.0)
    assert split_key(other) == split_key(FitConfig())
    hash(split_key(other))


# -- options of one method


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"method": "linear_probe", "mu": 0.1},
            "method linear_probe does not read mu, which channel_ulfine and ulfine",
        ),
        (
            {"method": "ulfine", "bag_size": 4},
            "method ulfine does not read bag_size, which proportions reads",
        ),
        (
            {"method": "zero_shot", "tau": 1.0},
            "method zero_shot does not read tau, which acr, ccl, channel_",
        ),
        ({"method": "ulfine", "anchor": 1.0, "neighbors": 3}, "method ulfine does not read anchor, which gmm reads"),
    ],
)
def test_an_option_of_other_methods_is_refused_and_they_are_named(values, sentence):
    for build in (lambda: FitConfig(**values), lambda: FitConfig.from_dict(values)):
        with pytest.raises(InputError) as error:
            build()
        assert str(error.value).startswith(sentence)


def test_the_default_method_is_ulfine_plus():
    assert FitConfig() == FitConfig(method="ulfine_plus") == FitConfig.from_dict({})
    assert FitConfig(probe_weight=0.7).probe_weight == 0.7
    with pytest.warns(FutureWarning) as caught:
        assert FitConfig(lean=0.7) == FitConfig(probe_weight=0.7)
    assert [str(one.message).partition(";")[0] for one in caught] == ["the option lean is now called probe_weight"]


@pytest.mark.parametrize(("name", "method"), [("mu", "ulfine"), ("paf", "ulfine"), ("anchor", "gmm")])
def test_an_option_of_other_methods_without_a_method_says_which_to_name(name, method):
    for build in (lambda: FitConfig(**{name: 1.0}), lambda: FitConfig.from_dict({name: 1.0})):
        with pytest.raises(
            InputError, match=rf"method ulfine_plus does not read {name}, .*, such as --method {method}$"
        ):
            build()


def test_saved_options_without_a_method_are_of_ulfine(tmp_path):
    assert FitConfig.from_dict({"lr": 0.1}, saved=True) == FitConfig(method="ulfine", lr=0.1)
    assert FitConfig.from_dict({"ensemble_heads": 3}, saved=True).method == "channel_ulfine"

    # best.toml of a sweep of version 0.1, whose space named no method; other files are no sweep's
    text = "lr = 0.1\nmu = 0.02\n"
    path = tmp_path / "best.toml"
    path.write_text(f"# trial 3 of a sweep by ulfine-fast 0.1.0; on validation: few 0.5\n{text}")
    assert FitConfig(**read_options(path)) == FitConfig(method="ulfine", lr=0.1, mu=0.02)
    path.write_text(f'# trial 3 of a sweep by ulfine-fast 0.1.0; on validation: few 0.5\nmethod = "gmm"\n{text}')
    assert read_options(path)["method"] == "gmm"
    path.write_text(text)
    assert read_options(path) == {"lr": 0.1, "mu": 0.02}


def test_of_many_methods_a_message_names_a_few():
    with pytest.raises(InputError, match=r"channel_ulfine, clip_adapter and \d+ others read; leave it out$"):
        FitConfig(method="zero_shot", tau=1.0)


def test_only_its_own_and_the_shared_options_are_there():
    config = FitConfig(method="linear_probe")
    own = {"tau", "solver", "head", "ridge", "class_weighted", "train_views"}
    assert set(config.to_dict()) == {*shared_options(), *own}
    assert not hasattr(config, "mu")
    assert set(own_options("ulfine")) > {"mu", "eta", "tau", "threshold", "rho"}
    assert options_of("ulfine")["mu"].metadata["help"]


@pytest.mark.parametrize("method", registry.names())
def test_every_method_has_a_config_that_goes_round(method):
    config = FitConfig(method=method, seed=3, lr=0.01)
    assert type(config) is config_class(method)
    assert isinstance(config, FitConfig)
    for other in (
        FitConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
        dataclasses.replace(config),
    ):
        assert other == config
        assert hash(other) == hash(config)
        assert type(other) is type(config)
    assert dataclasses.replace(config, seed=4) != config
    assert dataclasses.replace(config, seed=4).seed == 4


def test_a_replaced_value_is_checked():
    with pytest.raises(InputError, match="mu must be at most 1, got 2"):
        dataclasses.replace(FitConfig(method="ulfine"), mu=2)
    with pytest.raises(InputError, match="method ulfine does not read bag_size"):
        dataclasses.replace(FitConfig(method="ulfine"), bag_size=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        FitConfig().lr = 0.1


def test_with_method_keeps_what_the_other_method_reads():
    config = FitConfig(method="ulfine", lr=0.2, tau=0.5, mu=0.3, seed=7)
    probe = config.with_method("linear_probe")
    assert (probe.method, probe.lr, probe.tau, probe.seed) == ("linear_probe", 0.2, 0.5, 7)
    assert config.with_method("gmm", anchor=2.0, lr=0.1) == FitConfig(method="gmm", anchor=2.0, lr=0.1, seed=7)
    with pytest.raises(InputError, match="method linear_probe does not read mu"):
        config.with_method("linear_probe", mu=0.3)
    assert readable("linear_probe", {"mu": 1, "tau": 2, "lr": 3}) == {"tau": 2, "lr": 3}


# -- names of version 0.1


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("ulfine_plus", "lean", "probe_weight"),
        ("ulfine_plus", "shrink", "shrinkage"),
        ("ulfine_plus", "blunt", "sharpness_start"),
        ("ulfine_plus", "sharp", "sharpness_end"),
        ("ulfine_plus", "pull", "prior_pseudo_count"),
        ("ulfine_plus", "trust", "evidence_temperature"),
        ("ldam", "defer", "reweight_after"),
        ("channel_ulfine", "ensemble_share", "ensemble_fraction"),
    ],
)
def test_old_names_are_accepted_with_a_warning(method, old, new):
    with pytest.warns(FutureWarning, match=f"the option {old} is now called {new}; the old name will be refused"):
        config = FitConfig(method=method, **{old: 0.25})
    assert config == FitConfig(method=method, **{new: 0.25})
    with pytest.raises(InputError, match=f"method linear_probe does not read {old}, which "):
        FitConfig(method="linear_probe", **{old: 0.25})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"method": "fixmatch", "ensemble_heads": 4, "ensemble_share": 0.8, "low_bias": 0.1},
            {"method": "channel_fixmatch", "ensemble_heads": 4, "ensemble_fraction": 0.8, "low_bias": 0.1},
        ),
        (
            {"method": "freematch", "ensemble_heads": 2, "fairness": 0.2},
            {"method": "channel_freematch", "ensemble_heads": 2, "fairness": 0.2},
        ),
        (
            {"method": "ulfine", "ensemble_heads": 2, "mu": 0.2},
            {"method": "channel_ulfine", "ensemble_heads": 2, "mu": 0.2},
        ),
        (
            {"method": "fixmatch", "pseudo_loss": "equal", "reference_scale": 0.5, "ensemble_heads": 0},
            {"method": "preference_fixmatch", "pseudo_loss": "equal", "reference_scale": 0.5},
        ),
    ],
)
def test_options_that_have_become_methods_choose_them_with_a_warning(old, new):
    with pytest.warns(FutureWarning, match=f"with .* is now the method {new['method']}"):
        config = FitConfig(**old)
    assert config == FitConfig(**new)


def test_options_that_have_become_methods_may_be_off():
    for values in ({"ensemble_heads": 0}, {"pseudo_loss": "cross-entropy"}):
        with pytest.warns(FutureWarning, match="method fixmatch does not read .* any more; leave it out"):
            assert FitConfig(method="fixmatch", **values) == FitConfig(method="fixmatch")


def test_what_the_new_method_does_not_read_is_still_refused():
    with pytest.raises(InputError, match="method channel_fixmatch does not read tau"):
        FitConfig(method="fixmatch", ensemble_heads=3, tau=0.5)
    # both at once version 0.1 refused too
    with pytest.raises(InputError, match="method channel_fixmatch does not read pseudo_loss, which preference_fix"):
        FitConfig(method="fixmatch", ensemble_heads=3, pseudo_loss="equal")


@pytest.mark.parametrize("path", VERSION_0_1, ids=lambda path: path.parent.name)
def test_runs_of_version_0_1_are_read_without_a_warning(path):
    values = json.loads(path.read_text(encoding="utf-8"))["config"]
    if "method" not in values or values["method"] not in registry.names():
        pytest.skip("no method of this registry")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = FitConfig.from_dict(values, saved=True)
    assert config.steps == values["steps"]
    assert config.seed == values["seed"]
    renamed = {old: spec.name for spec in own_options(config.method).values() for old in spec.metadata["was"]}
    for name, value in values.items():
        name = renamed.get(name, name)
        if name != "method" and name in config.to_dict():
            assert getattr(config, name) == value, name


@pytest.mark.parametrize("method", registry.names())
def test_a_full_dict_of_version_0_1_is_read_for_each_method(method):
    """Version 0.1 recorded the options of all methods, whichever was fitted."""
    values = json.loads(VERSION_0_1[0].read_text(encoding="utf-8"))["config"]
    values |= {"ensemble_heads": 0, "pseudo_loss": "cross-entropy", "lean": 0.7, "defer": 0.6, "threshold": 0.6}
    original = registry.find(method).replaces or method
    if original != method:
        switch = "pseudo_loss" if method.startswith("preference") else "ensemble_heads"
        values[switch] = {"pseudo_loss": "weighted", "ensemble_heads": 5}[switch]
    config = FitConfig.from_dict({**values, "method": original}, saved=True)
    assert config.method == method
    changed = {"probe_weight": 0.7, "reweight_after": 0.6, "threshold": 0.6, "ensemble_fraction": 0.6}
    for name, value in readable(method, changed).items():
        assert getattr(config, name) == value
    assert FitConfig.from_dict(config.to_dict(), saved=True) == config


def test_a_saved_name_that_never_was_an_option_is_refused():
    with pytest.raises(InputError, match="unknown option 'magic'"):
        FitConfig.from_dict({"method": "ulfine", "magic": 3}, saved=True)
