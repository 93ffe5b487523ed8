"""Options of a benchmark's command line that hold several values."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks.comparison.contenders import ORACLE, Settings, check_names
from benchmarks.comparison.scikit_learn import OUTSIDE
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import METHODS

_DECIDED = ("method", "seed", "split_seed", "n1", "m1", "gamma_l", "gamma_u", "shape", "labeled_fraction")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `0-4`, `3` or `0,2,5-7`.

    Raises:
        InputError: anything else, or a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise InputError(f"seeds are numbers and ranges such as 0-4 or 1,3,5, got {text!r}")
        seeds += range(int(first), int(last or first) + 1)
    if len(set(seeds)) != len(seeds):
        raise InputError(f"each seed counts once, got {text!r}")
    return tuple(seeds)


def parse_methods(text: str) -> tuple[str, ...]:
    """Read method names separated by commas; `all` is everyone.

    Raises:
        InputError: an unknown name, or none.
    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    if wanted == ["all"]:
        wanted = [*METHODS, ORACLE, *OUTSIDE]
    if not wanted:
        raise InputError("name at least one method, such as linear_probe")
    check_names(wanted)
    return tuple(dict.fromkeys(wanted))


def parse_names(text: str, known: Sequence[str], what: str) -> list[str]:
    """Read names separated by commas.

    Raises:
        InputError: one that is not among `known`, or none; `what` says what they are, in the plural.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or any(name not in known for name in names):
        raise InputError(f"{what} are {', '.join(known)}, got {text!r}")
    return names


def parse_settings(given: Sequence[str]) -> Settings:
    """Read NAME=VALUE pairs, each value as JSON or else as text.

    Raises:
        InputError: no pair, or a setting that cells, methods and seeds decide.
    """
    settings: Settings = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"a setting is NAME=VALUE such as steps=300, got {pair!r}")
        if name in _DECIDED:
            raise InputError(f"{name} is decided by --cells, --methods, --seeds or --gamma-u, not by --set")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings
