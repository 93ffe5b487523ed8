"""What a sweep may try: a typed space of options, read from a small TOML file or made from the options themselves."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.cache.io.toml import read_toml
from ulfine_fast.config import FitConfig, all_options, check, options_of, readable
from ulfine_fast.methods import registry

Value = bool | int | float | str

MOST_STRUCTURES = 64
"""Values that a structural option may take: each makes trial batches of its own, hundreds would undo the batching."""

MOST_STEPS = 10**9
"""Steps of a range; where they are finer, a number cannot be distinguished from its neighbours."""

_GRID_POINTS = 5


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high, both included.

    Attributes:
        low: smallest.
        high: largest.
        log: spread evenly over the logarithm.
        step: distance between neighbours, None for all numbers between.
        points: values on a grid, where the search is one and there is no step.
        whole: only whole numbers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    points: int = _GRID_POINTS
    whole: bool = False

    @property
    def count(self) -> float:
        """How many values there are; infinite between floating numbers without a step."""
        if self.step is None:
            return self.high - self.low + 1 if self.whole else math.inf
        return math.floor((self.high - self.low) / self.step + 1e-9) + 1

    @property
    def grid_points(self) -> float:
        """The most values that :meth:`grid` returns."""
        return self.points if self.step is None else self.count

    def holds(self, value: Value) -> bool:
        """Whether the range has this value."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        if not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-8

    def grid(self) -> list[float]:
        """The values a grid search tries: by step where there is one, else `points` of them, evenly spread."""
        if self.step is not None:
            return [self._typed(self.low + i * self.step) for i in range(int(self.count))]
        last = max(self.points - 1, 1)
        fractions = [i / last for i in range(self.points)]
        # rounding twice the same whole number must not make two points of it
        return list(dict.fromkeys(self._typed(self._between(fraction)) for fraction in fractions))

    def _between(self, fraction: float) -> float:
        if self.log:
            return min(self.high, max(self.low, self.low * (self.high / self.low) ** fraction))
        return self.low + fraction * (self.high - self.low)

    def _typed(self, value: float) -> float:
        return round(value) if self.whole else value


