"""Flat TOML files of settings: what `fit --config` takes, what a sweep writes, and what spaces are written in."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import opened_regular_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 20
"""Size of the largest file that is read."""

_MOST_PARTS = 32
_LONG_CHAIN = re.compile(rf"""(?<![\w"'-])(?:[\w"'-]+[ \t]*\.[ \t]*){{{_MOST_PARTS},}}""")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        InputError: no such file, not TOML, or nested too deep; says where in the file.
    """
    return parse_toml(toml_bytes(path), str(path))


def toml_bytes(path: Path) -> bytes:
    """The bytes of a file for :func:`parse_toml`, which refuses those of a larger one than is read.

    Raises:
        InputError: no such file.
    """
    try:
        with opened_regular_file(path) as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; name a TOML file of settings") from error


def parse_toml(data: bytes, name: str) -> dict[str, Any]:
    """The content of TOML in memory.

    Args:
        data: UTF-8.
        name: of the file, for the sentence of a refusal.

    Raises:
        InputError: not TOML, or nested too deep; says where in the file.
    """
    try:
        text = data.decode()
        # each name of a long chain takes as long as all names before it
        if len(data) > MAX_BYTES or _LONG_CHAIN.search(text):
            raise ValueError(f"it has more than {MAX_BYTES} bytes, or a dotted name of more than {_MOST_PARTS} parts")
        return tomllib.loads(text)
    except ValueError as error:  # broken syntax, text that is not UTF-8, or a number of thousands of digits
        raise InputError(f"{name} is not TOML: {error}") from error
    except RecursionError as error:
        raise InputError(
            f"{name} is not TOML of ours: it is nested too deep; write a value or a list a line"
        ) from error


def toml_text(values: Mapping[str, bool | int | float | str], heading: str) -> str:
    """A flat TOML document, one `name = value` a line.

    Args:
        values: settings by name.
        heading: lines of comment above them.
    """
    # TOML writes true, numbers and quoted texts of these types as JSON does
    lines = [f"{name} = {json.dumps(value, allow_nan=False)}" for name, value in values.items()]
    return "\n".join([*(f"# {line}" for line in heading.splitlines()), *lines]) + "\n"
