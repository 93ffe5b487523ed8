"""Methods by name: found without an import, registered once, and from other packages by entry points."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata

import pytest

from ulfine_fast import fit
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig, option, options_of
from ulfine_fast.core.heads import cosine_logits
from ulfine_fast.core.types import State
from ulfine_fast.estimator import FeatureClassifier
from ulfine_fast.methods import registry
from ulfine_fast.methods.base import Method
from ulfine_fast.methods.registry import register


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What a test registers is forgotten after it."""
    for name in registry.names():  # a module registers only when it is first imported
        registry.find(name)
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


@dataclass(frozen=True)
class SharpOptions:
    """The option of a toy method."""

    toy_sharpness: float = option(2.0, "factor on the logits", low=0.0)


def toy_method():
    """A new class, as a module of another package would define it."""

    class Sharp(Method):
        """The texts' logits, sharpened."""

        trains = False
        uses_unlabeled = False

        def start(self, trials):
            return State({}, {"prototypes": trials.prototypes.clone()})

        def logits(self, trials, tensors, features):
            return cosine_logits(features, tensors["prototypes"], trials.values["toy_sharpness"])

    return Sharp


def test_names_import_no_method_and_no_torch():
    code = """
import sys
from ulfine_fast.methods import registry
names = registry.names()
assert {"ulfine", "zero_shot", "proportions", "channel_ulfine"} <= set(names), names
assert names == sorted(names)
loaded = [name for name in sys.modules if name.startswith("ulfine_fast.methods.")]
assert loaded == ["ulfine_fast.methods.registry"], loaded
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", registry.names())
def test_every_method_is_found_and_says_what_it_is(name):
    result = registry.find(name)
    assert result.name == name
    assert result.summary.endswith((".", ":"))
    assert result.source
    assert isinstance(registry.method_of(FitConfig(method=name)), result.method)


def test_files_register_the_method_of_their_name():
    assert set(registry._files()) <= set(registry.names())
    for name in registry._files():
        assert registry.find(name).method.__module__ == f"ulfine_fast.methods.{name}"


def test_an_unknown_method_is_named_with_the_closest():
    with pytest.raises(InputError, match=r"got 'ulfinne'; did you mean ulfine\?"):
        registry.find("ulfinne")
    with pytest.raises(InputError, match="got 'xyzzy'; `ulfine-fast methods` lists them"):
        registry.find("xyzzy")


def test_needs_are_those_of_the_class():
    assert registry.find("zero_shot").needs == ["texts"]
    assert registry.find("linear_probe").needs == ["labels", "texts"]
    assert registry.find("fixmatch").needs == ["labels", "texts", "unlabelled images", "strong views"]
    assert registry.find("gmm").needs == ["labels", "texts", "unlabelled images"]
    assert registry.find("knn").needs == ["labels"]


def test_readers_know_old_names_too():
    assert registry.readers("mu") == ["channel_ulfine", "ulfine"]
    assert registry.readers("lean") == registry.readers("probe_weight") == ["ulfine_plus"]
    assert registry.readers("lr") == registry.readers("magic") == []


def test_a_name_may_be_registered_once():
    method = toy_method()
    register("toy_sharp", options=SharpOptions)(method)
    # a module that is loaded again registers the same class again
    register("toy_sharp", options=SharpOptions)(method)

    class Other(Method):
        """Another method."""

    with pytest.raises(InputError, match=r"method toy_sharp is registered already, by tests\.methods\.test_registry"):
        register("toy_sharp")(Other)
    # imported or not, methods of this package have their names
    registry._REGISTERED.pop("ulfine", None)
    with pytest.raises(InputError, match=r"method ulfine is registered already, by ulfine_fast\.methods\.ulfine"):
        register("ulfine")(Other)


def test_names_are_identifiers_and_options_are_declared():
    with pytest.raises(InputError, match="must consist of letters, digits and underscores, got 'my method'"):
        register("my method")

    @dataclass(frozen=True)
    class Bare:
        weight: float = field(default=1.0)

    with pytest.raises(InputError, match=r"option weight of method bare must be made by ulfine_fast\.config\.option"):
        register("bare", options=Bare)


def test_an_option_must_not_have_the_name_of_a_shared_one():
    @dataclass(frozen=True)
    class Clashing:
        lr: float = option(1.0, "another learning rate")

    register("toy_clash", options=Clashing)(toy_method())
    with pytest.raises(InputError, match="option lr of method toy_clash is a shared option; give it another name"):
        FitConfig(method="toy_clash")


def test_a_method_may_have_other_defaults_of_shared_options():
    register("toy_slow", options=SharpOptions, defaults={"lr": 0.25})(toy_method())
    assert FitConfig(method="toy_slow").lr == options_of("toy_slow")["lr"].default == 0.25
    assert FitConfig(method="toy_slow", lr=0.5).lr == 0.5
    # of two methods with the same options, the other one keeps the usual default
    register("toy_usual", options=SharpOptions)(toy_method())
    assert FitConfig(method="toy_usual").lr == FitConfig().lr != 0.25
    # estimators of all methods leave it to the method
    assert FeatureClassifier(method="toy_slow").lr is None


def test_a_default_must_be_one_of_a_shared_option():
    register("toy_wrong", defaults={"speed": 1})(toy_method())
    with pytest.raises(InputError, match="method toy_wrong has a default of 'speed', which is no shared option"):
        FitConfig(method="toy_wrong")


def test_a_method_of_a_test_is_fitted_with_its_option(clusters, quick):
    register("toy_sharp", options=SharpOptions, source="this test")(toy_method())
    assert "toy_sharp" in registry.names()
    assert options_of("toy_sharp")["toy_sharpness"].default == 2.0
    config = quick(method="toy_sharp", toy_sharpness=3.0)
    run = fit(clusters, config)
    zero = fit(clusters, quick(method="zero_shot", scale=3.0))
    assert (run.logits(clusters.plain[:5]) == zero.logits(clusters.plain[:5])).all()
    with pytest.raises(InputError, match="method zero_shot does not read toy_sharpness, which toy_sharp reads"):
        quick(method="zero_shot", toy_sharpness=3.0)


def test_entry_points_name_methods_of_other_packages(monkeypatch, tmp_path):
    (tmp_path / "toy_entry.py").write_text(
        '''
from ulfine_fast.methods.registry import register
from ulfine_fast.methods.zero_shot import ZeroShot

@register("toy_entry")
class Entry(ZeroShot):
    """Zero-shot classification under another name."""
'''
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = metadata.EntryPoint("toy_entry", "toy_entry", registry.GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"toy_entry": entry})
    assert "toy_entry" in registry.names()
    assert "toy_entry" not in sys.modules
    assert registry.find("toy_entry").summary == "Zero-shot classification under another name."
    assert FitConfig(method="toy_entry").method == "toy_entry"


def test_an_entry_point_that_registers_nothing_is_an_unknown_method(monkeypatch):
    entry = metadata.EntryPoint("nothing", "json", registry.GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"nothing": entry})
    with pytest.raises(InputError, match="got 'nothing'"):
        registry.find("nothing")