@dataclass(frozen=True)
class Space:
    """Options that are fixed and options that are searched.

    Attributes:
        fixed: one value for all trials, by option.
        searched: a :class:`Range` or a tuple of choices, by option.
        warnings: sentences on entries that have old names.
    """

    fixed: dict[str, Value]
    searched: dict[str, Range | tuple[Value, ...]]
    warnings: list[str] = field(default_factory=list, compare=False)

    def allows(self, name: str, value: Value) -> bool:
        """Whether a searched option may have this value."""
        entry = self.searched[name]
        if isinstance(entry, Range):
            return entry.holds(value)
        return any(type(value) is type(choice) and value == choice for choice in entry)

    def settings(self, params: Mapping[str, Value]) -> dict[str, Value]:
        """The options of a trial with these searched values that its method reads, but for the seed."""
        values = {**self.fixed, **params}
        return readable(str(values.get("method", FitConfig.method)), values)

    def config(self, params: Mapping[str, Value], seed: int) -> FitConfig:
        """The config of a trial with these searched values."""
        return FitConfig.from_dict({**self.settings(params), "seed": seed})

    def to_dict(self) -> dict[str, Any]:
        """The space in JSON's types, by field; two spaces are the same where these are."""
        searched = {
            name: dataclasses.asdict(entry) if isinstance(entry, Range) else list(entry)
            for name, entry in self.searched.items()
        }
        return {**self.fixed, **searched}

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that trials may have."""
        entry = self.searched.get("method")
        return (
            tuple(map(str, entry)) if isinstance(entry, tuple) else (str(self.fixed.get("method", FitConfig.method)),)
        )


def read_space(path: Path, settings: Mapping[str, Value] | None = None) -> Space:
    """Read a space file; see :func:`parse_space`.

    Raises:
        InputError: no such file, not TOML, or an entry that is refused.
    """
    try:
        return parse_space(read_toml(path), settings)
    except InputError as error:
        named = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise InputError(named) from error


def parse_space(entries: Mapping[str, Any], settings: Mapping[str, Value] | None = None) -> Space:
    """Make a space of entries, each a field of :class:`FitConfig`.

    Args:
        entries: by field: a value (fixed), a list (a choice), or a table with low, high and, if you like, log, step
            and points.
        settings: further fixed values, such as those of the command line.

    Raises:
        InputError: an unknown name, a wrong type, a range or value outside the field's legal range, a field given
            twice, a seed, or nothing to search.
    """
    searched: dict[str, Range | tuple[Value, ...]] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        fixed_values = _with_new_names(settings or {})
        entries = _with_new_names(entries)
    fixed = dict(fixed_values)
    for name, entry in entries.items():
        _refuse_name(name, fixed)
        if isinstance(entry, Mapping):
            searched[name] = _range(name, entry)
        elif isinstance(entry, list | tuple):
            searched[name] = _choices(name, entry)
        else:
            fixed[name] = _legal(name, entry)
    for name, value in fixed_values.items():
        _legal(name, value)
    space = Space(fixed, searched, list(dict.fromkeys(str(one.message) for one in caught)))
    _refuse_unread(space)
    _refuse_useless(space)
    return space


def default_space(method: str, settings: Mapping[str, Value] | None = None) -> Space:
    """The space made from the method's options: each that declares what a sweep tries, and shared ones that matter.

    Args:
        method: of all trials.
        settings: fixed values, which replace entries.

    Raises:
        InputError: an unknown method, or one with nothing to search.
    """
    registration = registry.find(method)
    kind = registry.method_of(FitConfig.from_dict({**readable(method, settings or {}), "method": method}))
    shared = {
        "lr": kind.trains,
        "weight_decay": kind.trains,
        "warmup": kind.trains and kind.uses_unlabeled,
        "feature_noise": kind.trains and not kind.uses_unlabeled,
        "adapter_scale": "adapter_scale" in registration.searches,
    }
    entries = {
        name: spec.metadata["search"]
        for name, spec in options_of(method).items()
        if spec.metadata["search"] is not None
        and shared.get(name, True)
        and name not in kind.not_read
        and name not in (settings or {})
    }
    if not entries:
        raise InputError(f"{method} has no option to search; use fit, or name another method")
    return parse_space(entries, {**(settings or {}), "method": method})


def new_names() -> dict[str, str]:
    """The names of options by the names that they had in earlier versions."""
    return {was: name for name, spec in all_options().items() for was in spec.metadata["was"]}


def _with_new_names(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of any method with new names for old ones."""
    old = new_names()
    for name in old.keys() & entries.keys():
        message = f"the option {name} is now called {old[name]}; the old name will be refused in the next release"
        warnings.warn(message, FutureWarning, stacklevel=2)
    return {old.get(name, name): entry for name, entry in entries.items()}


def _refuse_name(name: str, fixed: Mapping[str, Value]) -> None:
    """Refuse what is no setting, what `--seeds` decides, and what has been fixed elsewhere."""
    if name == "seed":
        raise InputError("seed cannot be in a space: --seed and --seeds say which seeds every trial is averaged over")
    if name not in all_options():
        hint = did_you_mean(name, all_options(), "`ulfine-fast fit --method NAME --help` lists the options")
        raise InputError(f"unknown option {name!r}{hint}")
    if name in fixed:
        raise InputError(f"{name} is in the space and given as {fixed[name]!r} beside it; keep one of them")


def _legal(name: str, value: Any) -> Value:
    """A value that the option allows."""
    spec = all_options().get(name)
    if spec is None or isinstance(value, Mapping | list) or value is None:
        raise InputError(f"{name} must be a value, a list of values, or a table with low and high, got {value!r}")
    if name == "method":
        registry.find(value)
    check(spec, value)
    typed: Value = float(value) if str(spec.type).startswith("float") else value
    return typed


def _choices(name: str, entry: Any) -> tuple[Value, ...]:
    """A choice among at least one legal value, none of them twice."""
    _refuse_lucky_splits(name)
    if not entry:
        raise InputError(f"{name} has an empty list; give it values to choose from")
    values = tuple(_legal(name, value) for value in entry)
    if len(set(values)) < len(values):
        twice = next(value for value, count in Counter(values).items() if count > 1)
        raise InputError(f"{name} has {twice!r} twice in its list; name each value once")
    return values


