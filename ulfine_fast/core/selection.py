"""Selecting trials from any value with a leading trials axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

_Value = TypeVar("_Value")

SHARED = {"shared": True}
"""Metadata of a dataclass field that all trials share: :func:`select_trials` leaves it as it is."""


def select_trials(value: _Value, index: Tensor | slice) -> _Value:
    """The trials at some positions alone.

    Args:
        value: a tensor (T, ...), None, or a mapping, named tuple or dataclass of such values, nested at will.
        index: positions int64 (t,), or a slice, which shares memory with `value`.

    Raises:
        TypeError: a value that has no trials axis and is not marked as :data:`SHARED`.
    """
    result: Any
    if value is None:
        result = None
    elif isinstance(value, Tensor):
        result = value[index]
    elif isinstance(value, Mapping):
        result = {name: select_trials(item, index) for name, item in value.items()}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        result = type(value)(*(select_trials(item, index) for item in value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [spec.name for spec in dataclasses.fields(value) if not spec.metadata.get("shared")]
        result = dataclasses.replace(value, **{name: select_trials(getattr(value, name), index) for name in names})
    else:
        raise TypeError(f"{type(value).__name__} has no trials axis")
    return result
