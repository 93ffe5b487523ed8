"""The command line of benchmarks: options that several commands have, how they are read, and the trials they make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, overload

import typer

from benchmarks.comparison.contenders import check_contenders, contender_names
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig

DATA_HELP = "demo, a data set of benchmarks.studies.methods, or a cache's folder"

DataOption = Annotated[str, typer.Option(help=f"{DATA_HELP}.")]
DataListOption = Annotated[list[str] | None, typer.Option(help=f"{DATA_HELP}; repeatable.", show_default="demo")]
MethodsOption = Annotated[str, typer.Option(help="Methods, separated by commas.")]
SeedsOption = Annotated[str, typer.Option(help="Seeds, such as 0-4, 3, or 0,2,5-7.")]
N1Option = Annotated[int, typer.Option(help="Labelled images of the largest class.", min=1)]
M1Option = Annotated[int, typer.Option(help="Unlabelled images of the largest class.", min=0)]
GammaOption = Annotated[float, typer.Option(help="Imbalance of labelled and unlabelled images.", min=1.0)]
StepsOption = Annotated[int, typer.Option(help="Mini-batch steps.", min=1)]
ThreadsOption = Annotated[int, typer.Option(help="Threads of torch; 0 takes its own choice.", min=0)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")]


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


def split_names(text: str) -> list[str]:
    """Texts separated by commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def parse_methods(text: str) -> tuple[str, ...]:
    """Read method names separated by commas; `all` is every contender.

    Raises:
        InputError: an unknown name, or none.
    """
    names = split_names(text)
    if names == ["all"]:
        return contender_names()
    if not names:
        raise InputError("name at least one method, such as linear_probe")
    check_contenders(names)
    return tuple(names)


def parse_names(text: str, known: Iterable[str], what: str) -> list[str]:
    """Read names separated by commas, each once.

    Args:
        text: such as "one,two".
        known: all legal names.
        what: what they are, in the plural, for the message.

    Raises:
        InputError: one that is not among `known`, or none.
    """
    known = list(known)
    names = split_names(text)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"{what} are {', '.join(known)}, got {unknown[0] if unknown else text!r}")
    return names


@overload
def parse_numbers(text: str, what: str, low: float, high: float = math.inf) -> list[float]: ...
@overload
def parse_numbers(text: str, what: str, low: float, high: float = math.inf, *, kind: type[int]) -> list[int]: ...
def parse_numbers(
    text: str, what: str, low: float, high: float = math.inf, *, kind: type[int] | type[float] = float
) -> list[Any]:
    """Read numbers separated by commas, each once.

    Args:
        text: such as "0.1,0.3".
        what: what they are, in the plural, for the message.
        low: smallest legal number.
        high: largest legal number.
        kind: float, or int for whole numbers.

    Raises:
        InputError: none, one of another kind, or one outside the range.
    """
    try:
        numbers = [kind(part) for part in split_names(text)]
    except ValueError:
        numbers = []
    if not numbers or not all(low <= number <= high for number in numbers):
        bounds = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        whole = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{what} are {whole} {bounds}, separated by commas, got {text!r}")
    return list(dict.fromkeys(numbers))


def split_options(n1: int, m1: int | None, gamma: float) -> dict[str, Any]:
    """Options of a split whose labelled and unlabelled images have the same imbalance."""
    return {"n1": n1, "m1": m1, "gamma_l": gamma, "gamma_u": gamma}


def trial_configs(methods: Sequence[str], seeds: Sequence[int], options: Mapping[str, Any]) -> list[FitConfig]:
    """A trial for each method and seed, seeds of one method side by side.

    Raises:
        InputError: an unknown option, or a value outside its range.
    """
    return [FitConfig.from_dict({**options, "method": method, "seed": seed}) for method in methods for seed in seeds]
