"""Methods by name, imported when they are asked for.

A method of this package is a file of `ulfine_fast/methods/` with the method's name. One from another package is named
by an entry point of the group `ulfine_fast.methods`, or is imported and calls :func:`register`. This module imports no
method before it is asked for, so that configs can look up a method's options.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of

if TYPE_CHECKING:
    from ulfine_fast.config import FitConfig
    from ulfine_fast.methods.base import Method

GROUP = "ulfine_fast.methods"
"""Entry points of this group name modules that register methods; the entry point has the method's name."""

_NOT_METHODS = ("__init__", "base", "registry")
_MethodClass = TypeVar("_MethodClass", bound="type[Method]")


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that reads the shared ones alone."""


@dataclass(frozen=True)
class Registration:
    """What is known of a method.

    Attributes:
        name: the value of `FitConfig.method`.
        method: its class.
        options: dataclass of the options that it reads beside the shared ones, see :func:`ulfine_fast.config.option`.
        source: the paper that it comes from.
        replaces: the method that it was an option of in version 0.1, if any.
        searches: shared options that a sweep of it tries beside the usual ones.
        defaults: of shared options, where they are not the usual ones.
    """

    name: str
    method: type[Method]
    options: type[Any]
    source: str
    replaces: str | None = None
    searches: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first sentence of the class's docstring."""
        return (self.method.__doc__ or "").strip().splitlines()[0]

    @property
    def needs(self) -> list[str]:
        """What it needs to learn, of "labels", "texts", "unlabelled images" and "strong views"."""
        method = self.method
        needs = {
            "labels": method.uses_labels,
            "texts": method.uses_texts,
            "unlabelled images": method.uses_unlabeled or method.uses_unlabeled_pool,
            "strong views": method.uses_unlabeled,
        }
        return [name for name, needed in needs.items() if needed]


_REGISTERED: dict[str, Registration] = {}


def register(
    name: str,
    *,
    options: type[Any] = NoOptions,
    source: str = "",
    replaces: str | None = None,
    searches: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[_MethodClass], _MethodClass]:
    """A class decorator that makes a method known to fit, sweep, report, the estimators and the command line.

    Args:
        name: the value of `FitConfig.method`; letters, digits and underscores.
        options: frozen dataclass of its own options, each made by :func:`ulfine_fast.config.option`.
        source: the paper that it comes from, such as "arXiv 2505.05062".
        replaces: the method whose option it was in version 0.1, if any.
        searches: shared options that a sweep of it tries beside the usual ones.
        defaults: of shared options, where they are not the usual ones, such as {"lr": 0.03}.

    Raises:
        InputError: the name is taken by another class, or is no identifier; an option without help.
    """
    if not name.isidentifier():
        raise InputError(f"a method's name must consist of letters, digits and underscores, got {name!r}")
    for option in dataclasses.fields(options):
        if "help" not in option.metadata:
            raise InputError(f"option {option.name} of method {name} must be made by ulfine_fast.config.option")

    def add(method: _MethodClass) -> _MethodClass:
        # a method of this package has its name before it is imported; a module that is loaded again registers again
        known = _REGISTERED.get(name)
        owner = known.method.__module__ if known is not None else None
        if name in _files():
            owner = f"{__package__}.{name}"
        same_class = known is None or known.method.__qualname__ == method.__qualname__
        if owner is not None and (owner != method.__module__ or not same_class):
            raise InputError(f"method {name} is registered already, by {owner}; choose another name")
        _REGISTERED[name] = Registration(name, method, options, source, replaces, searches, defaults or {})
        return method

    return add


def find(name: str) -> Registration:
    """The method of this name.

    Raises:
        InputError: there is none; names the closest one.
    """
    if name not in _REGISTERED:
        if name in _files():
            importlib.import_module(f"ulfine_fast.methods.{name}")
        elif name in _entry_points():
            _entry_points()[name].load()
    if name not in _REGISTERED:
        raise one_of("method", name, names(), "`ulfine-fast methods` lists them")
    return _REGISTERED[name]


def names() -> list[str]:
    """Names of all methods, sorted; imports none of them."""
    return sorted({*_files(), *_entry_points(), *_REGISTERED})


def readers(option: str) -> list[str]:
    """Names of the methods with an option of their own of this name, old names included; imports all methods."""
    matches = []
    for name in names():
        specs = dataclasses.fields(find(name).options)
        if any(option == spec.name or option in spec.metadata["was"] for spec in specs):
            matches.append(name)
    return matches


@functools.cache
def _files() -> frozenset[str]:
    """Methods of this package."""
    paths = Path(__file__).parent.glob("*.py")
    return frozenset(path.stem for path in paths if path.stem not in _NOT_METHODS)


@functools.cache
def _entry_points() -> dict[str, metadata.EntryPoint]:
    """Methods of other packages and of related systems, by name."""
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP)}


def method_of(config: FitConfig) -> Method:
    """The method that a config names, in the way of fitting that its options choose."""
    return find(config.method).method.of(config)