def _range(name: str, entry: Mapping[str, Any]) -> Range:
    """A range whose ends the field allows."""
    _refuse_lucky_splits(name)
    spec = all_options()[name]
    kind = str(spec.type).split(" ")[0]
    if kind not in ("int", "float") or spec.metadata["choices"]:
        raise InputError(f"{name} has no order; give a list of values, such as {name} = {_example(spec)}")
    _refuse_keys(name, entry)
    ends: dict[str, Any] = {end: _legal(name, entry[end]) for end in ("low", "high")}
    made = Range(**{**entry, **ends}, whole=kind == "int")
    _refuse_empty_range(name, made)
    return made


def _refuse_lucky_splits(name: str) -> None:
    if name == "split_seed":
        raise InputError("split_seed can be fixed but not searched: the search would look for lucky splits")


def _example(spec: dataclasses.Field[Any]) -> str:
    return str(list(spec.metadata["choices"][:2])) if spec.metadata["choices"] else "[true, false]"


def _refuse_keys(name: str, entry: Mapping[str, Any]) -> None:
    """Refuse a table without both ends, or with words that mean nothing."""
    known = {"low": (int, float), "high": (int, float), "log": bool, "step": (int, float), "points": int}
    for key, value in entry.items():
        if key not in known:
            raise InputError(f"{name} has {key!r}; a range has low, high, log, step and points")
        if not isinstance(value, known[key]) or (isinstance(value, bool) and key != "log"):  # type: ignore[arg-type]
            raise InputError(f"{name}.{key} must be {'true or false' if key == 'log' else 'a number'}, got {value!r}")
    for end in ("low", "high"):
        if end not in entry:
            raise InputError(f"{name} has no {end}; a range is {{ low = ..., high = ... }}")


def _refuse_empty_range(name: str, made: Range) -> None:
    """Refuse a range without room, a logarithm of zero, and steps that do not fit."""
    if made.low >= made.high:
        raise InputError(f"{name} needs low below high, got low = {made.low} and high = {made.high}")
    if made.log and made.low <= 0:
        raise InputError(f"{name} has log = true and needs low above 0, got {made.low}")
    if made.step is not None:
        if made.log:
            raise InputError(f"{name} has both log and step; keep one of them")
        if not 0 < made.step <= made.high - made.low or (made.whole and made.step != int(made.step)):
            kind = "whole number" if made.whole else "number"
            raise InputError(f"{name} needs as step a {kind} above 0 and at most high - low, got {made.step}")
        if made.count > MOST_STEPS:
            raise InputError(f"{name} has {made.count:g} steps, more than {MOST_STEPS:g}; give a larger step, or none")
    if made.points < 2:
        raise InputError(f"{name} needs at least 2 points on a grid, got {made.points}")
    if made.points > MOST_STEPS:
        raise InputError(f"{name} needs at most {MOST_STEPS:g} points on a grid, got {made.points}")


def _refuse_useless(space: Space) -> None:
    """Refuse a space without anything to search, or with hundreds of structures."""
    if not space.searched:
        raise InputError("the space has nothing to search; give an entry a range or a list of values")
    for name, entry in space.searched.items():
        structural = all_options()[name].metadata["structural"]
        if structural and isinstance(entry, Range) and entry.count > MOST_STRUCTURES:
            raise InputError(
                f"{name} is structural (trials that differ in it cannot share a trial batch) and its range has "
                f"{entry.count:g} values; give a step or a list of at most {MOST_STRUCTURES}"
            )


def _refuse_unread(space: Space) -> None:
    """Refuse options that no method of the space reads."""
    for name in [*space.fixed, *space.searched]:
        if not any(name in options_of(method) for method in space.methods):
            # the config says which methods read it, and which method to name where the space names none
            named = {"method": space.methods[0]} if "method" in {**space.fixed, **space.searched} else {}
            FitConfig.from_dict({name: None, **named})
