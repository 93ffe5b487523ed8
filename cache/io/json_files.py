"""JSON that this program wrote, read against a schema: a damaged or hostile file is refused in one sentence.

A schema is any type that msgspec knows: a dataclass, a `msgspec.Struct`, a `TypedDict`, `dict[str, Any]`, or
`Annotated[int, msgspec.Meta(ge=0, le=1000)]` for a range. Fields that a schema does not name are ignored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import read_regular_file
from ulfine_fast.cache.io.paths import RemotePath

MAX_BYTES = 64 << 20
"""Size of the largest file that is read, unless the caller says otherwise."""

MAX_DEPTH = 64
"""How deep objects and lists may be nested: no file of ours has more than a dozen levels."""

_MAX_DIGITS = 40  # beyond it a number is in no field of ours, and converting it may fail or take long
_STRING = re.compile(rb'"[^"]*"?')
_LONG_NUMBER = re.compile(rb"\d{%d}" % (_MAX_DIGITS + 1))
_OPENING, _CLOSING = b"[{", b"]}"
_NO_BRACKETS = bytes(set(range(256)) - set(_OPENING + _CLOSING))

Schema = TypeVar("Schema")


def read_json(
    path: Path | RemotePath,
    schema: type[Schema],
    *,
    fix: str,
    missing: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Schema:
    """Reads a JSON file.

    Args:
        path: of a regular file, here or in a store.
        schema: the type that the content must have.
        fix: what the user can do, the end of the sentence of a refusal.
        missing: the whole sentence where there is no such file; None for one like the others.
        max_bytes: a larger file is refused before it is read.

    Returns:
        The content as `schema` has it.

    Raises:
        InputError: no such file; a folder, a pipe or a device; too large; not JSON, or with text that is no Unicode;
            nested too deep; a number that is too large; or of another type, with the field's name.
    """
    try:
        data = path.read_bytes() if isinstance(path, RemotePath) else read_regular_file(path, max_bytes)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(missing or f"there is no file {path}; {fix}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {fix}") from error
    return parse_json(data, schema, name=str(path), fix=fix)


def parse_json(data: bytes, schema: type[Schema], *, name: str, fix: str) -> Schema:
    """Reads JSON in memory.

    Args:
        data: UTF-8.
        schema: the type that the content must have.
        name: of the file, for the sentence of a refusal.
        fix: what the user can do, its end.

    Raises:
        InputError: as for :func:`read_json`.
    """
    try:
        _refuse_depth_and_length(data)
        return msgspec.json.decode(data, type=schema)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} cannot be read ({_reason(error)}); {fix}") from error


def check_schema(content: object, schema: type[Schema], *, name: str, fix: str) -> Schema:
    """Checks content that is in memory already, such as a part of a file.

    Args:
        content: of dictionaries, lists, texts, numbers, bools and None.
        schema: the type that it must have.
        name: of the file, for the sentence of a refusal.
        fix: what the user can do, its end.

    Returns:
        The content as `schema` has it.

    Raises:
        InputError: it has another type; names the field.
    """
    try:
        return msgspec.convert(content, schema)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} cannot be read ({_reason(error)}); {fix}") from error


def _refuse_depth_and_length(data: bytes) -> None:
    """Refuses nesting and numbers that would only fail later, in code that walks or converts the content.

    Raises:
        ValueError: too deep, or a number too long.
    """
    # a few brackets cannot be deep, so that most files are not looked at any closer
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH and not _LONG_NUMBER.search(data):
        return
    bare = _STRING.sub(b"", data.replace(rb"\\", b"").replace(rb"\"", b""))
    if _LONG_NUMBER.search(bare):
        raise ValueError(f"a number has more than {_MAX_DIGITS} digits")
    brackets = np.frombuffer(bare.translate(None, _NO_BRACKETS), dtype=np.uint8)
    steps = np.where(np.isin(brackets, np.frombuffer(_OPENING, dtype=np.uint8)), 1, -1)
    if steps.cumsum().max(initial=0) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _reason(error: Exception) -> str:
    """What is wrong in a few words; the decoder's own sentence but for its marks."""
    return " ".join(str(error).replace("`", "").split()).replace(" - at $", " at ").replace("at .", "at ")
