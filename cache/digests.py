"""Digests that tie the files of a cache together, over content in JSON's types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ulfine_fast.cache.io.errors import InputError

KEY = "digest"


def content_digest(values: Mapping[str, Any]) -> str:
    """Hex SHA-256 of the values but `digest`, as JSON in ASCII on one line, with sorted keys and no blanks."""
    kept = {name: value for name, value in values.items() if name != KEY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def refuse_other_digest(values: Mapping[str, Any], name: str, fix: str) -> None:
    """Refuses content that is not what its own digest says.

    Args:
        values: with the key `digest`.
        name: of the content, the beginning of the sentence.
        fix: what the user can do, its end.

    Raises:
        InputError: it was changed since it was written.
    """
    if values.get(KEY) != content_digest(values):
        raise InputError(f"{name} was changed since it was written: it does not match its own digest; {fix}")


def is_storable(text: str) -> bool:
    """Whether HDF5 can hold the text: it cannot hold half characters and zero bytes."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False
